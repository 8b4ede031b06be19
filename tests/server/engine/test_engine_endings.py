"""The engine over fakes: how requests end badly, or the engine itself does, and that nothing is held afterwards.

Every test also passes through the end of `make_bench`: blocks, slots and leases are back, one last output each.
"""

import random
import threading
from collections import deque
from collections.abc import Callable
from typing import Any

import pytest
from lorasrv.errors import (
    DeadlineExceededError,
    DrainingError,
    EngineDownError,
    EngineStepError,
    InvalidRequestError,
    NonFiniteOutputError,
    PromptTooLongError,
    QueueFullError,
    QueueTimeoutError,
    RequestCancelledError,
    RequestTooLargeError,
)

MakeBench = Callable[..., Any]


def on_step_number(bench: Any, number: int, act: Callable[[], None]) -> None:
    """Acts inside one step of the model, counted from the next."""
    last = bench.runner.num_steps + number

    def count() -> None:
        if bench.runner.num_steps == last:
            act()

    bench.runner.on_step = count


def test_cancelled_in_the_inbox(bench: Any) -> None:
    gate = bench.plug()
    bench.submit("r", adapter="a")
    bench.engine.cancel("r")
    gate.set()
    [last] = bench.outputs.wait("r")
    assert isinstance(last.error, RequestCancelledError)
    assert last.error.phase == "queued"
    assert bench.runner.num_steps == 1


def test_cancelled_while_it_waits_for_its_turn(make_bench: MakeBench) -> None:
    bench = make_bench(max_num_seqs=1)
    gate = bench.plug()
    bench.submit("runs", max_new_tokens=6)
    bench.submit("waits", adapter="a")
    on_step_number(bench, 3, lambda: bench.engine.cancel("waits"))
    gate.set()
    runs, waits = bench.outputs.wait("runs", "waits")
    assert waits.error.phase == "queued"
    assert runs.finish is not None


@pytest.mark.parametrize(("prompt_tokens", "step", "num_tokens"), [(200, 2, 0), (6, 3, 3)], ids=["prefill", "decode"])
def test_cancelled_while_it_runs(bench: Any, prompt_tokens: int, step: int, num_tokens: int) -> None:
    on_step_number(bench, step, lambda: bench.engine.cancel("r"))
    bench.submit("r", prompt="x" * prompt_tokens, adapter="a", max_new_tokens=50)
    [last] = bench.outputs.wait("r")
    assert last.error.phase == "running"
    assert len(bench.outputs.tokens("r")) == num_tokens
    bench.engine.drain()
    assert bench.runner.num_steps == step
    assert bench.recorder.finished[0].error_reason == "CANCELLED"


def test_cancelled_while_preempted(make_bench: MakeBench) -> None:
    bench = make_bench(num_blocks=2)

    def cancel_once_preempted() -> None:
        if bench.engine.stats().num_queued:
            bench.engine.cancel("newer")

    gate = bench.plug()
    bench.submit("older", prompt="x" * 20, max_new_tokens=40)
    bench.submit("newer", prompt="x" * 20, max_new_tokens=40, adapter="a")
    bench.runner.on_step = cancel_once_preempted
    gate.set()
    older, newer = bench.outputs.wait("older", "newer")
    assert older.finish is not None
    assert newer.error.phase == "running"


def test_cancelled_with_its_last_token_or_after_it_or_unknown(bench: Any) -> None:
    on_step_number(bench, 2, lambda: bench.engine.cancel("r"))
    bench.submit("r", max_new_tokens=2, adapter="a")
    [last] = bench.outputs.wait("r")
    assert last.finish is not None
    bench.engine.cancel("r")
    bench.engine.cancel("never was")
    bench.submit("next", max_new_tokens=1)
    assert bench.outputs.wait("next")[0].finish is not None


def test_deadline_passed_before_it_came_in(bench: Any) -> None:
    bench.submit("r", deadline_seconds=bench.clock.now, adapter="a")
    [last] = bench.outputs.wait("r")
    assert isinstance(last.error, DeadlineExceededError)
    assert last.error.phase == "queued"
    assert bench.runner.num_steps == 0


def test_deadline_while_it_waits_for_its_turn(make_bench: MakeBench) -> None:
    bench = make_bench(max_num_seqs=1)
    gate = bench.plug()
    bench.submit("r", deadline_seconds=bench.clock.now + 5, adapter="a")
    bench.clock.now += 5
    gate.set()
    assert bench.outputs.wait("r")[0].error.phase == "queued"


@pytest.mark.parametrize(("prompt_tokens", "num_tokens"), [(200, 0), (6, 2)], ids=["prefill", "decode"])
def test_deadline_while_it_runs(bench: Any, prompt_tokens: int, num_tokens: int) -> None:
    def step_takes_a_second() -> None:
        bench.clock.now += 1

    bench.runner.on_step = step_takes_a_second
    bench.submit("r", prompt="x" * prompt_tokens, deadline_seconds=bench.clock.now + 2, adapter="a", max_new_tokens=9)
    [last] = bench.outputs.wait("r")
    assert isinstance(last.error, DeadlineExceededError)
    assert last.error.phase == "running"
    assert len(bench.outputs.tokens("r")) == num_tokens


def test_waiting_has_its_own_limit_and_running_has_not(make_bench: MakeBench) -> None:
    bench = make_bench(max_num_seqs=1, max_queue_seconds=5.0)
    gate = bench.plug()
    bench.submit("r", adapter="a")
    bench.clock.now += 6
    gate.set()
    [last] = bench.outputs.wait("r")
    assert isinstance(last.error, QueueTimeoutError)
    assert last.error.waited_seconds == 6.0
    assert last.error.retry_after_seconds > 0

    def step_takes_longer() -> None:
        bench.clock.now += 6

    bench.runner.on_step = step_takes_longer
    bench.submit("runs for long", max_new_tokens=3)
    assert bench.outputs.wait("runs for long")[0].finish is not None


def test_a_failing_step_fails_its_requests_and_the_engine_goes_on(
    make_bench: MakeBench, caplog: pytest.LogCaptureFixture
) -> None:
    bench = make_bench(max_num_seqs=2)

    def fail() -> None:
        raise RuntimeError("secret path /home/x")

    gate = bench.plug()
    for name in ("a", "b", "waits"):
        bench.submit(name, adapter=name, max_new_tokens=4)
    on_step_number(bench, 2, fail)
    gate.set()
    a, b, waits = bench.outputs.wait("a", "b", "waits")
    assert isinstance(a.error, EngineStepError)
    assert a.error.error_id == b.error.error_id
    assert "secret" not in str(a.error)
    [record] = [record for record in caplog.records if record.getMessage() == "engine step failed"]
    assert record.error_id == a.error.error_id
    assert "secret" in str(record.exc_info[1])
    assert waits.finish is not None
    assert len(bench.outputs.tokens("a")) == 1


def test_a_runner_that_returns_the_wrong_number_of_tokens_is_a_failing_step(
    bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench.runner, "execute", lambda _: [])
    bench.submit("r", adapter="a")
    assert isinstance(bench.outputs.wait("r")[0].error, EngineStepError)


def test_non_finite_logits_end_their_request_alone(bench: Any) -> None:
    bench.script("bad", [65, 66, None])
    gate = bench.plug()
    bench.submit("bad", adapter="broken")
    bench.submit("good", adapter="fine")
    gate.set()
    bad, good = bench.outputs.wait("bad", "good")
    assert isinstance(bad.error, NonFiniteOutputError)
    assert (bad.error.adapter_id, bad.error.position) == ("broken", 2)
    assert bench.outputs.text("bad") == "AB"
    assert good.finish is not None


def test_an_adapter_that_cannot_be_placed_ends_its_request_alone(bench: Any) -> None:
    bench.slots.broken.add("bad")
    gate = bench.plug()
    bench.submit("bad", adapter="bad")
    bench.submit("good", adapter="good")
    gate.set()
    bad, good = bench.outputs.wait("bad", "good")
    assert isinstance(bad.error, EngineStepError)
    assert good.finish is not None


def test_a_full_queue_refuses_at_once_and_the_caller_keeps_the_lease(make_bench: MakeBench) -> None:
    bench = make_bench(max_num_seqs=1, max_queue=2)
    gate = bench.plug()
    bench.submit("a")
    bench.submit("b")
    refused = bench.request("c", adapter="x")
    with pytest.raises(QueueFullError) as full:
        bench.engine.submit(refused)
    assert full.value.capacity == 2
    assert 0.1 <= full.value.retry_after_seconds <= 30
    assert refused.lease.num_releases == 0
    assert bench.recorder.rejected == ["QUEUE_FULL"]
    gate.set()
    bench.outputs.wait("a", "b")
    bench.engine.submit(refused)
    bench.outputs.wait("c")


def test_a_request_that_can_never_fit_is_refused_at_once(make_bench: MakeBench) -> None:
    bench = make_bench(num_blocks=2)
    with pytest.raises(RequestTooLargeError):
        bench.submit("r", max_new_tokens=100)
    with pytest.raises(PromptTooLongError):
        bench.submit("r", max_new_tokens=10_000)
    assert bench.recorder.rejected == ["REQUEST_TOO_LARGE", "PROMPT_TOO_LONG"]


def test_an_id_that_is_live_is_refused(bench: Any) -> None:
    gate = bench.plug()
    with pytest.raises(InvalidRequestError, match="in use"):
        bench.submit("plug 1")
    gate.set()


def test_drain_finishes_what_was_accepted_and_refuses_the_rest(bench: Any) -> None:
    gate = bench.plug()
    bench.submit("r", adapter="a")
    assert not bench.engine.drain(timeout=0)
    with pytest.raises(DrainingError):
        bench.submit("late")
    assert bench.engine.stats().is_draining
    gate.set()
    assert bench.engine.drain(timeout=20)
    assert bench.outputs.by_request["r"][-1].finish is not None


def test_close_ends_what_is_left(make_bench: MakeBench) -> None:
    bench = make_bench(max_num_seqs=2)
    gate = bench.plug()
    bench.submit("runs", adapter="a", max_new_tokens=1000)
    bench.submit("waits", adapter="b", max_new_tokens=1000)
    closing = threading.Thread(target=bench.engine.close)
    on_step_number(bench, 5, closing.start)
    gate.set()
    runs, waits = bench.outputs.wait("runs", "waits")
    closing.join()
    assert isinstance(runs.error, EngineDownError)
    assert isinstance(waits.error, EngineDownError)
    assert not bench.engine.is_up
    with pytest.raises(EngineDownError):
        bench.submit("late")
    bench.engine.close()


def test_outputs_nobody_takes_do_not_stop_the_engine(bench: Any, caplog: pytest.LogCaptureFixture) -> None:
    bench.outputs.broken.add("lost")
    bench.submit("lost", max_new_tokens=1)
    bench.submit("r", max_new_tokens=1)
    assert bench.outputs.wait("lost", "r")[1].finish is not None
    assert bench.engine.drain(timeout=20)
    assert "could not be handed over" in caplog.text


def test_an_engine_that_dies_ends_its_requests_and_says_so(
    bench: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(_: object) -> None:
        raise RuntimeError("a bug")

    gate = bench.plug()
    bench.submit("r", adapter="a")
    monkeypatch.setattr(bench.recorder, "step_finished", fail)
    gate.set()
    [last] = bench.outputs.wait("r")
    assert isinstance(last.error, EngineDownError)
    assert bench.engine.drain(timeout=20)
    assert not bench.engine.is_up
    assert "the engine died" in caplog.text


@pytest.mark.parametrize("seed", range(4))
def test_thousands_of_random_operations_leave_nothing_behind(make_bench: MakeBench, seed: int) -> None:
    rng = random.Random(seed)
    bench = make_bench(num_blocks=10, num_slots=2, max_num_seqs=5, max_batched_tokens=24, max_queue=60)
    submitted: list[str] = []
    awaited: deque[str] = deque()

    def shake() -> None:
        bench.clock.now += 0.01
        if rng.random() < 0.02:
            raise RuntimeError("a step fails")
        if rng.random() < 0.3:
            bench.engine.cancel(rng.choice(tuple(submitted[-50:]) or ("none",)))

    bench.runner.on_step = shake
    for number in range(1000):
        request_id = f"r{number}"
        deadline = bench.clock.now + rng.random() if rng.random() < 0.3 else None
        adapter = rng.choice([None, "a", "b", "c", "d"])
        if rng.random() < 0.1:
            bench.script(request_id, [65, None])
        request = bench.request(
            request_id,
            prompt="x" * rng.randint(1, 90),
            adapter=adapter,
            deadline_seconds=deadline,
            max_new_tokens=rng.randint(2, 40),
            stop=rng.choice([(), ("A",), ("\x10",)]),
        )
        while True:
            try:
                bench.engine.submit(request)
                break
            except QueueFullError:
                bench.outputs.wait(awaited.popleft())
        submitted.append(request_id)
        awaited.append(request_id)
    assert bench.engine.drain(timeout=60)
    stats = bench.engine.stats()
    assert (stats.num_running, stats.num_queued, stats.num_kv_blocks_used) == (0, 0, 0)
    assert stats.num_preemptions > 0
    assert stats.max_adapters_in_one_step == 2
    reasons = {finished.error_reason for finished in bench.recorder.finished}
    assert reasons == {"", "CANCELLED", "DEADLINE_EXCEEDED", "NON_FINITE_OUTPUT", "INTERNAL"}

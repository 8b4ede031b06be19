"""The engine over fakes: how requests end well, and what they get on the way."""

from collections.abc import Callable
from typing import Any

import pytest
from lorasrv.engine.request import FinishReason

MakeBench = Callable[..., Any]
EOS = 256


def test_tokens_stream_one_output_a_step_on_the_engine_thread(bench: Any) -> None:
    bench.script("r", "hello")
    bench.submit("r", max_new_tokens=5)
    [last] = bench.outputs.wait("r")
    assert [output.text for output in bench.outputs.by_request["r"]] == ["h", "e", "l", "l", "o"]
    assert bench.outputs.threads == {"engine"}
    assert last.finish.reason is FinishReason.LENGTH
    assert (last.finish.num_prompt_tokens, last.finish.num_generated_tokens) == (6, 5)


def test_outputs_of_one_step_come_in_one_call(bench: Any) -> None:
    gate = bench.plug()
    for name in "abc":
        bench.submit(name, max_new_tokens=4)
    gate.set()
    bench.outputs.wait("plug 1", *"abc")
    assert bench.outputs.num_calls == 1 + 4


def test_a_stop_string_over_token_borders_never_shows(bench: Any) -> None:
    bench.script("r", "one <e two <end> three")
    bench.submit("r", max_new_tokens=22, stop=("<end>", "never"))
    [last] = bench.outputs.wait("r")
    assert bench.outputs.text("r") == "one <e two "
    assert last.finish.reason is FinishReason.STOP
    assert last.finish.stop_string == "<end>"
    assert last.finish.num_generated_tokens == len("one <e two <end>") == len(bench.outputs.tokens("r"))


def test_a_stop_string_with_the_last_token_is_a_stop(bench: Any) -> None:
    bench.script("r", "ab")
    bench.submit("r", max_new_tokens=2, stop=("b",))
    assert bench.outputs.wait("r")[0].finish.reason is FinishReason.STOP


def test_what_was_held_back_comes_with_the_end(bench: Any) -> None:
    bench.script("length", "ab<e")
    bench.script("eos", [*b"ab<e", EOS])
    bench.submit("length", max_new_tokens=4, stop=("<end>",))
    bench.submit("eos", stop=("<end>",))
    length, eos = bench.outputs.wait("length", "eos")
    assert bench.outputs.text("length") == bench.outputs.text("eos") == "ab<e"
    assert (length.finish.reason, eos.finish.reason) == (FinishReason.LENGTH, FinishReason.EOS)


def test_characters_split_over_tokens_come_whole(bench: Any) -> None:
    text = "é中😀!"
    bench.script("r", text)
    bench.submit("r", max_new_tokens=len(text.encode()))
    bench.outputs.wait("r")
    pieces = [output.text for output in bench.outputs.by_request["r"]]
    assert [piece for piece in pieces if piece] == list(text)
    assert bench.outputs.tokens("r") == list(text.encode())


def test_an_end_token_ends_unless_ignored(bench: Any) -> None:
    for name in ("ends", "ignores"):
        bench.script(name, [*b"ab", EOS, *b"cd"])
    bench.submit("ends")
    bench.submit("ignores", ignore_eos=True, max_new_tokens=5)
    ends, ignores = bench.outputs.wait("ends", "ignores")
    assert (ends.finish.reason, ends.finish.stop_token_id) == (FinishReason.EOS, EOS)
    assert (bench.outputs.text("ends"), bench.outputs.tokens("ends")) == ("ab", [*b"ab", EOS])
    assert (bench.outputs.text("ignores"), ignores.finish.reason) == ("abcd", FinishReason.LENGTH)


def test_a_stop_token_ends_and_is_not_part_of_the_text(bench: Any) -> None:
    bench.script("r", "abXcd")
    bench.submit("r", stop_token_ids=(ord("X"),), ignore_eos=True)
    [last] = bench.outputs.wait("r")
    assert bench.outputs.text("r") == "ab"
    assert (last.finish.reason, last.finish.stop_token_id) == (FinishReason.STOP, ord("X"))
    assert last.finish.num_generated_tokens == 3


def test_logprobs_come_with_their_tokens(bench: Any) -> None:
    bench.submit("r", max_new_tokens=3, logprobs=0)
    bench.outputs.wait("r")
    outputs = bench.outputs.by_request["r"]
    assert [output.logprobs[0].token_id for output in outputs] == [output.token_ids[0] for output in outputs]


def test_times_are_measured_from_the_arrival(bench: Any) -> None:
    gate = bench.plug()
    bench.submit("r", adapter="a", max_new_tokens=2)
    bench.clock.now += 2.0

    def step_takes_a_second() -> None:
        bench.clock.now += 1.0

    bench.runner.on_step = step_takes_a_second
    gate.set()
    [last] = bench.outputs.wait("r")
    assert (last.finish.queue_seconds, last.finish.ttft_seconds) == (2.0, 3.0)
    stats = bench.recorder.finished[-1]
    assert (stats.adapter_id, stats.finish_reason, stats.error_reason) == ("a", "length", "")
    assert (stats.queue_seconds, stats.prefill_seconds, stats.decode_seconds) == (2.0, 1.0, 1.0)
    assert stats.duration_seconds == 4.0
    assert bench.recorder.ttfts[-1] == (3.0, True)
    assert [step.inter_token_seconds for step in bench.recorder.steps[-2:]] == [(), (1.0,)]


def test_base_and_adapters_share_steps_and_the_peak_is_told(bench: Any) -> None:
    gate = bench.plug()
    for index, adapter in enumerate([None, "a", "b", "c", "a"]):
        bench.submit(f"r{index}", adapter=adapter)
    gate.set()
    bench.outputs.wait(*(f"r{index}" for index in range(5)))
    bench.engine.drain()
    stats = bench.engine.stats()
    assert stats.max_adapters_in_one_step == 3
    assert max(step.num_sequences for step in bench.recorder.steps) == 5
    assert (stats.num_running, stats.num_queued, stats.num_kv_blocks_used, stats.num_adapters_running) == (0, 0, 0, 0)
    assert stats.num_steps == bench.runner.num_steps == len(bench.recorder.steps)
    assert stats.num_prompt_tokens == 6 * 6
    assert stats.num_generated_tokens == 1 + 5 * 8


def test_state_while_running_counts_who_runs_and_who_waits(make_bench: MakeBench) -> None:
    bench = make_bench(max_num_seqs=2)
    gate = bench.plug()
    for index in range(4):
        bench.submit(f"r{index}", adapter="a", max_new_tokens=2)
    stats = bench.engine.stats()
    assert (stats.num_running, stats.num_queued) == (1, 4)
    gate.set()
    bench.outputs.wait("r0", "r1", "r2", "r3")
    busiest = max(bench.recorder.states, key=lambda stats: stats.num_kv_blocks_used)
    assert (busiest.num_running, busiest.num_queued, busiest.num_adapters_running) == (2, 2, 1)
    assert busiest.kv_cache_usage == 2 / 64


@pytest.mark.parametrize("num_blocks", [64, 9])
def test_neighbours_and_preemption_change_no_token(make_bench: MakeBench, num_blocks: int) -> None:
    alone = make_bench()
    crowd = make_bench(num_blocks=num_blocks, num_slots=2, max_num_seqs=6, max_batched_tokens=20)
    specs = [
        {"prompt": "x" * (5 + 13 * index), "adapter": [None, "a", "b", "c"][index % 4], "max_new_tokens": 60}
        for index in range(12)
    ]
    gate = crowd.plug()
    for index, spec in enumerate(specs):
        alone.submit(f"r{index}", **spec)
        alone.outputs.wait(f"r{index}")
        crowd.submit(f"r{index}", **spec)
    gate.set()
    crowd.outputs.wait(*(f"r{index}" for index in range(12)))
    for index in range(12):
        assert crowd.outputs.tokens(f"r{index}") == alone.outputs.tokens(f"r{index}")
        assert crowd.outputs.text(f"r{index}") == alone.outputs.text(f"r{index}")
    assert (crowd.engine.stats().num_preemptions > 0) == (num_blocks == 9)

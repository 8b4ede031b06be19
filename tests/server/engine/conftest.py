"""A whole engine over fakes: a model that reads its KV blocks, tokens that are bytes, a clock that stands still."""

import threading
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest
from lorasrv.engine.engine import Engine
from lorasrv.engine.kv_cache import BLOCK_TOKENS, BlockAllocator
from lorasrv.engine.observer import EngineStats, RequestStats, StepStats
from lorasrv.engine.request import Request, RequestOutput, SampledToken, SamplingParams
from lorasrv.engine.scheduler import ScheduledSequence, ScheduledStep, Scheduler, SchedulerLimits

EOS = 256
WAIT_SECONDS = 20.0


class FakeClock:
    """Monotonic seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class FakeLease:
    """A lease that counts how often it is released."""

    def __init__(self, adapter_id: str) -> None:
        self.adapter_id = adapter_id
        self.digest = f"digest of {adapter_id}"
        self.image = None
        self.num_releases = 0

    def release(self) -> None:
        self.num_releases += 1


class FakeSlots:
    """A slot pool that evicts whatever is not in use."""

    def __init__(self, num_slots: int) -> None:
        self.digests = [""] * num_slots
        self.users = [0] * num_slots
        self.broken: set[str] = set()

    def acquire(self, lease: FakeLease) -> int | None:
        if lease.adapter_id in self.broken:
            raise MemoryError("no room")
        if lease.digest in self.digests:
            slot = self.digests.index(lease.digest)
        elif 0 in self.users:
            slot = self.users.index(0)
        else:
            return None
        self.digests[slot] = lease.digest
        self.users[slot] += 1
        return slot

    def release(self, slot: int) -> None:
        assert self.users[slot] > 0
        self.users[slot] -= 1


class ByteTokenizer:
    """Tokens 0 to 255 are bytes; 256 ends a text."""

    eos_ids = (EOS,)

    def token_bytes(self, token_id: int) -> bytes:
        return bytes([token_id]) if token_id < 256 else b""


def do_nothing() -> None:
    """What a step does besides running."""


class FakeRunner:
    """A model whose next token is a hash of what its KV blocks hold, computed with the slot's adapter.

    A block shared by mistake, a slot with another adapter or a position not computed changes the tokens. A request
    with a script gets the tokens of its script instead; None stands for non-finite logits.
    """

    def __init__(self, slots: FakeSlots) -> None:
        self.scripts: dict[str, list[int | None]] = {}
        self.on_step: Callable[[], None] = do_nothing
        self.num_steps = 0
        self._slots = slots
        self._cache: dict[int, list[str]] = {}

    def execute(self, step: ScheduledStep) -> list[SampledToken]:
        self.num_steps += 1
        self.on_step()
        for part in step.sequences:
            self._store(part)
        return [self._sample(part) for part in step.sequences if part.samples]

    def _store(self, part: ScheduledSequence) -> None:
        sequence = part.sequence
        adapter = self._slots.digests[sequence.slot] if sequence.slot >= 0 else "base"
        for position in range(part.start, part.start + part.num_tokens):
            block = self._cache.setdefault(sequence.block_table[position // BLOCK_TOKENS], ["?"] * BLOCK_TOKENS)
            block[position % BLOCK_TOKENS] = f"{adapter}/{sequence.token_ids[position]}"

    def _sample(self, part: ScheduledSequence) -> SampledToken:
        sequence = part.sequence
        script = self.scripts.get(sequence.request.request_id)
        if script is not None:
            token_id = script[sequence.num_generated_tokens]
            return SampledToken(token_id=-1, is_finite=False) if token_id is None else SampledToken(token_id=token_id)
        values = [value for block_id in sequence.block_table for value in self._cache[block_id]]
        context = " ".join(values[: part.start + part.num_tokens])
        return SampledToken(token_id=zlib.crc32(context.encode()) % 128, logprob=-0.5)


class Outputs:
    """What the engine hands over, by request."""

    def __init__(self) -> None:
        self.by_request: dict[str, list[RequestOutput]] = {}
        self.threads: set[str] = set()
        self.num_calls = 0
        self.broken: set[str] = set()
        self._condition = threading.Condition()

    def __call__(self, outputs: list[RequestOutput]) -> None:
        with self._condition:
            self.num_calls += 1
            self.threads.add(threading.current_thread().name)
            for output in outputs:
                self.by_request.setdefault(output.request_id, []).append(output)
            self._condition.notify_all()
        if any(output.request_id in self.broken for output in outputs):
            raise RuntimeError("Event loop is closed")

    def wait(self, *request_ids: str) -> list[RequestOutput]:
        """Waits for the last output of each and returns those."""
        with self._condition:
            assert self._condition.wait_for(lambda: all(map(self._is_over, request_ids)), WAIT_SECONDS)
            return [self.by_request[request_id][-1] for request_id in request_ids]

    def text(self, request_id: str) -> str:
        return "".join(output.text for output in self.by_request[request_id])

    def tokens(self, request_id: str) -> list[int]:
        return [token_id for output in self.by_request[request_id] for token_id in output.token_ids]

    def _is_over(self, request_id: str) -> bool:
        outputs = self.by_request.get(request_id)
        return bool(outputs) and outputs[-1].is_terminal


@dataclass
class Recorder:
    """An observer that writes everything down."""

    steps: list[StepStats] = field(default_factory=list)
    finished: list[RequestStats] = field(default_factory=list)
    ttfts: list[tuple[float, bool]] = field(default_factory=list)
    rejected: list[str] = field(default_factory=list)
    states: list[EngineStats] = field(default_factory=list)

    def step_finished(self, stats: StepStats) -> None:
        self.steps.append(stats)

    def first_token(self, *, ttft_seconds: float, is_adapted: bool) -> None:
        self.ttfts.append((ttft_seconds, is_adapted))

    def request_finished(self, stats: RequestStats) -> None:
        self.finished.append(stats)

    def request_rejected(self, reason: str) -> None:
        self.rejected.append(reason)

    def state_changed(self, stats: EngineStats) -> None:
        self.states.append(stats)


class Bench:
    """An engine and everything around it."""

    def __init__(
        self,
        *,
        num_blocks: int = 64,
        num_slots: int = 4,
        max_num_seqs: int = 8,
        max_batched_tokens: int = 64,
        max_queue: int = 32,
        max_queue_seconds: float | None = None,
    ) -> None:
        self.clock = FakeClock()
        self.slots = FakeSlots(num_slots)
        self.runner = FakeRunner(self.slots)
        self.outputs = Outputs()
        self.recorder = Recorder()
        self.blocks = BlockAllocator(num_blocks)
        self.leases: list[FakeLease] = []
        self._gates: list[threading.Event] = []
        limits = SchedulerLimits(
            max_num_seqs=max_num_seqs, max_batched_tokens=max_batched_tokens, max_model_len=2048, max_overtakes=4
        )
        self.engine = Engine(
            self.runner,
            Scheduler(limits, self.blocks, self.slots),
            ByteTokenizer(),
            max_queue=max_queue,
            on_outputs=self.outputs,
            max_queue_seconds=max_queue_seconds,
            clock=self.clock,
            metrics=self.recorder,
        )
        self.engine.start()

    def request(
        self,
        request_id: str,
        *,
        prompt: str = "prompt",
        adapter: str | None = None,
        deadline_seconds: float | None = None,
        **sampling: object,
    ) -> Request:
        lease = None if adapter is None else FakeLease(adapter)
        if lease is not None:
            self.leases.append(lease)
        return Request(
            request_id=request_id,
            prompt_token_ids=tuple(prompt.encode()),
            sampling=SamplingParams(**{"max_new_tokens": 8} | sampling),
            lease=lease,
            deadline_seconds=deadline_seconds,
            arrival_seconds=self.clock.now,
        )

    def submit(self, request_id: str, **options: object) -> Request:
        request = self.request(request_id, **options)
        self.engine.submit(request)
        return request

    def script(self, request_id: str, tokens: str | bytes | list[int | None]) -> None:
        """Says what the model answers this request."""
        self.runner.scripts[request_id] = list(tokens.encode() if isinstance(tokens, str) else tokens)

    def plug(self) -> threading.Event:
        """Holds the engine in a step of a request of its own until the returned event is set."""
        entered, gate = threading.Event(), threading.Event()
        self._gates.append(gate)

        def hold() -> None:
            self.runner.on_step = do_nothing
            entered.set()
            assert gate.wait(WAIT_SECONDS)

        self.runner.on_step = hold
        self.submit(f"plug {len(self._gates)}", max_new_tokens=1)
        assert entered.wait(WAIT_SECONDS)
        return gate

    def close(self) -> None:
        for gate in self._gates:
            gate.set()
        self.engine.close()

    def check_nothing_is_held(self) -> None:
        """Blocks, slots and leases are back, each lease once; every request had one last output, and it came last."""
        assert self.blocks.num_used == 0
        assert not any(self.slots.users)
        assert [lease.num_releases for lease in self.leases] == [1] * len(self.leases)
        for outputs in self.outputs.by_request.values():
            assert [output.is_terminal for output in outputs] == [False] * (len(outputs) - 1) + [True]
            assert not (outputs[-1].finish and outputs[-1].error)
        assert len(self.recorder.finished) == len(self.outputs.by_request)


@pytest.fixture
def make_bench() -> Iterator[Callable[..., Bench]]:
    """Makes engines over fakes; at the end they are closed and must hold nothing."""
    benches: list[Bench] = []

    def make(**options: object) -> Bench:
        benches.append(Bench(**options))
        return benches[-1]

    yield make
    for bench in benches:
        bench.close()
        bench.check_nothing_is_held()


@pytest.fixture
def bench(make_bench: Callable[..., Bench]) -> Bench:
    """An engine over fakes with room for everything."""
    return make_bench()

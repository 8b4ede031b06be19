"""The scheduler under arbitrary submissions, steps and cancellations, and its promises one by one."""

from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from lorasrv.engine.kv_cache import BlockAllocator, num_blocks_for
from lorasrv.engine.request import Request, SamplingParams
from lorasrv.engine.scheduler import ScheduledStep, Scheduler, SchedulerLimits, Sequence, SequenceStatus
from lorasrv.errors import PromptTooLongError, RequestTooLargeError

NUM_BLOCKS = 8
NUM_SLOTS = 2
LIMITS = SchedulerLimits(max_num_seqs=4, max_batched_tokens=24, max_model_len=200, max_overtakes=3)


class FakeLease:
    """An adapter that is its digest."""

    def __init__(self, digest: str) -> None:
        self.adapter_id = self.digest = digest
        self.image = None

    def release(self) -> None:
        raise AssertionError("the scheduler does not own leases")


class FakeSlots:
    """A slot pool that evicts whatever is not in use."""

    def __init__(self, num_slots: int = NUM_SLOTS) -> None:
        self.digests: list[str | None] = [None] * num_slots
        self.users = [0] * num_slots

    def acquire(self, lease: FakeLease) -> int | None:
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


def make_request(number: int, *, prompt: int = 4, new: int = 4, adapter: str | None = None) -> Request:
    return Request(
        request_id=str(number),
        prompt_token_ids=tuple(range(prompt)),
        sampling=SamplingParams(max_new_tokens=new),
        lease=None if adapter is None else FakeLease(adapter),
    )


def make_scheduler(
    limits: SchedulerLimits = LIMITS, *, num_blocks: int = NUM_BLOCKS, num_slots: int = NUM_SLOTS
) -> Scheduler:
    return Scheduler(limits, BlockAllocator(num_blocks), FakeSlots(num_slots))


def run(scheduler: Scheduler, step: ScheduledStep) -> list[Sequence]:
    """What the engine does with a step: returns the sequences that ended."""
    scheduler.advance(step)
    ended = []
    for part in step.sequences:
        if part.samples:
            part.sequence.token_ids.append(7)
            if part.sequence.num_generated_tokens == part.sequence.request.sampling.max_new_tokens:
                scheduler.finish(part.sequence)
                ended.append(part.sequence)
    return ended


class SchedulerMachine(RuleBasedStateMachine):
    """Submits, steps and cancels; counts overtakings by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.scheduler = make_scheduler()
        self.slots = self.scheduler._slots
        self.live: list[Sequence] = []
        self.overtakes: Counter[int] = Counter()
        self.num_submitted = 0

    @rule(
        prompt=st.integers(1, 90),
        new=st.integers(1, 60),
        adapter=st.sampled_from([None, "a", "b", "c", "d"]),
    )
    def submit(self, prompt: int, new: int, adapter: str | None) -> None:
        request = make_request(self.num_submitted, prompt=prompt, new=new, adapter=adapter)
        self.scheduler.check_fits(request)
        self.live.append(self.scheduler.add(request))
        self.num_submitted += 1

    @rule(count=st.integers(1, 12))
    def step(self, count: int) -> None:
        for _ in range(count):
            self._step()

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        sequence = self.live.pop(data.draw(st.integers(0, len(self.live) - 1)))
        self.scheduler.finish(sequence)
        with pytest.raises(ValueError, match="finished already"):
            self.scheduler.finish(sequence)

    @invariant()
    def holdings_agree(self) -> None:
        running = [sequence for sequence in self.live if sequence.status is SequenceStatus.RUNNING]
        assert self.scheduler.running == running
        assert self.scheduler.waiting == [sequence for sequence in self.live if sequence not in running]
        self.scheduler.blocks.check_integrity(sequence.block_table for sequence in running)
        users = Counter(sequence.slot for sequence in running if sequence.slot >= 0)
        assert self.slots.users == [users[slot] for slot in range(NUM_SLOTS)]
        for sequence in self.scheduler.waiting:
            assert (sequence.block_table, sequence.slot, sequence.num_computed_tokens) == ([], -1, 0)

    def teardown(self) -> None:
        # in every step the oldest running sequence computes a token and is never preempted
        bound = sum(len(s.request.prompt_token_ids) + s.request.sampling.max_new_tokens for s in self.live)
        for _ in range(bound):
            self._step()
        assert not self.live
        assert self.scheduler.schedule() is None
        self.holdings_agree()

    def _step(self) -> None:
        before = {sequence.number: sequence.status for sequence in self.live}
        step = self.scheduler.schedule()
        assert self.scheduler.take_failed() == []
        assert (step is None) == (not self.live)
        if step is None:
            return
        self._count_overtakes(before, step)
        self._check(step)
        for sequence in run(self.scheduler, step):
            self.live.remove(sequence)

    def _count_overtakes(self, before: dict[int, SequenceStatus], step: ScheduledStep) -> None:
        for part in step.sequences:
            if before[part.sequence.number] is SequenceStatus.RUNNING or part.sequence.request.lease is None:
                continue
            for other in self.scheduler.waiting:
                self.overtakes[other.number] += other.number < part.sequence.number
        assert max(self.overtakes.values(), default=0) <= LIMITS.max_overtakes

    def _check(self, step: ScheduledStep) -> None:
        assert 0 < step.num_tokens == sum(part.num_tokens for part in step.sequences) <= LIMITS.max_batched_tokens
        assert len(self.scheduler.running) <= LIMITS.max_num_seqs
        assert self.scheduler.running[0] in [part.sequence for part in step.sequences]
        digests = set()
        for part in step.sequences:
            sequence, end = part.sequence, part.start + part.num_tokens
            assert part.num_tokens > 0
            assert part.start == sequence.num_computed_tokens
            assert part.samples == (end == len(sequence.token_ids))
            assert num_blocks_for(end) <= len(sequence.block_table)
            if sequence.request.lease is None:
                assert sequence.slot == -1
            else:
                assert self.slots.digests[sequence.slot] == sequence.request.lease.digest
                digests.add(sequence.request.lease.digest)
        assert step.num_adapters == len(digests) <= NUM_SLOTS


TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = settings(max_examples=80, stateful_step_count=30, deadline=None)


def test_decodes_come_first_and_prefill_fills_the_budget_in_chunks() -> None:
    scheduler = make_scheduler()
    decoding = scheduler.add(make_request(0, prompt=3, new=9))
    run(scheduler, scheduler.schedule())
    prefilling = scheduler.add(make_request(1, prompt=50))
    chunks = []
    for _ in range(3):
        step = scheduler.schedule()
        assert step.sequences[0].sequence is decoding
        assert step.sequences[0].decodes
        assert step.sequences[1].sequence is prefilling
        chunks.append((step.sequences[1].start, step.sequences[1].num_tokens, step.sequences[1].samples))
        run(scheduler, step)
    assert chunks == [(0, 23, False), (23, 23, False), (46, 4, True)]


def test_the_latest_arrival_is_preempted_and_computed_again() -> None:
    scheduler = make_scheduler(num_blocks=2)
    older, newer = scheduler.add(make_request(0, prompt=30, new=10)), scheduler.add(make_request(1, prompt=2, new=40))
    preemptions = 0
    while older.status is not SequenceStatus.FINISHED:
        step = scheduler.schedule()
        preemptions += step.num_preemptions
        run(scheduler, step)
    assert preemptions == 1
    assert newer.status is SequenceStatus.WAITING
    assert newer.num_generated_tokens > 0
    step = scheduler.schedule()
    assert [(part.start, part.num_tokens) for part in step.sequences] == [(0, min(24, len(newer.token_ids)))]


def test_a_sequence_without_a_slot_does_not_hold_up_those_behind() -> None:
    scheduler = make_scheduler(num_slots=1)
    sequences = [scheduler.add(make_request(i, adapter=name)) for i, name in enumerate(["a", "b", None, "a"])]
    scheduler.schedule()
    assert [sequence.status.value for sequence in sequences] == ["running", "waiting", "running", "running"]


def test_a_stream_of_newer_requests_for_a_resident_adapter_starves_nobody() -> None:
    scheduler = make_scheduler(num_slots=1)
    scheduler.add(make_request(0, adapter="a", new=3))
    run(scheduler, scheduler.schedule())
    starved = scheduler.add(make_request(1, adapter="b"))
    admitted = 0
    for number in range(2, 60):
        newer = scheduler.add(make_request(number, adapter="a", new=3))
        run(scheduler, scheduler.schedule())
        if starved.status is SequenceStatus.RUNNING:
            break
        admitted += newer.status is not SequenceStatus.WAITING
    assert starved.status is SequenceStatus.RUNNING
    assert admitted == LIMITS.max_overtakes


def test_nobody_overtakes_a_sequence_that_waits_for_blocks() -> None:
    scheduler = make_scheduler(num_blocks=3)
    scheduler.add(make_request(0, prompt=60, new=4))
    large, small = scheduler.add(make_request(1, prompt=60, new=4)), scheduler.add(make_request(2, prompt=1, new=1))
    while large.status is SequenceStatus.WAITING:
        assert small.status is SequenceStatus.WAITING
        run(scheduler, scheduler.schedule())


def test_a_request_that_never_fits_is_refused_with_numbers() -> None:
    scheduler = make_scheduler(num_blocks=2)
    scheduler.check_fits(make_request(0, prompt=60, new=5))
    with pytest.raises(RequestTooLargeError) as too_large:
        scheduler.check_fits(make_request(0, prompt=60, new=6))
    assert (too_large.value.needed, too_large.value.limit, too_large.value.unit) == (3, 2, "KV blocks")
    with pytest.raises(PromptTooLongError) as too_long:
        scheduler.check_fits(make_request(0, prompt=150, new=51))
    assert (too_long.value.num_prompt_tokens, too_long.value.max_new_tokens) == (150, 51)
    assert too_long.value.limit_tokens == 200


def test_what_a_slot_pool_raises_ends_that_sequence_alone() -> None:
    class BrokenSlots(FakeSlots):
        def acquire(self, lease: FakeLease) -> int | None:
            if lease.digest == "bad":
                raise MemoryError("no room")
            return super().acquire(lease)

    blocks = BlockAllocator(NUM_BLOCKS)
    scheduler = Scheduler(LIMITS, blocks, BrokenSlots())
    bad, good = scheduler.add(make_request(0, adapter="bad")), scheduler.add(make_request(1, adapter="good"))
    step = scheduler.schedule()
    assert [part.sequence for part in step.sequences] == [good]
    [(failed, error)] = scheduler.take_failed()
    assert failed is bad
    assert isinstance(error, MemoryError)
    assert bad.status is SequenceStatus.FINISHED


def test_a_pool_that_never_has_a_slot_ends_the_sequence_instead_of_blocking() -> None:
    scheduler = make_scheduler(num_slots=0)
    sequence = scheduler.add(make_request(0, adapter="a"))
    assert scheduler.schedule() is None
    [(failed, error)] = scheduler.take_failed()
    assert failed is sequence
    assert isinstance(error, RequestTooLargeError)
    assert error.unit == "adapter slots"


@pytest.mark.parametrize(
    "wrong", [{"max_num_seqs": 0}, {"max_batched_tokens": 3}, {"max_model_len": 1}, {"max_overtakes": -1}]
)
def test_limits_are_checked(wrong: dict[str, int]) -> None:
    values = {"max_num_seqs": 4, "max_batched_tokens": 8, "max_model_len": 16} | wrong
    with pytest.raises(ValueError, match=r"expected|must be"):
        SchedulerLimits(**values)

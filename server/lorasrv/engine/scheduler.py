"""Which sequences run in the next step, with how many tokens, on which blocks and slots.

Continuous batching in one rule: older first. Running sequences that decode get their token, running ones that prefill
get a chunk of what is left of the step's token budget, and the waiting ones are admitted in order of arrival. When
blocks run out the latest arrived running sequence gives up its own and is computed again later.

The promises:

* The oldest running sequence is never preempted for another one and is part of every step, so it ends.
* A sequence that waits for blocks or for its turn is overtaken by nobody.
* One whose adapter gets no slot is overtaken freely by those that need none, and by at most `max_overtakes` that do.
  From then on slots only become free, until one is its own.

So every sequence ends. This module knows no tensor and no text. Not thread-safe: engine thread only.
"""

from bisect import insort
from dataclasses import dataclass
from typing import Protocol

from lorasrv.engine.kv_cache import BlockAllocator, num_blocks_for
from lorasrv.engine.request import Lease, Request
from lorasrv.engine.sequence import ScheduledSequence, ScheduledStep, Sequence, SequenceStatus
from lorasrv.errors import PromptTooLongError, RequestTooLargeError

__all__ = [
    "ScheduledSequence",
    "ScheduledStep",
    "Scheduler",
    "SchedulerLimits",
    "Sequence",
    "SequenceStatus",
    "SlotPool",
]


class SlotPool(Protocol):
    """Where adapters get their place on the device."""

    def acquire(self, lease: Lease) -> int | None:
        """Returns a slot that holds the lease's adapter, counted as used once more; None if all are used by others.

        It must find one when none is in use. What it raises ends this lease's request alone.
        """

    def release(self, slot: int) -> None:
        """Undoes one `acquire`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerLimits:
    """How much a step and a sequence may take.

    Attributes:
        max_num_seqs: sequences that may run at once.
        max_batched_tokens: tokens in one step, at least max_num_seqs.
        max_model_len: positions of one sequence, prompt and generated.
        max_overtakes: newer sequences with an adapter that may pass one that waits for a slot.
    """

    max_num_seqs: int
    max_batched_tokens: int
    max_model_len: int
    max_overtakes: int = 32

    def __post_init__(self) -> None:
        if self.max_num_seqs < 1 or self.max_model_len < 2 or self.max_overtakes < 0:
            raise ValueError(f"max_num_seqs from 1, max_model_len from 2, max_overtakes from 0 expected, got {self}")
        if self.max_batched_tokens < self.max_num_seqs:
            raise ValueError(f"max_batched_tokens must be at least max_num_seqs, got {self}")


class Scheduler:
    """Owns the waiting and the running sequences and gives blocks and slots to the running ones.

    Args:
        limits: how much a step and a sequence may take.
        blocks: the KV blocks; nobody else allocates from it.
        slots: the adapters' places.
    """

    def __init__(self, limits: SchedulerLimits, blocks: BlockAllocator, slots: SlotPool) -> None:
        self.limits = limits
        self.blocks = blocks
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self._slots = slots
        self._num_arrived = 0
        self._num_preemptions = 0
        self._failed: list[tuple[Sequence, Exception]] = []

    def check_fits(self, request: Request) -> None:
        """Refuses a request that could never run to its end; reads nothing that changes, so any thread may call it.

        Raises:
            PromptTooLongError: prompt and max_new_tokens pass max_model_len.
            RequestTooLargeError: they need more blocks than there are.
        """
        num_prompt_tokens, max_new_tokens = len(request.prompt_token_ids), request.sampling.max_new_tokens
        if num_prompt_tokens + max_new_tokens > self.limits.max_model_len:
            raise PromptTooLongError(
                num_prompt_tokens=num_prompt_tokens,
                max_new_tokens=max_new_tokens,
                limit_tokens=self.limits.max_model_len,
            )
        # the last token is sampled and never run
        needed = num_blocks_for(num_prompt_tokens + max_new_tokens - 1)
        if needed > self.blocks.num_blocks:
            raise RequestTooLargeError(needed=needed, limit=self.blocks.num_blocks, unit="KV blocks")

    def add(self, request: Request) -> Sequence:
        """Puts a request that fits at the end of the queue."""
        sequence = Sequence(request=request, number=self._num_arrived, token_ids=list(request.prompt_token_ids))
        self._num_arrived += 1
        self.waiting.append(sequence)
        return sequence

    def schedule(self) -> ScheduledStep | None:
        """Chooses the next step; None only when there is no live sequence left.

        Whoever calls it runs the step, then calls `advance`, and asks `take_failed` each time.
        """
        self._num_preemptions = 0
        while True:
            scheduled = self._schedule_running()
            scheduled += self._admit(self.limits.max_batched_tokens - _count_tokens(scheduled))
            if scheduled:
                return self._step(scheduled)
            if not self.waiting:
                return None
            self._fail_stuck(self.waiting[0])

    def advance(self, step: ScheduledStep) -> None:
        """Notes that the step ran: its tokens' keys and values are in the cache."""
        for scheduled in step.sequences:
            scheduled.sequence.num_computed_tokens += scheduled.num_tokens

    def finish(self, sequence: Sequence) -> None:
        """Takes a live sequence out and releases what it holds.

        Raises:
            ValueError: it was taken out before.
        """
        if sequence.status is SequenceStatus.FINISHED:
            raise ValueError(f"sequence {sequence.number} is finished already")
        if sequence.status is SequenceStatus.RUNNING:
            self.running.remove(sequence)
            self._release(sequence)
        else:
            self.waiting.remove(sequence)
        sequence.status = SequenceStatus.FINISHED

    def take_failed(self) -> list[tuple[Sequence, Exception]]:
        """Returns the sequences that `schedule` had to end, with the reason; they are finished and hold nothing."""
        failed, self._failed = self._failed, []
        return failed

    def check_integrity(self) -> None:
        """Checks that the blocks in use are those of the running sequences; raises RuntimeError."""
        self.blocks.check_integrity(sequence.block_table for sequence in self.running)

    def _schedule_running(self) -> list[ScheduledSequence]:
        scheduled = []
        index = 0
        # `_grow` may take sequences off the end, the current one included
        while index < len(self.running):
            sequence = self.running[index]
            index += 1
            if sequence.num_pending_tokens == 1 and self._grow(sequence):
                scheduled.append(_part(sequence, 1))
        # whoever is admitted gets the rest of the budget, so one at most is left in the middle of its prompt
        for sequence in self.running:
            if sequence.num_pending_tokens > 1:
                scheduled.append(_part(sequence, self.limits.max_batched_tokens - len(scheduled)))
        return scheduled

    def _grow(self, sequence: Sequence) -> bool:
        """Gives a decoding sequence the block for its next position, at the cost of the latest if need be."""
        while num_blocks_for(len(sequence.token_ids)) > len(sequence.block_table):
            block_ids = self.blocks.allocate(1)
            if block_ids is not None:
                sequence.block_table += block_ids
                continue
            victim = self.running[-1]
            self._preempt(victim)
            if victim is sequence:
                return False
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._release(sequence)
        sequence.status = SequenceStatus.WAITING
        sequence.num_computed_tokens = 0
        insort(self.waiting, sequence, key=_number)
        self._num_preemptions += 1

    def _release(self, sequence: Sequence) -> None:
        self.blocks.free(sequence.block_table)
        sequence.block_table = []
        if sequence.slot >= 0:
            self._slots.release(sequence.slot)
            sequence.slot = -1

    def _admit(self, budget: int) -> list[ScheduledSequence]:
        scheduled = []
        passed = _Passed(self.limits.max_overtakes)
        for sequence in tuple(self.waiting):
            needed = num_blocks_for(len(sequence.token_ids))
            if budget < 1 or len(self.running) >= self.limits.max_num_seqs or needed > self.blocks.num_free:
                break
            if not self._take_slot(sequence, passed):
                continue
            self._start(sequence, needed)
            passed.count(sequence)
            scheduled.append(_part(sequence, budget))
            budget -= scheduled[-1].num_tokens
        return scheduled

    def _take_slot(self, sequence: Sequence, passed: "_Passed") -> bool:
        lease = sequence.request.lease
        if lease is None:
            return True
        slot = None
        if not passed.closes_to(lease.digest):
            try:
                slot = self._slots.acquire(lease)
            # whatever goes wrong with one adapter ends the requests of that adapter alone
            except Exception as error:
                self._fail(sequence, error)
                return False
        if slot is None:
            passed.add(sequence, lease.digest)
            return False
        sequence.slot = slot
        return True

    def _start(self, sequence: Sequence, num_blocks: int) -> None:
        block_ids = self.blocks.allocate(num_blocks)
        assert block_ids is not None
        sequence.block_table = block_ids
        sequence.status = SequenceStatus.RUNNING
        self.waiting.remove(sequence)
        insort(self.running, sequence, key=_number)

    def _fail_stuck(self, sequence: Sequence) -> None:
        """Ends the oldest sequence, which could not start although nothing runs; keeps the queue moving."""
        needed = num_blocks_for(len(sequence.token_ids))
        if needed > self.blocks.num_free:
            self._fail(sequence, RequestTooLargeError(needed=needed, limit=self.blocks.num_free, unit="KV blocks"))
        else:
            self._fail(sequence, RequestTooLargeError(needed=1, limit=0, unit="adapter slots"))

    def _fail(self, sequence: Sequence, error: Exception) -> None:
        self.finish(sequence)
        self._failed.append((sequence, error))

    def _step(self, scheduled: list[ScheduledSequence]) -> ScheduledStep:
        leases = (part.sequence.request.lease for part in scheduled)
        return ScheduledStep(
            sequences=tuple(scheduled),
            num_tokens=_count_tokens(scheduled),
            num_adapters=len({lease.digest for lease in leases if lease is not None}),
            num_preemptions=self._num_preemptions,
        )


class _Passed:
    """The sequences without a slot that newer ones pass in one round of admission, and when that has to stop."""

    def __init__(self, max_overtakes: int) -> None:
        self._max_overtakes = max_overtakes
        self._sequences: list[Sequence] = []
        self._digests: set[str] = set()
        self._most_overtakes = -1

    def add(self, sequence: Sequence, digest: str) -> None:
        self._sequences.append(sequence)
        self._digests.add(digest)
        self._most_overtakes = max(self._most_overtakes, sequence.num_overtakes)

    def count(self, admitted: Sequence) -> None:
        if admitted.request.lease is None or not self._sequences:
            return
        for sequence in self._sequences:
            sequence.num_overtakes += 1
        self._most_overtakes += 1

    def closes_to(self, digest: str) -> bool:
        """Whether a newer sequence with this adapter has to wait, too."""
        return digest in self._digests or self._most_overtakes >= self._max_overtakes


def _number(sequence: Sequence) -> int:
    return sequence.number


def _part(sequence: Sequence, budget: int) -> ScheduledSequence:
    pending = sequence.num_pending_tokens
    return ScheduledSequence(
        sequence=sequence,
        start=sequence.num_computed_tokens,
        num_tokens=min(pending, budget),
        samples=pending <= budget,
    )


def _count_tokens(scheduled: list[ScheduledSequence]) -> int:
    return sum(part.num_tokens for part in scheduled)

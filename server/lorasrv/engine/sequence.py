"""The state of one request inside the engine, and one step over several of them.

Plain state: the scheduler decides and changes it, the model runner reads it. This module knows no tensor and no text.
"""

from dataclasses import dataclass, field
from enum import Enum

from lorasrv.engine.request import Request


class SequenceStatus(Enum):
    """Where a sequence is: waiting ones hold nothing, running ones their blocks and slot."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(slots=True, kw_only=True, eq=False)
class Sequence:
    """The state of one request inside the engine.

    Attributes:
        request: what was asked.
        number: order of arrival, unique.
        token_ids: prompt and generated tokens.
        num_computed_tokens: positions whose keys and values are in the cache.
        block_table: block ids, one per 32 positions.
        slot: the adapter's slot while running, -1 for the base.
        status: waiting, running or finished.
        num_overtakes: newer sequences with an adapter that were admitted while this one could not get a slot.
    """

    request: Request
    number: int
    token_ids: list[int]
    num_computed_tokens: int = 0
    block_table: list[int] = field(default_factory=list)
    slot: int = -1
    status: SequenceStatus = SequenceStatus.WAITING
    num_overtakes: int = 0

    @property
    def num_generated_tokens(self) -> int:
        """Tokens sampled so far."""
        return len(self.token_ids) - len(self.request.prompt_token_ids)

    @property
    def num_pending_tokens(self) -> int:
        """Tokens to run through the model before the next one can be sampled."""
        return len(self.token_ids) - self.num_computed_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class ScheduledSequence:
    """One sequence's part of a step.

    Attributes:
        sequence: whose tokens; positions start to start + num_tokens - 1 of its token_ids.
        start: first position.
        num_tokens: how many.
        samples: whether the last of them is the last known token, so that the next one is sampled.
    """

    sequence: Sequence
    start: int
    num_tokens: int
    samples: bool

    @property
    def decodes(self) -> bool:
        """Whether it only runs the token sampled last."""
        return self.num_tokens == 1 and self.start >= len(self.sequence.request.prompt_token_ids)


@dataclass(frozen=True, slots=True, kw_only=True)
class ScheduledStep:
    """What runs together; never empty.

    Attributes:
        sequences: decoding ones first; each has its blocks and its slot.
        num_tokens: tokens of all of them.
        num_adapters: distinct adapter digests among them; the base is none.
        num_preemptions: sequences that gave up their blocks for this step.
    """

    sequences: tuple[ScheduledSequence, ...]
    num_tokens: int
    num_adapters: int
    num_preemptions: int

"""What the engine tells about itself while it works: the seam between the engine and its metrics.

The engine calls an `EngineObserver`; it knows no metric name, and an observer knows no engine.
"""

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True, kw_only=True)
class StepStats:
    """One engine step that ran.

    Attributes:
        duration_seconds: from scheduling to the outputs' hand-over.
        num_sequences: sequences in the step.
        num_adapters: distinct adapter versions in the step; the base is none.
        num_prompt_tokens: tokens prefilled, recomputed ones included.
        num_generated_tokens: tokens sampled.
        num_preemptions: sequences that gave up their blocks for this step.
        inter_token_seconds: for each token that was not its request's first, the time since the one before.
    """

    duration_seconds: float
    num_sequences: int
    num_adapters: int
    num_prompt_tokens: int
    num_generated_tokens: int
    num_preemptions: int
    inter_token_seconds: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestStats:
    """One request that left the engine, well or not.

    Attributes:
        adapter_id: which adapter answered, empty for the base.
        finish_reason: "stop", "length" or "eos"; empty if it ended with an error.
        error_reason: `LorasrvError.reason` of the error, e.g. "CANCELLED"; empty if it ended well.
        phase: "queued" if no step ever ran it, else "running".
        num_prompt_tokens: tokens of the prompt.
        num_generated_tokens: tokens generated so far.
        duration_seconds: from arrival to now.
        queue_seconds: from arrival to the first step that ran it; the whole duration if none did.
        prefill_seconds: from that step to the first token; None if there was none.
        decode_seconds: from the first token to now; None if there was none.
    """

    adapter_id: str
    finish_reason: str
    error_reason: str
    phase: str
    num_prompt_tokens: int
    num_generated_tokens: int
    duration_seconds: float
    queue_seconds: float
    prefill_seconds: float | None
    decode_seconds: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    """The engine at one moment, and its totals since it started.

    Attributes:
        num_running: requests that hold blocks.
        num_queued: requests that wait, preempted ones and those not yet taken from the inbox included.
        queue_capacity: how many may wait.
        num_kv_blocks: KV blocks there are for requests now.
        num_kv_blocks_used: KV blocks in use.
        num_adapters_running: distinct adapter versions among the running requests.
        max_adapters_in_one_step: the peak of distinct adapter versions in one step; the base is none.
        num_steps: steps run.
        num_prompt_tokens: tokens prefilled.
        num_generated_tokens: tokens sampled.
        num_preemptions: sequences that gave up their blocks.
        is_draining: whether new requests are refused.
    """

    num_running: int = 0
    num_queued: int = 0
    queue_capacity: int = 0
    num_kv_blocks: int = 0
    num_kv_blocks_used: int = 0
    num_adapters_running: int = 0
    max_adapters_in_one_step: int = 0
    num_steps: int = 0
    num_prompt_tokens: int = 0
    num_generated_tokens: int = 0
    num_preemptions: int = 0
    is_draining: bool = False

    @property
    def kv_cache_usage(self) -> float:
        """Share of the KV blocks in use, 0 to 1."""
        return self.num_kv_blocks_used / self.num_kv_blocks if self.num_kv_blocks else 0.0


class EngineObserver(Protocol):
    """Told what happens in an engine. Every method must be quick and must not raise.

    All are called on the engine thread, except `request_rejected`, which is called on the thread that submits.
    """

    def step_finished(self, stats: StepStats) -> None:
        """A step ran."""

    def first_token(self, *, ttft_seconds: float, is_adapted: bool) -> None:
        """A request got its first token, `ttft_seconds` after its arrival; `is_adapted` if an adapter answered."""

    def request_finished(self, stats: RequestStats) -> None:
        """An accepted request left the engine; called exactly once for each."""

    def request_rejected(self, reason: str) -> None:
        """`Engine.submit` refused a request; `reason` is `LorasrvError.reason`."""

    def state_changed(self, stats: EngineStats) -> None:
        """The engine's state may have changed; called once per turn of its loop, for gauges."""


class NullObserver:
    """An observer that looks away."""

    def step_finished(self, stats: StepStats) -> None:
        """Ignored."""

    def first_token(self, *, ttft_seconds: float, is_adapted: bool) -> None:
        """Ignored."""

    def request_finished(self, stats: RequestStats) -> None:
        """Ignored."""

    def request_rejected(self, reason: str) -> None:
        """Ignored."""

    def state_changed(self, stats: EngineStats) -> None:
        """Ignored."""

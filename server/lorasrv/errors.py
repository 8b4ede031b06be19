"""The errors of the server: what is wrong with a request, with the queue, with the engine, with the configuration.

    LorasrvError
    |-- InvalidRequestError             INVALID_REQUEST        every violated field at once
    |   |-- PromptTooLongError          PROMPT_TOO_LONG        prompt and new tokens pass the context
    |   `-- RequestTooLargeError        REQUEST_TOO_LARGE      could not fit even alone
    |-- RequestEndedError                                      an accepted request that ended early
    |   |-- RequestCancelledError       CANCELLED
    |   |-- DeadlineExceededError       DEADLINE_EXCEEDED
    |   |-- QueueTimeoutError           QUEUE_TIMEOUT          waited longer than the queue allows
    |   |-- SlowReaderError             SLOW_READER            the client does not take its output
    |   |-- NonFiniteOutputError        NON_FINITE_OUTPUT      NaN or infinity in the logits
    |   `-- EngineStepError             INTERNAL               a step failed; the trace is in the log
    |-- QueueFullError                  QUEUE_FULL
    |-- DrainingError                   DRAINING
    |-- EngineDownError                 ENGINE_DOWN
    |-- DiskFullError                   DISK_FULL
    |-- NonFiniteLossError                                     training met NaN or infinity
    `-- ReasonsError                                           lists everything wrong at once
        |-- ConfigError                 CONFIG_INVALID
        |-- ModelLoadError              MODEL_INVALID
        |-- TrainingDataError                                  data that cannot be trained on
        `-- MergeError                                         an adapter that cannot be merged
            |-- MergeRefusedError                              merged, little of it would be left
            `-- MergeVerificationError                         merged, it would answer otherwise

`reason` is the machine-readable name a client sees in `google.rpc.ErrorInfo`; the code it travels under is chosen in
`lorasrv.rpc.status` alone. Errors about adapters are `lorasrv_adapters.errors`. This module knows no wire format.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Literal

Phase = Literal["queued", "running"]


class LorasrvError(Exception):
    """Base of every error this server raises on purpose."""

    reason: ClassVar[str] = "INTERNAL"


class InvalidRequestError(LorasrvError):
    """A request that breaks the contract.

    Attributes:
        violations: (field, what is wrong with it) for every violated field, not only the first.
    """

    reason: ClassVar[str] = "INVALID_REQUEST"

    def __init__(self, violations: Sequence[tuple[str, str]]) -> None:
        self.violations = tuple(violations)
        super().__init__("; ".join(f"{field}: {text}" for field, text in self.violations))


class PromptTooLongError(InvalidRequestError):
    """The prompt, or the prompt with the tokens asked for, passes the model's context.

    Attributes:
        num_prompt_tokens: tokens of the prompt.
        max_new_tokens: tokens asked for.
        limit_tokens: what both together may have.
    """

    reason: ClassVar[str] = "PROMPT_TOO_LONG"

    def __init__(self, *, num_prompt_tokens: int, max_new_tokens: int, limit_tokens: int) -> None:
        self.num_prompt_tokens = num_prompt_tokens
        self.max_new_tokens = max_new_tokens
        self.limit_tokens = limit_tokens
        text = (
            f"{num_prompt_tokens} prompt tokens and {max_new_tokens} new ones pass the context of {limit_tokens} "
            "tokens; shorten the prompt or lower max_new_tokens"
        )
        super().__init__([("prompt", text)])


class RequestTooLargeError(InvalidRequestError):
    """A request that could not run even alone.

    Attributes:
        needed: how much it needs, in `unit`.
        limit: how much there is, in `unit`.
        unit: what is counted, e.g. "KV blocks".
    """

    reason: ClassVar[str] = "REQUEST_TOO_LARGE"

    def __init__(self, *, needed: int, limit: int, unit: str) -> None:
        self.needed = needed
        self.limit = limit
        self.unit = unit
        text = f"needs {needed} {unit}, the server has {limit}; shorten the prompt or lower max_new_tokens"
        super().__init__([("prompt", text)])


class RequestEndedError(LorasrvError):
    """Base of the reasons for which an accepted request ended without a finish."""


class RequestCancelledError(RequestEndedError):
    """The client cancelled, or went away.

    Attributes:
        phase: "queued" before its first step, "running" after.
    """

    reason: ClassVar[str] = "CANCELLED"

    def __init__(self, phase: Phase) -> None:
        self.phase = phase
        super().__init__(f"the request was cancelled while {phase}")


class DeadlineExceededError(RequestEndedError):
    """The deadline of the request passed.

    Attributes:
        phase: "queued" before its first step, "running" after.
    """

    reason: ClassVar[str] = "DEADLINE_EXCEEDED"

    def __init__(self, phase: Phase) -> None:
        self.phase = phase
        super().__init__(f"the deadline of the request passed while {phase}")


class QueueTimeoutError(RequestEndedError):
    """The request waited in the queue for longer than the server lets requests wait.

    Attributes:
        waited_seconds: how long it waited.
        retry_after_seconds: when another attempt makes sense.
    """

    reason: ClassVar[str] = "QUEUE_TIMEOUT"

    def __init__(self, *, waited_seconds: float, retry_after_seconds: float) -> None:
        self.waited_seconds = waited_seconds
        self.retry_after_seconds = retry_after_seconds
        super().__init__(f"the request waited {waited_seconds:.1f} s; try again in {retry_after_seconds:.1f} s")


class SlowReaderError(RequestEndedError):
    """The client does not read its stream, and the output kept for it reached the limit.

    Attributes:
        limit: how many pieces of output are kept for one stream.
    """

    reason: ClassVar[str] = "SLOW_READER"

    def __init__(self, *, limit: int) -> None:
        self.limit = limit
        super().__init__(f"the stream was not read while {limit} pieces of output waited; read faster")


class NonFiniteOutputError(RequestEndedError):
    """The model's logits held NaN or infinity for this request.

    Attributes:
        adapter_id: the adapter that was asked, empty for the base.
        position: which generated token it happened at, from 0.
    """

    reason: ClassVar[str] = "NON_FINITE_OUTPUT"

    def __init__(self, *, adapter_id: str, position: int) -> None:
        self.adapter_id = adapter_id
        self.position = position
        source = f"adapter {adapter_id!r}" if adapter_id else "the base model"
        super().__init__(f"{source} gave non-finite logits at generated token {position}")


class EngineStepError(RequestEndedError):
    """The engine step this request was part of failed; nothing of the cause is told to the client.

    Attributes:
        error_id: an opaque id; the log carries it beside the trace.
    """

    reason: ClassVar[str] = "INTERNAL"

    def __init__(self, error_id: str) -> None:
        self.error_id = error_id
        super().__init__(f"internal error {error_id}")


class QueueFullError(LorasrvError):
    """The queue is full; the request was not accepted.

    Attributes:
        capacity: how many requests may wait.
        retry_after_seconds: when another attempt makes sense.
    """

    reason: ClassVar[str] = "QUEUE_FULL"

    def __init__(self, *, capacity: int, retry_after_seconds: float) -> None:
        self.capacity = capacity
        self.retry_after_seconds = retry_after_seconds
        super().__init__(f"{capacity} requests are waiting already; try again in {retry_after_seconds:.1f} s")


class DrainingError(LorasrvError):
    """The server is shutting down and takes no new request; another one may.

    Attributes:
        retry_after_seconds: when another attempt makes sense.
    """

    reason: ClassVar[str] = "DRAINING"

    def __init__(self, *, retry_after_seconds: float = 1.0) -> None:
        self.retry_after_seconds = retry_after_seconds
        super().__init__("the server is draining and takes no new requests; try another server")


class EngineDownError(LorasrvError):
    """The engine is not running: not started, closed, or died.

    Attributes:
        retry_after_seconds: when another attempt makes sense.
    """

    reason: ClassVar[str] = "ENGINE_DOWN"

    def __init__(self, *, retry_after_seconds: float = 1.0) -> None:
        self.retry_after_seconds = retry_after_seconds
        super().__init__("the engine is not running")


class DiskFullError(LorasrvError):
    """There is no room for files that were to be written; nothing of them is left.

    Attributes:
        path: what was to be written.
        needed_bytes: how much it takes.
        free_bytes: how much is free there; a quota or a limit on file sizes may allow less.
    """

    reason: ClassVar[str] = "DISK_FULL"

    def __init__(self, path: Path, *, needed_bytes: int, free_bytes: int) -> None:
        self.path = path
        self.needed_bytes = needed_bytes
        self.free_bytes = free_bytes
        super().__init__(
            f"no room for {path}: it takes {needed_bytes} bytes, {free_bytes} are free there; "
            "free some, choose another disk, or raise the limit on files"
        )


class NonFiniteLossError(LorasrvError):
    """A training loss was NaN or infinite; nothing of that step was learned.

    Attributes:
        step: counted from 1.
        jobs: whose losses.
        places: of the examples that were in the batch.
    """

    def __init__(self, *, step: int, jobs: Sequence[str], places: Sequence[str]) -> None:
        self.step = step
        self.jobs = tuple(jobs)
        self.places = tuple(dict.fromkeys(places))
        super().__init__(
            f"the loss of {', '.join(self.jobs)} at step {step} is not finite; lower the learning rate, or look at "
            f"these examples: {', '.join(self.places)}"
        )


class ReasonsError(LorasrvError):
    """Base of errors that list everything wrong at once.

    Attributes:
        reasons: one sentence each: what was expected, what came, what to do.
    """

    def __init__(self, reasons: Sequence[str]) -> None:
        self.reasons = tuple(reasons)
        super().__init__("; ".join(self.reasons))


class ConfigError(ReasonsError):
    """The configuration of the server is wrong."""

    reason: ClassVar[str] = "CONFIG_INVALID"


class ModelLoadError(ReasonsError):
    """The base model cannot be served."""

    reason: ClassVar[str] = "MODEL_INVALID"


class TrainingDataError(ReasonsError):
    """The training data is damaged, of an unknown shape, or holds nothing to learn."""


class MergeError(ReasonsError):
    """An adapter cannot be merged as it was asked for; nothing is written."""


class MergeRefusedError(MergeError):
    """Storing the merged weights would take out again what was merged; nothing is written.

    Attributes:
        figures: of every changed module its name, the update as a share of the weight, the share of the update that
            would be kept, and what storing would change as a share of the update.
    """

    def __init__(self, reason: str, figures: Sequence[tuple[str, float, float, float]]) -> None:
        self.figures = tuple(figures)
        super().__init__([reason])


class MergeVerificationError(MergeError):
    """The merged model does not answer as base and adapter do; nothing of it is left."""

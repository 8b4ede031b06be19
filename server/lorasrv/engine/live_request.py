"""One accepted request between its submission and its last output: text, times, and whether it is complete.

Turns what the runner sampled into what the client gets. This module knows no schedule and releases nothing.
"""

from collections.abc import Collection
from dataclasses import replace
from typing import Protocol

from lorasrv.engine.detokenizer import Detokenizer, TokenBytes
from lorasrv.engine.observer import RequestStats
from lorasrv.engine.request import Finish, FinishReason, RequestOutput, SampledToken, TokenLogprob
from lorasrv.engine.sequence import Sequence
from lorasrv.errors import DeadlineExceededError, NonFiniteOutputError, Phase, QueueTimeoutError, RequestEndedError


class Tokenizer(TokenBytes, Protocol):
    """The part of a tokenizer the engine needs."""

    @property
    def eos_ids(self) -> Collection[int]: ...


class LiveRequest:
    """The engine's view of one request; all times are on the engine's clock.

    Attributes:
        sequence: its state in the scheduler.
        started_seconds: when the first step ran it; None before.
        first_token_seconds: when its first token came; None before.
        last_token_seconds: when its latest token came; None before the first.
    """

    def __init__(self, sequence: Sequence, tokenizer: Tokenizer) -> None:
        self.sequence = sequence
        self.started_seconds: float | None = None
        self.first_token_seconds: float | None = None
        self.last_token_seconds: float | None = None
        self._request = sequence.request
        sampling = self._request.sampling
        self._eos_ids = frozenset() if sampling.ignore_eos else frozenset(tokenizer.eos_ids)
        self._detokenizer = Detokenizer(tokenizer, sampling.stop)

    @property
    def request_id(self) -> str:
        """The id the client knows it by."""
        return self._request.request_id

    @property
    def adapter_id(self) -> str:
        """The adapter that answers, empty for the base."""
        return self._request.lease.adapter_id if self._request.lease else ""

    @property
    def phase(self) -> Phase:
        """Whether a step ever ran it; a preempted request is still "running"."""
        return "queued" if self.started_seconds is None else "running"

    def start(self, now: float) -> None:
        """Notes the first step that runs it."""
        if self.started_seconds is None:
            self.started_seconds = now

    def expiry(
        self, now: float, *, max_queue_seconds: float | None, retry_after_seconds: float
    ) -> RequestEndedError | None:
        """Returns why the request has to end at `now`, None if it has not."""
        deadline, waited = self._request.deadline_seconds, now - self._request.arrival_seconds
        if deadline is not None and now >= deadline:
            return DeadlineExceededError(self.phase)
        if max_queue_seconds is not None and self.phase == "queued" and waited >= max_queue_seconds:
            return QueueTimeoutError(waited_seconds=waited, retry_after_seconds=retry_after_seconds)
        return None

    def accept(self, sampled: SampledToken, now: float) -> RequestOutput:
        """Appends a sampled token and returns what the client gets for it, the finish included if it is the last.

        Raises:
            NonFiniteOutputError: nothing could be sampled.
        """
        if not sampled.is_finite:
            raise NonFiniteOutputError(adapter_id=self.adapter_id, position=self.sequence.num_generated_tokens)
        self.sequence.token_ids.append(sampled.token_id)
        self.last_token_seconds = now
        if self.first_token_seconds is None:
            self.first_token_seconds = now
        output = RequestOutput(
            request_id=self.request_id, token_ids=(sampled.token_id,), logprobs=self._logprobs(sampled)
        )
        return self._decide(output, sampled.token_id)

    def stats(self, now: float, output: RequestOutput) -> RequestStats:
        """Returns what the metrics get when the request leaves with `output` at `now`."""
        arrival, started, first = self._request.arrival_seconds, self.started_seconds, self.first_token_seconds
        return RequestStats(
            adapter_id=self.adapter_id,
            finish_reason=output.finish.reason.value if output.finish else "",
            error_reason=str(getattr(output.error, "reason", "INTERNAL")) if output.error else "",
            phase=self.phase,
            num_prompt_tokens=len(self._request.prompt_token_ids),
            num_generated_tokens=self.sequence.num_generated_tokens,
            duration_seconds=now - arrival,
            queue_seconds=(now if started is None else started) - arrival,
            prefill_seconds=None if started is None or first is None else first - started,
            decode_seconds=None if first is None else now - first,
        )

    def _decide(self, output: RequestOutput, token_id: int) -> RequestOutput:
        sampling = self._request.sampling
        if token_id in sampling.stop_token_ids:
            return self._finish(output, FinishReason.STOP, stop_token_id=token_id, text=self._detokenizer.flush())
        if token_id in self._eos_ids:
            return self._finish(output, FinishReason.EOS, stop_token_id=token_id, text=self._detokenizer.flush())
        text = self._detokenizer.push(token_id)
        if self._detokenizer.stop_string is not None:
            return self._finish(output, FinishReason.STOP, text=text)
        if self.sequence.num_generated_tokens >= sampling.max_new_tokens:
            return self._finish(output, FinishReason.LENGTH, text=text + self._detokenizer.flush())
        return replace(output, text=text)

    def _finish(
        self, output: RequestOutput, reason: FinishReason, *, text: str, stop_token_id: int | None = None
    ) -> RequestOutput:
        started, first = self.started_seconds, self.first_token_seconds
        assert started is not None
        assert first is not None
        finish = Finish(
            reason=reason,
            num_prompt_tokens=len(self._request.prompt_token_ids),
            num_generated_tokens=self.sequence.num_generated_tokens,
            stop_string=self._detokenizer.stop_string,
            stop_token_id=stop_token_id,
            ttft_seconds=first - self._request.arrival_seconds,
            queue_seconds=started - self._request.arrival_seconds,
        )
        return replace(output, text=text, finish=finish)

    def _logprobs(self, sampled: SampledToken) -> tuple[TokenLogprob, ...]:
        if sampled.logprob is None:
            return ()
        return (TokenLogprob(token_id=sampled.token_id, logprob=sampled.logprob, top=sampled.top),)

"""The loop: requests in, one step after the other, outputs out, all on one thread that alone owns the device.

A turn of the loop takes what came in, ends what expired, schedules, runs and hands the outputs over. Whatever way a
request ends, its lease, slot and blocks are released once, before its one last output is handed over. A step that fails
takes its own requests with it and nothing else. This module knows no tensor, no transport and no metric name.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from types import TracebackType
from typing import Protocol, Self
from uuid import uuid4

from lorasrv_adapters.errors import AdapterError

from lorasrv.engine.inbox import Inbox
from lorasrv.engine.live_request import LiveRequest, Tokenizer
from lorasrv.engine.observer import EngineObserver, EngineStats, NullObserver, StepStats
from lorasrv.engine.request import Request, RequestOutput, SampledToken
from lorasrv.engine.scheduler import ScheduledStep, Scheduler
from lorasrv.engine.sequence import SequenceStatus
from lorasrv.errors import (
    EngineDownError,
    EngineStepError,
    LorasrvError,
    NonFiniteOutputError,
    RequestCancelledError,
)

MIN_RETRY_SECONDS = 0.1
MAX_RETRY_SECONDS = 30.0

_log = logging.getLogger(__name__)


class Runner(Protocol):
    """Runs the model over a step; called on the engine thread only."""

    def execute(self, step: ScheduledStep) -> list[SampledToken]:
        """Returns one token for each scheduled sequence with `samples`, in the step's order."""


class Engine:
    """Serves requests until it is closed.

    Args:
        runner: runs the model.
        scheduler: owns blocks and slots; from `start` on it belongs to the engine thread.
        tokenizer: knows the tokens' bytes and which of them end a text.
        max_queue: requests that may wait beside the `max_num_seqs` that may run.
        on_outputs: gets the outputs of each turn that has any, on the engine thread; must not block.
        max_queue_seconds: how long a request may wait for its first step; None for ever.
        clock: monotonic seconds; deadlines and arrivals of requests are on it.
        metrics: told what happens.
    """

    def __init__(
        self,
        runner: Runner,
        scheduler: Scheduler,
        tokenizer: Tokenizer,
        *,
        max_queue: int,
        on_outputs: Callable[[list[RequestOutput]], None],
        max_queue_seconds: float | None = None,
        clock: Callable[[], float] = time.monotonic,
        metrics: EngineObserver | None = None,
    ) -> None:
        self._runner = runner
        self._scheduler = scheduler
        self._tokenizer = tokenizer
        self._on_outputs = on_outputs
        self._max_queue_seconds = max_queue_seconds
        self._clock = clock
        self._metrics = NullObserver() if metrics is None else metrics
        self._inbox = Inbox(max_running=scheduler.limits.max_num_seqs, max_queue=max_queue)
        self._stats = EngineStats(queue_capacity=max_queue, num_kv_blocks=scheduler.blocks.num_blocks)
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._live: dict[str, LiveRequest] = {}
        self._outputs: list[RequestOutput] = []
        self._mean_running_seconds = 1.0

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def is_up(self) -> bool:
        """Whether the engine runs; false before `start`, after `close`, and if it died."""
        return self._inbox.is_open

    def start(self) -> None:
        """Starts the engine thread; once."""
        self._inbox.open()
        self._thread.start()

    def submit(self, request: Request) -> None:
        """Accepts a request, and with it its lease; if this raises, the caller keeps the lease. Any thread.

        Raises:
            PromptTooLongError, RequestTooLargeError: it could not run even alone.
            InvalidRequestError: a live request has this id.
            QueueFullError: as many requests are live as may.
            DrainingError: `drain` was called.
            EngineDownError: the engine does not run.
        """
        try:
            self._scheduler.check_fits(request)
            self._inbox.submit(request)
        except LorasrvError as error:
            self._metrics.request_rejected(error.reason)
            raise

    def cancel(self, request_id: str) -> None:
        """Ends a request with RequestCancelledError before its next step; ignores an unknown id. Any thread."""
        self._inbox.cancel(request_id)

    def drain(self, timeout: float | None = None) -> bool:
        """Refuses new requests and waits for the accepted ones; not on the engine thread.

        Args:
            timeout: real seconds; None waits for ever.

        Returns:
            Whether all of them ended and their last outputs were handed over.
        """
        return self._inbox.drain(timeout)

    def close(self) -> None:
        """Ends the requests that are left with EngineDownError, then the thread; not on the engine thread."""
        self._inbox.close()
        if self._thread.ident is not None:
            self._thread.join()

    def stats(self) -> EngineStats:
        """Returns the state in the latest step, with the requests accepted since. Any thread."""
        stats = self._stats
        num_queued = max(0, self._inbox.num_live - stats.num_running)
        return replace(stats, num_queued=num_queued, is_draining=self._inbox.is_draining)

    def _run(self) -> None:
        try:
            while (messages := self._next_messages()) is not None:
                self._take(messages)
                self._expire()
                self._step()
                self._hand_over()
        except Exception:
            _log.critical("the engine died", exc_info=True)
        finally:
            self._shut_down()

    def _next_messages(self) -> list[Request | str] | None:
        if not self._live:
            self._scheduler.check_integrity()
        return self._inbox.take(waits=not self._live)

    def _take(self, messages: Iterable[Request | str]) -> None:
        for message in messages:
            if isinstance(message, Request):
                self._live[message.request_id] = LiveRequest(self._scheduler.add(message), self._tokenizer)
            elif live := self._live.get(message):
                self._fail(live, RequestCancelledError(live.phase))

    def _expire(self) -> None:
        now = self._clock()
        for live in tuple(self._live.values()):
            error = live.expiry(
                now,
                max_queue_seconds=self._max_queue_seconds,
                retry_after_seconds=self._inbox.retry_after_seconds,
            )
            if error is not None:
                self._fail(live, error)

    def _step(self) -> None:
        begin = self._clock()
        parts = tuple(self._live.values())
        # one bad step must not end the engine: its requests end, the next step begins clean
        try:
            step = self._scheduler.schedule()
            for sequence, error in self._scheduler.take_failed():
                if live := self._live.get(sequence.request.request_id):
                    self._fail(live, error)
            if step is None:
                return
            parts = tuple(self._live[part.sequence.request.request_id] for part in step.sequences)
            for live in parts:
                live.start(begin)
            self._measure()
            sampled = self._runner.execute(step)
            self._scheduler.advance(step)
            gaps = self._accept(step, sampled)
        except Exception as error:
            self._fail_step(parts, error)
        else:
            self._count(step, gaps, begin)

    def _accept(self, step: ScheduledStep, sampled: list[SampledToken]) -> list[float]:
        """Gives each sequence its token; returns the seconds since the one before, where there was one."""
        now = self._clock()
        gaps = []
        request_ids = [part.sequence.request.request_id for part in step.sequences if part.samples]
        if len(request_ids) != len(sampled):
            raise RuntimeError(f"expected {len(request_ids)} tokens from the runner, got {len(sampled)}")
        for request_id, token in zip(request_ids, sampled, strict=True):
            live = self._live[request_id]
            previous = live.last_token_seconds
            try:
                output = live.accept(token, now)
            except NonFiniteOutputError as error:
                self._fail(live, error)
                continue
            if previous is not None:
                gaps.append(now - previous)
            else:
                self._metrics.first_token(
                    ttft_seconds=now - live.sequence.request.arrival_seconds, is_adapted=bool(live.adapter_id)
                )
            if output.finish is not None:
                self._release(live, output)
            self._outputs.append(output)
        return gaps

    def _fail_step(self, parts: Iterable[LiveRequest], error: Exception) -> None:
        error_id = uuid4().hex
        _log.error("engine step failed", exc_info=error, extra={"error_id": error_id})
        for live in parts:
            if live.request_id in self._live:
                self._fail(live, EngineStepError(error_id))

    def _fail(self, live: LiveRequest, error: Exception) -> None:
        if not isinstance(error, LorasrvError | AdapterError):
            error_id = uuid4().hex
            _log.error("request failed", exc_info=error, extra={"error_id": error_id, "adapter_id": live.adapter_id})
            error = EngineStepError(error_id)
        output = RequestOutput(request_id=live.request_id, error=error)
        self._release(live, output)
        self._outputs.append(output)

    def _release(self, live: LiveRequest, output: RequestOutput) -> None:
        """The one way out: whoever leaves `_live` gives back blocks, slot and lease."""
        del self._live[live.request_id]
        if live.sequence.status is not SequenceStatus.FINISHED:
            self._scheduler.finish(live.sequence)
        if (lease := live.sequence.request.lease) is not None:
            lease.release()
        now = self._clock()
        self._metrics.request_finished(live.stats(now, output))
        if live.started_seconds is not None:
            self._mean_running_seconds += 0.1 * (now - live.started_seconds - self._mean_running_seconds)

    def _count(self, step: ScheduledStep, gaps: list[float], begin: float) -> None:
        num_generated = sum(part.samples for part in step.sequences)
        num_prompt = step.num_tokens - sum(part.decodes for part in step.sequences)
        self._stats = replace(
            self._stats,
            max_adapters_in_one_step=max(self._stats.max_adapters_in_one_step, step.num_adapters),
            num_steps=self._stats.num_steps + 1,
            num_prompt_tokens=self._stats.num_prompt_tokens + num_prompt,
            num_generated_tokens=self._stats.num_generated_tokens + num_generated,
            num_preemptions=self._stats.num_preemptions + step.num_preemptions,
        )
        self._metrics.step_finished(
            StepStats(
                duration_seconds=self._clock() - begin,
                num_sequences=len(step.sequences),
                num_adapters=step.num_adapters,
                num_prompt_tokens=num_prompt,
                num_generated_tokens=num_generated,
                num_preemptions=step.num_preemptions,
                inter_token_seconds=tuple(gaps),
            )
        )

    def _measure(self) -> None:
        running = self._scheduler.running
        leases = (sequence.request.lease for sequence in running)
        self._stats = replace(
            self._stats,
            num_running=len(running),
            num_kv_blocks_used=self._scheduler.blocks.num_used,
            num_adapters_running=len({lease.digest for lease in leases if lease is not None}),
        )

    def _hand_over(self) -> None:
        outputs, self._outputs = self._outputs, []
        self._measure()
        seconds = self._mean_running_seconds / self._scheduler.limits.max_num_seqs
        self._inbox.retry_after_seconds = min(max(seconds, MIN_RETRY_SECONDS), MAX_RETRY_SECONDS)
        self._inbox.forget(output.request_id for output in outputs if output.is_terminal)
        self._metrics.state_changed(self.stats())
        if not outputs:
            return
        # a closed event loop is its owner's affair; what other requests hold must still be released
        try:
            self._on_outputs(outputs)
        except Exception:
            _log.exception("the outputs of a step could not be handed over")

    def _shut_down(self) -> None:
        self._take(self._inbox.take_rest())
        for live in tuple(self._live.values()):
            self._fail(live, EngineDownError())
        self._hand_over()
        self._inbox.rest()

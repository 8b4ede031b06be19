"""From the engine thread to the event loop: one hand-over per step, then one bounded buffer per request.

A reader that falls behind gets what waits for it in one piece. One that does not read at all fills its buffer, and
its request ends; the engine is never held up. Knows neither protobuf nor gRPC.
"""

import asyncio
from collections.abc import Callable, Sequence

from lorasrv.engine.request import RequestOutput
from lorasrv.errors import SlowReaderError

MAX_PENDING_OUTPUTS = 1024


class OutputStreams:
    """The open requests of one event loop.

    Everything but `on_outputs` must be called on the loop's thread.

    Args:
        loop: the loop the servicers run on.
        max_pending: outputs kept for a request whose reader does not take them.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, *, max_pending: int = MAX_PENDING_OUTPUTS) -> None:
        self._loop = loop
        self._max_pending = max_pending
        self._streams: dict[str, OutputStream] = {}

    def __len__(self) -> int:
        return len(self._streams)

    def on_outputs(self, outputs: Sequence[RequestOutput]) -> None:
        """Takes the outputs of one step; called on the engine thread, never blocks it."""
        self._loop.call_soon_threadsafe(self._dispatch, outputs)

    def open(self, request_id: str, *, on_overflow: Callable[[str], None]) -> "OutputStream":
        """Begins to keep the outputs of a request; do so before it is submitted, and close the stream at the end.

        Args:
            request_id: unique among the open requests.
            on_overflow: called with the request's id if its outputs are not taken.
        """
        stream = OutputStream(request_id, streams=self, max_pending=self._max_pending, on_overflow=on_overflow)
        self._streams[request_id] = stream
        return stream

    def forget(self, request_id: str) -> None:
        """Drops what else the engine sends for this request."""
        self._streams.pop(request_id, None)

    def _dispatch(self, outputs: Sequence[RequestOutput]) -> None:
        for output in outputs:
            # a request that was closed before its last output has no stream anymore
            if stream := self._streams.get(output.request_id):
                stream.put(output)


class OutputStream:
    """The outputs of one request, for one reader. Made by `OutputStreams.open`."""

    def __init__(
        self, request_id: str, *, streams: OutputStreams, max_pending: int, on_overflow: Callable[[str], None]
    ) -> None:
        self._request_id = request_id
        self._streams = streams
        self._max_pending = max_pending
        self._on_overflow = on_overflow
        self._pending: list[RequestOutput] = []
        self._arrived = asyncio.Event()
        self._is_complete = False

    @property
    def is_complete(self) -> bool:
        """Whether the engine is done with the request, or was told to be."""
        return self._is_complete

    def put(self, output: RequestOutput) -> None:
        """Keeps an output, or ends the request if too many are kept already."""
        if len(self._pending) >= self._max_pending and not output.is_terminal:
            output = RequestOutput(request_id=self._request_id, error=SlowReaderError(limit=self._max_pending))
            self._on_overflow(self._request_id)
        if output.error is not None:
            # nobody needs the pieces of an answer that has no end
            self._pending.clear()
        self._pending.append(output)
        if output.is_terminal:
            self._is_complete = True
            self._streams.forget(self._request_id)
        self._arrived.set()

    async def read(self) -> RequestOutput:
        """Waits until there is something, and returns all there is as one output; not to be called after the last.

        Raises:
            Exception: what the request ended with, if it did not end well.
        """
        await self._arrived.wait()
        self._arrived.clear()
        taken, self._pending = self._pending, []
        output = merge(taken)
        if output.error is not None:
            raise output.error
        return output

    def close(self) -> None:
        """Stops keeping outputs."""
        self._streams.forget(self._request_id)


def merge(outputs: Sequence[RequestOutput]) -> RequestOutput:
    """Returns consecutive outputs of one request as one; there is at least one."""
    if len(outputs) == 1:
        return outputs[0]
    return RequestOutput(
        request_id=outputs[0].request_id,
        text="".join(output.text for output in outputs),
        token_ids=tuple(token_id for output in outputs for token_id in output.token_ids),
        logprobs=tuple(logprob for output in outputs for logprob in output.logprobs),
        finish=outputs[-1].finish,
        error=outputs[-1].error,
    )

"""The door between the threads that submit and the one engine thread: who may come in, who is in, what was said since.

Messages are taken in the order they came, so that a cancellation never runs ahead of its request. This module knows
no schedule and no step.
"""

import threading
from collections import deque
from collections.abc import Iterable

from lorasrv.engine.request import Request
from lorasrv.errors import DrainingError, EngineDownError, InvalidRequestError, QueueFullError


class Inbox:
    """Counts the live requests, the accepted ones whose last output is not out, and refuses those beyond.

    Args:
        max_running: requests that may run.
        max_queue: requests that may wait beside them.

    Attributes:
        retry_after_seconds: told to those who are refused; the engine keeps it up to date.
    """

    def __init__(self, *, max_running: int, max_queue: int) -> None:
        self.retry_after_seconds = 1.0
        self._max_running = max_running
        self._max_queue = max_queue
        self._condition = threading.Condition()
        self._messages: deque[Request | str] = deque()
        self._live_ids: set[str] = set()
        self._is_open = False
        self._is_draining = False
        self._is_idle = True

    @property
    def is_open(self) -> bool:
        """Whether the engine is up, draining or not."""
        return self._is_open

    @property
    def is_draining(self) -> bool:
        """Whether new requests are refused for good."""
        return self._is_draining

    @property
    def num_live(self) -> int:
        """Accepted requests that have not ended."""
        return len(self._live_ids)

    def open(self) -> None:
        """Lets requests in."""
        self._is_open = True

    def close(self) -> None:
        """Lets nothing in anymore and wakes whoever waits in `take`."""
        with self._condition:
            self._is_open = False
            self._condition.notify_all()

    def submit(self, request: Request) -> None:
        """Accepts a request. Any thread.

        Raises:
            EngineDownError, DrainingError, QueueFullError: not now.
            InvalidRequestError: a live request has this id.
        """
        with self._condition:
            if not self._is_open:
                raise EngineDownError()
            if self._is_draining:
                raise DrainingError()
            if request.request_id in self._live_ids:
                raise InvalidRequestError([("request_id", f"{request.request_id!r} is in use")])
            if len(self._live_ids) >= self._max_running + self._max_queue:
                raise QueueFullError(capacity=self._max_queue, retry_after_seconds=self.retry_after_seconds)
            self._live_ids.add(request.request_id)
            self._tell(request)

    def cancel(self, request_id: str) -> None:
        """Asks for the end of a request; one that is not live is ignored. Any thread."""
        with self._condition:
            if request_id in self._live_ids:
                self._tell(request_id)

    def drain(self, timeout: float | None) -> bool:
        """Refuses new requests and waits, in real seconds, until the engine is idle; returns whether it is."""
        with self._condition:
            self._is_draining = True
            return self._condition.wait_for(lambda: self._is_idle, timeout)

    def take(self, *, waits: bool) -> list[Request | str] | None:
        """Returns requests, and ids to cancel, in order; None once the inbox is closed. Engine thread.

        Args:
            waits: the engine is idle: say so to those who drain, and wait for a message.
        """
        with self._condition:
            if waits and not self._messages:
                self._is_idle = True
                self._condition.notify_all()
                self._condition.wait_for(lambda: self._messages or not self._is_open)
            return self._take_all() if self._is_open else None

    def take_rest(self) -> list[Request | str]:
        """Closes, and returns what was left. Engine thread."""
        with self._condition:
            self._is_open = False
            return self._take_all()

    def forget(self, request_ids: Iterable[str]) -> None:
        """Makes room for others: these requests ended. Engine thread."""
        with self._condition:
            self._live_ids.difference_update(request_ids)

    def rest(self) -> None:
        """Says that the engine does nothing anymore. Engine thread."""
        with self._condition:
            self._is_idle = True
            self._condition.notify_all()

    def _take_all(self) -> list[Request | str]:
        messages = list(self._messages)
        self._messages.clear()
        return messages

    def _tell(self, message: Request | str) -> None:
        self._messages.append(message)
        self._is_idle = False
        self._condition.notify_all()

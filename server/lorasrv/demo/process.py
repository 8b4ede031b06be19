"""A server as a child process: started, found by the address it logs, and ended on every way out.

It knows nothing of what the server serves.
"""

import os
import re
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Self

from lorasrv.demo.errors import ServerEndedError

_LISTENING = re.compile(r"listening on (\S+:\d+)")
_NUM_TAIL_LINES = 20
_START_TIMEOUT_SECONDS = 300.0
_STOP_TIMEOUT_SECONDS = 10.0
_ASK_AND_BECOME = """
import ctypes, os, signal, sys
PR_SET_PDEATHSIG = 1
ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGTERM))
if os.getppid() == int(sys.argv[1]):
    os.execvp(sys.argv[2], sys.argv[2:])
"""


class ServerProcess:
    """A running server; use it with `with`.

    Attributes:
        target: `HOST:PORT`, once the block has been entered.

    Args:
        command: The program and its arguments; it logs `listening on HOST:PORT` to stderr when it takes requests.
        environ: Its whole environment.
        start_timeout_seconds: How long it may take to listen.
    """

    target: str

    def __init__(
        self,
        command: Sequence[str],
        *,
        environ: Mapping[str, str],
        start_timeout_seconds: float = _START_TIMEOUT_SECONDS,
    ) -> None:
        self._command = list(command)
        self._environ = dict(environ)
        self._start_timeout_seconds = start_timeout_seconds
        self._tail: deque[str] = deque(maxlen=_NUM_TAIL_LINES)
        self._settled = threading.Event()

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            _ending_with_parent(self._command),
            env=self._environ,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            errors="replace",
            # its end is this process's business, not that of a Ctrl-C in the terminal
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read_log, name="demo-server-log", daemon=True)
        self._reader.start()
        try:
            self._settled.wait(self._start_timeout_seconds)
            if not hasattr(self, "target"):
                raise self.ended_error()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def wait(self) -> None:
        """Block until the server ends by itself, which it should not.

        Raises:
            ServerEndedError: It did.
        """
        self._process.wait()
        raise self.ended_error()

    def is_running(self) -> bool:
        """Whether the process still lives."""
        return self._process.poll() is None

    def ended_error(self) -> ServerEndedError:
        """What became of the server, with the last lines of its log."""
        if self._settled.is_set() and not hasattr(self, "target"):
            self._process.wait(_STOP_TIMEOUT_SECONDS)
        if not self.is_running():
            self._reader.join(_STOP_TIMEOUT_SECONDS)
        return ServerEndedError(status=self._process.poll(), log_tail=self._tail)

    def close(self) -> None:
        """End the server: SIGTERM, and SIGKILL if it does not go."""
        if self.is_running():
            self._process.terminate()
            try:
                self._process.wait(_STOP_TIMEOUT_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._reader.join(_STOP_TIMEOUT_SECONDS)
        if self._process.stderr is not None and not self._reader.is_alive():
            self._process.stderr.close()

    def _read_log(self) -> None:
        for line in self._process.stderr or ():
            self._tail.append(line.rstrip())
            if not self._settled.is_set() and (match := _LISTENING.search(line)):
                self.target = match[1]
                self._settled.set()
        self._settled.set()


@contextmanager
def signals_unwind() -> Iterator[None]:
    """Inside the block SIGTERM and SIGHUP raise SystemExit, so that `with` blocks are left in order.

    Must run on the main thread.
    """

    def leave(number: int, frame: FrameType | None) -> None:
        del frame
        sys.exit(128 + number)

    previous = {number: signal.signal(number, leave) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _ending_with_parent(command: Sequence[str]) -> list[str]:
    """The command, told by the kernel to end when this process is killed and can no longer do it. Linux only.

    A program that asks for it and then becomes the command: a function run after the fork would be simpler, but a
    fork of a process with threads may run none safely.
    """
    if not sys.platform.startswith("linux"):
        return list(command)
    return [sys.executable, "-I", "-S", "-c", _ASK_AND_BECOME, str(os.getpid()), *command]

"""What can go wrong in the demo.

DemoError
|-- ServerEndedError        the server died, or never came up; its last log lines
`-- NoAdaptersError         the package carries no adapters
"""

from collections.abc import Sequence
from pathlib import Path


class DemoError(Exception):
    """Base of the demo's errors."""


class ServerEndedError(DemoError):
    """The server process is gone, or did not start listening in time.

    Attributes:
        status: Its exit status; None if it was still running.
        log_tail: The last lines it wrote.
    """

    def __init__(self, *, status: int | None, log_tail: Sequence[str]) -> None:
        self.status = status
        self.log_tail = tuple(log_tail)
        what = "the server did not start in time" if status is None else f"the server ended with status {status}"
        lines = "".join(f"\n  {line}" for line in self.log_tail) or " nothing"
        super().__init__(f"{what}; the last it wrote:{lines}")


class NoAdaptersError(DemoError):
    """There are no adapters to show.

    Attributes:
        root: The folder that was searched.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        super().__init__(f"no adapters below {root}: the installation is incomplete")

"""One fuzz target from its seeds to its verdict: a corpus is written anew, then libFuzzer takes over."""

import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import atheris

DEFAULTS = ["-seed=1", "-runs=20000", "-max_len=1000", "-timeout=10", "-verbosity=0"]
"""With these every run takes the same inputs in the same order; a later option overrides an earlier one."""


def fuzz(check: Callable[[bytes], object], seeds: Sequence[bytes]) -> None:
    """Call `check` with ever new bytes until it raises or the runs are over; ends the process.

    The input that broke it is kept in the folder for temporary files, under the name that is printed.
    """
    kept = f"-artifact_prefix={tempfile.gettempdir()}/lorasrv-"
    memory = "/dev/shm" if Path("/dev/shm").is_dir() else None
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        # libFuzzer ends its process without cleaning up, so a child runs it, with everything temporary in here
        child = os.fork()
        if child == 0:
            tempfile.tempdir = folder
            corpus = tempfile.mkdtemp()
            for index, seed in enumerate(seeds):
                Path(corpus, f"{index:03}").write_bytes(seed)
            atheris.Setup([sys.argv[0], kept, *DEFAULTS, *sys.argv[1:], corpus], check)
            atheris.Fuzz()
        _, status = os.waitpid(child, 0)
    sys.exit(os.waitstatus_to_exitcode(status))

"""Runs the tests of Triton kernels where there is no device: in a process whose Triton interprets."""

import os
import subprocess
import sys
from pathlib import Path

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
"""Triton decides when it is imported, so this holds for a whole process."""


def run_interpreted(file: str, *, native_only: tuple[str, ...] = ()) -> None:
    """Runs on the CPU the tests of a file that are marked `gpu`, but for those named; fails if one fails or skips."""
    root = Path(__file__).parents[2]
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-rs", "-p", "no:cacheprovider", file]
    for name in native_only:
        command += ["--deselect", f"{Path(file).relative_to(root)}::{name}"]
    done = subprocess.run(command, cwd=root, env=environment, text=True, capture_output=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout, done.stdout

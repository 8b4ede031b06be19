"""Work in a thread of its own leaves no OpenMP workers; its outcome reaches the caller."""

import os
import subprocess
import sys

import pytest
from lorasrv.engine.own_thread import in_own_thread

SCRIPT = """
import os, sys, time, torch
from lorasrv.engine.own_thread import in_own_thread

def num_threads():
    return len(os.listdir("/proc/self/task"))

def work():
    (torch.ones(1_000_000) + 1).sum()
    return num_threads()

torch.set_num_threads(4)
before = num_threads()
during = in_own_thread(work) if sys.argv[1] == "own" else work()
# the system ends a thread a moment after Python does
deadline = time.monotonic() + 10
while sys.argv[1] == "own" and num_threads() > before and time.monotonic() < deadline:
    os.sched_yield()
print(during - before, num_threads() - before)
"""


def num_threads(where: str) -> list[int]:
    """Threads that came while the work ran, and that stayed after it."""
    environ = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, where], env=environ, capture_output=True, text=True, check=True
    )
    return [int(number) for number in done.stdout.split()]


def test_a_team_of_workers_ends_with_its_thread() -> None:
    assert num_threads("main") == [3, 3]
    assert num_threads("own") == [4, 0]


def test_results_and_errors_reach_the_caller() -> None:
    assert in_own_thread(lambda: 3) == 3
    with pytest.raises(ZeroDivisionError):
        in_own_thread(lambda: 1 // 0)

"""Two ways to do one thing, timed in turns; what the benchmarks beside it share.

Times are processor time of all threads where there is one, so that other load on the machine does not count, and wall
time where there are several.
"""

import statistics
import time
from collections.abc import Callable

import torch

MIN_SECONDS = 0.004

Run = Callable[[], object]


def compare(candidate: Run, baseline: Run, *, pairs: int) -> tuple[float, float, float, float]:
    """Seconds of the candidate (median), and quartiles of the ratio candidate / baseline."""
    repeats = {run: max(1, int(MIN_SECONDS / once(run, 1))) for run in (candidate, baseline)}
    times, ratios = [], []
    for pair in range(pairs):
        order = (candidate, baseline) if pair % 2 == 0 else (baseline, candidate)
        first, second = (once(run, repeats[run]) for run in order)
        seconds, other = (first, second) if pair % 2 == 0 else (second, first)
        times.append(seconds)
        ratios.append(seconds / other)
    low, middle, high = statistics.quantiles(ratios, n=4)
    return statistics.median(times), low, middle, high


def once(run: Run, repeats: int) -> float:
    """Seconds per call."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    run()
    start = clock()
    for _ in range(repeats):
        run()
    return (clock() - start) / repeats


def spread(low: float, middle: float, high: float) -> str:
    """A median with its quartiles."""
    return f"{middle:.3f} [{low:.3f}, {high:.3f}]"

"""Times calls on a device: whole CUDA graphs on a GPU, so that launches cost what they cost in a captured step."""

import statistics
import time
from collections.abc import Callable

import torch

MIN_SECONDS = 0.02
REPEATS = 5

Run = Callable[[int], object]
"""A call on the copy of its data that the argument names."""


def seconds_per_call(run: Run, copies: int, device: torch.device) -> float:
    """The median over a few measurements; the calls of one measurement go round the copies."""
    for _ in range(2):
        for copy in range(copies):
            run(copy)
    if device.type == "cpu":
        return _timed(lambda: run(0), 1)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for copy in range(copies):
            run(copy)
    once = _elapsed(graph.replay, 1)
    replays = max(1, round(MIN_SECONDS / once))
    return statistics.median(_elapsed(graph.replay, replays) for _ in range(REPEATS)) / copies


def bytes_per_second(device: torch.device, num_bytes: int) -> float:
    """What a copy reads and writes."""
    source = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * num_bytes / seconds_per_call(lambda _: target.copy_(source), 1, device)


def _timed(call: Callable[[], object], repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def _elapsed(call: Callable[[], object], repeats: int) -> float:
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(repeats):
        call()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) / 1e3 / repeats

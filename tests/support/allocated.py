"""What PyTorch's allocator gives out on a CPU, by its own count: the same number in every run."""

from collections.abc import Callable
from itertools import accumulate

from lorasrv_kernels.workspace import Workspace, using_workspace
from torch.profiler import ProfilerActivity, profile


def peak_bytes(run: Callable[[], object]) -> int:
    """Bytes that PyTorch's CPU allocator has given out at the highest moment of a run, beyond what was given before.

    Runs once before, so that what is allocated once and for all does not count; scratch memory of kernels does.
    """
    run()
    with using_workspace(Workspace()), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = profiler.profiler.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    return max(accumulate((size for _, size in changes), initial=0))

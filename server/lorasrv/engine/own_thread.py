"""Computing beside the engine without leaving threads behind.

OpenMP keeps a team of workers for every thread that ever ran a parallel region. Once the teams together have more
threads than the machine has cores, GNU's runtime lets all of them sleep between regions, and waking them costs more
than the engine's small products do: a decode step of the embedded model took two to five times as long on 2 cores
(`kernels/benchmarks/RESULTS.md`). A team ends with its thread. So what computes outside the engine thread, loading
above all, gets a thread of its own.
"""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")


def in_own_thread(work: Callable[[], T]) -> T:
    """Returns what `work` returns, or raises what it raises; it runs in a thread that ends with it. Blocks."""
    outcome: Future[T] = Future()

    def run() -> None:
        try:
            outcome.set_result(work())
        # handed over to the caller as it is
        except BaseException as error:
            outcome.set_exception(error)

    thread = threading.Thread(target=run, name="own", daemon=True)
    thread.start()
    thread.join()
    return outcome.result()

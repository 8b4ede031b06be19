"""Waiting for work in a thread that goes on, and is forgotten, when the caller leaves. Knows nothing of the work."""

import asyncio
from typing import TypeVar

T = TypeVar("T")


async def outlived_by(work: "asyncio.Future[T]") -> T:
    """Waits for `work` without cancelling it; a failure that nobody waits for any more is dropped.

    Raises:
        Exception: what the work raised.
        asyncio.CancelledError: the caller left; the work goes on.
    """
    try:
        return await asyncio.shield(work)
    except asyncio.CancelledError:
        # or the loop complains of an exception that nobody asked for
        work.add_done_callback(_retrieve)
        raise


def _retrieve(done: "asyncio.Future[T]") -> None:
    if not done.cancelled():
        done.exception()

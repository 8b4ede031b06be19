"""Work that outlives its waiter: it goes on, and its failure is nobody's."""

import asyncio
import gc

import pytest
from lorasrv.rpc.shield import outlived_by


def test_results_and_failures_reach_a_waiter_that_stays() -> None:
    async def scenario() -> None:
        work: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        work.set_result(3)
        assert await outlived_by(work) == 3
        failing: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        failing.set_exception(ValueError("no"))
        with pytest.raises(ValueError, match="no"):
            await outlived_by(failing)

    asyncio.run(scenario())


def test_a_failure_after_the_waiter_left_is_dropped(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        work: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        waiter = asyncio.ensure_future(outlived_by(work))
        await asyncio.sleep(0)
        waiter.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiter
        assert not work.cancelled()
        work.set_exception(ValueError("no"))
        await asyncio.sleep(0)

    asyncio.run(scenario())
    gc.collect()
    assert not [record for record in caplog.records if record.name == "asyncio"]


@pytest.mark.parametrize("turns", [0, 1, 2, 3])
def test_a_failure_about_when_the_waiter_leaves_is_dropped(turns: int, caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        work: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        waiter = asyncio.ensure_future(outlived_by(work))
        await asyncio.sleep(0)
        work.set_exception(ValueError("no"))
        for _ in range(turns):
            await asyncio.sleep(0)
        waiter.cancel()
        with pytest.raises((asyncio.CancelledError, ValueError)):
            await waiter
        assert not work.cancelled()

    asyncio.run(scenario())
    gc.collect()
    assert not [record for record in caplog.records if record.name == "asyncio"]

"""AdapterService over real gRPC, on a registry of records."""

import asyncio

import grpc
import pytest
from lorasrv_adapters.errors import AdapterIncompatibleError
from lorasrv_proto.v1 import adapters_pb2 as pb
from rpc_fakes import NUM_THREADS, FakeRecord, serving


def test_load_then_get_then_unload() -> None:
    async def scenario() -> None:
        async with serving() as service:
            loaded = await service.adapters.LoadAdapter(
                pb.LoadAdapterRequest(adapter_id="team/poet", source="/adapters/poet", expected_digest="a1" * 32)
            )
            adapter = loaded.adapter
            assert (adapter.adapter_id, adapter.source) == ("team/poet", "/adapters/poet")
            assert adapter.digest == "a1" * 32
            assert adapter.kind == pb.ADAPTER_KIND_DORA
            assert (adapter.min_rank, adapter.max_rank, adapter.total_rank) == (2, 8, 40)
            assert (adapter.num_modules, adapter.num_bytes, adapter.num_in_use) == (7, 4096, 0)
            assert adapter.state == pb.ADAPTER_STATE_READY
            assert adapter.load_time.ToMilliseconds() == 1_700_000_000_500
            got = await service.adapters.GetAdapter(pb.GetAdapterRequest(adapter_id="team/poet"))
            assert got.adapter == adapter
            gone = await service.adapters.UnloadAdapter(pb.UnloadAdapterRequest(adapter_id="team/poet"))
            assert gone.adapter.state == pb.ADAPTER_STATE_UNLOADED
            call = service.adapters.GetAdapter(pb.GetAdapterRequest(adapter_id="team/poet"))
            assert await call.code() is grpc.StatusCode.NOT_FOUND

    asyncio.run(scenario())


def test_other_weights_take_an_id_only_when_told_to_replace() -> None:
    async def scenario() -> None:
        async with serving(records=[FakeRecord(adapter_id="poet")]) as service:
            request = pb.LoadAdapterRequest(adapter_id="poet", source="/adapters/poet")
            assert await service.adapters.LoadAdapter(request).code() is grpc.StatusCode.ALREADY_EXISTS
            request.replace = True
            loaded = await service.adapters.LoadAdapter(request)
            assert loaded.adapter.digest.startswith("cd")

    asyncio.run(scenario())


def test_unload_of_an_adapter_in_use() -> None:
    async def scenario() -> None:
        async with serving(records=[FakeRecord(adapter_id="poet", num_in_use=2)]) as service:
            idle = pb.UnloadAdapterRequest(adapter_id="poet", mode=pb.UNLOAD_MODE_IF_IDLE)
            assert await service.adapters.UnloadAdapter(idle).code() is grpc.StatusCode.FAILED_PRECONDITION
            gone = await service.adapters.UnloadAdapter(pb.UnloadAdapterRequest(adapter_id="poet"))
            assert (gone.adapter.state, gone.adapter.num_in_use) == (pb.ADAPTER_STATE_DRAINING, 2)

    asyncio.run(scenario())


def test_the_deadline_ends_the_wait_and_not_the_load() -> None:
    async def scenario() -> None:
        async with serving() as service:
            service.registry.may_go_on.clear()
            request = pb.LoadAdapterRequest(adapter_id="poet", source="/adapters/poet")
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await service.adapters.LoadAdapter(request, timeout=0.2)
            assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
            service.registry.may_go_on.set()
            assert await asyncio.to_thread(service.registry.loaded.wait, 10)
            assert "poet" in service.registry.records

    asyncio.run(scenario())


def test_a_load_that_waits_for_a_thread_is_done_though_its_caller_left() -> None:
    async def scenario() -> None:
        async with serving() as service:
            service.registry.may_go_on.clear()
            names = [f"poet-{number}" for number in range(NUM_THREADS + 1)]
            for name in names:
                request = pb.LoadAdapterRequest(adapter_id=name, source="/adapters/poet")
                call = service.adapters.LoadAdapter(request, timeout=0.3)
                if name == names[-1]:
                    assert await call.code() is grpc.StatusCode.DEADLINE_EXCEEDED
            service.registry.may_go_on.set()
            # a pool of threads takes its work in order, so what comes last ends after all the others began
            await service.adapters.LoadAdapter(pb.LoadAdapterRequest(adapter_id="last", source="/adapters/poet"))
            assert {*names, "last"} <= set(service.registry.records)

    asyncio.run(scenario())


def test_a_load_that_fails_after_its_caller_left_disturbs_nobody(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        async with serving() as service:
            service.registry.may_go_on.clear()
            service.registry.error = AdapterIncompatibleError(["rank 4096 is above 64"])
            call = service.adapters.LoadAdapter(pb.LoadAdapterRequest(adapter_id="poet", source="/adapters/poet"))
            assert await asyncio.to_thread(service.registry.entered.wait, 10)
            call.cancel()
            service.registry.may_go_on.set()
            again = service.adapters.LoadAdapter(pb.LoadAdapterRequest(adapter_id="poet", source="/adapters/poet"))
            assert await again.code() is grpc.StatusCode.FAILED_PRECONDITION

    asyncio.run(scenario())
    assert not [record for record in caplog.records if record.name == "asyncio"]


@pytest.mark.parametrize(
    ("request_", "fields"),
    [
        (pb.LoadAdapterRequest(), {"adapter_id", "source"}),
        (
            pb.LoadAdapterRequest(adapter_id="a,b", source="s", expected_digest="a1" * 6),
            {"adapter_id", "expected_digest"},
        ),
        (pb.LoadAdapterRequest(adapter_id="a@" + "0" * 12, source="s\0"), {"adapter_id", "source"}),
    ],
    ids=["empty", "grammar", "version"],
)
def test_load_lists_every_violation(request_: pb.LoadAdapterRequest, fields: set[str]) -> None:
    async def scenario() -> None:
        async with serving() as service:
            call = service.adapters.LoadAdapter(request_)
            assert await call.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert {part.partition(":")[0] for part in (await call.details()).split("; ")} == fields
            assert service.registry.num_loads == 0

    asyncio.run(scenario())


def test_unload_refuses_a_mode_it_does_not_know() -> None:
    async def scenario() -> None:
        async with serving(records=[FakeRecord(adapter_id="poet")]) as service:
            call = service.adapters.UnloadAdapter(pb.UnloadAdapterRequest(adapter_id="poet", mode=9))  # type: ignore[arg-type]
            assert await call.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert "poet" in service.registry.records

    asyncio.run(scenario())


def test_pages_hold_every_adapter_once_in_order_of_ids() -> None:
    names = [f"a{number:03}" for number in range(25)]

    async def scenario() -> None:
        async with serving(records=[FakeRecord(adapter_id=name) for name in reversed(names)]) as service:
            listed, token, num_pages = [], "", 0
            while token or num_pages == 0:
                page = await service.adapters.ListAdapters(pb.ListAdaptersRequest(page_size=10, page_token=token))
                listed += [adapter.adapter_id for adapter in page.adapters]
                token, num_pages = page.next_page_token, num_pages + 1
                # what goes between pages makes none of the others vanish
                service.registry.records.pop("a003", None)
            assert (listed, num_pages) == (names, 3)
            everything = await service.adapters.ListAdapters(pb.ListAdaptersRequest())
            assert (len(everything.adapters), everything.next_page_token) == (24, "")

    asyncio.run(scenario())


@pytest.mark.parametrize("token", ["?", "YQ", "_w==", "é"], ids=["alphabet", "padding", "utf8", "ascii"])
def test_a_page_token_that_is_none_of_ours_is_refused(token: str) -> None:
    async def scenario() -> None:
        async with serving() as service:
            call = service.adapters.ListAdapters(pb.ListAdaptersRequest(page_token=token))
            assert await call.code() is grpc.StatusCode.INVALID_ARGUMENT

    asyncio.run(scenario())


def test_a_full_page_is_bounded() -> None:
    async def scenario() -> None:
        async with serving(records=[FakeRecord(adapter_id=f"a{number}") for number in range(1001)]) as service:
            page = await service.adapters.ListAdapters(pb.ListAdaptersRequest(page_size=5000))
            assert len(page.adapters) == 1000
            assert page.next_page_token
            assert len((await service.adapters.ListAdapters(pb.ListAdaptersRequest())).adapters) == 100

    asyncio.run(scenario())


def test_a_draining_server_loads_nothing() -> None:
    async def scenario() -> None:
        async with serving() as service:
            service.engine.is_draining = True
            call = service.adapters.LoadAdapter(pb.LoadAdapterRequest(adapter_id="poet", source="/adapters/poet"))
            assert await call.code() is grpc.StatusCode.UNAVAILABLE
            assert service.registry.num_loads == 0

    asyncio.run(scenario())

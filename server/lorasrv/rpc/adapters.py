"""AdapterService: the registry of adapters, over the wire.

What may block runs in an executor, and goes on there when the caller is gone. Knows no file and no tensor.
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import Executor
from functools import partial
from typing import TypeVar

from lorasrv_proto.v1 import adapters_pb2, adapters_pb2_grpc

from lorasrv.errors import DrainingError
from lorasrv.rpc.convert import adapters as convert
from lorasrv.rpc.edge import Context, served
from lorasrv.rpc.ports import CallObserver, RegistryPort
from lorasrv.rpc.shield import outlived_by

T = TypeVar("T")


class AdapterServicer(adapters_pb2_grpc.AdapterServiceServicer):
    """Serves lorasrv.v1.AdapterService; used on one event loop.

    Args:
        registry: knows the adapters.
        executor: where the registry is called.
        observer: told how calls end.
        is_draining: whether the server is shutting down, so that nothing new is loaded.
    """

    def __init__(
        self,
        *,
        registry: RegistryPort,
        executor: Executor,
        observer: CallObserver,
        is_draining: Callable[[], bool],
    ) -> None:
        self._registry = registry
        self._executor = executor
        self._observer = observer
        self._is_draining = is_draining

    async def LoadAdapter(
        self, request: adapters_pb2.LoadAdapterRequest, context: Context
    ) -> adapters_pb2.LoadAdapterResponse:
        """Loads an adapter; the end of the call ends the wait, not the load."""
        async with served("LoadAdapter", context, observer=self._observer):
            call = convert.load_call(request)
            if self._is_draining():
                raise DrainingError
            record = await self._in_executor(
                partial(
                    self._registry.load,
                    call.adapter_id,
                    call.source,
                    replace=call.replace,
                    expected_digest=call.expected_digest,
                )
            )
            return adapters_pb2.LoadAdapterResponse(adapter=convert.adapter(record))

    async def UnloadAdapter(
        self, request: adapters_pb2.UnloadAdapterRequest, context: Context
    ) -> adapters_pb2.UnloadAdapterResponse:
        """Withdraws an adapter."""
        async with served("UnloadAdapter", context, observer=self._observer):
            if_idle = convert.unload_if_idle(request)
            record = await self._in_executor(partial(self._registry.unload, request.adapter_id, if_idle=if_idle))
            return adapters_pb2.UnloadAdapterResponse(adapter=convert.withdrawn_adapter(record))

    async def GetAdapter(
        self, request: adapters_pb2.GetAdapterRequest, context: Context
    ) -> adapters_pb2.GetAdapterResponse:
        """Reports one adapter."""
        async with served("GetAdapter", context, observer=self._observer):
            record = await self._in_executor(partial(self._registry.get, convert.adapter_id(request)))
            return adapters_pb2.GetAdapterResponse(adapter=convert.adapter(record))

    async def ListAdapters(
        self, request: adapters_pb2.ListAdaptersRequest, context: Context
    ) -> adapters_pb2.ListAdaptersResponse:
        """Reports adapters, a page at a time."""
        async with served("ListAdapters", context, observer=self._observer):
            return convert.page(request, await self._in_executor(self._registry.list))

    async def _in_executor(self, function: Callable[[], T]) -> T:
        # what waits for a thread is done even if its caller leaves
        return await outlived_by(asyncio.wrap_future(self._executor.submit(function)))

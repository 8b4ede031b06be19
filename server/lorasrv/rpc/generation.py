"""GenerationService: a request's way into the engine and its answer's way out.

Whatever ends a call - its last token, an error, the client, a deadline - ends its request in the engine exactly once.
The unary call is the stream collected. Knows no tensor, and of adapters only that they are acquired.
"""

import asyncio
import itertools
import random
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Executor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from weakref import WeakValueDictionary

from lorasrv_proto.v1 import generation_pb2, generation_pb2_grpc

from lorasrv.engine.request import Lease, Request, RequestOutput, SamplingParams
from lorasrv.rpc.convert import generation as convert
from lorasrv.rpc.edge import Call, Context, announce, served
from lorasrv.rpc.ports import CallObserver, EnginePort, RegistryPort
from lorasrv.rpc.shield import outlived_by
from lorasrv.rpc.streams import OutputStream, OutputStreams, merge


@dataclass(frozen=True, slots=True, kw_only=True)
class _Running:
    """A request in the engine: where its outputs come from, and what its answer must tell beside them."""

    stream: OutputStream
    adapter_digest: str
    seed: int


class GenerationServicer(generation_pb2_grpc.GenerationServiceServicer):
    """Serves lorasrv.v1.GenerationService; used on one event loop.

    Args:
        engine: generates.
        registry: knows the adapters.
        streams: bring the engine's outputs to the loop; the engine's `on_outputs` is theirs.
        encode: text to token ids, in any thread.
        limits: what the model allows a request.
        defaults: the values of sampling fields that are not set.
        executor: where adapters are acquired, which blocks while one must be read again. Prompts are tokenized in the
            loop's own, so that a slow disk holds up nobody else.
        observer: told how calls end.
        clock: the engine's clock, in seconds.
        draw_seed: draws the seed of a request that has none.
    """

    def __init__(
        self,
        *,
        engine: EnginePort,
        registry: RegistryPort,
        streams: OutputStreams,
        encode: Callable[[str], Sequence[int]],
        limits: convert.RequestLimits,
        defaults: SamplingParams,
        executor: Executor,
        observer: CallObserver,
        clock: Callable[[], float] = time.monotonic,
        draw_seed: Callable[[], int] = lambda: random.getrandbits(64),
    ) -> None:
        self._engine = engine
        self._registry = registry
        self._streams = streams
        self._encode = encode
        self._limits = limits
        self._defaults = defaults
        self._executor = executor
        self._observer = observer
        self._clock = clock
        self._draw_seed = draw_seed
        self._numbers = itertools.count(1)
        self._turns: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    async def Generate(
        self, request: generation_pb2.GenerateRequest, context: Context
    ) -> generation_pb2.GenerateResponse:
        """Answers in one message."""
        async with served("Generate", context, observer=self._observer) as call:
            async with self._running(request, call, context) as running:
                outputs = [await running.stream.read()]
                while not outputs[-1].is_terminal:
                    outputs.append(await running.stream.read())
            whole = merge(outputs)
            call.finish_reason = _finish_reason(whole)
            return convert.generate_response(whole, adapter_digest=running.adapter_digest, seed=running.seed)

    # the base class, made for both kinds of server, cannot say that a coroutine may write its messages itself
    async def GenerateStream(  # type: ignore[override]
        self, request: generation_pb2.GenerateStreamRequest, context: Context
    ) -> None:
        """Answers piece by piece."""
        # written, not yielded: a cancelled call must raise here, where the request is ended, and not in a generator
        # that nobody resumes
        async with served("GenerateStream", context, observer=self._observer) as call:
            message = convert.stream_request(request)
            async with self._running(message, call, context, prefix="request.") as running:
                while True:
                    output = await running.stream.read()
                    if output.text or output.token_ids:
                        await _write(context, chunk=convert.generate_chunk(output))
                    if output.is_terminal:
                        break
                finish = convert.generate_finish(output, adapter_digest=running.adapter_digest, seed=running.seed)
                await _write(context, finish=finish)
            call.finish_reason = _finish_reason(output)

    @asynccontextmanager
    async def _running(
        self,
        message: generation_pb2.GenerateRequest,
        call: Call,
        context: Context,
        *,
        prefix: str = "",
    ) -> AsyncIterator[_Running]:
        """Has a request in the engine while the body runs."""
        arrival_seconds = self._clock()
        request = await self._admissible(message, call, context, arrival_seconds=arrival_seconds, prefix=prefix)
        stream = self._streams.open(request.request_id, on_overflow=self._engine.cancel)
        try:
            self._submit(request)
            await announce(call, context)
            digest = request.lease.digest if request.lease is not None else ""
            yield _Running(stream=stream, adapter_digest=digest, seed=request.sampling.seed)
        finally:
            stream.close()
            if not stream.is_complete:
                self._engine.cancel(request.request_id)

    async def _admissible(
        self,
        message: generation_pb2.GenerateRequest,
        call: Call,
        context: Context,
        *,
        arrival_seconds: float,
        prefix: str,
    ) -> Request:
        """Returns a checked request that holds its adapter."""
        checked = convert.generation_call(
            message,
            limits=self._limits,
            defaults=self._defaults,
            seed=self._draw_seed(),
            routed_adapter=call.metadata.get(convert.ROUTING_KEY),
            prefix=prefix,
        )
        prompt = checked.prompt
        if isinstance(prompt, str):
            prompt = tuple(await asyncio.get_running_loop().run_in_executor(None, self._encode, prompt))
        sampling = checked.fit(len(prompt), limits=self._limits)
        lease = await self._acquire(checked.adapter) if checked.adapter else None
        remaining_seconds = context.time_remaining()
        return Request(
            # a client may use one id for several calls
            request_id=f"{call.request_id}#{next(self._numbers)}",
            prompt_token_ids=prompt,
            sampling=sampling,
            lease=lease,
            deadline_seconds=None if remaining_seconds is None else self._clock() + remaining_seconds,
            arrival_seconds=arrival_seconds,
        )

    async def _acquire(self, reference: str) -> Lease:
        """Acquires an adapter without blocking the loop; a caller that goes away leaves no lease behind."""
        # one thread per adapter, however many requests wait for it
        turn = self._turns.setdefault(reference, asyncio.Lock())
        async with turn:
            acquired = asyncio.wrap_future(self._executor.submit(self._registry.acquire, reference))
            try:
                return await outlived_by(acquired)
            except asyncio.CancelledError:
                acquired.add_done_callback(_release_result)
                raise

    def _submit(self, request: Request) -> None:
        try:
            self._engine.submit(request)
        except BaseException:
            if request.lease is not None:
                request.lease.release()
            raise


def _release_result(acquired: asyncio.Future[Lease]) -> None:
    if not acquired.cancelled() and acquired.exception() is None:
        acquired.result().release()


def _finish_reason(output: RequestOutput) -> str:
    return output.finish.reason.value if output.finish is not None else ""


async def _write(
    context: Context,
    *,
    chunk: generation_pb2.GenerateChunk | None = None,
    finish: generation_pb2.GenerateFinish | None = None,
) -> None:
    await context.write(generation_pb2.GenerateStreamResponse(chunk=chunk, finish=finish))

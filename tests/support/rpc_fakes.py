"""The service over real gRPC with everything below it faked: the engine answers from a script, adapters are records."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from grpc import aio
from lorasrv.engine.observer import EngineStats
from lorasrv.engine.request import Finish, FinishReason, Request, RequestOutput, SamplingParams, TokenLogprob
from lorasrv.errors import DrainingError, EngineDownError
from lorasrv.rpc.adapters import AdapterServicer
from lorasrv.rpc.convert.generation import RequestLimits
from lorasrv.rpc.convert.server import ServerFacts
from lorasrv.rpc.generation import GenerationServicer
from lorasrv.rpc.server import Health, ServerServicer, Servicers, bind, build_server
from lorasrv.rpc.streams import OutputStreams
from lorasrv_adapters.errors import AdapterExistsError, AdapterInUseError, AdapterNotFoundError
from lorasrv_proto.v1.adapters_pb2_grpc import AdapterServiceStub
from lorasrv_proto.v1.generation_pb2_grpc import GenerationServiceStub
from lorasrv_proto.v1.server_pb2_grpc import ServerServiceStub

LIMITS = RequestLimits(max_model_len=64, vocab_size=256)
DEFAULTS = SamplingParams(max_new_tokens=32)
NUM_THREADS = 4
PIECES = ("Once", " upon", "", " a time")


@dataclass(frozen=True, kw_only=True)
class FakeRanks:
    """Ranks over an adapter's modules."""

    min: int = 2
    max: int = 8
    sum: int = 40


@dataclass(frozen=True, kw_only=True)
class FakeRecord:
    """A loaded adapter."""

    adapter_id: str
    source: str = "/adapters/one"
    digest: str = "ab" * 32
    kind: str = "dora"
    ranks: FakeRanks = FakeRanks()
    num_modules: int = 7
    num_bytes: int = 4096
    num_in_use: int = 0
    loaded_at_seconds: float = 1_700_000_000.5


class FakeLease:
    """Counts itself in the registry while it is held."""

    image: object = None

    def __init__(self, registry: "FakeRegistry", record: FakeRecord) -> None:
        self._registry = registry
        self._is_held = True
        self.adapter_id = record.adapter_id
        self.digest = record.digest
        with registry.lock:
            registry.num_held += 1

    def release(self) -> None:
        with self._registry.lock:
            self._registry.num_held -= self._is_held
            self._is_held = False


class FakeRegistry:
    """Adapters in a dictionary; `may_go_on` holds up what may block, `error` is raised by `load`."""

    def __init__(self, records: Sequence[FakeRecord] = ()) -> None:
        self.records = {record.adapter_id: record for record in records}
        self.lock = threading.Lock()
        self.num_held = 0
        self.num_acquiring = 0
        self.num_loads = 0
        self.error: Exception | None = None
        self.entered = threading.Event()
        self.may_go_on = threading.Event()
        self.may_go_on.set()
        self.loaded = threading.Event()

    def acquire(self, reference: str) -> FakeLease:
        with self.lock:
            self.num_acquiring += 1
        self._wait()
        return FakeLease(self, self.get(reference.partition("@")[0]))

    def load(
        self, adapter_id: str, source: str, *, replace: bool = False, expected_digest: str | None = None
    ) -> FakeRecord:
        self._wait()
        self.num_loads += 1
        if self.error is not None:
            raise self.error
        digest = (expected_digest or "cd").ljust(64, "0")
        if adapter_id in self.records and not replace:
            served = self.records[adapter_id].digest
            raise AdapterExistsError(adapter_id, served_digest=served, new_digest=digest)
        self.records[adapter_id] = FakeRecord(adapter_id=adapter_id, source=source, digest=digest)
        self.loaded.set()
        return self.records[adapter_id]

    def unload(self, adapter_id: str, *, if_idle: bool = False) -> FakeRecord:
        record = self.get(adapter_id)
        if if_idle and record.num_in_use:
            raise AdapterInUseError(adapter_id, num_in_use=record.num_in_use)
        return self.records.pop(adapter_id)

    def get(self, adapter_id: str) -> FakeRecord:
        if adapter_id not in self.records:
            raise AdapterNotFoundError(adapter_id)
        return self.records[adapter_id]

    def list(self) -> list[FakeRecord]:
        return list(self.records.values())

    def _wait(self) -> None:
        self.entered.set()
        assert self.may_go_on.wait(30)


class FakeEngine:
    """Answers every request with PIECES at once, or, without `answers`, only when the test calls `emit`."""

    def __init__(self, *, answers: bool = True) -> None:
        self.answers = answers
        self.error: Exception | None = None
        self.live: dict[str, Request] = {}
        self.requests: list[Request] = []
        self.submitted: asyncio.Queue[Request] = asyncio.Queue()
        self.cancelled: asyncio.Queue[str] = asyncio.Queue()
        self.on_outputs: Callable[[Sequence[RequestOutput]], None] = lambda _: None
        self.is_draining = False
        self.is_closed = False
        self.is_idle = threading.Event()
        self.is_idle.set()

    def submit(self, request: Request) -> None:
        if self.error is not None:
            raise self.error
        if self.is_draining:
            raise DrainingError
        self.live[request.request_id] = request
        self.is_idle.clear()
        self.requests.append(request)
        self.submitted.put_nowait(request)
        if self.answers:
            for output in script(request):
                self.emit(output)

    def emit(self, output: RequestOutput) -> None:
        if output.is_terminal:
            self._end(output.request_id)
        self.on_outputs([output])

    def cancel(self, request_id: str) -> None:
        if request_id in self.live:
            self._end(request_id)
            self.cancelled.put_nowait(request_id)

    def stats(self) -> EngineStats:
        return EngineStats(
            num_running=len(self.live), num_queued=3, max_adapters_in_one_step=5, is_draining=self.is_draining
        )

    def drain(self, timeout: float | None = None) -> bool:
        self.is_draining = True
        return self.is_idle.wait(timeout)

    def close(self) -> None:
        self.is_closed = True
        for request_id in list(self.live):
            self.emit(RequestOutput(request_id=request_id, error=EngineDownError()))

    def _end(self, request_id: str) -> None:
        if lease := self.live.pop(request_id).lease:
            lease.release()
        if not self.live:
            self.is_idle.set()


def script(request: Request) -> list[RequestOutput]:
    """The outputs of one answer: a token each, the third of which has no text of its own yet."""
    outputs = [
        RequestOutput(
            request_id=request.request_id,
            text=piece,
            token_ids=(10 + index,),
            logprobs=(TokenLogprob(token_id=10 + index, logprob=-0.5, top=((10 + index, -0.5), (9, -1.5))),)
            if request.sampling.logprobs
            else (),
        )
        for index, piece in enumerate(PIECES)
    ]
    finish = Finish(
        reason=FinishReason.STOP,
        num_prompt_tokens=len(request.prompt_token_ids),
        num_generated_tokens=len(PIECES),
        stop_string="!",
        ttft_seconds=0.25,
        queue_seconds=0.125,
    )
    return [*outputs, RequestOutput(request_id=request.request_id, finish=finish)]


@dataclass
class FakeObserver:
    """Remembers what it is told."""

    calls: list[tuple[str, str, str]] = field(default_factory=list)
    a_call_finished: asyncio.Event = field(default_factory=asyncio.Event)

    def call_finished(self, *, method: str, code: str, finish_reason: str = "") -> None:
        self.calls.append((method, code, finish_reason))
        self.a_call_finished.set()


@dataclass(kw_only=True)
class Service:
    """A server on loopback and the stubs that call it."""

    engine: FakeEngine
    registry: FakeRegistry
    observer: FakeObserver
    streams: OutputStreams
    health: Health
    server: aio.Server
    channel: aio.Channel
    port: int

    @property
    def generation(self) -> "GenerationServiceStub":
        return GenerationServiceStub(self.channel)

    @property
    def adapters(self) -> "AdapterServiceStub":
        return AdapterServiceStub(self.channel)

    @property
    def info(self) -> "ServerServiceStub":
        return ServerServiceStub(self.channel)

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"


FACTS = ServerFacts(
    version="0.1.0",
    base_model="tiny",
    base_digest="ef" * 32,
    device="cpu",
    dtype="bfloat16",
    exact=True,
    native_kernels=False,
    limits=LIMITS,
    defaults=DEFAULTS,
    max_num_seqs=8,
    max_batched_tokens=128,
    max_queue=16,
    max_rank=64,
    max_adapters=4,
)


@asynccontextmanager
async def bound(
    *, answers: bool = True, records: Sequence[FakeRecord] = (), max_pending: int = 1024
) -> AsyncIterator[Service]:
    """A server that listens but has not started."""
    engine, registry, observer = FakeEngine(answers=answers), FakeRegistry(records), FakeObserver()
    streams = OutputStreams(asyncio.get_running_loop(), max_pending=max_pending)
    engine.on_outputs = streams.on_outputs
    health = Health()
    with ThreadPoolExecutor(NUM_THREADS) as executor:
        server = build_server(
            Servicers(
                generation=GenerationServicer(
                    engine=engine,
                    registry=registry,
                    streams=streams,
                    encode=lambda text: [1, *text.encode()],
                    limits=LIMITS,
                    defaults=DEFAULTS,
                    executor=executor,
                    observer=observer,
                    draw_seed=lambda: 77,
                ),
                adapters=AdapterServicer(
                    registry=registry,
                    executor=executor,
                    observer=observer,
                    is_draining=lambda: engine.is_draining,
                ),
                server=ServerServicer(facts=FACTS, engine=engine, registry=registry, observer=observer),
                health=health,
            )
        )
        port = bind(server, host="127.0.0.1", port=0)
        async with aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            yield Service(
                engine=engine,
                registry=registry,
                observer=observer,
                streams=streams,
                health=health,
                server=server,
                channel=channel,
                port=port,
            )


@asynccontextmanager
async def serving(
    *, answers: bool = True, records: Sequence[FakeRecord] = (), max_pending: int = 1024
) -> AsyncIterator[Service]:
    """A server that answers."""
    async with bound(answers=answers, records=records, max_pending=max_pending) as service:
        await service.server.start()
        await service.health.serving()
        try:
            yield service
        finally:
            await service.server.stop(None)

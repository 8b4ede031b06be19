"""A lorasrv server without model or engine: real gRPC on a free port, answers made up from the request.

As a program it prints where it listens and serves until SIGTERM; in tests it is a context manager.
"""

import signal
import sys
import threading
import time
from collections.abc import Iterator
from concurrent import futures

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from lorasrv_proto.v1 import (
    adapters_pb2,
    adapters_pb2_grpc,
    generation_pb2,
    generation_pb2_grpc,
    server_pb2,
    server_pb2_grpc,
)

WORDS = ("one ", "two ", "three ", "för ", "five ")
KINDS = {
    "lora": adapters_pb2.ADAPTER_KIND_LORA,
    "dora": adapters_pb2.ADAPTER_KIND_DORA,
    "adalora": adapters_pb2.ADAPTER_KIND_ADALORA,
}


class Refusal(Exception):
    """What a method answers instead of a response."""

    def __init__(self, code, message, reason, *details, metadata=None, pushback_ms=None):
        super().__init__(message)
        self.code = code
        self.pushback_ms = pushback_ms
        info = error_details_pb2.ErrorInfo(reason=reason, domain="lorasrv", metadata=metadata or {})
        self.status = status_pb2.Status(code=code.value[0], message=message)
        for detail in (info, *details):
            packed = any_pb2.Any()
            packed.Pack(detail)
            self.status.details.append(packed)

    def abort(self, context):
        trailing = [("grpc-status-details-bin", self.status.SerializeToString())]
        if self.pushback_ms is not None:
            trailing.append(("grpc-retry-pushback-ms", str(self.pushback_ms)))
        context.set_trailing_metadata(tuple(trailing))
        context.abort(self.code, self.status.message)


def retry_info(seconds):
    return error_details_pb2.RetryInfo(
        retry_delay=duration_pb2.Duration(seconds=int(seconds), nanos=int(seconds % 1 * 1e9))
    )


class FakeServer(
    generation_pb2_grpc.GenerationServiceServicer,
    adapters_pb2_grpc.AdapterServiceServicer,
    server_pb2_grpc.ServerServiceServicer,
):
    """All services; `requests` records what came, `refusals` is served first, one per call."""

    def __init__(self):
        self.adapters = {}
        self.requests = []
        self.refusals = []
        self.cancelled = threading.Event()
        self.hold = threading.Event()
        self.hold.set()
        self.lock = threading.Lock()
        self.waiting = {}
        self.largest_batch = 0

    def __enter__(self):
        self.server = grpc.server(futures.ThreadPoolExecutor(max_workers=40))
        generation_pb2_grpc.add_GenerationServiceServicer_to_server(self, self.server)
        adapters_pb2_grpc.add_AdapterServiceServicer_to_server(self, self.server)
        server_pb2_grpc.add_ServerServiceServicer_to_server(self, self.server)
        self.health = health.HealthServicer()
        for service in ("", "live", "ready"):
            self.health.set(service, health_pb2.HealthCheckResponse.SERVING)
        health_pb2_grpc.add_HealthServicer_to_server(self.health, self.server)
        self.target = f"127.0.0.1:{self.server.add_insecure_port('127.0.0.1:0')}"
        self.server.start()
        return self

    def __exit__(self, *_):
        self.hold.set()
        self.server.stop(None).wait()

    def Generate(self, request, context):
        self.begin(request, context)
        self.check_adapter(request, context)
        words = self.words(request)
        return generation_pb2.GenerateResponse(
            text="".join(words), token_ids=range(len(words)), logprobs=self.logprobs(request), **self.ending(request)
        )

    def GenerateStream(self, request, context) -> Iterator[generation_pb2.GenerateStreamResponse]:
        self.begin(request, context)
        request = request.request
        self.check_adapter(request, context)
        context.add_callback(self.cancelled.set)
        with self.lock:
            self.waiting[request.adapter_id] = self.waiting.get(request.adapter_id, 0) + 1
            self.largest_batch = max(self.largest_batch, sum(self.waiting.values()))
        for index, word in enumerate(self.words(request)):
            chunk = generation_pb2.GenerateChunk(text=word, token_ids=[index])
            yield generation_pb2.GenerateStreamResponse(chunk=chunk)
            while index == 1 and not self.hold.wait(0.05) and context.is_active():
                pass
        with self.lock:
            self.waiting[request.adapter_id] -= 1
        finish = generation_pb2.GenerateFinish(**self.ending(request))
        yield generation_pb2.GenerateStreamResponse(finish=finish)

    def LoadAdapter(self, request, context):
        self.begin(request, context)
        adapter = adapters_pb2.Adapter(
            adapter_id=request.adapter_id,
            source=request.source,
            digest=(request.adapter_id.encode().hex() * 64)[:64],
            kind=KINDS.get(request.adapter_id, adapters_pb2.ADAPTER_KIND_RSLORA),
            min_rank=2,
            max_rank=8,
            total_rank=30,
            num_modules=7,
            num_bytes=3 * 1024**2,
            state=adapters_pb2.ADAPTER_STATE_READY,
        )
        adapter.load_time.FromSeconds(1_700_000_000)
        self.adapters[request.adapter_id] = adapter
        return adapters_pb2.LoadAdapterResponse(adapter=adapter)

    def UnloadAdapter(self, request, context):
        self.begin(request, context)
        self.check_adapter(request, context)
        adapter = self.adapters.pop(request.adapter_id)
        adapter.state = adapters_pb2.ADAPTER_STATE_UNLOADED
        return adapters_pb2.UnloadAdapterResponse(adapter=adapter)

    def GetAdapter(self, request, context):
        self.begin(request, context)
        self.check_adapter(request, context)
        return adapters_pb2.GetAdapterResponse(adapter=self.adapters[request.adapter_id])

    def ListAdapters(self, request, context):
        self.begin(request, context)
        ids = sorted(self.adapters)
        start = int(request.page_token or 0)
        stop = start + (request.page_size or 2)
        return adapters_pb2.ListAdaptersResponse(
            adapters=[self.adapters[name] for name in ids[start:stop]],
            next_page_token=str(stop) if stop < len(ids) else "",
        )

    def GetServerInfo(self, request, context):
        self.begin(request, context)
        return server_pb2.GetServerInfoResponse(
            version="9.9",
            base_model="fake",
            limits=server_pb2.Limits(max_rank=64),
            sampling_defaults=server_pb2.SamplingDefaults(top_p=1.0),
            features=["stream"],
            device="cpu",
            max_adapters_in_one_step=len(self.adapters),
        )

    def begin(self, request, context):
        with self.lock:
            self.requests.append(type(request).FromString(request.SerializeToString()))
            refusal = self.refusals.pop(0) if self.refusals else None
        if refusal:
            refusal.abort(context)

    def check_adapter(self, request, context):
        if request.adapter_id and request.adapter_id not in self.adapters:
            message = f"adapter {request.adapter_id!r} is not loaded"
            Refusal(grpc.StatusCode.NOT_FOUND, message, "ADAPTER_NOT_FOUND").abort(context)

    def words(self, request):
        return [f"{request.adapter_id} ", *WORDS][: request.max_new_tokens or 3]

    def logprobs(self, request):
        if not request.HasField("logprobs"):
            return []
        top = [generation_pb2.TopLogprob(token_id=4, logprob=-0.25)]
        return [generation_pb2.TokenLogprob(token_id=4, logprob=-0.25, top=top)]

    def ending(self, request):
        return {
            "finish_reason": generation_pb2.FINISH_REASON_LENGTH,
            "usage": generation_pb2.Usage(prompt_tokens=5, generated_tokens=len(self.words(request))),
            "adapter_digest": "ab" * 32 if request.adapter_id else "",
            "timings": generation_pb2.Timings(queue_seconds=0.25, time_to_first_token_seconds=0.5),
            "seed": request.seed,
        }


def main():
    """`fake_server.py [die-at-start | die-when-asked | deaf]`."""
    mode = sys.argv[1] if len(sys.argv) > 1 else ""
    print("2026-01-01 INFO fake: beginning", file=sys.stderr, flush=True)
    if mode == "die-at-start":
        print("no such model: nowhere", file=sys.stderr)
        sys.exit(3)
    done = threading.Event()
    signal.signal(signal.SIGTERM, (lambda *_: None) if mode == "deaf" else (lambda *_: done.set()))
    with FakeServer() as server:
        if mode == "die-when-asked":
            server.begin = lambda *_: (print("engine fell over", file=sys.stderr, flush=True), time.sleep(0.05), die())
        print(f"2026-01-01 INFO fake: listening on {server.target}", file=sys.stderr, flush=True)
        done.wait()


def die():
    import os

    os._exit(9)


if __name__ == "__main__":
    main()

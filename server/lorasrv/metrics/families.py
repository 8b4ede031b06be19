"""The metric families of a server that are counted as things happen: names, labels, buckets and what they mean.

Every instance makes its own, registered nowhere; labels whose values are known beforehand have their series from the
start, so that a rate over the first event is not lost. Knows no event: `lorasrv.metrics.server` does.
"""

from collections.abc import Iterator

from prometheus_client import Counter, Histogram
from prometheus_client.metrics_core import Metric

_LATENCY_BUCKETS_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
_TOKEN_GAP_BUCKETS_SECONDS = (0.002, 0.005, 0.01, 0.015, 0.02, 0.03, 0.04, 0.06, 0.08, 0.12, 0.2, 0.5, 1.0, 2.5, 10.0)
_STEP_BUCKETS_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.08, 0.12, 0.2, 0.5, 1.0, 2.5, 10.0)
_TOKEN_COUNT_BUCKETS = (1, 4, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 131072)
_BATCH_BUCKETS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 256)
_BATCH_ADAPTER_BUCKETS = (0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 128, 256)

REJECTION_REASONS = ("QUEUE_FULL", "QUEUE_TIMEOUT", "DRAINING", "ENGINE_DOWN")
CANCELLED_BY = {"CANCELLED": "client", "DEADLINE_EXCEEDED": "deadline", "SLOW_READER": "slow_reader"}
PHASES = ("queued", "running")
LEVELS = ("device", "host")


class Families:
    """All counters and histograms of one server, except those per adapter."""

    def __init__(self) -> None:
        self.requests = _counter(
            "requests_total",
            "Calls answered, by gRPC method and status code; finish_reason is empty for those that did not end well.",
            ("method", "code", "finish_reason"),
        )
        self.rejected = _counter(
            "requests_rejected_total", "Requests turned away before their first step, by reason.", ("reason",)
        )
        self.cancelled = _counter(
            "requests_cancelled_total",
            "Accepted requests ended early, by whether a step had run them and by who ended them.",
            ("phase", "by"),
        )
        self.prompt_tokens = _counter(
            "prompt_tokens_total", "Tokens prefilled, those computed again after a preemption included."
        )
        self.generated_tokens = _counter("generated_tokens_total", "Tokens sampled.")
        self.adapter_loads = _counter(
            "adapter_loads_total", "Adapter loads, by result: ok, or error and its reason.", ("result", "reason")
        )
        self.adapter_evictions = _counter(
            "adapter_evictions_total", "Idle adapters that made room for others, by the level they left.", ("level",)
        )
        self.engine_steps = _counter("engine_steps_total", "Engine steps run.")
        self.preemptions = _counter(
            "preemptions_total", "Sequences that gave up their KV blocks to others and were computed again."
        )
        self._define_request_histograms()
        self._define_step_histograms()
        self._create_known_series()

    def collect(self) -> Iterator[Metric]:
        """Yields every family."""
        for family in vars(self).values():
            yield from family.collect()

    def _define_request_histograms(self) -> None:
        self.time_to_first_token = _histogram(
            "time_to_first_token_seconds",
            "From arrival to the first token, by whether an adapter answered.",
            _LATENCY_BUCKETS_SECONDS,
            ("adapted",),
        )
        self.inter_token_latency = _histogram(
            "inter_token_latency_seconds", "Between two tokens of one request.", _TOKEN_GAP_BUCKETS_SECONDS
        )
        self.request_duration = _histogram(
            "request_duration_seconds",
            "From arrival to the last token, of requests that ended well.",
            _LATENCY_BUCKETS_SECONDS,
        )
        self.queue_time = _histogram(
            "queue_time_seconds", "From arrival to the first step, of all accepted requests.", _LATENCY_BUCKETS_SECONDS
        )
        self.prefill_time = _histogram(
            "prefill_time_seconds", "From the first step to the first token.", _LATENCY_BUCKETS_SECONDS
        )
        self.decode_time = _histogram(
            "decode_time_seconds", "From the first token to the last.", _LATENCY_BUCKETS_SECONDS
        )
        self.request_prompt_tokens = _histogram(
            "request_prompt_tokens", "Prompt tokens of accepted requests.", _TOKEN_COUNT_BUCKETS
        )
        self.request_generated_tokens = _histogram(
            "request_generated_tokens", "Generated tokens of requests that ended well.", _TOKEN_COUNT_BUCKETS
        )
        self.adapter_load_duration = _histogram(
            "adapter_load_duration_seconds",
            "From asking for an adapter to it being servable.",
            _LATENCY_BUCKETS_SECONDS,
        )

    def _define_step_histograms(self) -> None:
        self.step_duration = _histogram(
            "engine_step_duration_seconds", "From scheduling a step to handing over its tokens.", _STEP_BUCKETS_SECONDS
        )
        self.batch_requests = _histogram("batch_requests", "Requests in one engine step.", _BATCH_BUCKETS)
        self.batch_adapters = _histogram(
            "batch_adapters", "Distinct adapters in one engine step; the base is none.", _BATCH_ADAPTER_BUCKETS
        )

    def _create_known_series(self) -> None:
        for reason in REJECTION_REASONS:
            self.rejected.labels(reason)
        for phase in PHASES:
            for by in CANCELLED_BY.values():
                self.cancelled.labels(phase, by)
        self.adapter_loads.labels("ok", "")
        for level in LEVELS:
            self.adapter_evictions.labels(level)


def _counter(name: str, documentation: str, labels: tuple[str, ...] = ()) -> Counter:
    return Counter(f"lorasrv_{name}", documentation, labels, registry=None)


def _histogram(name: str, documentation: str, buckets: tuple[float, ...], labels: tuple[str, ...] = ()) -> Histogram:
    return Histogram(f"lorasrv_{name}", documentation, labels, registry=None, buckets=buckets)

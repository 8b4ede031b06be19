"""What happens in a server, as metrics: the observer of the engine, of the adapter registry and of the service.

Knows which event moves which metric. What the metrics are called is in `lorasrv.metrics.families`, gauges are in
`lorasrv.metrics.state`, counters per adapter in `lorasrv.metrics.adapters`.
"""

import platform
import time
from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from lorasrv import __version__
from lorasrv.engine.observer import EngineStats, RequestStats, StepStats
from lorasrv.metrics.adapters import AdapterSeries
from lorasrv.metrics.families import CANCELLED_BY, REJECTION_REASONS, Families
from lorasrv.metrics.labels import with_labels
from lorasrv.metrics.state import ServerState, state_families


class ServerMetrics(Collector):
    """The metrics of one server, in a registry of its own.

    Implements `lorasrv.engine.observer.EngineObserver`, `lorasrv.rpc.ports.CallObserver` and
    `lorasrv_adapters.registry.AdapterObserver`. Every method may be called from any thread.

    Args:
        registry: where to register; None makes a new registry.
        base_model: the value of the label `base_model`, which every series carries.
        max_adapter_series: how many adapters have counters of their own, at most.
        clock: Unix seconds.
    """

    def __init__(
        self,
        registry: CollectorRegistry | None = None,
        *,
        base_model: str,
        max_adapter_series: int = 50,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.registry = CollectorRegistry() if registry is None else registry
        self._base_model = base_model
        self._clock = clock
        self._families = Families()
        self._adapters = AdapterSeries(max_adapter_series)
        self._read_state: Callable[[], ServerState] | None = None
        self._ttft_adapted = self._families.time_to_first_token.labels("true")
        self._ttft_base = self._families.time_to_first_token.labels("false")
        self.registry.register(self)

    def read_state_from(self, read: Callable[[], ServerState]) -> None:
        """Names what gauges are read from, at every scrape and on its thread; until then they are not exported."""
        self._read_state = read

    def step_finished(self, stats: StepStats) -> None:
        """Counts one engine step."""
        families = self._families
        families.engine_steps.inc()
        families.step_duration.observe(stats.duration_seconds)
        families.batch_requests.observe(stats.num_sequences)
        families.batch_adapters.observe(stats.num_adapters)
        families.prompt_tokens.inc(stats.num_prompt_tokens)
        families.generated_tokens.inc(stats.num_generated_tokens)
        families.preemptions.inc(stats.num_preemptions)
        observe = families.inter_token_latency.observe
        for gap in stats.inter_token_seconds:
            observe(gap)

    def first_token(self, *, ttft_seconds: float, is_adapted: bool) -> None:
        """Counts the first token of a request."""
        (self._ttft_adapted if is_adapted else self._ttft_base).observe(ttft_seconds)

    def request_finished(self, stats: RequestStats) -> None:
        """Counts a request that left the engine, however it ended."""
        families = self._families
        families.queue_time.observe(stats.queue_seconds)
        families.request_prompt_tokens.observe(stats.num_prompt_tokens)
        if stats.adapter_id:
            self._adapters.add(
                stats.adapter_id,
                num_prompt_tokens=stats.num_prompt_tokens,
                num_generated_tokens=stats.num_generated_tokens,
            )
        if stats.error_reason:
            self._count_error(stats)
            return
        families.request_duration.observe(stats.duration_seconds)
        families.request_generated_tokens.observe(stats.num_generated_tokens)
        if stats.prefill_seconds is not None:
            families.prefill_time.observe(stats.prefill_seconds)
        if stats.decode_seconds is not None:
            families.decode_time.observe(stats.decode_seconds)

    def request_rejected(self, reason: str) -> None:
        """Counts a request the engine did not accept."""
        self._families.rejected.labels(reason).inc()

    def state_changed(self, stats: EngineStats) -> None:
        """Ignored: gauges are read when they are scraped, not pushed."""

    def call_finished(self, *, method: str, code: str, finish_reason: str = "") -> None:
        """Counts a call that was answered.

        Args:
            method: the method's name, e.g. "GenerateStream".
            code: the name of its gRPC status code, e.g. "OK".
            finish_reason: "stop", "length" or "eos" where a generation ended well.
        """
        self._families.requests.labels(method, code, finish_reason).inc()

    def adapter_loaded(self, record: object, seconds: float) -> None:  # noqa: ARG002
        """Counts a load that ended well after this time."""
        self._families.adapter_loads.labels("ok", "").inc()
        self._families.adapter_load_duration.observe(seconds)

    def adapter_load_failed(self, reason: str) -> None:
        """Counts a load that failed; `reason` is `AdapterError.reason`."""
        self._families.adapter_loads.labels("error", reason).inc()

    def adapter_evicted(self, level: str) -> None:
        """Counts an idle adapter that lost its place on "device" or "host"."""
        self._families.adapter_evictions.labels(level).inc()

    def adapter_unloaded(self, adapter_id: str) -> None:
        """Drops the series of an adapter that is no longer served."""
        self._adapters.remove(adapter_id)

    def collect(self) -> Iterator[Metric]:
        """Yields every family, each sample with the label `base_model`."""
        yield from with_labels(self._all_families(), base_model=self._base_model)

    def _all_families(self) -> Iterator[Metric]:
        yield from self._families.collect()
        if self._read_state is not None:
            state = self._read_state()
            self._adapters.keep_only(state.adapter_ids)
            yield from state_families(state, now_seconds=self._clock())
        yield from self._adapters.collect()
        build = GaugeMetricFamily(
            "lorasrv_build_info", "Always 1; its labels say what is running.", labels=["version", "python_version"]
        )
        build.add_metric([__version__, platform.python_version()], 1.0)
        yield build

    def _count_error(self, stats: RequestStats) -> None:
        by = CANCELLED_BY.get(stats.error_reason)
        if by is not None:
            self._families.cancelled.labels(stats.phase, by).inc()
        elif stats.error_reason in REJECTION_REASONS:
            self._families.rejected.labels(stats.error_reason).inc()

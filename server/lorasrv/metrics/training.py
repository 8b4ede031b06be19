"""What happens in a training run, as metrics: an observer of the run.

Knows what the metrics are called and which event moves which. The word for a job is `training_job`: Prometheus itself
uses `job` for what it scrapes.
"""

import re
import threading
from collections.abc import Callable, Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from lorasrv.metrics.labels import with_labels
from lorasrv.train.observer import RunObserver, RunStart, StepReport, StepResult

_SECONDS_BUCKETS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0, 640.0)
# series of ranks, of all jobs together; a run with more has only its totals
_MAX_RANK_SERIES = 5000
_LAYER = re.compile(r"(?:.*\.)?layers\.(\d+)\.(?:.*\.)?([^.]+)")

_JOB_GAUGES: Mapping[str, tuple[str, Callable[[StepResult], float]]] = {
    "loss": ("Loss of the last step, in nats a token, by job.", lambda result: result.loss),
    "learning_rate": ("Learning rate of the last step, by job.", lambda result: result.learning_rate),
    "gradient_norm": ("Norm of the last step's gradient before clipping, by job.", lambda result: result.gradient_norm),
    "total_rank": ("Sum of the ranks of all modules, by job.", lambda result: sum(result.ranks.values())),
}


class TrainingMetrics(RunObserver, Collector):
    """The metrics of one run, in a registry of its own; told by the run's thread, read by any.

    Args:
        registry: where to register; None makes a new registry.
        base_model: the value of the label `base_model`, which every series carries.
    """

    def __init__(self, registry: CollectorRegistry | None = None, *, base_model: str) -> None:
        self.registry = CollectorRegistry() if registry is None else registry
        self._base_model = base_model
        self._lock = threading.Lock()
        self._start: RunStart | None = None
        self._last: StepReport | None = None
        self._results: dict[str, StepResult] = {}
        self._held_out: dict[str, float] = {}
        self._tokens = _counter("tokens_total", "Tokens that went through the model in steps, of all jobs.")
        self._shrinks = _counter(
            "out_of_memory_halvings_total",
            "Times a step ran out of memory and was begun again in smaller pieces.",
        )
        self._step_duration = _histogram("step_duration_seconds", "A step, without evaluation and checkpoint.")
        self._checkpoint_duration = _histogram("checkpoint_duration_seconds", "Writing a checkpoint of all jobs.")
        self.registry.register(self)

    def run_started(self, start: RunStart) -> None:
        """Notes how long the run is."""
        with self._lock:
            self._start = start

    def step_finished(self, report: StepReport) -> None:
        """Counts a step."""
        with self._lock:
            self._last = report
            self._results |= report.jobs
            self._held_out |= report.evaluations
            self._tokens.inc(report.tokens)
            self._shrinks.inc(report.num_shrinks)
            self._step_duration.observe(report.seconds)

    def checkpoint_written(self, step: int, seconds: float) -> None:  # noqa: ARG002
        """Counts a checkpoint."""
        with self._lock:
            self._checkpoint_duration.observe(seconds)

    def collect(self) -> Iterator[Metric]:
        """Yields every family, each sample with the label `base_model`."""
        with self._lock:
            families = list(self._families())
        yield from with_labels(families, base_model=self._base_model)

    def _families(self) -> Iterator[Metric]:
        for family in (self._tokens, self._shrinks, self._step_duration, self._checkpoint_duration):
            yield from family.collect()
        if self._start is None:
            return
        done = self._start.first_step if self._last is None else self._last.step
        yield _gauge("step", "Steps done, those of an interrupted run before this included.", done)
        yield _gauge("max_steps", "Steps there will be.", self._start.max_steps)
        if self._last is None:
            return
        speed = self._last.tokens / self._last.seconds
        yield _gauge("tokens_per_second", "Tokens of the last step over its seconds.", speed)
        yield _gauge("time_left_seconds", "Until the last step, at the pace so far.", self._last.seconds_left)
        yield _gauge(
            "memory_peak_bytes",
            "The most memory that was in use so far: the device's, on a CPU the process's.",
            self._last.memory_bytes,
        )
        for name, (documentation, read) in _JOB_GAUGES.items():
            yield _by_job(name, documentation, {job: read(result) for job, result in self._results.items()})
        yield _by_job("held_out_loss", "Last loss of held-out data, in nats a token, by job.", self._held_out)
        yield self._module_ranks()

    def _module_ranks(self) -> Metric:
        family = GaugeMetricFamily(
            "lorasrv_train_module_rank",
            f"Rank by job, layer and module; absent where that would make more than {_MAX_RANK_SERIES} series.",
            labels=["training_job", "layer", "module"],
        )
        if sum(len(result.ranks) for result in self._results.values()) <= _MAX_RANK_SERIES:
            for job, result in self._results.items():
                for module, rank in result.ranks.items():
                    family.add_metric([job, *_place(module)], rank)
        return family


def _place(module: str) -> tuple[str, str]:
    """Layer and last name of a module; no layer for one that is in none."""
    match = _LAYER.fullmatch(module)
    return (match[1], match[2]) if match else ("", module)


def _counter(name: str, documentation: str) -> Counter:
    return Counter(f"lorasrv_train_{name}", documentation, registry=None)


def _histogram(name: str, documentation: str) -> Histogram:
    return Histogram(f"lorasrv_train_{name}", documentation, registry=None, buckets=_SECONDS_BUCKETS)


def _gauge(name: str, documentation: str, value: float) -> Metric:
    return GaugeMetricFamily(f"lorasrv_train_{name}", documentation, value=value)


def _by_job(name: str, documentation: str, values: Mapping[str, float]) -> Metric:
    family = GaugeMetricFamily(f"lorasrv_train_{name}", documentation, labels=["training_job"])
    for job, value in values.items():
        family.add_metric([job], value)
    return family

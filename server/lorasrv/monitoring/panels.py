"""The panels of a server's dashboard: what is asked of Prometheus, and what a reader is told about it.

Knows metric names and PromQL; how a panel becomes Grafana's JSON is in `lorasrv.monitoring.dashboard`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

_INSTANCE = '{instance=~"$instance"}'


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """One panel.

    Attributes:
        title: a few words.
        description: what it shows and what to make of it.
        unit: Grafana's name of the unit.
        queries: (PromQL, legend) of each line.
        kind: Grafana's panel type.
        max_value: upper end of the axis, where there is one.
    """

    title: str
    description: str
    unit: str
    queries: Sequence[tuple[str, str]]
    kind: str = "timeseries"
    max_value: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """Panels under one heading."""

    title: str
    panels: Sequence[Panel]


def rate(metric: str, *by: str) -> str:
    """A second's worth of a counter, over the chosen instances."""
    return f"sum{_by(*by)} (rate(lorasrv_{metric}{_INSTANCE}[$__rate_interval]))"


def quantile(share: float, metric: str, *by: str) -> str:
    """A quantile of a histogram, over the chosen instances."""
    return f"histogram_quantile({share}, {rate(f'{metric}_bucket', 'le', *by)})"


def mean(metric: str, *by: str) -> str:
    """The mean of a histogram, over the chosen instances."""
    return f"{rate(f'{metric}_sum', *by)} / {rate(f'{metric}_count', *by)}"


def gauge(metric: str, *by: str) -> str:
    """A gauge, added up over the chosen instances."""
    return f"sum{_by(*by)} (lorasrv_{metric}{_INSTANCE})"


def _by(*labels: str) -> str:
    return f" by ({', '.join(labels)})" if labels else ""


def _p50_p95(metric: str) -> tuple[tuple[str, str], ...]:
    return (quantile(0.5, metric), "p50"), (quantile(0.95, metric), "p95")


def mean_p95(metric: str) -> tuple[tuple[str, str], ...]:
    """Two lines about a histogram."""
    return (mean(metric), "mean"), (quantile(0.95, metric), "p95")


_OVERVIEW = (
    Panel(
        title="Requests per second",
        description="Calls answered, by status code.",
        unit="reqps",
        queries=((rate("requests_total", "code"), "{{code}}"),),
    ),
    Panel(
        title="Tokens per second",
        description="Tokens prefilled, those computed again after a preemption included, and tokens generated.",
        unit="short",
        queries=((rate("prompt_tokens_total"), "prompt"), (rate("generated_tokens_total"), "generated")),
    ),
    Panel(
        title="Requests running and queued",
        description="Requests in the batch, requests waiting, and how many may wait before new ones are rejected.",
        unit="short",
        queries=(
            (gauge("requests_running"), "running"),
            (gauge("requests_queued"), "queued"),
            (gauge("queue_capacity"), "queue capacity"),
        ),
    ),
    Panel(
        title="Time to first token",
        description="From a request's arrival to its first token, for adapters and for the plain base.",
        unit="s",
        queries=(
            (quantile(0.5, "time_to_first_token_seconds", "adapted"), "p50, adapted {{adapted}}"),
            (quantile(0.95, "time_to_first_token_seconds", "adapted"), "p95, adapted {{adapted}}"),
        ),
    ),
    Panel(
        title="Inter-token latency",
        description="Between two tokens of one request: what a reader of a stream sees.",
        unit="s",
        queries=_p50_p95("inter_token_latency_seconds"),
    ),
    Panel(
        title="Request duration",
        description="From arrival to the last token, of requests that ended well.",
        unit="s",
        queries=_p50_p95("request_duration_seconds"),
    ),
    Panel(
        title="Where the time of a request goes",
        description="Mean seconds waiting, until the first token, and from there to the last.",
        unit="s",
        queries=(
            (mean("queue_time_seconds"), "queue"),
            (mean("prefill_time_seconds"), "prefill"),
            (mean("decode_time_seconds"), "decode"),
        ),
    ),
    Panel(
        title="Servers",
        description="Instances by version, and those that are shutting down.",
        unit="short",
        queries=((gauge("build_info", "version"), "{{version}}"), (gauge("draining"), "draining")),
        kind="stat",
    ),
)

_ADAPTERS = (
    Panel(
        title="Adapters per step",
        description="Distinct adapters mixed in one engine step; the base is none.",
        unit="short",
        queries=mean_p95("batch_adapters"),
    ),
    Panel(
        title="Slots by level",
        description="Adapters kept on the device and in host memory, and how many there is room for.",
        unit="short",
        queries=(
            (gauge("adapter_slots_used", "level"), "{{level}} used"),
            (gauge("adapter_slots", "level"), "{{level}} slots"),
        ),
    ),
    Panel(
        title="Bytes by level",
        description="Memory of the adapters kept on the device and in host memory.",
        unit="bytes",
        queries=((gauge("adapter_bytes", "level"), "{{level}}"),),
    ),
    Panel(
        title="Loads and evictions",
        description="Adapters loaded or refused, and idle ones that made room. Steady evictions: too few slots.",
        unit="ops",
        queries=(
            (rate("adapter_loads_total", "result", "reason"), "load {{result}} {{reason}}"),
            (rate("adapter_evictions_total", "level"), "evicted from {{level}}"),
        ),
    ),
    Panel(
        title="Load duration",
        description="From asking for an adapter to it being servable; running requests do not wait for it.",
        unit="s",
        queries=mean_p95("adapter_load_duration_seconds"),
    ),
    Panel(
        title="Top adapters by tokens",
        description="Prompt and generated tokens of finished requests; adapters below the heaviest are _other.",
        unit="short",
        queries=((f"topk(10, {rate('adapter_tokens_total', 'adapter_id')})", "{{adapter_id}}"),),
    ),
    Panel(
        title="Top adapters by requests",
        description="Finished requests a second; adapters below the heaviest are _other.",
        unit="reqps",
        queries=((f"topk(10, {rate('adapter_requests_total', 'adapter_id')})", "{{adapter_id}}"),),
    ),
)

_ENGINE = (
    Panel(
        title="Step duration",
        description="From scheduling a step to handing over its tokens.",
        unit="s",
        queries=_p50_p95("engine_step_duration_seconds"),
    ),
    Panel(
        title="Steps per second",
        description="Engine steps run.",
        unit="ops",
        queries=((rate("engine_steps_total"), "steps"),),
    ),
    Panel(
        title="Batch size",
        description="Requests in one engine step.",
        unit="short",
        queries=mean_p95("batch_requests"),
    ),
    Panel(
        title="KV cache use",
        description="KV blocks in use over those there are. Near 100 %, requests wait or are preempted.",
        unit="percentunit",
        queries=((f"lorasrv_kv_cache_usage_ratio{_INSTANCE}", "{{instance}}"),),
        max_value=1.0,
    ),
    Panel(
        title="Preemptions per second",
        description="Sequences that gave up their KV blocks and were computed again. Steady: too little KV memory.",
        unit="ops",
        queries=((rate("preemptions_total"), "preemptions"),),
    ),
    Panel(
        title="Tokens per request",
        description="Mean length of prompts and of answers.",
        unit="short",
        queries=((mean("request_prompt_tokens"), "prompt"), (mean("request_generated_tokens"), "generated")),
    ),
)

_FAILED_CALLS = 'sum by (method) (rate(lorasrv_requests_total{instance=~"$instance", code!="OK"}[$__rate_interval]))'

_ERRORS = (
    Panel(
        title="Rejected by reason",
        description="Requests turned away before their first step.",
        unit="reqps",
        queries=((rate("requests_rejected_total", "reason"), "{{reason}}"),),
    ),
    Panel(
        title="Cancelled by phase",
        description="Requests ended early: queued or running, by the client, their deadline or a reader too slow.",
        unit="reqps",
        queries=((rate("requests_cancelled_total", "phase", "by"), "{{phase}}, by {{by}}"),),
    ),
    Panel(
        title="Share of calls that failed",
        description="Calls with a status other than OK, over all calls, by method.",
        unit="percentunit",
        queries=(
            (
                # a method that never failed has no such series, and zero is what it should show
                f"({_FAILED_CALLS} or 0 * {rate('requests_total', 'method')}) / {rate('requests_total', 'method')}",
                "{{method}}",
            ),
        ),
        max_value=1.0,
    ),
)

ROWS = (
    Row(title="Overview", panels=_OVERVIEW),
    Row(title="Adapters", panels=_ADAPTERS),
    Row(title="Engine", panels=_ENGINE),
    Row(title="Errors", panels=_ERRORS),
)

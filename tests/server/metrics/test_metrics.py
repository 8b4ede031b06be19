"""What the metrics say after something happened."""

import inspect
import subprocess
import sys

import pytest
from lorasrv.engine.observer import EngineObserver, EngineStats
from lorasrv.metrics import ServerMetrics
from lorasrv.rpc.ports import CallObserver
from lorasrv_adapters.registry import AdapterObserver
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families


def value(metrics: ServerMetrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(f"lorasrv_{name}", {"base_model": "tiny", **labels})


def series(metrics: ServerMetrics, name: str) -> dict[frozenset, float]:
    samples = (sample for family in metrics.registry.collect() for sample in family.samples)
    return {
        frozenset((key, text) for key, text in sample.labels.items() if key != "base_model"): sample.value
        for sample in samples
        if sample.name == f"lorasrv_{name}"
    }


def adapter_requests(metrics: ServerMetrics) -> dict[str, float]:
    return {dict(labels)["adapter_id"]: count for labels, count in series(metrics, "adapter_requests_total").items()}


@pytest.mark.parametrize("observer", [EngineObserver, CallObserver, AdapterObserver])
def test_is_what_the_other_parts_call(metrics, observer):
    names = [name for name in vars(observer) if not name.startswith("_")]
    assert names
    for name in names:
        parameters = inspect.signature(getattr(observer, name)).parameters.values()
        expected = [(parameter.name, parameter.kind) for parameter in parameters if parameter.name != "self"]
        ours = inspect.signature(getattr(metrics, name)).parameters.values()
        assert [(parameter.name, parameter.kind) for parameter in ours] == expected, name


def test_pushed_state_changes_nothing(metrics):
    before = generate_latest(metrics.registry)
    metrics.state_changed(EngineStats(num_running=5))
    assert generate_latest(metrics.registry) == before


def test_counts_a_step(metrics, step):
    metrics.step_finished(step())
    metrics.step_finished(step(num_adapters=0, inter_token_seconds=()))
    assert value(metrics, "engine_steps_total") == 2
    assert value(metrics, "prompt_tokens_total") == 22
    assert value(metrics, "generated_tokens_total") == 8
    assert value(metrics, "preemptions_total") == 2
    assert value(metrics, "engine_step_duration_seconds_sum") == pytest.approx(0.04)
    assert value(metrics, "batch_requests_sum") == 10
    assert value(metrics, "batch_adapters_bucket", le="0.0") == 1
    assert value(metrics, "inter_token_latency_seconds_count") == 3
    assert value(metrics, "inter_token_latency_seconds_sum") == pytest.approx(0.07)


def test_counts_first_tokens_by_whether_an_adapter_answered(metrics):
    metrics.first_token(ttft_seconds=0.3, is_adapted=True)
    metrics.first_token(ttft_seconds=0.2, is_adapted=False)
    assert value(metrics, "time_to_first_token_seconds_sum", adapted="true") == 0.3
    assert value(metrics, "time_to_first_token_seconds_sum", adapted="false") == 0.2


def test_counts_a_request_that_ended_well(metrics, request_ended):
    metrics.request_finished(request_ended())
    assert value(metrics, "request_duration_seconds_sum") == 0.5
    assert value(metrics, "queue_time_seconds_sum") == 0.1
    assert value(metrics, "prefill_time_seconds_count") == 1
    assert value(metrics, "decode_time_seconds_count") == 1
    assert value(metrics, "request_prompt_tokens_sum") == 7
    assert value(metrics, "request_generated_tokens_sum") == 3


@pytest.mark.parametrize(
    ("reason", "by"), [("CANCELLED", "client"), ("DEADLINE_EXCEEDED", "deadline"), ("SLOW_READER", "slow_reader")]
)
def test_counts_a_request_that_was_ended_early(metrics, request_ended, reason, by):
    ended = request_ended(
        error_reason=reason, finish_reason="", phase="queued", prefill_seconds=None, decode_seconds=None
    )
    metrics.request_finished(ended)
    assert value(metrics, "requests_cancelled_total", phase="queued", by=by) == 1
    assert sum(series(metrics, "requests_cancelled_total").values()) == 1
    assert value(metrics, "queue_time_seconds_count") == 1
    assert value(metrics, "request_duration_seconds_count") == 0


def test_a_request_that_waited_too_long_was_rejected(metrics, request_ended):
    metrics.request_finished(request_ended(error_reason="QUEUE_TIMEOUT", finish_reason="", phase="queued"))
    metrics.request_rejected("QUEUE_FULL")
    assert value(metrics, "requests_rejected_total", reason="QUEUE_TIMEOUT") == 1
    assert value(metrics, "requests_rejected_total", reason="QUEUE_FULL") == 1
    assert sum(series(metrics, "requests_cancelled_total").values()) == 0


def test_counts_calls_and_adapter_events(metrics):
    metrics.call_finished(method="Generate", code="OK", finish_reason="eos")
    metrics.call_finished(method="Generate", code="NOT_FOUND")
    metrics.adapter_loaded(object(), 0.5)
    metrics.adapter_load_failed("ADAPTER_CORRUPT")
    metrics.adapter_evicted("host")
    assert value(metrics, "requests_total", method="Generate", code="OK", finish_reason="eos") == 1
    assert value(metrics, "requests_total", method="Generate", code="NOT_FOUND", finish_reason="") == 1
    assert value(metrics, "adapter_loads_total", result="ok", reason="") == 1
    assert value(metrics, "adapter_loads_total", result="error", reason="ADAPTER_CORRUPT") == 1
    assert value(metrics, "adapter_load_duration_seconds_sum") == 0.5
    assert value(metrics, "adapter_evictions_total", level="host") == 1


def test_gauges_follow_the_state_at_scrape_time(metrics, state):
    now = [state()]
    metrics.read_state_from(lambda: now[0])
    assert value(metrics, "requests_running") == 3
    assert value(metrics, "requests_queued") == 2
    assert value(metrics, "queue_capacity") == 64
    assert value(metrics, "kv_cache_usage_ratio") == 0.25
    assert value(metrics, "draining") == 0
    assert value(metrics, "adapter_slots_used", level="device") == 2
    assert value(metrics, "adapter_slots", level="device") == 4
    assert value(metrics, "adapter_slots", level="host") is None
    assert value(metrics, "adapter_bytes", level="host") == 3072
    now[0] = state(engine=EngineStats(is_draining=True))
    assert value(metrics, "requests_running") == 0
    assert value(metrics, "kv_cache_usage_ratio") == 0
    assert value(metrics, "draining") == 1


def test_no_gauge_is_made_up_without_a_state(metrics):
    assert value(metrics, "requests_running") is None


def test_one_router_series_names_each_adapter_once(state):
    metrics = ServerMetrics(base_model="tiny", clock=lambda: 1700000000.0)
    states = iter([state(), state(resident_adapter_ids=frozenset(), waiting_adapter_ids=frozenset())])
    metrics.read_state_from(lambda: next(states))
    labels = {"max_lora": "4", "running_lora_adapters": "legal,noir", "waiting_lora_adapters": "haiku"}
    assert series(metrics, "lora_requests_info") == {frozenset(labels.items()): 1700000000.0}
    labels = {"max_lora": "4", "running_lora_adapters": "", "waiting_lora_adapters": ""}
    assert series(metrics, "lora_requests_info") == {frozenset(labels.items()): 1700000000.0}


def test_the_base_has_no_adapter_series(metrics, request_ended):
    metrics.request_finished(request_ended(adapter_id=""))
    assert adapter_requests(metrics) == {"_other": 0}


def test_only_so_many_adapters_have_series(metrics, request_ended):
    for adapter_id in ("a", "b", "c", "d", "a"):
        metrics.request_finished(request_ended(adapter_id=adapter_id))
    assert adapter_requests(metrics) == {"a": 2, "b": 1, "_other": 2}
    assert value(metrics, "adapter_tokens_total", adapter_id="a", kind="prompt") == 14
    assert value(metrics, "adapter_tokens_total", adapter_id="_other", kind="generated") == 6


def test_a_much_heavier_adapter_takes_the_series_of_the_lightest(metrics, request_ended):
    for adapter_id in ("light", "heavy", "heavy", "late"):
        metrics.request_finished(request_ended(adapter_id=adapter_id))
    assert "late" not in adapter_requests(metrics)
    metrics.request_finished(request_ended(adapter_id="late"))
    # what "late" did before stays where it was counted, and the past of "light" does not become a burst of others
    assert adapter_requests(metrics) == {"heavy": 2, "late": 1, "_other": 1}


def test_no_adapter_series_at_all(request_ended):
    metrics = ServerMetrics(base_model="tiny", max_adapter_series=0)
    metrics.request_finished(request_ended())
    assert adapter_requests(metrics) == {"_other": 1}


def test_many_adapters_do_not_grow_the_page(metrics, request_ended):
    for number in range(300):
        metrics.request_finished(request_ended(adapter_id=f"adapter-{number}"))
    counts = adapter_requests(metrics)
    assert len(counts) == 3
    assert sum(counts.values()) <= 300


def test_series_go_when_the_adapter_is_unloaded(metrics, request_ended):
    metrics.request_finished(request_ended(adapter_id="noir"))
    metrics.adapter_unloaded("noir")
    assert adapter_requests(metrics) == {"_other": 0}


def test_series_do_not_come_back_with_a_request_that_outlived_its_adapter(metrics, request_ended, state):
    metrics.read_state_from(lambda: state(adapter_ids=frozenset({"legal"})))
    metrics.request_finished(request_ended(adapter_id="legal"))
    metrics.adapter_unloaded("noir")
    metrics.request_finished(request_ended(adapter_id="noir"))
    assert adapter_requests(metrics) == {"legal": 1, "_other": 0}


def test_instances_share_nothing(exercised):
    other = ServerMetrics(base_model="tiny")
    assert value(other, "engine_steps_total") == 0
    assert value(exercised, "engine_steps_total") == 1


def test_every_series_is_ours_and_names_the_base(exercised):
    families = list(text_string_to_metric_families(generate_latest(exercised.registry).decode()))
    assert families
    for family in families:
        assert family.name.startswith("lorasrv_")
        assert family.documentation
        assert family.samples, family.name
        for sample in family.samples:
            assert sample.labels["base_model"] == "tiny"
            assert not sample.name.endswith("_created")


def test_no_histogram_has_a_label_per_adapter(exercised):
    for family in exercised.registry.collect():
        if family.type == "histogram":
            assert all("adapter_id" not in sample.labels for sample in family.samples), family.name


def test_needs_no_torch(tmp_path):
    code = "import sys, lorasrv.metrics, lorasrv.logs, lorasrv.monitoring.dashboard; print('torch' in sys.modules)"
    environment = {"PYTHONPATH": ":".join(path for path in sys.path if path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, cwd=tmp_path, text=True, capture_output=True)
    assert done.stdout.strip() == "False", done.stderr


def test_series_known_beforehand_begin_at_zero(metrics):
    assert value(metrics, "adapter_loads_total", result="ok", reason="") == 0
    assert value(metrics, "adapter_evictions_total", level="host") == 0
    assert value(metrics, "requests_rejected_total", reason="QUEUE_FULL") == 0
    assert value(metrics, "requests_cancelled_total", phase="running", by="deadline") == 0
    assert value(metrics, "time_to_first_token_seconds_count", adapted="false") == 0

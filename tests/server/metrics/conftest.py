"""Metrics of a server that did a little of everything."""

from collections.abc import Callable

import pytest
from lorasrv.engine.observer import EngineStats, RequestStats, StepStats
from lorasrv.metrics import LevelState, ServerMetrics, ServerState
from lorasrv.metrics.training import TrainingMetrics
from lorasrv.train.observer import RunStart, StepReport, StepResult


def server_state(**changes) -> ServerState:
    values = {
        "engine": EngineStats(
            num_running=3, num_queued=2, queue_capacity=64, num_kv_blocks=8, num_kv_blocks_used=2, is_draining=False
        ),
        "levels": {
            "device": LevelState(num_adapters=2, num_slots=4, num_bytes=2048),
            "host": LevelState(num_adapters=3, num_slots=None, num_bytes=3072),
        },
        "adapter_ids": frozenset({"haiku", "legal", "noir"}),
        "resident_adapter_ids": frozenset({"noir", "legal"}),
        "waiting_adapter_ids": frozenset({"legal", "haiku"}),
    }
    return ServerState(**(values | changes))


def request_stats(**changes) -> RequestStats:
    values = {
        "adapter_id": "noir",
        "finish_reason": "stop",
        "error_reason": "",
        "phase": "running",
        "num_prompt_tokens": 7,
        "num_generated_tokens": 3,
        "duration_seconds": 0.5,
        "queue_seconds": 0.1,
        "prefill_seconds": 0.2,
        "decode_seconds": 0.2,
    }
    return RequestStats(**(values | changes))


def step_stats(**changes) -> StepStats:
    values = {
        "duration_seconds": 0.02,
        "num_sequences": 5,
        "num_adapters": 3,
        "num_prompt_tokens": 11,
        "num_generated_tokens": 4,
        "num_preemptions": 1,
        "inter_token_seconds": (0.02, 0.02, 0.03),
    }
    return StepStats(**(values | changes))


@pytest.fixture
def state() -> Callable[..., ServerState]:
    """Makes a snapshot; keyword arguments replace fields."""
    return server_state


@pytest.fixture
def request_ended() -> Callable[..., RequestStats]:
    """Makes a request's figures; keyword arguments replace fields."""
    return request_stats


@pytest.fixture
def step() -> Callable[..., StepStats]:
    """Makes a step's figures; keyword arguments replace fields."""
    return step_stats


@pytest.fixture
def metrics() -> ServerMetrics:
    """Metrics of a server that did nothing yet."""
    return ServerMetrics(base_model="tiny", max_adapter_series=2)


@pytest.fixture
def exercised(metrics) -> ServerMetrics:
    """Metrics that hold at least one series of every family."""
    metrics.read_state_from(server_state)
    metrics.step_finished(step_stats())
    metrics.first_token(ttft_seconds=0.3, is_adapted=True)
    metrics.first_token(ttft_seconds=0.2, is_adapted=False)
    metrics.request_finished(request_stats())
    metrics.request_finished(request_stats(error_reason="CANCELLED", finish_reason="", phase="queued"))
    metrics.request_rejected("QUEUE_FULL")
    metrics.call_finished(method="Generate", code="OK", finish_reason="stop")
    metrics.adapter_loaded(object(), 0.7)
    metrics.adapter_load_failed("ADAPTER_CORRUPT")
    metrics.adapter_evicted("device")
    return metrics


def step_report(**changes) -> StepReport:
    ranks = {"model.layers.0.self_attn.q_proj": 3, "model.layers.11.mlp.up_proj": 5, "lm_head": 2}
    result = StepResult(loss=2.5, learning_rate=1e-3, gradient_norm=0.75, ranks=ranks)
    values = {
        "step": 1,
        "tokens": 600,
        "seconds": 0.5,
        "seconds_left": 90.0,
        "memory_bytes": 2**30,
        "num_shrinks": 1,
        "jobs": {"poet": result},
        "evaluations": {"poet": 2.75},
    }
    return StepReport(**(values | changes))


@pytest.fixture
def training_step() -> Callable[..., StepReport]:
    """Makes a training step's figures; keyword arguments replace fields."""
    return step_report


@pytest.fixture
def training_metrics() -> TrainingMetrics:
    """Metrics of a run that has loaded its base."""
    return TrainingMetrics(base_model="tiny")


@pytest.fixture
def exercised_training(training_metrics) -> TrainingMetrics:
    """Metrics that hold at least one series of every family."""
    training_metrics.run_started(RunStart(base_digest="ab", jobs=("poet",), first_step=0, max_steps=200))
    training_metrics.step_finished(step_report())
    training_metrics.checkpoint_written(1, 0.25)
    return training_metrics

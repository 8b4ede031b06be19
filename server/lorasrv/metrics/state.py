"""Gauges read at scrape time from a snapshot of the server, so that they cannot leak, drift or go stale.

Knows how a snapshot becomes metric families, not where one comes from.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric

from lorasrv.engine.observer import EngineStats


@dataclass(frozen=True, slots=True, kw_only=True)
class LevelState:
    """One level at which adapters are kept.

    Attributes:
        num_adapters: adapters kept there now.
        num_slots: adapters it has room for; None where only bytes limit it.
        num_bytes: what they occupy, in bytes.
    """

    num_adapters: int
    num_slots: int | None
    num_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerState:
    """What the server is doing at one moment.

    Attributes:
        engine: the engine at that moment.
        levels: "device" and "host", each with the adapters it holds.
        adapter_ids: adapters that can be asked for; others lose their counters.
        resident_adapter_ids: adapters on the device, idle ones too.
        waiting_adapter_ids: adapters with queued requests; those that are resident as well do not count as waiting.
    """

    engine: EngineStats
    levels: Mapping[str, LevelState]
    adapter_ids: frozenset[str]
    resident_adapter_ids: frozenset[str]
    waiting_adapter_ids: frozenset[str]


def state_families(state: ServerState, *, now_seconds: float) -> Iterator[Metric]:
    """Yields the families of one snapshot.

    Args:
        state: the snapshot.
        now_seconds: Unix time, the value of `lorasrv_lora_requests_info`.
    """
    engine = state.engine
    gauges = (
        ("requests_running", "Requests in the running batch.", engine.num_running),
        ("requests_queued", "Requests accepted that wait for their turn.", engine.num_queued),
        ("queue_capacity", "Requests that may wait before new ones are rejected.", engine.queue_capacity),
        ("kv_cache_usage_ratio", "KV cache blocks in use over those there are, 0 to 1.", engine.kv_cache_usage),
        ("draining", "1 while the server is shutting down and takes no new requests.", float(engine.is_draining)),
    )
    for name, documentation, value in gauges:
        yield GaugeMetricFamily(f"lorasrv_{name}", documentation, value=value)
    yield from _level_families(state.levels)
    yield _router_family(state, now_seconds)


def _level_families(levels: Mapping[str, LevelState]) -> Iterator[Metric]:
    used = GaugeMetricFamily("lorasrv_adapter_slots_used", "Adapters kept at a level.", labels=["level"])
    slots = GaugeMetricFamily(
        "lorasrv_adapter_slots", "Adapters a level has room for; absent where only bytes limit it.", labels=["level"]
    )
    num_bytes = GaugeMetricFamily("lorasrv_adapter_bytes", "Bytes of the adapters kept at a level.", labels=["level"])
    for level, state in levels.items():
        used.add_metric([level], state.num_adapters)
        num_bytes.add_metric([level], state.num_bytes)
        if state.num_slots is not None:
            slots.add_metric([level], state.num_slots)
    yield from (used, slots, num_bytes)


def _router_family(state: ServerState, now_seconds: float) -> Metric:
    """The series inference gateways route by: ids joined by commas, one series at a time, its value the time."""
    family = GaugeMetricFamily(
        "lorasrv_lora_requests_info",
        "Adapters on the device (running) and adapters with queued requests that are not (waiting); Unix time.",
        labels=["max_lora", "running_lora_adapters", "waiting_lora_adapters"],
    )
    device = state.levels.get("device")
    max_lora = 0 if device is None else device.num_slots or 0
    running = ",".join(sorted(state.resident_adapter_ids))
    waiting = ",".join(sorted(state.waiting_adapter_ids - state.resident_adapter_ids))
    family.add_metric([str(max_lora), running, waiting], now_seconds)
    return family

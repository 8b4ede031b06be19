"""Counters per adapter, for the heaviest adapters only.

A server holds hundreds of adapters and sees thousands over its life; a label value for each would make every scrape,
and the database behind it, grow without bound. `SpaceSaving` finds the heaviest in bounded memory (Metwally, Agrawal,
El Abbadi, "Efficient computation of frequent and top-k elements in data streams", ICDT 2005, section 3), and
`AdapterSeries` exports those and folds the rest into one series. Knows ids and numbers; no request, no engine.
"""

import threading
from collections.abc import Iterator, Set
from dataclasses import dataclass

from prometheus_client.core import CounterMetricFamily
from prometheus_client.metrics_core import Metric

# no adapter can be called this: ids begin with a letter or a digit
OTHER = "_other"

# how much heavier a newcomer must be to take another's series; without it, two near-equals would swap at every request
_TAKEOVER = 1.25
_SKETCH_ENTRIES_PER_SERIES = 4


class SpaceSaving:
    """Approximate weights of the heaviest items of a stream, in bounded memory.

    Every item whose true weight passes total / capacity is among the entries, and `lower_bound` never overstates.

    Args:
        capacity: how many items are kept.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        # item -> [weight, of which inherited from the item it displaced]
        self._entries: dict[str, list[float]] = {}

    def add(self, item: str, weight: float) -> str | None:
        """Adds `weight` to `item`; returns the item it displaced, if any."""
        entry = self._entries.get(item)
        if entry is not None:
            entry[0] += weight
            return None
        if len(self._entries) < self._capacity:
            self._entries[item] = [weight, 0.0]
            return None
        lightest = min(self._entries, key=lambda key: self._entries[key][0])
        inherited = self._entries.pop(lightest)[0]
        self._entries[item] = [inherited + weight, inherited]
        return lightest

    def lower_bound(self, item: str) -> float:
        """A weight the item has at least; 0.0 for one that is not kept."""
        entry = self._entries.get(item)
        return 0.0 if entry is None else entry[0] - entry[1]

    def remove(self, item: str) -> None:
        """Forgets the item."""
        self._entries.pop(item, None)


@dataclass(slots=True)
class _Counts:
    requests: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0


class AdapterSeries:
    """`lorasrv_adapter_requests_total` and `lorasrv_adapter_tokens_total{kind}` of at most `max_series` adapters.

    What an adapter does while it has no series of its own is counted under `_other`. An adapter that loses its series
    does not carry its past into `_other`: a rate over that would show a burst that never was. Thread-safe.

    Args:
        max_series: how many adapters have series of their own, at most; 0 folds all of them.
    """

    def __init__(self, max_series: int) -> None:
        self._max_series = max_series
        self._sketch = SpaceSaving(max(1, max_series * _SKETCH_ENTRIES_PER_SERIES))
        self._series: dict[str, _Counts] = {}
        self._other = _Counts()
        self._lock = threading.Lock()

    def add(self, adapter_id: str, *, num_prompt_tokens: int, num_generated_tokens: int) -> None:
        """Counts one finished request of an adapter."""
        with self._lock:
            displaced = self._sketch.add(adapter_id, 1 + num_prompt_tokens + num_generated_tokens)
            if displaced is not None:
                self._series.pop(displaced, None)
            counts = self._counts_of(adapter_id)
            counts.requests += 1
            counts.prompt_tokens += num_prompt_tokens
            counts.generated_tokens += num_generated_tokens

    def remove(self, adapter_id: str) -> None:
        """Drops the series of an adapter that was unloaded."""
        with self._lock:
            self._sketch.remove(adapter_id)
            self._series.pop(adapter_id, None)

    def keep_only(self, adapter_ids: Set[str]) -> None:
        """Drops the series of all other adapters; a request may have finished after its adapter was unloaded."""
        with self._lock:
            for adapter_id in self._series.keys() - adapter_ids:
                self._sketch.remove(adapter_id)
                del self._series[adapter_id]

    def collect(self) -> Iterator[Metric]:
        """Yields both families; `_other` is always there, so that a rate over it begins at zero."""
        requests = CounterMetricFamily(
            "lorasrv_adapter_requests",
            "Finished requests, by adapter; adapters below the heaviest are counted under _other.",
            labels=["adapter_id"],
        )
        tokens = CounterMetricFamily(
            "lorasrv_adapter_tokens",
            "Tokens of finished requests, by adapter; adapters below the heaviest are counted under _other.",
            labels=["adapter_id", "kind"],
        )
        with self._lock:
            for adapter_id, counts in (*self._series.items(), (OTHER, self._other)):
                requests.add_metric([adapter_id], counts.requests)
                tokens.add_metric([adapter_id, "prompt"], counts.prompt_tokens)
                tokens.add_metric([adapter_id, "generated"], counts.generated_tokens)
        yield requests
        yield tokens

    def _counts_of(self, adapter_id: str) -> _Counts:
        counts = self._series.get(adapter_id)
        if counts is not None:
            return counts
        if len(self._series) >= self._max_series:
            if not self._series:
                return self._other
            lightest = min(self._series, key=self._sketch.lower_bound)
            if self._sketch.lower_bound(adapter_id) <= _TAKEOVER * self._sketch.lower_bound(lightest):
                return self._other
            del self._series[lightest]
        self._series[adapter_id] = counts = _Counts()
        return counts

"""Batches that take steps in turns, so that whatever else the machine does hits all of them; what benchmarks share.

Knows how to take turns and to compare; knows no system.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch


class Lane(Protocol):
    """One batch on one system."""

    def prefill(self) -> object:
        """Starts the batch anew: its prompts, and the first token of each."""

    def step(self) -> object:
        """One decode step: one more token of each."""


@dataclass(slots=True)
class Times:
    """Seconds of each turn of a lane; of decode steps the mean over the turn."""

    prefill: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ratio:
    """How much one thing is of another in each of some pairs."""

    quartiles: tuple[float, float, float]
    num_pairs: int

    @classmethod
    def of(cls, seconds: Sequence[float], other: Sequence[float]) -> "Ratio":
        """`seconds` over `other`, turn by turn."""
        values = [one / two for one, two in zip(seconds, other, strict=True)]
        low, middle, high = statistics.quantiles(values * 2 if len(values) == 1 else values, n=4)
        return cls(quartiles=(low, middle, high), num_pairs=len(values))

    @property
    def median(self) -> float:
        """Of all pairs."""
        return self.quartiles[1]

    def __str__(self) -> str:
        low, middle, high = self.quartiles
        return f"{middle:.2f} [{low:.2f}, {high:.2f}]"


def take_turns(
    lanes: Mapping[str, Lane],
    *,
    rounds: int,
    turns: int,
    steps: int = 1,
    clock: Callable[[], float] | None = None,
) -> dict[str, Times]:
    """Times all lanes; from turn to turn they go in the opposite order.

    Args:
        lanes: by name.
        rounds: prefills of each lane.
        turns: turns of each lane after each of its prefills.
        steps: decode steps of one turn.
        clock: seconds; None: the default one.
    """
    clock = clock or default_clock()
    times = {name: Times() for name in lanes}
    order = list(lanes)
    for _ in range(rounds):
        for name in order:
            times[name].prefill.append(_seconds(lanes[name].prefill, 1, clock))
        order.reverse()
        for _ in range(turns):
            for name in order:
                times[name].decode.append(_seconds(lanes[name].step, steps, clock) / steps)
            order.reverse()
    return times


def default_clock() -> Callable[[], float]:
    """Processor time of one thread, so that other load counts less; wall time of several."""
    return time.process_time if torch.get_num_threads() == 1 else time.perf_counter


def _seconds(run: Callable[[], object], repeats: int, clock: Callable[[], float]) -> float:
    start = clock()
    for _ in range(repeats):
        run()
    return clock() - start

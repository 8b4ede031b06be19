"""The two tables of the comparison: tokens a second, and the ratios that have a target. Knows no system but by name."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from lanes import Ratio, Times
from workload import Workload

COLUMNS = ("base B=1", "base B=8", "adapters B=8")
"""The batches; a lane is named by system and batch, e.g. "bf16 base B=8"."""

MOST_ADDED = 1.6

Phase = Literal["prefill", "decode"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """How many times faster than a system lorasrv should be; `ours` is its lane, exact or not."""

    ours: str = "ours"
    phase: Phase
    column: str
    system: str
    at_least: float


TARGETS = (
    Target(ours="not exact", phase="decode", column="base B=1", system="bitsandbytes", at_least=1),
    Target(phase="decode", column="base B=1", system="bitsandbytes", at_least=0.8),
    Target(phase="decode", column="base B=8", system="bitsandbytes", at_least=1.8),
    Target(phase="decode", column="adapters B=8", system="bitsandbytes", at_least=5),
    Target(phase="decode", column="adapters B=8", system="vLLM", at_least=7),
    Target(phase="prefill", column="adapters B=8", system="bf16", at_least=1.5),
    Target(phase="prefill", column="adapters B=8", system="vLLM", at_least=20),
)

_NAMES = {"ours": "", "not exact": "not exact, "}
_CELLS: tuple[tuple[Phase, str], ...] = (
    ("prefill", "base B=8"),
    ("decode", "base B=1"),
    ("decode", "base B=8"),
    ("prefill", "adapters B=8"),
    ("decode", "adapters B=8"),
)


def print_rates(
    workload: Workload,
    systems: Mapping[str, tuple[str, str]],
    times: Mapping[str, Times],
    *,
    floor: Mapping[str, float],
    not_run: str,
) -> None:
    """Prints tokens a second.

    Args:
        workload: what was run.
        systems: full name and format of the base of each.
        times: of every lane.
        floor: seconds that a decode step of a batch takes at the least.
        not_run: why a lane that has no times was not run.
    """
    print("| system | base |", *(f"{phase} {column} |" for phase, column in _CELLS))
    print("|---|---|" + "---|" * len(_CELLS))
    for system, (name, base) in systems.items():
        cells = []
        for phase, column in _CELLS:
            lane = times.get(f"{system} {column}")
            seconds = None if lane is None else statistics.median(getattr(lane, phase))
            cells.append(_rate(workload, phase, column, seconds) if seconds else f"not run: {not_run}")
        print(f"| {name} | {base} | {' | '.join(cells)} |")
    cells = [_rate(workload, phase, column, floor[column]) if phase == "decode" else "-" for phase, column in _CELLS]
    print(f"| floor: bytes over read bandwidth | NF4 | {' | '.join(cells)} |", flush=True)


def print_ratios(measured: Sequence[Mapping[str, Times]], *, not_run: str, least_seconds: Sequence[float]) -> None:
    """Prints speed over that of others against the targets.

    Args:
        measured: sets of lanes that took turns with each other; of several with the lanes in question the last counts.
        not_run: why a lane that has no times was not run.
        least_seconds: what reading the adapters takes at the least, at each of the decode steps.
    """
    print("\n| speed of lorasrv over | phase | target | ratio | pairs | lorasrv over itself | |")
    print("|---|---|---|---|---|---|---|")
    for target in TARGETS:
        found = [lanes for lanes in measured if f"{target.system} {target.column}" in lanes]
        if f"{target.ours} {target.column}" not in measured[0]:
            continue
        where = (
            f"{target.system} | {_NAMES[target.ours]}{target.phase}, {target.column} | at least {target.at_least:g} |"
        )
        if not found:
            print(f"| {where} not run: {not_run} | | | |")
            continue
        theirs, ours, again = (
            getattr(found[-1][f"{system} {target.column}"], target.phase)
            for system in (target.system, target.ours, "ours again")
        )
        ratio, itself = Ratio.of(theirs, ours), Ratio.of(again, ours)
        verdict = "reached" if ratio.median >= target.at_least else "missed"
        print(f"| {where} {ratio} | {ratio.num_pairs} | {itself} | {verdict} |")
    lanes = measured[0]
    base, adapted, again = (
        lanes[f"{name} B=8"].decode for name in ("ours base", "ours adapters", "ours again adapters")
    )
    added = Ratio.of([one - other for one, other in zip(adapted, base, strict=True)], least_seconds)
    noise = Ratio.of([one - other for one, other in zip(again, adapted, strict=True)], least_seconds)
    verdict = "reached" if added.median <= MOST_ADDED else "missed"
    print(
        "\n| time that adapters add, over that of their bytes | target | ratio | pairs | noise | |",
        "|---|---|---|---|---|---|",
        sep="\n",
    )
    print(
        f"| decode, adapters B=8 | at most {MOST_ADDED} | {added} | {added.num_pairs} | {noise} | {verdict} |",
        flush=True,
    )


def _rate(workload: Workload, phase: Phase, column: str, seconds: float) -> str:
    batch = 1 if column.endswith("B=1") else workload.batch
    tokens = batch * (workload.prompt_tokens if phase == "prefill" else 1)
    return f"{tokens / seconds:.0f}"

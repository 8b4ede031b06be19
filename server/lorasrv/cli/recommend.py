"""What `lorasrv train --recommend` writes: a configuration file that says where its values come from."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from lorasrv.cli.console import print_json, say

if TYPE_CHECKING:
    from lorasrv.train.recommend import Recommendation


def show_recommendation(found: "Recommendation", *, as_json: bool) -> None:
    """Write it: a file for `lorasrv train` on stdout, and what is still to be said on stderr."""
    if as_json:
        print_json({**asdict(found), "resident_bytes": found.resident_bytes})
        return
    lines = [(_yaml(advice.key, advice.value), advice.source) for advice in found.settings]
    width = max(len(line) for line, _ in lines)
    for line, source in lines:
        print(f"{line.ljust(width)}  # {source}", flush=True)
    spare = found.memory_bytes - found.resident_bytes
    say(
        f"{_count(found.num_parameters)} parameters: it takes {found.resident_bytes / 1e9:.1f} GB of "
        f"{found.memory_bytes / 1e9:.1f}, {spare / 1e9:.1f} to spare"
    )
    missing = [flag for key, flag in (("data", "--data FILE"), ("out", "--out DIR")) if _lacks(found, key)]
    say(" ".join(["to train: lorasrv train THIS.yaml", *missing]))


def _count(number: int) -> str:
    return f"{number / 1e9:.1f} billion" if number >= 1e9 else f"{number / 1e6:.1f} million"


def _lacks(found: "Recommendation", key: str) -> bool:
    return all(advice.key != key for advice in found.settings)


def _yaml(key: str, value: object) -> str:
    if isinstance(value, tuple):
        value = [str(item) if isinstance(item, Path) else item for item in value]
    elif isinstance(value, Path):
        value = str(value)
    # a flow mapping on one line, without its braces
    return yaml.safe_dump({key: value}, default_flow_style=True, width=10**6).strip()[1:-1]

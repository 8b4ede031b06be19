"""SIGKILL at any point of a run: what is on the disk is whole, and going on from it ends in the same adapter."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import killed_training
from tiny_peft import save_base

KILLS = (0, 23, 37, 50)
_STEP = re.compile(r"out\.training/(step-\d+)/")


def test_a_run_killed_at_any_change_of_a_file_ends_as_another(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    base = save_base(
        tmp_path / "base", hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
    )
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"text": "arms and men " * count}) + "\n" for count in range(1, 7)))
    command = [sys.executable, killed_training.__file__, base, data, tmp_path / "runs", "adalora", *KILLS]
    # OpenMP's other threads would not be in a forked child, which would wait for them
    alone = {**os.environ, "OMP_NUM_THREADS": "1"}
    ended = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False, env=alone)
    assert ended.returncode == 0, ended.stderr
    states = [json.loads(line) for line in ended.stdout.splitlines()]
    whole, *changes, last = [state["left"] for state in states[: -len(KILLS)]]
    adapter = out_of(whole)
    assert len(adapter) == 3
    assert last == {f"out/{name}": digest for name, digest in adapter.items()}
    # every write, folder, renaming and removal of three checkpoints and the adapter
    assert len(changes) > KILLS[-1]
    newest = ""
    for left in changes:
        assert out_of(left) in ({}, adapter)
        before, newest = newest, max((match[1] for match in map(_STEP.match, left) if match), default="")
        if not out_of(left):
            assert before <= newest
            assert of_step(left, newest) == of_step(whole, newest)
    resumed = [state for state in states if "resumed" in state]
    assert len(resumed) > 10
    assert all((state["resumed"], state["adapter"]) == (0, adapter) for state in resumed), ended.stderr
    killed = [(state["ended"], state["left"]) for state in states[-len(KILLS) :]]
    assert killed == [(-signal.SIGKILL, changes[at]) for at in KILLS]


def out_of(left: dict[str, str]) -> dict[str, str]:
    return {name.removeprefix("out/"): digest for name, digest in left.items() if name.startswith("out/")}


def of_step(left: dict[str, str], step: str) -> dict[str, str]:
    return {name: digest for name, digest in left.items() if step and f"/{step}/" in name}

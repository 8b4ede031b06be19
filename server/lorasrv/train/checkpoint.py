"""Checkpoints of a run: what it needs to go on bit for bit, each one whole or not there at all.

Knows files, and jobs by what they say is their state; does not know what that means.
"""

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from safetensors.torch import load_file, save_file
from torch import Tensor

from lorasrv.errors import ConfigError
from lorasrv.model.new_folder import new_folder

_NAME = re.compile(r"step-(\d{9})")
_KEPT = 2
_IDENTITY = "identity"


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """The state of a job after a step.

    Attributes:
        step: how many steps were done.
        tensors: by name.
        facts: what is not a tensor, as JSON has it.
    """

    step: int
    tensors: Mapping[str, Tensor]
    facts: Mapping[str, Any]


class CheckpointFolder:
    """Where the checkpoints of one job lie; the newest two are kept."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def save(self, checkpoint: Checkpoint) -> None:
        """Writes a checkpoint, unless there is one of that step; then removes old ones.

        Raises:
            DiskFullError: there is no room; nothing of it is left.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        target = self.folder / f"step-{checkpoint.step:09d}"
        if not target.exists():
            tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in checkpoint.tensors.items()}
            num_bytes = sum(tensor.nbytes for tensor in tensors.values())
            with new_folder(target, needed_bytes=num_bytes) as draft:
                save_file(tensors, draft / "state.safetensors")
                (draft / "facts.json").write_text(json.dumps(dict(checkpoint.facts)))
        for step in self.steps()[:-_KEPT]:
            shutil.rmtree(self._path(step))

    def steps(self) -> list[int]:
        """The steps there are checkpoints of, ascending."""
        if not self.folder.is_dir():
            return []
        names = (_NAME.fullmatch(path.name) for path in self.folder.iterdir())
        return sorted(int(match[1]) for match in names if match)

    def load(self, step: int) -> Checkpoint:
        """Reads the checkpoint of a step; raises FileNotFoundError if there is none."""
        path = self._path(step)
        facts = json.loads((path / "facts.json").read_text())
        return Checkpoint(step=step, tensors=load_file(path / "state.safetensors"), facts=facts)

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step:09d}"


class Stateful(Protocol):
    """What is checkpointed: a job of a run."""

    name: str

    @property
    def out(self) -> Path:
        """Where its adapter will be."""

    def state(self, step: int) -> Checkpoint:
        """Everything that `step` steps have changed."""

    def load_state(self, checkpoint: Checkpoint) -> None:
        """Takes what `state` gave."""


class RunCheckpoints:
    """The checkpoints of all jobs of a run, each beside its adapter's folder.

    Args:
        jobs: of the run.
        identities: by job, what must be the same in a run that goes on.
    """

    def __init__(self, jobs: Sequence[Stateful], *, identities: Mapping[str, Mapping[str, Any]]) -> None:
        self._jobs = tuple(jobs)
        # as it will be read back
        self._identities = {
            name: json.loads(json.dumps(identity, default=str)) for name, identity in identities.items()
        }
        self._folders = {job.name: CheckpointFolder(checkpoint_folder(job.out)) for job in jobs}

    def save(self, step: int) -> None:
        """Writes the state of every job after `step` steps."""
        for job in self._jobs:
            state = job.state(step)
            facts = {**state.facts, _IDENTITY: self._identities[job.name]}
            self._folders[job.name].save(Checkpoint(step=step, tensors=state.tensors, facts=facts))

    def resume(self) -> int:
        """Gives every job its state after the newest step that all of them have; returns that step, 0 if there is none.

        Raises:
            ConfigError: the run that was interrupted was another one; says in what.
        """
        step = max(set.intersection(*(set(folder.steps()) for folder in self._folders.values())), default=0)
        if not step:
            return 0
        found = {job.name: self._folders[job.name].load(step) for job in self._jobs}
        reasons = [reason for name in found for reason in self._differences(name, found[name])]
        if reasons:
            raise ConfigError(reasons)
        for job in self._jobs:
            job.load_state(found[job.name])
        return step

    def remove(self) -> None:
        """Removes all checkpoints."""
        for folder in self._folders.values():
            shutil.rmtree(folder.folder, ignore_errors=True)

    def _differences(self, name: str, checkpoint: Checkpoint) -> list[str]:
        before, now = checkpoint.facts[_IDENTITY], self._identities[name]
        return [
            f"{name}: {key} is {now.get(key)}, the run that was interrupted had {before.get(key)}"
            for key in sorted(before.keys() | now.keys())
            if before.get(key) != now.get(key)
        ]


def checkpoint_folder(out: Path) -> Path:
    """Where everything about the training of an adapter is until it is finished, in `out`."""
    return out.with_name(f"{out.name}.training")

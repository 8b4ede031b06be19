"""What a kill leaves of a training run, at every change that the run makes to its files; run as a process of its own.

A kill leaves the files as they are at that moment. So one run is looked at before each of its changes, and in the
middle of each write; a forked child goes on from a copy of whatever differs from all that was seen before. To show that
this is what kills leave, others of the same run get SIGKILL at some of these moments.
"""

import builtins
import io
import json
import os
import re
import shutil
import signal
import sys
from collections.abc import Callable
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from lorasrv.train import app, checkpoint
from lorasrv.train.config import JobConfig, RunConfig, TrainConfig

STEPS = 3
_CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod")


class Watch:
    """Calls a function before this process changes a file below a folder, and in the middle of writes."""

    def __init__(self, folder: Path, look: Callable[[], None]) -> None:
        self._folder = f"{folder}/"
        self._look = look
        self._open = io.open
        sys.addaudithook(self._audit)
        io.open = builtins.open = self._opened  # type: ignore[assignment]
        checkpoint.save_file = partial(self._halved, checkpoint.save_file)

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        changes = event in _CHANGES or (event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR))
        # whole trees are removed relative to open folders
        relative = event in ("os.remove", "os.rmdir") and arguments[1] >= 0
        if relative or (changes and str(arguments[0]).startswith(self._folder)):
            self._look()

    def _opened(self, path: Any, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        file = self._open(path, mode, *arguments, **options)
        watched = str(path).startswith(self._folder) and mode[0] in "wxa"
        return _Halved(file, self._look) if watched else file

    def _halved(self, save: Callable[..., None], tensors: dict[str, torch.Tensor], path: Path) -> None:
        save(tensors, path)
        size = path.stat().st_size
        with self._open(path, "rb+") as file:
            content = file.read()
            file.truncate(size // 2)
            self._look()
            file.seek(0)
            file.write(content)


class _Halved:
    """A file written to in two halves."""

    def __init__(self, file: Any, look: Callable[[], None]) -> None:
        self._file = file
        self._look = look

    def write(self, content: Any) -> int:
        half = len(content) // 2
        self._file.write(content[:half])
        self._file.flush()
        self._look()
        self._file.write(content[half:])
        return len(content)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> "_Halved":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def contents(folder: Path) -> dict[str, str]:
    """The digest of every file below a folder that tells no time, without what is random in names of hidden folders."""
    return {
        re.sub(r"^\.out\.\w+", ".out", str(path.relative_to(folder))): sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in ("metrics.jsonl", "report.html")
    }


def in_child(work: Callable[[], object]) -> int:
    """Does something in a forked process; returns how that ended, as `subprocess` tells it."""
    child = os.fork()
    if not child:
        try:
            work()
            os._exit(0)
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


class Looker:
    """Says what is there at every change, and what going on from a copy makes of it."""

    def __init__(self, root: Path, train: Callable[..., None]) -> None:
        self._root = root
        self._train = train
        self._seen: list[dict[str, str]] = []
        self._looking = False

    def __call__(self) -> None:
        # copies are changes too
        if self._looking:
            return
        self._looking = True
        copy, left = self._root / "copy", contents(self._root / "watched")
        state: dict[str, Any] = {"left": left}
        if left not in self._seen and not (self._root / "watched" / "out").exists():
            self._seen.append(left)
            shutil.copytree(self._root / "watched", copy)
            state |= {"resumed": in_child(lambda: self._train(copy, resume=True)), "adapter": contents(copy / "out")}
            shutil.rmtree(copy)
        print(json.dumps(state), flush=True)
        self._looking = False


class Killer:
    """Kills this process at a change, the first one being 0."""

    def __init__(self, at: int) -> None:
        self._left = at

    def __call__(self) -> None:
        if not self._left:
            os.kill(os.getpid(), signal.SIGKILL)
        self._left -= 1


def main(base: Path, data: Path, root: Path, method: str, kills: list[int]) -> None:
    """Prints what a whole run leaves that keeps its checkpoints, then what is left at each change, then at kills."""
    # no power is lost here
    os.fsync = lambda _: None  # type: ignore[assignment]
    model = app.load_model(base, dtype=torch.float32)
    app.load_model = lambda *_, **__: model  # type: ignore[assignment]

    def train(folder: Path, *, resume: bool = False) -> None:
        run = RunConfig(base=str(base), max_steps=STEPS, save_every=1, dtype="float32", resume=resume)
        job = JobConfig(out=folder / "out", data=(data,), rank=2, batch_size=2, method=method, eval_fraction=0.0)  # type: ignore[arg-type]
        app.train(TrainConfig(run=run, jobs={"one": job}))

    def watched(folder: Path, look: Callable[[], None]) -> None:
        folder.mkdir(parents=True)
        Watch(folder, look)
        train(folder)

    # in this process, so that what is slow once is behind all children
    with patch.object(checkpoint.RunCheckpoints, "remove"), patch.object(checkpoint, "_KEPT", STEPS):
        train(root / "whole")
    print(json.dumps({"left": contents(root / "whole")}), flush=True)
    in_child(lambda: watched(root / "watched", Looker(root, train)))
    print(json.dumps({"left": contents(root / "watched")}), flush=True)
    for at in kills:
        folder = root / f"killed-{at}"
        ended = in_child(partial(watched, folder, Killer(at)))
        print(json.dumps({"at": at, "ended": ended, "left": contents(folder)}), flush=True)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]), sys.argv[4], [int(word) for word in sys.argv[5:]])

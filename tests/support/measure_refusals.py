"""Refuses adapter folders, each in a process of its own, and prints what each refusal said and cost.

Run as `python measure_refusals.py FOLDER...`: one JSON object, measurements by folder name. Every child is forked once
the packages are imported, so that its memory is that of the refusal alone.
"""

import json
import os
import resource
import sys
import time
from pathlib import Path
from types import SimpleNamespace

from lorasrv_adapters.base import BaseModule
from lorasrv_adapters.checkpoint import read_checkpoint
from lorasrv_adapters.errors import AdapterError

BASE = SimpleNamespace(
    modules={"model.layers.0.self_attn.q_proj": BaseModule(kind="linear", out_features=8, in_features=8)},
    tied=False,
    digest="0" * 64,
)


def refuse(folder: Path) -> str:
    try:
        read_checkpoint(folder, BASE)
    except AdapterError as error:
        return f"{type(error).__name__}: {error}"
    return "served"


def measure(folder: Path) -> dict[str, object]:
    """The cheapest of three times, which is what the work takes when nothing disturbs it, and the peak of memory."""
    before = resident_bytes()
    seconds = []
    for _ in range(3):
        start = time.process_time()
        message = refuse(folder)
        seconds.append(time.process_time() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"message": message, "seconds": min(seconds), "bytes": peak - before}


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def in_child(folder: Path) -> dict[str, object]:
    reader, writer = os.pipe()
    if os.fork() == 0:
        os.write(writer, json.dumps(measure(folder)).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as file:
        return json.load(file)


if __name__ == "__main__":
    json.dump({Path(name).name: in_child(Path(name)) for name in sys.argv[1:]}, sys.stdout)

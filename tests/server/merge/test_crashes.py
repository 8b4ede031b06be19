"""A merge that is killed, at any write: there is no new model, or a complete one, and the next merge succeeds."""

import subprocess
import sys

from peft_options import OPTIONS

# a process of its own: it forks once for each write, which needs a process without other threads
DRIVER = """
import os, shutil, signal, sys
from pathlib import Path
import torch
from lorasrv.merge.app import merge
from lorasrv.merge.config import MergeConfig

torch.set_num_threads(1)
base, adapter, folder = map(Path, sys.argv[1:])
writes, last = 0, None

def counted():
    global writes
    if writes == last:
        os.kill(os.getpid(), signal.SIGKILL)
    writes += 1

def watch(event, arguments):
    flags = arguments[2] if event == "open" and isinstance(arguments[2], int) else 0
    if str(folder) in str(arguments) or event == "os.rmdir":
        if event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir") or flags & (os.O_WRONLY | os.O_RDWR):
            counted()

def wrapped(name):
    function = getattr(os, name)
    def call(*arguments):
        counted()
        return function(*arguments)
    setattr(os, name, call)

def run(out):
    merge(MergeConfig(base=str(base), adapters=((str(adapter), 1.0),), out=out, shard_bytes=40_000))

def content(path):
    return {file.name: file.read_bytes() for file in path.iterdir()}

sys.addaudithook(watch)
for name in ("pwrite", "posix_fallocate", "fsync"):
    wrapped(name)
run(folder / "whole")
expected, total = content(folder / "whole"), writes
out = folder / "merged"
for last in range(total):
    # each begins with what the one before left behind
    child = os.fork()
    if child == 0:
        writes = 0
        run(out)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or last >= total - 1, (last, status)
    if out.exists():
        assert content(out) == expected, last
        shutil.rmtree(out)
        print("complete after", last)
last = None
run(out)
assert content(out) == expected
assert sorted(path.name for path in folder.iterdir()) == ["merged", "whole"]
print("killed", total)
"""


def test_a_merge_that_is_killed_at_any_write_leaves_no_half_model(base, tmp_path):
    small = base(num_hidden_layers=1, hidden_size=32, intermediate_size=64)
    adapter = small.save_adapter(tmp_path / "adapter", kind="lora", option=OPTIONS["list"])
    (tmp_path / "models").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, small.folder, adapter, tmp_path / "models"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert int(lines[-1].removeprefix("killed ")) > 40
    # only once the folder has its name, before its parent is on the disk
    assert len(lines) <= 3

"""Folders that are there completely or not at all: after errors, full disks, killed and competing processes."""

import errno
import fcntl
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from lorasrv.errors import DiskFullError
from lorasrv.model.new_folder import new_folder


def names(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


def test_files_appear_all_at_once(tmp_path):
    folder = tmp_path / "new"
    with new_folder(folder, needed_bytes=1) as partial:
        (partial / "file").write_text("content")
        assert not folder.exists()
        assert partial.parent == tmp_path
    assert (folder / "file").read_text() == "content"
    assert names(tmp_path) == ["new"]


def test_everything_is_on_the_disk_before_the_folder_appears(tmp_path, monkeypatch):
    synced = []
    sync = os.fsync

    def record(descriptor):
        synced.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", record)
    with new_folder(tmp_path / "new", needed_bytes=1) as partial:
        (partial / "file").write_text("content")
    assert synced == ["file", ".new.partial", tmp_path.name]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt], ids=str)
def test_nothing_is_left_after_an_error(tmp_path, error):
    def fail(partial: Path) -> None:
        (partial / "file").write_text("content")
        raise error

    with pytest.raises(error), new_folder(tmp_path / "new", needed_bytes=1) as partial:
        fail(partial)
    assert not list(tmp_path.iterdir())


def test_an_existing_folder_is_not_touched(tmp_path):
    (tmp_path / "new").mkdir()
    with pytest.raises(FileExistsError, match="choose another"), new_folder(tmp_path / "new", needed_bytes=1):
        pytest.fail("it must not begin")
    (tmp_path / "new").rmdir()
    with pytest.raises(FileExistsError, match="choose another"), new_folder(tmp_path / "new", needed_bytes=1):
        (tmp_path / "new").mkdir()
    assert names(tmp_path) == ["new"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT], ids=errno.errorcode.get)
def test_a_full_disk_says_what_was_needed(tmp_path, number):
    with pytest.raises(DiskFullError) as caught, new_folder(tmp_path / "new", needed_bytes=12345):
        raise OSError(number, "no room")
    assert (caught.value.needed_bytes, caught.value.path) == (12345, tmp_path / "new")
    assert caught.value.free_bytes > 0
    assert not list(tmp_path.iterdir())


def test_other_errors_of_the_system_stay_what_they_are(tmp_path):
    with pytest.raises(OSError, match="broken") as caught, new_folder(tmp_path / "new", needed_bytes=1):
        raise OSError(errno.EIO, "broken")
    assert not isinstance(caught.value, DiskFullError)


def test_a_limit_on_files_is_a_full_disk(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        with pytest.raises(DiskFullError), new_folder(tmp_path / "new", needed_bytes=2 << 20) as partial:
            (partial / "file").write_bytes(b"\0" * (2 << 20))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.iterdir())


WRITER = """
import sys
from pathlib import Path
from lorasrv.model.new_folder import new_folder

with new_folder(Path(sys.argv[1]), needed_bytes=1) as partial:
    (partial / "old").write_text("content")
    (partial / "folder").mkdir()
    print("writing", flush=True)
    sys.stdin.read()
"""


def test_a_killed_process_is_cleaned_up_after_and_a_living_one_left_alone(tmp_path):
    folder = tmp_path / "new"
    environment = {"PYTHONPATH": ":".join(sys.path)}
    command = [sys.executable, "-c", WRITER, str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment) as process:
        assert process.stdout.readline() == b"writing\n"
        with pytest.raises(FileExistsError, match="another process"), new_folder(folder, needed_bytes=1):
            pytest.fail("it must not begin")
        assert names(tmp_path) == [".new.partial"]
        process.kill()
    assert names(tmp_path) == [".new.partial"]
    with new_folder(folder, needed_bytes=1) as partial:
        (partial / "new").write_text("content")
    assert names(tmp_path) == ["new"]
    assert names(folder) == ["new"]


def test_the_lock_of_a_folder_that_was_renamed_meanwhile_is_worth_nothing(tmp_path, monkeypatch):
    lock = fcntl.flock

    def finish_first(descriptor, operation):
        lock(descriptor, operation)
        (tmp_path / ".new.partial").rename(tmp_path / "new")
        (tmp_path / ".new.partial").mkdir()

    monkeypatch.setattr(fcntl, "flock", finish_first)
    with pytest.raises(FileExistsError, match="another process"), new_folder(tmp_path / "new", needed_bytes=1):
        pytest.fail("it must not begin")

"""A folder that appears with all of its files, or not at all. Knows no file format."""

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lorasrv.errors import DiskFullError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def new_folder(folder: Path, *, needed_bytes: int) -> Iterator[Path]:
    """Gives a hidden folder beside `folder` to write files into, and renames it to `folder` at the end.

    On the way out every file is on the disk; after an error nothing is left. What a killed process left behind, the
    next one that writes the same folder removes.

    Args:
        folder: must not exist; its parent must.
        needed_bytes: of all files together.

    Raises:
        FileExistsError: `folder` is there already, or another process is writing it.
        DiskFullError: there is no room for the files.
    """
    check_absent(folder)
    partial = folder.with_name(f".{folder.name}.partial")
    with _locked(partial):
        try:
            _empty(partial)
            yield partial
            _sync(*partial.iterdir(), partial)
            check_absent(folder)
            partial.rename(folder)
        except BaseException as error:
            shutil.rmtree(partial, ignore_errors=True)
            if isinstance(error, OSError) and error.errno in _FULL:
                free_bytes = shutil.disk_usage(folder.parent).free
                raise DiskFullError(folder, needed_bytes=needed_bytes, free_bytes=free_bytes) from error
            raise
    _sync(folder.parent)


def check_absent(folder: Path) -> None:
    """Raises FileExistsError if the folder is there already."""
    if folder.exists():
        raise FileExistsError(f"{folder} exists; choose another folder or remove it")


@contextmanager
def _locked(partial: Path) -> Iterator[None]:
    """Makes the folder, and keeps other processes from using it at the same time."""
    partial.mkdir(exist_ok=True)
    descriptor = os.open(partial, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # the one that held the lock may have renamed it
            held = os.path.samestat(os.fstat(descriptor), partial.stat())
        except (BlockingIOError, FileNotFoundError):
            held = False
        if not held:
            raise FileExistsError(f"another process is writing {partial}")
        yield
    finally:
        os.close(descriptor)


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def _sync(*paths: Path) -> None:
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

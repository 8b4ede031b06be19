"""Compile the native CPU kernels into one shared library; without a working compiler, warn and go on without it.

Two callers: hatchling, through the hook at the end, for every wheel and editable install; and `make native`, which runs
this file. Knows nothing of torch: the library has a plain C interface and takes its OpenMP runtime from the process
that loads it.
"""

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from pathlib import Path

LIBRARY = Path("kernels/lorasrv_kernels/cpu/_native.so")
# a contracted multiply-add rounds once instead of twice; kernels that want one write it out
COMPILE_FLAGS = ("-O3", "-std=c++17", "-fPIC", "-ffp-contract=off")
COMPILERS = ("c++", "g++", "clang++")


class CompileError(Exception):
    """The native library could not be built; the text says why."""


def build(root: Path) -> Path | None:
    """Compiles every `.cpp` beside `LIBRARY` and puts the library in place, whole or not at all.

    Args:
        root: The repository root.

    Returns:
        The library, or None if there is none now: no sources, no compiler, or an error, which is printed as a warning.
        An earlier library is removed then, since it no longer stands for its sources.
    """
    library = root / LIBRARY
    sources = sorted(library.parent.glob("*.cpp"))
    try:
        if not sources:
            raise CompileError(f"no .cpp files in {library.parent}")
        _compile(find_compiler(), sources, library)
    except CompileError as error:
        library.unlink(missing_ok=True)
        print(f"warning: native CPU kernels not built, the slower PyTorch path serves: {error}", file=sys.stderr)
        return None
    return library


def find_compiler() -> list[str]:
    """Returns the command of the C++ compiler: `$CXX` if set, else the first of `COMPILERS` on the PATH.

    Raises:
        CompileError: There is none.
    """
    if command := shlex.split(os.environ.get("CXX", "")):
        return command
    for name in COMPILERS:
        if path := shutil.which(name):
            return [path]
    raise CompileError("no C++ compiler found; install one (Debian, Ubuntu: apt-get install g++) and run `make native`")


def _compile(compiler: list[str], sources: Sequence[Path], library: Path) -> None:
    flags = (*COMPILE_FLAGS, _openmp_flag(compiler))
    with tempfile.TemporaryDirectory() as folder:
        objects = [str(Path(folder) / f"{source.stem}.o") for source in sources]
        for source, target in zip(sources, objects, strict=True):
            _run([*compiler, *flags, "-c", str(source), "-o", target])
        unfinished = library.with_name(f"{library.stem}.{os.getpid()}.so")
        try:
            # linked without -fopenmp: a library that names an OpenMP runtime could bring a second one into the process
            _run([*compiler, "-shared", *objects, "-o", str(unfinished)])
            unfinished.replace(library)
        finally:
            unfinished.unlink(missing_ok=True)


def _openmp_flag(compiler: list[str]) -> str:
    # clang's own OpenMP calls a runtime that torch does not bring; for libgomp it compiles the loops serially
    return "-fopenmp=libgomp" if "clang" in _run([*compiler, "--version"]) else "-fopenmp"


def _run(command: list[str]) -> str:
    try:
        return subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT).stdout
    except OSError as error:
        raise CompileError(f"cannot run {command[0]}: {error.strerror}") from error
    except subprocess.CalledProcessError as error:
        raise CompileError(f"{shlex.join(command)} exited with {error.returncode}\n{error.output}".rstrip()) from error


try:
    from hatchling.builders.hooks.plugin.interface import BuildHookInterface
except ImportError:
    # hatchling exists only while a wheel is built
    pass
else:

    class NativeLibraryHook(BuildHookInterface):
        """Builds the library before hatchling collects the files of a wheel or an editable install."""

        PLUGIN_NAME = "custom"

        def initialize(self, version: str, build_data: dict[str, object]) -> None:
            """Adds the library and a platform tag to the wheel; without a library the wheel stays pure Python."""
            del version
            if build(Path(self.root)) is None:
                return
            platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
            # loaded through ctypes, so any Python 3 will do
            build_data["tag"] = f"py3-none-{platform}"
            build_data["pure_python"] = False
            build_data["artifacts"] = [f"/{LIBRARY.as_posix()}"]


if __name__ == "__main__":
    if built := build(Path(__file__).resolve().parent):
        print(f"built {built}")

"""Writes the generated Python code of the wire contract, or checks that it is fresh.

    python proto/generate.py            writes *_pb2.py, *_pb2_grpc.py and their .pyi beside the .proto files
    python proto/generate.py --check    exits 1 and names the files that differ

Needs the extra `dev` (grpcio-tools, mypy-protobuf). Generated code refuses a runtime older than its generator, so
raising grpcio-tools raises the floors of grpcio and protobuf in pyproject.toml.
"""

import argparse
import importlib.resources
import os
import sys
import tempfile
from pathlib import Path

from grpc_tools import protoc

ROOT = Path(__file__).parent
PROTOS = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("lorasrv_proto/v1/*.proto"))


def generate(out: Path) -> None:
    """Writes all generated files below `out`.

    Raises:
        SystemExit: the protocol compiler reported an error, on stderr.
    """
    well_known = importlib.resources.files("grpc_tools") / "_proto"
    # the plug-ins of mypy-protobuf are scripts beside this interpreter, which need not be on PATH
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    outputs = [
        f"--{kind}_out={'quiet:' if 'mypy' in kind else ''}{out}"
        for kind in ("python", "grpc_python", "mypy", "mypy_grpc")
    ]
    status = protoc.main(["protoc", f"--proto_path={ROOT}", f"--proto_path={well_known}", *outputs, *PROTOS])
    if status != 0:
        raise SystemExit(status)


def stale_files() -> list[str]:
    """Returns the generated files that differ from what the `.proto` files now give, as paths below `proto`."""
    with tempfile.TemporaryDirectory() as folder:
        generate(Path(folder))
        fresh = {path.relative_to(folder).as_posix(): path.read_bytes() for path in Path(folder).rglob("*_pb2*")}
    committed = {
        path.relative_to(ROOT).as_posix(): path.read_bytes()
        for path in ROOT.rglob("*_pb2*")
        if path.suffix in (".py", ".pyi")
    }
    return sorted(name for name in fresh.keys() | committed.keys() if fresh.get(name) != committed.get(name))


def main() -> int:
    """Runs the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description="Write the generated code of the wire contract.")
    parser.add_argument("--check", action="store_true", help="only compare; exit 1 if the committed code is stale")
    if not parser.parse_args().check:
        generate(ROOT)
        return 0
    stale = stale_files()
    for name in stale:
        print(f"proto/{name} is stale: run python proto/generate.py", file=sys.stderr)
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())

"""The shape of the repository: who may import whom, what is installed, what a program that embeds a part pays for."""

import ast
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("kernels", "adapters", "proto", "server", "clients", "tests")
SEARCH_PATH = ("kernels", "adapters", "proto", "server", "clients/python")
PACKAGES = (
    "kernels/lorasrv_kernels",
    "adapters/lorasrv_adapters",
    "proto/lorasrv_proto",
    "server/lorasrv",
    "clients/python/lorasrv_client",
)
# distributions whose module has another name
MODULES = {
    "google-re2": "re2",
    "googleapis-common-protos": "google.rpc",
    "grpcio": "grpc",
    "grpcio-health-checking": "grpc_health",
    "grpcio-reflection": "grpc_reflection",
    "grpcio-status": "grpc_status",
    "import-linter": "importlinter",
    "protobuf": "google.protobuf",
    "pyyaml": "yaml",
}


def run_python(code: str, *, cwd: Path) -> str:
    """Runs `code` in a fresh interpreter that finds our packages by path only; returns its standard output."""
    path = os.pathsep.join(str(ROOT / folder) for folder in SEARCH_PATH)
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "2"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env=environment, text=True, capture_output=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def sources(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def imports(paths: Iterable[Path]) -> Iterator[str]:
    """Yields the dotted name of everything that the files import, function bodies included."""
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                yield from (alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                yield node.module
                yield from (f"{node.module}.{alias.name}" for alias in node.names)


def foreign(names: Iterable[str]) -> set[str]:
    """Returns the imported names without the standard library's and our own."""
    ours = {Path(package).name for package in PACKAGES}
    return {name for name in names if name.split(".")[0] not in ours | sys.stdlib_module_names}


def provides(module: str, name: str) -> bool:
    return name == module or name.startswith(f"{module}.")


def provides_any(module: str, names: Iterable[str]) -> bool:
    return any(provides(module, name) for name in names)


@cache
def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def modules_of(requirements: Iterable[str]) -> dict[str, str]:
    """Returns distribution -> module for a list of requirements."""
    names = [re.split(r"[^A-Za-z0-9._-]", requirement, maxsplit=1)[0].lower() for requirement in requirements]
    return {name: MODULES.get(name, name.replace("-", "_")) for name in names}


def test_import_contracts_hold():
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache", "--no-logo"]
    path = os.pathsep.join(str(ROOT / folder) for folder in SEARCH_PATH)
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": path}, text=True, capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("folder", FOLDERS)
def test_top_level_folders_are_no_packages(folder):
    # a regular package `kernels` would shadow the one that bitsandbytes looks for
    assert not (ROOT / folder / "__init__.py").exists()


def test_top_level_folders_cannot_be_imported(tmp_path):
    code = f"""
import importlib.util
for name in {FOLDERS}:
    spec = importlib.util.find_spec(name)
    places = [] if spec is None else [spec.origin or "", *(spec.submodule_search_locations or [])]
    assert not any(place.startswith({str(ROOT)!r}) for place in places), places
"""
    run_python(code, cwd=tmp_path)


@pytest.mark.parametrize("package", PACKAGES)
def test_package_is_typed(package):
    assert (ROOT / package / "py.typed").exists()


@pytest.mark.parametrize("package", ["lorasrv", "lorasrv_client", "lorasrv_proto", "lorasrv.config", "lorasrv.errors"])
def test_import_without_torch(package, tmp_path):
    code = f"import {package}, sys; print(*sorted({{'torch', 'transformers', 'numpy'}} & set(sys.modules)))"
    assert run_python(code, cwd=tmp_path) == ""


@pytest.mark.parametrize("module", ["lorasrv_kernels.lora", "lorasrv.engine.runner"])
def test_import_without_triton(module, tmp_path):
    code = f"import {module}, sys; print('triton' in sys.modules)"
    assert run_python(code, cwd=tmp_path) == "False"


@pytest.mark.parametrize("name", ["request", "kv_cache", "scheduler", "arena"])
def test_step_planning_without_torch(name, tmp_path):
    code = f"import lorasrv.engine.{name}, sys; print('torch' in sys.modules)"
    assert run_python(code, cwd=tmp_path) == "False"


def test_every_runtime_import_is_declared():
    extras = project()["optional-dependencies"]
    declared = modules_of([*project()["dependencies"], *extras["cuda"], *extras["parquet"]])
    used = foreign(imports(sources(*PACKAGES)))
    assert {name for name in used if not any(provides(module, name) for module in declared.values())} == set()


def test_every_runtime_dependency_is_imported():
    used = foreign(imports(sources(*PACKAGES)))
    declared = modules_of([*project()["dependencies"], *project()["optional-dependencies"]["cuda"]])
    unused = {dist for dist, module in declared.items() if not any(provides(module, name) for name in used)}
    assert unused == set()


def test_every_test_import_is_declared():
    extras = project()["optional-dependencies"]
    declared = modules_of([*project()["dependencies"], *extras["test"], *extras["fuzz"]])
    siblings = {path.stem for path in sources("tests/support", "server/make_assets")}
    used = {
        name for name in foreign(imports(sources("tests", "server/make_assets"))) if name.split(".")[0] not in siblings
    }
    assert {name for name in used if not any(provides(module, name) for module in declared.values())} == set()


def test_every_test_dependency_is_imported():
    used = foreign(imports([*sources("tests", "server/make_assets"), ROOT / "hatch_build.py"]))
    extras = project()["optional-dependencies"]
    declared = modules_of([*extras["test"], *extras["fuzz"]])
    unused = {dist for dist, module in declared.items() if not any(provides(module, name) for name in used)}
    # the contracts above run as a command
    assert unused - {"import-linter"} == set()


def test_oracles_stay_out_of_the_packages():
    assert not {"peft", "transformers"} & {name.split(".")[0] for name in imports(sources(*PACKAGES))}


def test_pickles_are_opened_in_one_program_only():
    program = ROOT / "adapters/lorasrv_adapters/unpickle.py"
    unsafe = re.compile(
        r"torch\.(load|jit|package|hub)\b|torch import .*\b(load|jit|package|hub)\b|weights_only|allow_pickle"
    )
    opening = {path for path in sources(*PACKAGES) if unsafe.search(path.read_text())}
    assert opening == {program}
    modules = {"pickle", "cPickle", "_pickle", "shelve", "marshal", "dill", "joblib", "cloudpickle"}
    for path in sources(*PACKAGES):
        assert not modules & {name.split(".")[0] for name in imports([path])}, path


def test_only_convert_can_reach_the_program_that_opens_pickles():
    importers = {
        name: {path.relative_to(ROOT).as_posix() for path in sources(*PACKAGES) if provides_any(name, imports([path]))}
        for name in ("lorasrv_adapters.unpickle", "lorasrv_adapters.pickles", "lorasrv_adapters.convert")
    }
    assert importers == {
        "lorasrv_adapters.unpickle": set(),
        "lorasrv_adapters.pickles": {"adapters/lorasrv_adapters/convert.py"},
        "lorasrv_adapters.convert": {"server/lorasrv/cli/convert.py"},
    }


def test_public_modules_have_docstrings():
    generated = re.compile(r"_pb2(_grpc)?\.py$")
    silent = [
        str(path.relative_to(ROOT))
        for path in sources(*PACKAGES)
        if not generated.search(path.name) and not ast.get_docstring(ast.parse(path.read_text()))
    ]
    assert silent == []


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/maps")
def test_one_openmp_runtime(tmp_path):
    code = """
import pathlib
import torch
from lorasrv_kernels.cpu.library import load
load()
torch.ones(1000, 1000).sum()
files = {line.split(maxsplit=5)[-1].strip() for line in open("/proc/self/maps")}
print(sum(pathlib.PurePath(file).name.startswith(("libgomp", "libomp", "libiomp")) for file in files))
"""
    assert run_python(code, cwd=tmp_path) == "1"

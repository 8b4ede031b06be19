"""The build hook with a compiler and without one, and what ends up in a wheel."""

import ctypes
import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = 'extern "C" int answer() { static int calls = 41; return ++calls; }\n'

spec = importlib.util.spec_from_file_location("hatch_build", ROOT / "hatch_build.py")
assert spec is not None
assert spec.loader is not None
hatch_build = importlib.util.module_from_spec(spec)
spec.loader.exec_module(hatch_build)

needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, hatch_build.COMPILERS)), reason="no C++ compiler on this machine"
)


@pytest.fixture
def tree(tmp_path):
    """A repository root with one native source and the build hook."""
    source = tmp_path / hatch_build.LIBRARY.with_name("answer.cpp")
    source.parent.mkdir(parents=True)
    source.write_text(SOURCE)
    shutil.copy(ROOT / "hatch_build.py", tmp_path)
    return tmp_path


def run_hook(tree: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "CXX"} | variables
    command = [sys.executable, "hatch_build.py"]
    return subprocess.run(command, cwd=tree, env=environment, text=True, capture_output=True, timeout=60)


def built_files(tree: Path) -> list[str]:
    return sorted(path.name for path in (tree / hatch_build.LIBRARY).parent.iterdir() if path.suffix != ".cpp")


@needs_compiler
def test_builds_a_library_that_loads(tree):
    done = run_hook(tree)
    assert (done.returncode, done.stderr) == (0, "")
    assert built_files(tree) == ["_native.so"]
    assert ctypes.CDLL(str(tree / hatch_build.LIBRARY)).answer() == 42


@needs_compiler
@pytest.mark.skipif(shutil.which("readelf") is None, reason="needs readelf")
def test_names_no_openmp_runtime(tree):
    (tree / hatch_build.LIBRARY.with_name("loop.cpp")).write_text("""
        extern "C" int total(int n) {
            int sum = 0;
            #pragma omp parallel for reduction(+ : sum)
            for (int i = 0; i < n; ++i) sum += i;
            return sum;
        }""")
    assert run_hook(tree).returncode == 0
    library = str(tree / hatch_build.LIBRARY)
    symbols = subprocess.run(["readelf", "--wide", "--dyn-syms", "--dynamic", library], text=True, capture_output=True)
    assert "GOMP_parallel" in symbols.stdout
    assert "libgomp" not in symbols.stdout


@pytest.mark.parametrize("compiler", ["/bin/false", "no-such-compiler"])
def test_goes_on_without_a_compiler(tree, compiler):
    done = run_hook(tree, CXX=compiler)
    assert done.returncode == 0
    assert "native CPU kernels not built" in done.stderr
    assert built_files(tree) == []


def test_names_the_remedy_when_there_is_no_compiler(tree, tmp_path):
    done = run_hook(tree, PATH=str(tmp_path))
    assert done.returncode == 0
    assert "apt-get install g++" in done.stderr


@needs_compiler
def test_a_failed_build_leaves_no_stale_library(tree):
    assert run_hook(tree).returncode == 0
    (tree / hatch_build.LIBRARY.with_name("answer.cpp")).write_text("not C++")
    done = run_hook(tree)
    assert done.returncode == 0
    assert "answer.cpp" in done.stderr
    assert built_files(tree) == []


@pytest.fixture(scope="module")
def wheels(tmp_path_factory):
    """Wheels of this checkout by name: with the machine's compiler, and without one."""
    return {
        name: build_wheel(tmp_path_factory.mktemp(name), variables)
        for name, variables in (("default", {}), ("no_compiler", {"CXX": "/bin/false"}))
    }


def build_wheel(folder: Path, variables: dict[str, str]) -> Path:
    # a copy, so that the library in use by this run stays as it is
    tree = folder / "tree"
    (tree / hatch_build.LIBRARY).parent.mkdir(parents=True)
    ignored = shutil.ignore_patterns(".git", ".venv", "__pycache__", "*.so", ".*_cache", "node_modules", "tests")
    shutil.copytree(ROOT, tree, ignore=ignored, dirs_exist_ok=True)
    (tree / hatch_build.LIBRARY.with_name("answer.cpp")).write_text(SOURCE)
    environment = {name: value for name, value in os.environ.items() if name != "CXX"} | variables
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel"]
    done = subprocess.run(command, cwd=tree, env=environment, text=True, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr
    (wheel,) = (tree / "dist").glob("*.whl")
    return wheel


@needs_compiler
def test_wheel_carries_the_native_library(wheels):
    assert "-py3-none-linux_" in wheels["default"].name
    assert str(hatch_build.LIBRARY.relative_to("kernels")) in zipfile.ZipFile(wheels["default"]).namelist()


def test_wheel_without_a_compiler_is_pure_python(wheels):
    assert wheels["no_compiler"].name.endswith("-py3-none-any.whl")
    assert not any(name.endswith(".so") for name in zipfile.ZipFile(wheels["no_compiler"]).namelist())


def test_wheel_holds_the_five_packages_and_nothing_beside_them(wheels):
    names = zipfile.ZipFile(wheels["no_compiler"]).namelist()
    packages = {"lorasrv_kernels", "lorasrv_adapters", "lorasrv_proto", "lorasrv_client", "lorasrv"}
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == packages
    assert {f"{package}/py.typed" for package in packages} <= set(names)
    assert any(name.startswith("lorasrv_proto/v1/") and name.endswith(".proto") for name in names)

"""`lorasrv doctor`: what it finds here, and what it says where something is missing."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from lorasrv import doctor
from lorasrv.doctor import NATIVE_FUNCTIONS, REQUIRED, diagnose
from lorasrv_kernels.cpu import isa, library

ROOT = Path(__file__).parents[3]
MAPS = Path("/proc/self/maps")


@pytest.fixture
def no_library(monkeypatch, tmp_path):
    """As on a machine where the native library was not built."""
    monkeypatch.setattr(library, "PATH", tmp_path / "_native.so")
    monkeypatch.setattr(isa, "widest_isa", lambda: None)
    library.load.cache_clear()
    yield tmp_path / "_native.so"
    library.load.cache_clear()


def whats(found):
    return [problem.what for problem in found.problems]


def test_json_says_everything_and_status_0_that_it_serves(lorasrv):
    end = lorasrv("doctor", "--json")
    assert (end.code, end.err) == (0, "")
    assert list(end.json) == [
        *("serves", "problems", "versions", "memory", "cpu", "native_library", "cpu_kernels", "openmp", "cuda")
    ]
    assert end.json["serves"] is True
    assert end.json["versions"]["torch"]
    assert end.json["memory"]["total_bytes"] > end.json["memory"]["free_bytes"] > 0
    assert len(end.json["openmp"]["runtimes"]) == 1


@pytest.mark.skipif(library.load() is None, reason="the native library is not built")
def test_people_get_columns(lorasrv):
    end = lorasrv("doctor")
    rows = {tuple(re.split("  +", line)[:2]): line for line in end.out.splitlines()}
    assert rows["cpu kernels", "lora"].endswith(f"native, {isa.widest_isa().name.lower()}")
    assert rows["memory", "total"].endswith(" GiB")
    assert end.err.splitlines()[-1] == "a server can run here"


@pytest.mark.usefixtures("no_library")
def test_without_a_library_the_pytorch_path_is_said_to_serve(lorasrv):
    end = lorasrv("doctor", "--json")
    assert end.code == 0
    assert end.json["native_library"] == {"state": "absent", "path": None}
    assert set(end.json["cpu_kernels"].values()) == {"PyTorch"}
    assert [problem["what"] for problem in end.json["problems"]] == [
        "the native CPU kernels are not built; the slower PyTorch path serves"
    ]


@pytest.mark.usefixtures("no_library")
def test_the_remedy_names_the_compiler_only_where_there_is_none(monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}" if name == "g++" else None)
    assert [problem.remedy for problem in diagnose().problems] == ["run `make native`"]
    monkeypatch.setattr(shutil, "which", lambda _: None)
    assert [problem.remedy for problem in diagnose().problems] == [
        "install a C++ compiler (Debian, Ubuntu: apt-get install g++) and run `make native`"
    ]


def test_a_library_that_cannot_be_loaded_is_broken(lorasrv, no_library):
    no_library.write_bytes(b"not a library")
    end = lorasrv("doctor")
    assert end.code == 0
    assert "broken" in end.out
    assert "warning: native CPU kernels not loaded" in end.err
    assert "  remedy: run `make native`\n" in end.err


@pytest.mark.skipif(library.load() is None, reason="the native library is not built")
def test_a_library_without_a_function_is_stale(monkeypatch):
    monkeypatch.setitem(NATIVE_FUNCTIONS, "lora", ("lorasrv_of_tomorrow",))
    found = diagnose()
    assert found.facts["native_library"]["state"] == "stale"
    assert found.facts["cpu_kernels"]["lora"] == "PyTorch"
    assert found.facts["cpu_kernels"]["attention"].startswith("native")
    assert "lorasrv_of_tomorrow" in whats(found)[0]


def test_a_library_older_than_its_sources_is_stale_in_a_checkout(tmp_path):
    native = tmp_path / "kernels" / "lorasrv_kernels" / "cpu" / "_native.so"
    native.parent.mkdir(parents=True)
    source = native.with_name("x.cpp")
    for path, seconds in ((native, 10), (source, 20)):
        path.touch()
        os.utime(path, (seconds, seconds))
    assert not doctor._older_than_sources(native)
    (tmp_path / "hatch_build.py").touch()
    assert doctor._older_than_sources(native)
    os.utime(native, (30, 30))
    assert not doctor._older_than_sources(native)


def test_the_functions_are_those_that_the_kernels_ask_for():
    sources = (ROOT / "kernels" / "lorasrv_kernels").rglob("*.py")
    asked = {name for path in sources for name in re.findall(r'"(lorasrv_[a-z0-9_]+)"', path.read_text())}
    assert asked == {name for names in NATIVE_FUNCTIONS.values() for name in names}


def test_a_missing_package_is_status_1(lorasrv, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "re2" else find(name))
    end = lorasrv("doctor")
    assert end.code == 1
    assert "error: google-re2 is not installed\n  remedy: pip install google-re2\n" in end.err
    assert end.err.splitlines()[-1] == "no server can run here"


def test_without_pytorch_it_still_answers():
    program = (
        f"import sys; sys.path[:0] = {sys.path!r}; sys.modules['torch'] = None\n"
        "from lorasrv.cli.main import main; sys.exit(main(['doctor']))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "error: torch is not installed" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_second_openmp_runtime_is_a_problem(monkeypatch):
    files = ("/a/libgomp.so.1", "/b/libiomp5.so", "/b/libiomp5.so", "/c/libcompat.so")
    maps = "".join(f"7f00-7f10 r-xp 0 00:00 0  {file}\n" for file in files)
    read = Path.read_text
    monkeypatch.setattr(Path, "read_text", lambda path, **how: maps if path == MAPS else read(path, **how))
    found = diagnose()
    assert found.facts["openmp"] == {"runtimes": ["/a/libgomp.so.1", "/b/libiomp5.so"]}
    # beside it, where the native library was not built, that it was not
    assert whats(found)[-1] == (
        "more than one OpenMP runtime, whose threads get in each other's way: /a/libgomp.so.1, /b/libiomp5.so"
    )


def test_every_dependency_is_looked_for():
    stated = (ROOT / "pyproject.toml").read_text().partition("dependencies = [")[2].partition("]\n\n")[0]
    names = {re.split(r"[^\w-]", name)[0].lower() for name in re.findall(r'^\s+"([^"]+)"', stated, re.M)}
    assert names == {name.lower() for name in REQUIRED.values()}

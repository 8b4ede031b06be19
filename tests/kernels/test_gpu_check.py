"""What `make gpu-check` says where there is no GPU and where there is no time; CI runs it whole with SMALL=1."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from interpreter import INTERPRETING

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(INTERPRETING, reason="starts its own interpreter")

ROOT = Path(__file__).parents[2]
PATHS = os.pathsep.join(str(ROOT / folder) for folder in ("kernels", "adapters", "server", "tests/support"))
SCRIPT = ROOT / "kernels" / "benchmarks" / "cuda" / "check.py"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": PATHS}
    return subprocess.run([sys.executable, SCRIPT, *arguments], env=environment, capture_output=True, text=True)


def test_without_a_device_it_is_skipped(tmp_path: Path) -> None:
    done = run("--results", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("skipped: no CUDA device")
    assert not list(tmp_path.iterdir())


def test_what_there_is_no_time_for_is_named(tmp_path: Path) -> None:
    done = run("--small", "--seconds", "0.01", "--results", str(tmp_path))
    assert done.returncode == 1, done.stderr
    assert "tests failed: not finished after 0 s" in done.stdout
    assert done.stdout.splitlines()[-1] == "| 6 more |  |  | not run: no time left | | |"
    report = json.loads((tmp_path / "gpu-check-small.json").read_text())
    assert report["rows"] == [
        {"kernel": name, "shape": "", "size": "", "outcome": "not run: no time left"} for name in ("steps", "6 more")
    ]


def test_it_needs_no_package_but_torch_and_triton() -> None:
    """A machine with a GPU may have no more than these, and no network."""
    absent = (
        *("re2", "safetensors", "tokenizers", "grpc", "google", "prometheus_client", "huggingface_hub", "yaml", "rich"),
        *("jinja2", "peft", "transformers", "bitsandbytes", "hypothesis"),
    )
    imports = "import lorasrv.engine.engine, lorasrv.engine.runner, random_llama, stepped_serving, recorded_graph"
    program = f"import sys; sys.modules.update(dict.fromkeys({absent!r})); {imports}"
    done = subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, "PYTHONPATH": PATHS}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr

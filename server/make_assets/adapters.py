"""Trains the embedded adapters with `lorasrv train`, all in one run, by the recipe in `adapters.yaml`.

    python server/make_assets/adapters.py STYLES_FOLDER --out DIR [FLAG...]

Each learns the first 95 % of its text; `evaluate.py` measures on the rest. Further flags go to `lorasrv train`. Knows
no recipe, and nothing about training.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml
from base import split_text

RECIPE = Path(__file__).with_name("adapters.yaml")
SERVED = ("adapter_config.json", "adapter_model.safetensors", "provenance.json")


def train(styles: Path, out: Path, flags: list[str]) -> None:
    """Writes one folder below `out` for each job of the recipe, in place of what was there."""
    jobs = yaml.safe_load(RECIPE.read_text())["jobs"]
    with tempfile.TemporaryDirectory() as folder:
        for text in {name for job in jobs.values() for name in job["data"]}:
            learned, _ = split_text(styles / text)
            Path(folder, text).write_text(learned, encoding="utf-8")
        # names in the recipe start in this folder
        subprocess.run([sys.executable, "-m", "lorasrv", "train", RECIPE, *flags], cwd=folder, check=True)
        for job in jobs.values():
            _copy(Path(folder, job["out"]), out / job["out"])


def _copy(trained: Path, target: Path) -> None:
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    for name in SERVED:
        shutil.copy(trained / name, target / name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("styles", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    arguments, flags = parser.parse_known_args()
    train(arguments.styles, arguments.out, flags)


if __name__ == "__main__":
    main()

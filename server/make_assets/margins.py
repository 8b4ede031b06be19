"""Measures how much a short run of `lorasrv train` teaches the embedded base of a style, for every kind of adapter.

    python server/make_assets/margins.py STYLES_FOLDER [--texts FILE...] [--steps N]

Of each text the first 95 % are learned by a LoRA, an rsLoRA, a DoRA and an AdaLoRA in one run, the rest is held out.
Prints the held-out loss in nats a token, before and after, as a table.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from base import split_text

# AdaLoRA begins with small factors on both sides of its values, and wants a higher rate in a short run
RATES = {"lora": 4e-3, "rslora": 4e-3, "dora": 4e-3, "adalora": 2e-2}


def measure(text: Path, *, steps: int, rank: int) -> dict[str, Any]:
    """The outcomes of a run by method, as `lorasrv train --json` tells them."""
    learned, held_out = split_text(text)
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "learned.txt").write_text(learned, encoding="utf-8")
        Path(folder, "held_out.txt").write_text(held_out, encoding="utf-8")
        config = {
            "data": ["learned.txt"],
            "eval_data": ["held_out.txt"],
            "max_steps": steps,
            "rank": rank,
            # four windows of the whole context
            "batch_size": 4,
            "micro_batch_tokens": 8192,
            # no checkpoint is chosen by what is measured
            "eval_every": 0,
            "jobs": {
                method: {"method": method, "learning_rate": rate, "out": method} for method, rate in RATES.items()
            },
        }
        Path(folder, "run.yaml").write_text(json.dumps(config))
        command = [sys.executable, "-m", "lorasrv", "train", "run.yaml", "--json"]
        return dict(json.loads(subprocess.run(command, cwd=folder, check=True, stdout=subprocess.PIPE).stdout))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("styles", type=Path)
    parser.add_argument("--texts", nargs="+", default=["leaves_of_grass.txt", "devils_dictionary.txt"])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rank", type=int, default=8)
    arguments = parser.parse_args()
    print("| text | " + " | ".join(RATES) + " |\n|---|" + "---|" * len(RATES))
    for text in arguments.texts:
        outcomes = measure(arguments.styles / text, steps=arguments.steps, rank=arguments.rank)
        cells = [f"{o['held_out_loss_before']:.2f} -> {o['held_out_loss']:.2f}" for o in map(outcomes.get, RATES) if o]
        print(f"| {text} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()

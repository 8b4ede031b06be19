"""Every kind of adapter learns a style over the embedded base: made-up ones, and of books where STYLES names them."""

import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from lorasrv.train.app import train
from lorasrv.train.config import JobConfig, Method, RunConfig, TrainConfig

# AdaLoRA begins with factors so small that it wants a higher rate in a run of a few steps
RATES: dict[Method, float] = {"lora": 4e-3, "rslora": 4e-3, "dora": 4e-3, "adalora": 2e-2}
STYLES = os.environ.get("STYLES")


def telegram(draw: random.Random) -> str:
    who, what = draw.choice(["MOTHER", "THE COLONEL", "YOUR BROTHER"]), draw.choice(["ARRIVED", "DEPARTED", "IS WELL"])
    return f"{who} {what} STOP {draw.choice(['SEND MONEY', 'WEATHER FINE', 'LETTER FOLLOWS'])} STOP\n"


def entry(draw: random.Random) -> str:
    thing, word = draw.choice(["Ale", "Bread", "Candles"]), draw.choice(["bought", "owed", "paid"])
    return f"Item: {thing}, {word}, {draw.randint(1, 20)}s. {draw.randint(1, 11)}d.\n"


def gains(data: Path, out: Path, *, steps: int, max_tokens: int, faster: float = 1.0) -> dict[str, float]:
    """By method, by how many nats a token a run of all methods lowers the held-out loss."""
    jobs = {
        method: JobConfig(
            out=out / method, data=(data,), method=method, rank=4, batch_size=4, learning_rate=rate * faster
        )
        for method, rate in RATES.items()
    }
    run = RunConfig(max_steps=steps, max_tokens=max_tokens, checkpoint_layers=False, eval_every=0, save_every=0)
    losses = {name: outcome.held_out_loss for name, outcome in train(TrainConfig(run=run, jobs=jobs)).items()}
    return {name: loss[0] - loss[1] for name, loss in losses.items() if loss is not None}


@pytest.mark.parametrize("line", [telegram, entry])
def test_made_up_styles(tmp_path: Path, line: Callable[[random.Random], str]) -> None:
    draw = random.Random(0)
    (tmp_path / "style.txt").write_text("".join(line(draw) for _ in range(40)))
    found = gains(tmp_path / "style.txt", tmp_path, steps=6, max_tokens=40, faster=2.0)
    # such lines cost the base four nats a token, nearly all of which are their form; 1.4 and more are seen
    assert min(found.values()) > 0.5, found
    assert found.keys() == set(RATES)


@pytest.mark.skipif(not STYLES, reason="STYLES does not name a folder of books")
@pytest.mark.parametrize("book", ["leaves_of_grass.txt", "devils_dictionary.txt"])
def test_books(tmp_path: Path, book: str) -> None:
    found = gains(Path(str(STYLES), book), tmp_path, steps=30, max_tokens=512)
    # the margin that server/lorasrv/train/README.md states; 0.48 and more are seen
    assert min(found.values()) > 0.3, found

"""Methods find what was planted: AdaLoRA the ranks, DoRA magnitudes and directions that move against each other."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from lorasrv.train.config import JobConfig
from lorasrv.train.job import TrainingJob
from lorasrv_adapters.base import BaseModule
from lorasrv_kernels.lora.training import lora_update
from torch import Tensor

WIDTH = 48
BATCH = 16
RANKS = (8, 8, 0, 0, 0, 0, 0, 0)


class PlantedLayers:
    """Frozen square layers W, and the layers W + update that they are to become."""

    def __init__(self, weights: list[Tensor], goals: list[Tensor]) -> None:
        self.weights = {f"model.layers.{n}.proj": weight for n, weight in enumerate(weights)}
        self.goals = dict(zip(self.weights, goals, strict=True))
        module = BaseModule(kind="linear", out_features=WIDTH, in_features=WIDTH)
        self.base = SimpleNamespace(
            modules=dict.fromkeys(self.weights, module),
            tied=False,
            dtype=torch.float32,
            digest="0" * 64,
            weight_rows=lambda name, start, stop: self.weights[name][start:stop].clone(),
        )

    def learned(self, job: TrainingJob) -> dict[str, Tensor]:
        """What each layer has become, out of what it does to the unit vectors."""
        with torch.no_grad():
            return {name: self._forward(job, name, torch.eye(WIDTH)).T for name in self.weights}

    def residual(self, job: TrainingJob) -> float:
        """What is left of the updates, as a part of them."""
        learned = self.learned(job)
        left = sum(float((learned[name] - goal).square().sum()) for name, goal in self.goals.items())
        whole = sum(float((self.weights[name] - goal).square().sum()) for name, goal in self.goals.items())
        return (left / whole) ** 0.5

    def train(self, job: TrainingJob, num_steps: int) -> None:
        generator = torch.Generator().manual_seed(1)
        for step in range(num_steps):
            x = torch.randn(BATCH, WIDTH, generator=generator)
            errors = [self._forward(job, name, x) - x @ goal.T for name, goal in self.goals.items()]
            loss = torch.stack([error.square().mean() for error in errors]).sum()
            loss.backward()
            extra = job.regularizer()
            if extra is not None:
                extra.backward()
            job.finish_step(step, loss=float(loss.detach()))

    def _forward(self, job: TrainingJob, name: str, x: Tensor) -> Tensor:
        weight = self.weights[name]
        frozen = SimpleNamespace(project=lambda rows: rows @ weight.T, squared_row_norms=lambda: weight.square().sum(1))
        update = job.adapter.low_rank(name, frozen)
        return lora_update(x @ weight.T, x, segment_tokens=[len(x)], adapters=[[update]], out_features=[WIDTH])


def new_job(layers: PlantedLayers, *, num_steps: int, **options: Any) -> TrainingJob:
    config = JobConfig(out=Path("/none"), data=(Path("/none"),), weight_decay=0.0, clip=0.0, **options)
    return TrainingJob(
        "one", config, base=layers.base, base_name="", examples=[None], held_out=[], max_steps=num_steps, seed=0
    )


def low_rank(rank: int, generator: torch.Generator) -> Tensor:
    """[WIDTH, WIDTH] of this rank, all its singular values 1."""
    left, right = (torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=generator)).Q for _ in range(2))
    return left[:, :rank] @ right[:rank]


def test_adalora_finds_planted_ranks() -> None:
    """https://arxiv.org/abs/2303.10512: the budget goes where it is needed, so that more is learned with as much."""
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(WIDTH, WIDTH, generator=generator) / WIDTH**0.5 for _ in RANKS]
    goals = [weight + low_rank(rank, generator) for weight, rank in zip(weights, RANKS, strict=True)]
    layers, num_steps = PlantedLayers(weights, goals), 400
    options = {"rank": 2, "num_steps": num_steps, "learning_rate": 3e-2, "schedule": "linear"}
    adalora = new_job(layers, method="adalora", init_rank=8, allocate_every=1, allocate_until=0.5, **options)
    lora = new_job(layers, method="lora", **options)
    for job in (adalora, lora):
        layers.train(job, num_steps)
    ranks = list(adalora.ranks().values())
    assert sum(ranks) == sum(RANKS)
    assert sum(abs(found - planted) for found, planted in zip(ranks, RANKS, strict=True)) <= 1
    assert layers.residual(adalora) < layers.residual(lora) / 5


def moves(before: Tensor, after: Tensor) -> tuple[Tensor, Tensor]:
    """How far magnitude and direction of every row have moved (https://arxiv.org/abs/2402.09353 equations 3 and 4)."""
    return (after.norm(dim=1) - before.norm(dim=1)).abs(), 1 - torch.cosine_similarity(before, after)


def test_dora_moves_magnitudes_and_directions_apart() -> None:
    """https://arxiv.org/abs/2402.09353 section 3.2: as in full training they go against each other, LoRA's together."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(WIDTH, WIDTH, generator=generator) / WIDTH**0.5
    turned = torch.linspace(0.1, 1, WIDTH)
    factors = torch.randn(WIDTH, 4, generator=generator), torch.randn(4, WIDTH, generator=generator) / WIDTH**0.5
    direction = weight + turned[:, None] * (factors[0] @ factors[1]) * 0.5
    magnitude = weight.norm(dim=1) * (1 + 0.6 * (1.1 - turned))
    goal = direction * (magnitude / direction.norm(dim=1))[:, None]
    layers, num_steps = PlantedLayers([weight], [goal]), 500
    found = {}
    for method in ("lora", "dora"):
        job = new_job(layers, method=method, rank=4, num_steps=num_steps, learning_rate=2e-2, schedule="linear")
        layers.train(job, num_steps)
        (learned,) = layers.learned(job).values()
        found[method] = float(torch.corrcoef(torch.stack(moves(weight, learned)))[0, 1]), layers.residual(job)
    planted = float(torch.corrcoef(torch.stack(moves(weight, goal)))[0, 1])
    assert planted < -0.5
    assert found["dora"][0] < 0 < found["lora"][0]
    assert found["dora"][1] < found["lora"][1] / 5

"""One adapter on its way through a run: its data, its optimizer, its schedule, its allocator.

Knows its own steps; does not know that other adapters may share its batches.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from lorasrv_adapters.base import BaseModel
from lorasrv_adapters.checkpoint import read_checkpoint, write_checkpoint
from torch import Tensor

from lorasrv.train.adapter import TrainableAdapter
from lorasrv.train.budget import BudgetSchedule, RankAllocator, orthogonality
from lorasrv.train.checkpoint import Checkpoint
from lorasrv.train.config import JobConfig
from lorasrv.train.data.examples import Example
from lorasrv.train.data.order import ExampleOrder
from lorasrv.train.observer import StepResult
from lorasrv.train.optimizer import FlatOptimizer
from lorasrv.train.schedule import learning_rate_factor


@dataclass(frozen=True, slots=True, kw_only=True)
class Best:
    """The best that held-out data have seen.

    Attributes:
        step: after how many steps.
        loss: held out, in nats a token.
        buffers: the adapter's flat tensors, by role.
    """

    step: int
    loss: float
    buffers: Mapping[str, Tensor]


class TrainingJob:
    """One adapter being trained.

    Attributes:
        name: of the job.
        config: what was asked for.
        adapter: the tensors.
        held_out: examples for evaluation.
        best: the tensors with the lowest held-out loss so far; None before the first evaluation.
    """

    def __init__(
        self,
        name: str,
        config: JobConfig,
        *,
        base: BaseModel,
        base_name: str,
        examples: Sequence[Example],
        held_out: Sequence[Example],
        max_steps: int,
        seed: int,
        device: torch.device | str = "cpu",
    ) -> None:
        self.name = name
        self.config = config
        self.held_out = held_out
        self._examples = examples
        self._max_steps = max_steps
        self._order = ExampleOrder(len(examples), batch_size=config.batch_size, seed=seed)
        described = adapter_config(config, base_name=base_name, max_steps=max_steps)
        start = None if config.init_from is None else read_checkpoint(config.init_from, base)
        self.adapter = TrainableAdapter(
            described,
            base,
            seed=seed,
            initialization=config.initialization,
            start=start,
            dropout=config.dropout,
            device=device,
        )
        self._optimizer = _optimizer(self.adapter, config)
        self._allocator = _allocator(self.adapter, config, max_steps=max_steps)
        self.best: Best | None = None
        self._evaluations_since_best = 0

    @property
    def _save_dtype(self) -> torch.dtype:
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[self.config.save_dtype]

    @property
    def out(self) -> Path:
        """Where its adapter will be."""
        return self.config.out

    def examples(self, step: int) -> list[Example]:
        """What step `step`, counted from 0, learns."""
        return [self._examples[place] for place in self._order.step(step)]

    def regularizer(self) -> Tensor | None:
        """What the loss of a step has beside the data's; differentiable."""
        triplets = self.adapter.triplets()
        return orthogonality(triplets) * self.config.orthogonality if triplets else None

    def finish_step(self, step: int, *, loss: float) -> StepResult:
        """Takes the gradients of step `step`, counted from 0, into the tensors, and clears them."""
        norm = self.adapter.parameters.gradient_norm()
        if self.config.clip:
            clipping = (self.config.clip / (norm + 1e-6)).clamp(max=1.0)
            for buffer in self.adapter.parameters.buffers.values():
                assert buffer.grad is not None
                buffer.grad.mul_(clipping)
        factor = learning_rate_factor(self.config.schedule, step, max_steps=self._max_steps, warmup=self.config.warmup)
        rate = self._optimizer.step(factor)
        if self._allocator is not None:
            self._allocator.update(step + 1)
        self.adapter.changed()
        self.adapter.parameters.clear_gradients()
        return StepResult(loss=loss, learning_rate=rate, gradient_norm=float(norm), ranks=self.ranks())

    def observe(self, step: int, held_out_loss: float) -> None:
        """Takes the held-out loss after `step` steps; the tensors with the lowest one are kept.

        AdaLoRA's count from its final ranks on.
        """
        if self._allocator is not None and not self._allocator.is_final:
            return
        if self.best is None or held_out_loss < self.best.loss:
            buffers = {role: buffer.detach().clone() for role, buffer in self.adapter.parameters.buffers.items()}
            self.best = Best(step=step, loss=held_out_loss, buffers=buffers)
            self._evaluations_since_best = 0
        else:
            self._evaluations_since_best += 1

    @property
    def is_done(self) -> bool:
        """Whether the held-out loss has stopped falling for as long as `patience` allows."""
        return 0 < self.config.patience <= self._evaluations_since_best

    def take_best(self) -> None:
        """Goes back to the tensors with the lowest held-out loss, if there were evaluations, as they are written."""
        for role, buffer in self.adapter.parameters.buffers.items():
            best = buffer.data if self.best is None else self.best.buffers[role]
            buffer.data.copy_(best.to(self._save_dtype))
        self.adapter.changed()

    def state(self, step: int) -> Checkpoint:
        """Everything that `step` steps have changed."""
        tensors: dict[str, Tensor] = {}
        for role, buffer in self.adapter.parameters.buffers.items():
            tensors[f"parameters/{role}"] = buffer.detach()
            if self.best is not None:
                tensors[f"best/{role}"] = self.best.buffers[role]
        tensors |= {f"optimizer/{name}": tensor for name, tensor in self._optimizer.state().items()}
        if self._allocator is not None:
            tensors |= {f"allocator/{key}": value for key, value in self._allocator.state().items()}
        facts = {
            "best": None if self.best is None else {"step": self.best.step, "loss": self.best.loss},
            "evaluations_since_best": self._evaluations_since_best,
        }
        return Checkpoint(step=step, tensors=tensors, facts=facts)

    def load_state(self, checkpoint: Checkpoint) -> None:
        """Takes what `state` gave; the job then goes on as if it had never stopped."""
        tensors, best = checkpoint.tensors, checkpoint.facts["best"]
        for role, buffer in self.adapter.parameters.buffers.items():
            buffer.data.copy_(tensors[f"parameters/{role}"])
        self.adapter.changed()
        self._optimizer.load_state(_below("optimizer/", tensors))
        if self._allocator is not None:
            self._allocator.load_state(_below("allocator/", tensors))
        if best is not None:
            buffers = {role: tensors[f"best/{role}"] for role in self.adapter.parameters.buffers}
            self.best = Best(step=best["step"], loss=best["loss"], buffers=buffers)
        self._evaluations_since_best = checkpoint.facts["evaluations_since_best"]

    def ranks(self) -> dict[str, int]:
        """By module, the rank now."""
        if self._allocator is not None:
            return self._allocator.ranks()
        return self.adapter.ranks()

    def write(self, provenance: Mapping[str, object], *, beside: Mapping[str, bytes]) -> Path:
        """Writes the adapter as a PEFT folder with some files beside, whole or not at all; returns where."""
        config, tensors = self.adapter.checkpoint(self._allocator.masks if self._allocator is not None else {})
        written = {name: tensor.to(self._save_dtype) for name, tensor in tensors.items()}
        write_checkpoint(self.config.out, config, written, provenance=provenance, beside=beside)
        return self.config.out


def _below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def adapter_config(job: JobConfig, *, base_name: str, max_steps: int) -> dict[str, object]:
    """The content of `adapter_config.json`, as PEFT spells it."""
    targets = "all-linear" if job.target_modules == ("all-linear",) else sorted(job.target_modules)
    config: dict[str, object] = {
        "base_model_name_or_path": base_name,
        "bias": "none",
        "inference_mode": True,
        "lora_alpha": job.effective_alpha,
        "lora_dropout": job.dropout,
        "target_modules": targets,
        "task_type": "CAUSAL_LM",
    }
    if job.modules_to_save:
        config |= {"modules_to_save": sorted(job.modules_to_save), "ensure_weight_tying": job.ensure_weight_tying}
    if job.method == "adalora":
        first, last = _allocation_steps(job, max_steps)
        return config | {
            "peft_type": "ADALORA",
            "init_r": job.start_rank,
            "target_r": job.rank,
            "tinit": first,
            "tfinal": max_steps - last,
            "deltaT": job.allocate_every,
            "beta1": job.sensitivity_beta,
            "beta2": job.sensitivity_beta,
            "orth_reg_weight": job.orthogonality,
            "total_step": max_steps,
        }
    if job.rank_pattern or job.alpha_pattern:
        config |= {"rank_pattern": dict(job.rank_pattern), "alpha_pattern": dict(job.alpha_pattern)}
    return config | {
        "peft_type": "LORA",
        "r": job.rank,
        "use_rslora": job.method == "rslora",
        "use_dora": job.method == "dora",
        "init_lora_weights": "gaussian" if job.initialization == "gaussian" else True,
    }


def _optimizer(adapter: TrainableAdapter, job: JobConfig) -> FlatOptimizer:
    buffers = adapter.parameters.buffers
    return FlatOptimizer(
        buffers,
        {role: job.learning_rate * (job.lora_plus_ratio if role == "b" else 1.0) for role in buffers},
        name=job.optimizer,
        betas=(job.beta1, job.beta2),
        weight_decay=job.weight_decay,
    )


def _allocator(adapter: TrainableAdapter, job: JobConfig, *, max_steps: int) -> RankAllocator | None:
    triplets = adapter.triplets()
    if not triplets:
        return None
    first, last = _allocation_steps(job, max_steps)
    schedule = BudgetSchedule(
        start=job.start_rank * len(triplets),
        target=job.rank * len(triplets),
        first_step=first,
        last_step=last,
        every=job.allocate_every,
    )
    return RankAllocator(triplets, schedule, beta=job.sensitivity_beta)


def _allocation_steps(job: JobConfig, max_steps: int) -> tuple[int, int]:
    """The last step with all ranks, and the first with the final ones."""
    first = min(round(job.allocate_from * max_steps), max_steps - 2)
    return first, max(first + 1, min(round(job.allocate_until * max_steps), max_steps - 1))

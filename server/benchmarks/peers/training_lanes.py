"""One training step after the other on lorasrv, and in the loop that people write around PEFT and transformers.

Both learn the same tokens with the same adapters, at first. Knows no clock and no table.
"""

import copy
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lanes import Lane
from lorasrv.model.decoder import DecoderModel
from lorasrv.train.batches import share_out, token_batches
from lorasrv.train.config import JobConfig
from lorasrv.train.data.examples import Example
from lorasrv.train.job import TrainingJob
from lorasrv.train.network import TrainableModel
from lorasrv.train.run import TrainingRun
from lorasrv_adapters.checkpoint import write_checkpoint
from peft import PeftModel
from torch import Tensor

LEARNING_RATE = 1e-4
CLIP = 1.0
_NO_FOLDER = Path("/none")


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What one adapter learns in a step: `batch` sequences of `length` tokens."""

    batch: int = 4
    length: int = 256
    rank: int = 16

    def __str__(self) -> str:
        return f"{self.batch} x {self.length} tokens a step, rank {self.rank}"

    @property
    def num_tokens(self) -> int:
        """Of a step."""
        return self.batch * self.length

    def tokens(self, vocab_size: int, seed: int = 0) -> Tensor:
        """[batch, length] int64."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(vocab_size, (self.batch, self.length), generator=generator)


class OurTraining:
    """Adapters that are trained together."""

    def __init__(
        self, model: DecoderModel, tokens: Sequence[Tensor], shape: Shape, *, method: str, checkpoint_layers: bool
    ) -> None:
        """Takes what each adapter learns, the same in every step: [batch, length]."""
        config = JobConfig(
            out=_NO_FOLDER,
            data=(_NO_FOLDER,),
            method=method,
            rank=shape.rank,
            batch_size=shape.batch,
            learning_rate=LEARNING_RATE,
            schedule="constant",
            warmup=0.0,
            clip=CLIP,
            weight_decay=0.0,
        )
        self._jobs = [
            TrainingJob(
                f"job {place}",
                config,
                base=model.base,
                base_name="base",
                examples=[_example(row) for row in rows.tolist()],
                held_out=[],
                max_steps=1 << 30,
                seed=place,
            )
            for place, rows in enumerate(tokens)
        ]
        for place, job in enumerate(self._jobs):
            randomize(job.adapter.parameters.tensors, seed=place)
        self._model = TrainableModel(model, checkpoint_layers=checkpoint_layers)
        self._num_tokens = sum(rows.numel() for rows in tokens)
        self._run = TrainingRun(self._model, self._jobs, micro_batch_tokens=self._num_tokens)
        self._steps = 0

    def prefill(self) -> None:
        """The first step, which is slower."""
        self.step()

    def step(self) -> None:
        """One step of every adapter."""
        steps = range(self._steps, self._steps + 1)
        self._run.train(steps, eval_every=0, report=lambda _: None, save=lambda _: None)
        self._steps += 1

    def gradients(self) -> tuple[float, dict[str, Tensor]]:
        """The loss of the next step and its gradients, of one adapter; they are added to those that are there."""
        (job,) = self._jobs
        shares = share_out([job.examples(self._steps)])
        (batch,) = token_batches(shares, num_adapters=1, max_tokens=self._num_tokens)
        loss = self._model.losses(batch, [job.adapter]).sum()
        loss.backward()
        tensors = job.adapter.parameters.tensors
        return float(loss.detach()), {name: tensor.grad for name, tensor in tensors.items() if tensor.grad is not None}

    def write(self, folder: Path) -> Path:
        """Writes the first adapter as a PEFT folder."""
        write_checkpoint(folder, *self._jobs[0].adapter.checkpoint({}))
        return folder


class PeftTraining:
    """A plain loop: forward with labels, backward, clip, AdamW."""

    def __init__(self, base: Any, adapter: Path, tokens: Tensor) -> None:
        """Reads the adapter over a base, which stays as it is."""
        tensors = [*base.parameters(), *base.buffers()]
        twin = copy.deepcopy(base, {id(tensor): tensor for tensor in tensors})
        # never in evaluation mode: bitsandbytes would pack its weights anew, for good, and gradients would end there
        self._model = PeftModel.from_pretrained(twin.train(), adapter, is_trainable=True).train()
        self._parameters = [one for one in self._model.parameters() if one.requires_grad]
        self._optimizer = torch.optim.AdamW(self._parameters, lr=LEARNING_RATE, weight_decay=0.0)
        self._tokens = tokens

    def prefill(self) -> None:
        """The first step, which is slower."""
        self.step()

    def step(self) -> None:
        """One step."""
        self._model(input_ids=self._tokens, labels=self._tokens).loss.backward()
        torch.nn.utils.clip_grad_norm_(self._parameters, CLIP)
        self._optimizer.step()
        self._optimizer.zero_grad()

    def gradients(self) -> tuple[float, dict[str, Tensor]]:
        """The loss of the next step and its gradients, by our names; they are added to those that are there."""
        loss = self._model(input_ids=self._tokens, labels=self._tokens).loss
        loss.backward()
        found = {_our_name(name): one.grad for name, one in self._model.named_parameters() if one.requires_grad}
        return float(loss.detach()), {name: gradient for name, gradient in found.items() if gradient is not None}


class OneByOne:
    """Lanes that take their steps one after the other."""

    def __init__(self, lanes: Sequence[Lane]) -> None:
        self._lanes = lanes

    def prefill(self) -> None:
        """A first step of each."""
        self.step()

    def step(self) -> None:
        """A step of each."""
        for lane in self._lanes:
            lane.step()


def randomize(tensors: Mapping[str, Tensor], *, seed: int) -> None:
    """Small random values, so that every gradient is there; magnitudes near what they were."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in tensors.items():
        drawn = torch.randn(tensor.shape, generator=generator)
        tensor.data.copy_(tensor.data * (1 + 0.05 * drawn) if "magnitude" in name else drawn * 0.02)


def _example(row: list[int]) -> Example:
    return Example(token_ids=array("i", row), supervised=bytes([0] + [1] * (len(row) - 1)), place="")


def _our_name(name: str) -> str:
    return name.removeprefix("base_model.model.").replace(".default", "").replace("_vector.weight", "_vector")

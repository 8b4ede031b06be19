"""A training run: one base, one adapter or several, step after step.

Knows the model, the jobs and the steps; does not know files of data, terminals or reports.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from lorasrv.errors import NonFiniteLossError
from lorasrv.train.batches import Share, share_out, token_batches
from lorasrv.train.job import StepResult, TrainingJob
from lorasrv.train.network import TokenBatch, TrainableModel


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    """A step of a run.

    Attributes:
        step: counted from 1.
        tokens: of all jobs.
        seconds: it took.
        jobs: by name, what each job did.
        evaluations: by name, the held-out loss in nats a token, where there was an evaluation.
    """

    step: int
    tokens: int
    seconds: float
    jobs: dict[str, StepResult]
    evaluations: dict[str, float]


class TrainingRun:
    """Trains the adapters of some jobs together: their rows share the products with the base."""

    def __init__(
        self,
        model: TrainableModel,
        jobs: Sequence[TrainingJob],
        *,
        micro_batch_tokens: int,
        device: torch.device | str = "cpu",
    ) -> None:
        self._model = model
        self._jobs = tuple(jobs)
        self._adapters = [job.adapter for job in jobs]
        self._micro_batch_tokens = micro_batch_tokens
        self._device = device

    def train(self, max_steps: int, *, eval_every: int, report: Callable[[StepReport], None]) -> None:
        """Runs all steps.

        Raises:
            NonFiniteLossError: a loss was NaN or infinite; nothing of that step was learned.
        """
        for step in range(max_steps):
            started = time.monotonic()
            tokens, results = self._step(step)
            seconds = time.monotonic() - started
            due = step + 1 == max_steps or (eval_every and (step + 1) % eval_every == 0)
            evaluations = {job.name: self.evaluate(job) for job in self._jobs if job.held_out} if due else {}
            report(StepReport(step=step + 1, tokens=tokens, seconds=seconds, jobs=results, evaluations=evaluations))

    def _step(self, step: int) -> tuple[int, dict[str, StepResult]]:
        shares = share_out([job.examples(step) for job in self._jobs])
        totals = torch.zeros(len(self._jobs))
        batches = self._token_batches(shares, len(self._jobs))
        for batch in batches:
            losses = self._model.losses(batch, self._adapters)
            losses.sum().backward()
            totals += _by_adapter(losses.detach(), batch)
        self._check(step, totals)
        for job in self._jobs:
            extra = job.regularizer()
            if extra is not None:
                extra.backward()
        results = {
            job.name: job.finish_step(step, loss=float(total)) for job, total in zip(self._jobs, totals, strict=True)
        }
        return sum(len(batch.token_ids) for batch in batches), results

    @torch.no_grad()
    def evaluate(self, job: TrainingJob) -> float:
        """The mean loss of a job's held-out tokens, in nats."""
        shares = share_out([job.held_out])
        total = 0.0
        for batch in self._token_batches(shares, 1):
            total += float(self._model.losses(batch, [job.adapter]).sum())
        return total

    def _token_batches(self, shares: Sequence[Share], num_adapters: int) -> list[TokenBatch]:
        return token_batches(
            shares, num_adapters=num_adapters, max_tokens=self._micro_batch_tokens, device=self._device
        )

    def _check(self, step: int, totals: torch.Tensor) -> None:
        broken = [job.name for job, loss in zip(self._jobs, totals.tolist(), strict=True) if not math.isfinite(loss)]
        if broken:
            raise NonFiniteLossError(step=step + 1, jobs=broken)


def _by_adapter(losses: torch.Tensor, batch: TokenBatch) -> torch.Tensor:
    return torch.stack([part.sum() for part in losses.split(batch.segments)])

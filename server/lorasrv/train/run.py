"""A training run: one base, one adapter or several, step after step.

Knows the model, the jobs and the steps; does not know files of data, terminals or reports.
"""

import logging
import math
import resource
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lorasrv.errors import NonFiniteLossError
from lorasrv.train.batches import Share, share_out, token_batches
from lorasrv.train.job import TrainingJob
from lorasrv.train.network import TokenBatch, TrainableModel
from lorasrv.train.observer import StepReport, StepResult

_log = logging.getLogger(__name__)


class TrainingRun:
    """Trains the adapters of some jobs together: their rows share the products with the base."""

    def __init__(
        self,
        model: TrainableModel,
        jobs: Sequence[TrainingJob],
        *,
        micro_batch_tokens: int,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        self._model = model
        self._jobs = tuple(jobs)
        self._seed = seed
        self._micro_batch_tokens = micro_batch_tokens
        self._device = torch.device(device)
        self._num_shrinks = 0

    def train(
        self,
        steps: range,
        *,
        eval_every: int,
        report: Callable[[StepReport], None],
        save: Callable[[int], None],
    ) -> None:
        """Runs some steps, fewer if every job is done before.

        Args:
            steps: which, counted from 0; the first ones were done by a run before this.
            eval_every: steps between evaluations; 0: only after the last one.
            report: called after every step.
            save: called after it with the number of steps done.

        Raises:
            NonFiniteLossError: a loss was NaN or infinite; nothing of that step was learned.
        """
        began = time.monotonic()
        for step in steps:
            jobs = [job for job in self._jobs if not job.is_done]
            if not jobs:
                return
            started, shrinks = time.monotonic(), self._num_shrinks
            tokens, results = self._step(step, jobs)
            seconds = time.monotonic() - started
            due = step + 1 == steps.stop or (eval_every and (step + 1) % eval_every == 0)
            evaluations = {job.name: self.evaluate(job) for job in jobs if job.held_out} if due else {}
            for job in jobs:
                if job.name in evaluations:
                    job.observe(step + 1, evaluations[job.name])
            done, left = step + 1 - steps.start, steps.stop - step - 1
            report(
                StepReport(
                    step=step + 1,
                    tokens=tokens,
                    seconds=seconds,
                    seconds_left=(time.monotonic() - began) / done * left,
                    memory_bytes=_memory_bytes(self._device),
                    num_shrinks=self._num_shrinks - shrinks,
                    jobs=results,
                    evaluations=evaluations,
                )
            )
            save(step + 1)

    def _step(self, step: int, jobs: Sequence[TrainingJob]) -> tuple[int, dict[str, StepResult]]:
        shares = share_out([job.examples(step) for job in jobs])
        while True:
            try:
                tokens, totals = self._gradients(step, shares, jobs)
                break
            except torch.OutOfMemoryError:
                if not self._save_memory(shares):
                    raise
                for job in jobs:
                    job.adapter.parameters.clear_gradients()
        results = {job.name: job.finish_step(step, loss=total) for job, total in zip(jobs, totals, strict=True)}
        return tokens, results

    def _gradients(self, step: int, shares: Sequence[Share], jobs: Sequence[TrainingJob]) -> tuple[int, list[float]]:
        """Adds the gradients of a step to the jobs' tensors; returns its tokens and every job's loss."""
        totals = torch.zeros(len(jobs))
        batches = self._token_batches(shares, len(jobs))
        for place, batch in enumerate(batches):
            # of the step alone, so that a run that was interrupted drops what it would have dropped
            torch.manual_seed(self._seed + (step << 16) + place)
            losses = self._model.losses(batch, [job.adapter for job in jobs])
            losses.sum().backward()
            totals += self._by_job(step, losses.detach(), batch, jobs)
        for job in jobs:
            extra = job.regularizer()
            if extra is not None:
                extra.backward()
        return sum(len(batch.token_ids) for batch in batches), totals.tolist()

    def _save_memory(self, shares: Sequence[Share]) -> bool:
        """Takes less from now on, for the same step: keeps less, then halves the micro-batches; False if it cannot."""
        if self._model.checkpoint_layers():
            _log.warning("out of memory: from now on layers are computed again on the way back")
            self._num_shrinks += 1
            torch.cuda.empty_cache()
            return True
        longest = max(len(share.example.token_ids) for share in shares)
        if self._micro_batch_tokens <= longest:
            return False
        self._micro_batch_tokens = max(longest, self._micro_batch_tokens // 2)
        self._num_shrinks += 1
        _log.warning("out of memory: from now on %d tokens at a time, in more pieces", self._micro_batch_tokens)
        torch.cuda.empty_cache()
        return True

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

    def _by_job(self, step: int, losses: Tensor, batch: TokenBatch, jobs: Sequence[TrainingJob]) -> Tensor:
        """The loss of every job in a batch: [J] float32, on the CPU."""
        sums = torch.stack([part.sum() for part in losses.split(batch.segments)]).cpu()
        broken = [job.name for job, loss in zip(jobs, sums.tolist(), strict=True) if not math.isfinite(loss)]
        if broken:
            raise NonFiniteLossError(step=step + 1, jobs=broken, places=batch.places)
        return sums


def _memory_bytes(device: torch.device) -> int:
    """The most that was ever in use: of the device, on a CPU by this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # Linux counts it in KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

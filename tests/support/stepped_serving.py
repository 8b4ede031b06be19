"""Requests run to their end step by step, on the calling thread: scheduler, memory and runner without an engine."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from lorasrv.engine.decode_graphs import DecodeGraphs, Graph
from lorasrv.engine.kv_cache import BlockAllocator
from lorasrv.engine.memory import DeviceMemory
from lorasrv.engine.request import Lease, Request, SampledToken, SamplingParams
from lorasrv.engine.runner import ModelRunner
from lorasrv.engine.scheduler import Scheduler, SchedulerLimits
from lorasrv.engine.sequence import ScheduledSequence, ScheduledStep
from lorasrv.model.decoder import DecoderModel
from torch import Tensor


def make_requests(
    leases: Sequence[Lease | None], *, count: int, longest: int = 40, most_tokens: int = 24
) -> list[Request]:
    """Requests of random prompts, taking turns with the leases; greedy ones and random ones."""
    source = random.Random(1)
    return [
        Request(
            request_id=str(index),
            prompt_token_ids=tuple(source.randrange(300) for _ in range(source.randint(1, longest))),
            sampling=SamplingParams(
                max_new_tokens=source.randint(2, most_tokens),
                temperature=source.choice([0.0, 0.8]),
                seed=index,
                ignore_eos=True,
            ),
            lease=leases[index % len(leases)],
        )
        for index in range(count)
    ]


class CountingObserver:
    """Counts evictions."""

    def __init__(self) -> None:
        self.num_evictions = 0

    def adapter_evicted(self, level: str) -> None:
        del level
        self.num_evictions += 1


class KeepingRunner(ModelRunner):
    """Keeps the logits of every sampled token."""

    def sample(
        self, logits: Tensor, parts: Sequence[ScheduledSequence], *, greedy: Tensor | None = None
    ) -> list[SampledToken]:
        self.rows = getattr(self, "rows", {})
        for row, part in zip(logits, parts, strict=True):
            self.rows[_key(part)] = row.cpu().clone()
        return super().sample(logits, parts, greedy=greedy)


class ComparingRunner(KeepingRunner):
    """Runs every step twice, eagerly and then captured, which writes the same keys and values again.

    `differences` are those of the logits, the largest of each step that was captured.
    """

    def execute(self, step: ScheduledStep) -> list[SampledToken]:
        self.differences = getattr(self, "differences", [])
        graphs, self._graphs = self._graphs, None
        super().execute(step)
        keys = [_key(part) for part in step.sequences if part.samples]
        eager = {key: self.rows[key] for key in keys}
        self._graphs = graphs
        tokens = super().execute(step)
        if all(part.num_tokens == 1 for part in step.sequences):
            self.differences.append(max(float((self.rows[key] - eager[key]).abs().max()) for key in keys))
        return tokens


@dataclass(slots=True)
class Served:
    """What happened.

    Attributes:
        rows: logits by request and place in its output.
        token_ids: outputs by request.
        sizes: sequences of every step.
        differences: of a `ComparingRunner`.
    """

    rows: dict[tuple[str, int], Tensor] = field(default_factory=dict)
    token_ids: dict[str, list[int]] = field(default_factory=dict)
    sizes: list[int] = field(default_factory=list)
    num_preemptions: int = 0
    num_evictions: int = 0
    num_moves: int = 0
    differences: list[float] = field(default_factory=list)


def serve(
    model: DecoderModel,
    requests: Sequence[Request],
    *,
    new_graph: Callable[[], Graph] | None,
    arrival_seed: int = 0,
    num_blocks: int = 64,
    max_num_seqs: int = 8,
    max_batched_tokens: int = 64,
    max_adapters: int = 4,
    max_rank: int = 16,
    adapter_bytes: int = 1 << 20,
    exact: bool = True,
    make_runner: type[KeepingRunner] = KeepingRunner,
) -> Served:
    """Runs requests that arrive a few at a time; with `new_graph` decode steps are captured and replayed."""
    observer, served, source = CountingObserver(), Served(), random.Random(arrival_seed)
    memory = DeviceMemory(
        model.config,
        model.base,
        dtype=model.dtype,
        device=model.device,
        kv_bytes=num_blocks * DeviceMemory.block_elements(model.config) * model.dtype.itemsize,
        adapter_bytes=adapter_bytes,
        max_rank=max_rank,
        max_adapters=max_adapters,
        exact=exact,
        observer=observer,
    )
    # what nobody wrote shows
    memory.arena.fill_(torch.nan)
    compact = memory.layout.compact
    memory.layout.compact = lambda: _counted(served, compact())
    graphs = None
    if new_graph is not None:
        graphs = DecodeGraphs(model, memory, max_num_seqs=max_num_seqs, new_graph=new_graph)
    runner = make_runner(model, memory, graphs=graphs)
    limits = SchedulerLimits(
        max_num_seqs=max_num_seqs, max_batched_tokens=max_batched_tokens, max_model_len=model.max_positions
    )
    scheduler = Scheduler(limits, BlockAllocator(memory.layout.num_blocks), memory)
    waiting = list(requests)
    while waiting or scheduler.running or scheduler.waiting:
        take = source.randint(0 if scheduler.running else 1, 2)
        for request in waiting[:take]:
            scheduler.add(request)
        waiting = waiting[take:]
        _step(scheduler, runner, served)
    served.rows, served.num_evictions = runner.rows, observer.num_evictions
    served.differences = getattr(runner, "differences", [])
    return served


def _key(part: ScheduledSequence) -> tuple[str, int]:
    return part.sequence.request.request_id, part.sequence.num_generated_tokens


def _step(scheduler: Scheduler, runner: ModelRunner, served: Served) -> None:
    step = scheduler.schedule()
    if step is None:
        return
    served.num_preemptions += step.num_preemptions
    served.sizes.append(len(step.sequences))
    tokens = runner.execute(step)
    scheduler.advance(step)
    for part, token in zip([part for part in step.sequences if part.samples], tokens, strict=True):
        assert token.is_finite
        sequence = part.sequence
        sequence.token_ids.append(token.token_id)
        if sequence.num_generated_tokens == sequence.request.sampling.max_new_tokens:
            scheduler.finish(sequence)
            prompt = len(sequence.request.prompt_token_ids)
            served.token_ids[sequence.request.request_id] = sequence.token_ids[prompt:]


def _counted(served: Served, moves: list[object]) -> list[object]:
    served.num_moves += len(moves)
    return moves

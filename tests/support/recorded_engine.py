"""The real engine over a real model, remembering the logits of every token it samples."""

import queue
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from lorasrv.engine.engine import Engine
from lorasrv.engine.kv_cache import BlockAllocator
from lorasrv.engine.memory import DeviceMemory
from lorasrv.engine.request import Request, RequestOutput, SampledToken
from lorasrv.engine.runner import ModelRunner
from lorasrv.engine.scheduler import Scheduler, SchedulerLimits
from lorasrv.engine.sequence import ScheduledSequence, ScheduledStep
from lorasrv.model.decoder import DecoderModel
from lorasrv.model.loader import load_model
from lorasrv.model.tokenizer import Tokenizer
from lorasrv_adapters.checkpoint import read_checkpoint
from lorasrv_adapters.image import AdapterImage, pack_image
from torch import Tensor


@dataclass(slots=True)
class Lease:
    """A hold on one adapter version that counts its releases."""

    adapter_id: str
    digest: str
    image: AdapterImage
    num_releases: int = 0

    def release(self) -> None:
        self.num_releases += 1


@dataclass(slots=True)
class Served:
    """A base in one dtype and the adapters it serves, by id."""

    model: DecoderModel
    tokenizer: Tokenizer
    images: dict[str, tuple[str, AdapterImage]] = field(default_factory=dict)

    @classmethod
    def load(cls, base_folder: Path, folders: dict[str, Path], dtype: torch.dtype) -> "Served":
        model = load_model(base_folder, dtype=dtype, device="cpu")
        served = cls(model, Tokenizer(base_folder))
        for adapter_id, folder in folders.items():
            adapter = read_checkpoint(folder, model.base)
            served.images[adapter_id] = (adapter.digest, pack_image(adapter, model.base, dtype))
        return served

    def lease(self, adapter_id: str) -> Lease | None:
        return Lease(adapter_id, *self.images[adapter_id]) if adapter_id else None


class RecordingRunner(ModelRunner):
    """Keeps the logits row of every sampled token and how each prompt was cut."""

    def __init__(self, model: DecoderModel, memory: DeviceMemory) -> None:
        super().__init__(model, memory)
        self.rows: dict[tuple[str, int], Tensor] = {}
        self.max_adapters = 0
        self.num_chunks: dict[str, int] = {}

    def execute(self, step: ScheduledStep) -> list[SampledToken]:
        self.max_adapters = max(self.max_adapters, step.num_adapters)
        for part in step.sequences:
            if part.num_tokens > 1:
                request_id = part.sequence.request.request_id
                self.num_chunks[request_id] = self.num_chunks.get(request_id, 0) + 1
        return super().execute(step)

    def sample(
        self, logits: Tensor, parts: Sequence[ScheduledSequence], *, greedy: Tensor | None = None
    ) -> list[SampledToken]:
        for row, part in zip(logits, parts, strict=True):
            self.rows[part.sequence.request.request_id, part.sequence.num_generated_tokens] = row.clone()
        return super().sample(logits, parts, greedy=greedy)


@dataclass(frozen=True, slots=True)
class Run:
    """What came out of one run of the engine."""

    runner: RecordingRunner
    outputs: dict[str, list[RequestOutput]]
    num_preemptions: int

    def token_ids(self, request_id: str) -> list[int]:
        return [token for output in self.outputs[request_id] for token in output.token_ids]


def run_engine(
    served: Served,
    requests: Sequence[Request],
    *,
    arrival_seed: int | None = None,
    num_blocks: int = 64,
    max_num_seqs: int = 32,
    max_batched_tokens: int = 2048,
    max_adapters: int = 8,
    max_rank: int = 32,
    adapter_bytes: int = 8 << 20,
) -> Run:
    """Runs requests to their end; with an arrival seed a few at a time, in random order, between steps."""
    block_elements = DeviceMemory.block_elements(served.model.config)
    memory = DeviceMemory(
        served.model.config,
        served.model.base,
        dtype=served.model.dtype,
        device="cpu",
        kv_bytes=num_blocks * block_elements * served.model.dtype.itemsize,
        adapter_bytes=adapter_bytes,
        max_rank=max_rank,
        max_adapters=max_adapters,
    )
    runner = RecordingRunner(served.model, memory)
    limits = SchedulerLimits(max_num_seqs=max_num_seqs, max_batched_tokens=max_batched_tokens, max_model_len=512)
    scheduler = Scheduler(limits, BlockAllocator(num_blocks), memory)
    arrived: queue.Queue[list[RequestOutput]] = queue.Queue()
    engine = Engine(runner, scheduler, served.tokenizer, max_queue=100, on_outputs=arrived.put)
    engine.start()
    try:
        outputs = _drive(engine, requests, arrived, arrival_seed)
    finally:
        engine.close()
    return Run(runner, outputs, engine.stats().num_preemptions)


def _drive(
    engine: Engine, requests: Sequence[Request], arrived: "queue.Queue[list[RequestOutput]]", arrival_seed: int | None
) -> dict[str, list[RequestOutput]]:
    source = random.Random(arrival_seed)
    waiting = list(requests)
    if arrival_seed is not None:
        source.shuffle(waiting)
    outputs: dict[str, list[RequestOutput]] = {request.request_id: [] for request in requests}
    num_open = 0
    while waiting or num_open:
        take = len(waiting) if arrival_seed is None else source.randint(0 if num_open else 1, 6)
        for request in waiting[:take]:
            engine.submit(request)
            num_open += 1
        waiting = waiting[take:]
        for output in arrived.get(timeout=60):
            assert output.error is None, output.error
            outputs[output.request_id].append(output)
            num_open -= output.is_terminal
    return outputs

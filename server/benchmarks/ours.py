"""lorasrv as a lane: the engine's scheduler and runner on the calling thread; no queue, no text, no network."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engine import Lease
from lorasrv.engine.kv_cache import BlockAllocator
from lorasrv.engine.memory import DeviceMemory
from lorasrv.engine.request import Request, SampledToken, SamplingParams
from lorasrv.engine.runner import ModelRunner
from lorasrv.engine.scheduler import Scheduler, SchedulerLimits
from lorasrv.engine.sequence import ScheduledSequence
from lorasrv.model.decoder import DecoderModel
from lorasrv_adapters.base import table_order
from lorasrv_adapters.checkpoint import read_checkpoint
from lorasrv_adapters.image import pack_image
from lorasrv_kernels.batch import SlotBatch
from lorasrv_kernels.lora.traffic import Traffic, update_traffic
from torch import Tensor


class Served:
    """A model and its resident adapters, which lanes share.

    Args:
        model: the base.
        leases: all of them become resident, in this order of slots.
        num_blocks: KV blocks for all lanes together.
        max_rank: what the server is told.
        exact: whether no row's bits may depend on its neighbours.
    """

    def __init__(
        self, model: DecoderModel, leases: Sequence[Lease], *, num_blocks: int, max_rank: int, exact: bool = True
    ) -> None:
        self.model = model
        self.leases = tuple(leases)
        self.memory = DeviceMemory(
            model.config,
            model.base,
            dtype=model.dtype,
            device="cpu",
            kv_bytes=num_blocks * DeviceMemory.block_elements(model.config) * model.dtype.itemsize,
            adapter_bytes=sum(lease.image.flat.nbytes + 4096 for lease in leases),
            max_rank=max_rank,
            max_adapters=max(1, len(leases)),
            exact=exact,
        )
        self.blocks = BlockAllocator(num_blocks)
        for lease in leases:
            self._slot(lease)

    def traffic(self, leases: Sequence[Lease]) -> Traffic:
        """What one decode step over sequences with these adapters reads of them."""
        slots = [self._slot(lease) for lease in leases]
        batch, total = SlotBatch.from_slots(slots), Traffic()
        modules = self.model.base.modules
        for place, name in enumerate(table_order(self.model.base)):
            if modules[name].kind == "linear":
                total += update_traffic(
                    self.memory.slots.table[:, place : place + 1],
                    batch,
                    in_features=modules[name].in_features,
                    out_features=[modules[name].out_features],
                    dtype=self.model.dtype,
                )
        return total

    def _slot(self, lease: Lease) -> int:
        slot = self.memory.acquire(lease)
        assert slot is not None, "there is room for all"
        self.memory.release(slot)
        return slot


class OurLane:
    """A batch that is prefilled and then decoded, step by step; one prompt and one lease a sequence."""

    def __init__(
        self, served: Served, prompts: Sequence[Sequence[int]], leases: Sequence[Lease | None] | None = None
    ) -> None:
        limits = SchedulerLimits(max_num_seqs=len(prompts), max_batched_tokens=4096, max_model_len=512)
        self._scheduler = Scheduler(limits, served.blocks, served.memory)
        self._runner = _Recorder(served.model, served.memory)
        self._prompts = prompts
        self._leases = [None] * len(prompts) if leases is None else leases

    def prefill(self) -> Tensor:
        """Starts the batch anew; the logits [B, V] of its first tokens."""
        for sequence in tuple(self._scheduler.running):
            self._scheduler.finish(sequence)
        for index, (prompt, lease) in enumerate(zip(self._prompts, self._leases, strict=True)):
            sampling = SamplingParams(max_new_tokens=256, temperature=0.0, ignore_eos=True)
            request = Request(request_id=str(index), prompt_token_ids=tuple(prompt), sampling=sampling, lease=lease)
            self._scheduler.add(request)
        self.step()
        return self._runner.logits

    def step(self) -> None:
        """One decode step."""
        step = self._scheduler.schedule()
        assert step is not None
        sampled = self._runner.execute(step)
        self._scheduler.advance(step)
        for part, token in zip(step.sequences, sampled, strict=True):
            part.sequence.token_ids.append(token.token_id)

    @property
    def tokens(self) -> list[list[int]]:
        """Generated tokens of each sequence."""
        running = self._scheduler.running
        return [sequence.token_ids[len(sequence.request.prompt_token_ids) :] for sequence in running]


class _Recorder(ModelRunner):
    """Keeps the latest logits."""

    logits: Tensor

    def sample(self, logits: Tensor, parts: Sequence[ScheduledSequence], **options: Any) -> list[SampledToken]:
        self.logits = logits
        return super().sample(logits, parts, **options)


def read_leases(model: DecoderModel, folders: Sequence[Path]) -> list[Lease]:
    """Adapters from PEFT folders, read as a server reads them."""
    leases = []
    for folder in folders:
        adapter = read_checkpoint(folder, model.base)
        leases.append(Lease(folder.name, adapter.digest, pack_image(adapter, model.base, model.dtype)))
    return leases

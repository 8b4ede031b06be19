"""Turns a scheduled step into tensors, runs the model over it and samples: the only part of the engine with tensors.

Knows the model and the device memory; knows no queue, no text and no adapter beyond its slot.
"""

from collections.abc import Sequence

import torch
from lorasrv_kernels.attention import AttentionBatch, Span, split_blocks, tile_tokens
from torch import Tensor

from lorasrv.engine.decode_graphs import DecodeGraphs
from lorasrv.engine.memory import DeviceMemory
from lorasrv.engine.request import SampledToken
from lorasrv.engine.sampler import sample
from lorasrv.engine.scheduler import ScheduledStep
from lorasrv.engine.sequence import ScheduledSequence
from lorasrv.model.batch import StepBatch
from lorasrv.model.decoder import DecoderModel


class ModelRunner:
    """Runs steps on one device; engine thread only.

    Args:
        model: the base.
        memory: the KV cache and the resident adapters.
        graphs: runs the steps that were captured; None: nothing was.
    """

    def __init__(self, model: DecoderModel, memory: DeviceMemory, *, graphs: DecodeGraphs | None = None) -> None:
        self._model = model
        self._memory = memory
        self._graphs = graphs
        self._tile_tokens = tile_tokens(model.config.num_heads, model.config.num_kv_heads)
        self._split_blocks = split_blocks(model.max_positions)

    @torch.inference_mode()
    def execute(self, step: ScheduledStep) -> list[SampledToken]:
        """One forward pass over all sequences of the step.

        Returns:
            One token for each scheduled sequence that samples, in the step's order.
        """
        decoded = None if self._graphs is None else self._graphs.run(step.sequences)
        if decoded is not None:
            return self.sample(decoded.logits, step.sequences, greedy=decoded.most_probable)
        return self._execute(step.sequences)

    def sample(
        self, logits: Tensor, parts: Sequence[ScheduledSequence], *, greedy: Tensor | None = None
    ) -> list[SampledToken]:
        """One token a row of `logits` [N, V], float32; row i belongs to parts[i]; `greedy` as in `sampler.sample`."""
        return sample(
            logits,
            [part.sequence.request.sampling for part in parts],
            [part.sequence.num_generated_tokens for part in parts],
            greedy=greedy,
        )

    def _execute(self, parts: Sequence[ScheduledSequence]) -> list[SampledToken]:
        device = self._memory.arena.device
        tokens = torch.tensor([token for part in parts for token in _tokens(part)], device=device)
        ends = torch.tensor([part.num_tokens for part in parts]).cumsum(0) - 1
        sampling = [index for index, part in enumerate(parts) if part.samples]
        # everything the device reads is sent before it begins: sending waits for what it is doing
        batch, last_rows = self._lay_out(parts), ends[sampling].to(device)
        adapters = self._memory.adapters([parts[index].sequence.slot for index in sampling])
        hidden = self._model.forward(tokens, batch)
        if not sampling:
            return []
        return self.sample(self._model.logits(hidden[last_rows], adapters), [parts[index] for index in sampling])

    def _lay_out(self, parts: Sequence[ScheduledSequence]) -> StepBatch:
        spans = [
            Span(start=part.start, num_tokens=part.num_tokens, block_table=part.sequence.block_table) for part in parts
        ]
        device = self._memory.arena.device
        return StepBatch(
            positions=torch.cat([torch.arange(part.start, part.start + part.num_tokens) for part in parts]).to(device),
            attention=AttentionBatch.from_spans(
                spans, tile_tokens=self._tile_tokens, split_blocks=self._split_blocks, device=device
            ),
            adapters=self._memory.adapters([part.sequence.slot for part in parts for _ in range(part.num_tokens)]),
            kv_cache=self._memory.kv_cache,
        )


def _tokens(part: ScheduledSequence) -> list[int]:
    return part.sequence.token_ids[part.start : part.start + part.num_tokens]

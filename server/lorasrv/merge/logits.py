"""The logits of prompts by a model that is read one layer at a time, computed in float32 with the serving kernels.

Knows how a model is put together; not where its weights come from. Letters: T token rows, V vocabulary, S slots.
"""

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from lorasrv_adapters.image import AdapterImage
from lorasrv_kernels.attention import BLOCK_TOKENS, AttentionBatch, Span, tile_tokens
from lorasrv_kernels.batch import NO_SLOT, SlotBatch
from torch import Tensor

from lorasrv.model.batch import AdapterBatch, StepBatch
from lorasrv.model.config import ModelConfig
from lorasrv.model.decoder import DecoderLayer
from lorasrv.model.layers import RMSNorm, RotaryTable
from lorasrv.model.tensors import EMBEDDING, FINAL_NORM, HEAD, module_order
from lorasrv.model.vocabulary import OutputHead, TokenEmbedding


class ModelParts(Protocol):
    """A model of float32 activations, part by part."""

    def layer(self, index: int) -> DecoderLayer:
        """One decoder layer; nobody keeps it."""

    def wide(self, name: str) -> Tensor:
        """A tensor that is never quantized, float32."""


@torch.inference_mode()
def compute_logits(
    config: ModelConfig,
    parts: ModelParts,
    prompts: Sequence[Sequence[int]],
    *,
    adapter: AdapterImage | None = None,
    num_adapted: int = 0,
) -> Tensor:
    """The logits of every position of every prompt: [T, V] float32, computed a layer at a time.

    Args:
        config: the model's.
        parts: the model.
        prompts: token ids of each.
        adapter: what is done to the model, in float32; None: nothing.
        num_adapted: how many prompts it is done for, the first ones.
    """
    places = {name: place for place, name in enumerate(module_order(config))}
    batch = _batch(config, prompts, adapter, num_adapted=num_adapted)
    embedding, norm, head = (name.removesuffix(".weight") for name in (EMBEDDING, FINAL_NORM, HEAD))
    tokens = torch.tensor([token for prompt in prompts for token in prompt])
    x = TokenEmbedding(parts.wide(EMBEDDING), module=places[embedding]).forward(tokens, batch.adapters)
    rotary = RotaryTable(
        config.rope, head_size=config.head_size, num_positions=max(map(len, prompts)), device="cpu"
    ).lookup(batch.positions)
    for index in range(config.num_layers):
        x = parts.layer(index).forward(x, rotary, batch)
    final = RMSNorm(parts.wide(FINAL_NORM), epsilon=config.rms_norm_eps, module=places[norm])
    x = final.forward(x, batch.adapters)
    weight = parts.wide(EMBEDDING if config.tie_word_embeddings else HEAD)
    return OutputHead(weight, module=places[head]).forward(x, batch.adapters)


def _batch(
    config: ModelConfig, prompts: Sequence[Sequence[int]], adapter: AdapterImage | None, *, num_adapted: int
) -> StepBatch:
    spans = list(_spans(prompts))
    num_blocks = sum(len(span.block_table) for span in spans)
    slots = [0 if place < num_adapted else NO_SLOT for place, prompt in enumerate(prompts) for _ in prompt]
    num_modules = len(module_order(config))
    table = torch.zeros(0, num_modules, 8).long() if adapter is None else adapter.table[None]
    return StepBatch(
        positions=torch.cat([torch.arange(len(prompt)) for prompt in prompts]),
        attention=AttentionBatch.from_spans(spans, tile_tokens=tile_tokens(config.num_heads, config.num_kv_heads)),
        adapters=AdapterBatch(
            slots=SlotBatch.from_slots(slots),
            arena=torch.zeros(0) if adapter is None else adapter.flat,
            table=table,
            touched=() if adapter is None else range(num_modules),
        ),
        # one layer's, which the next one writes over
        kv_cache=torch.zeros(num_blocks, 1, 2, config.num_kv_heads, BLOCK_TOKENS, config.head_size).expand(
            -1, config.num_layers, -1, -1, -1, -1
        ),
    )


def _spans(prompts: Sequence[Sequence[int]]) -> Iterator[Span]:
    first = 0
    for prompt in prompts:
        num_blocks = -(-len(prompt) // BLOCK_TOKENS)
        yield Span(start=0, num_tokens=len(prompt), block_table=range(first, first + num_blocks))
        first += num_blocks

"""Tiny random Llamas as transformers saves them, and the driver that runs ours over them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from lorasrv.model.batch import AdapterBatch, StepBatch
from lorasrv.model.decoder import DecoderModel
from lorasrv_kernels.attention import BLOCK_TOKENS, AttentionBatch, Span, tile_tokens
from lorasrv_kernels.batch import SlotBatch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

ROPE_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
SHAPES: dict[str, dict[str, Any]] = {
    "llama2": {"num_key_value_heads": 4},
    "llama3": {"num_key_value_heads": 2, "rope_parameters": ROPE_LLAMA3, "rms_norm_eps": 1e-5},
    "tied": {"num_key_value_heads": 1, "tie_word_embeddings": True},
    "head_dim": {"num_key_value_heads": 2, "head_dim": 24},
    "linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 2.0}},
}


@pytest.fixture(scope="session")
def shapes() -> dict[str, dict[str, Any]]:
    """The kinds of tiny Llama, by name, and what is special in their configs."""
    return SHAPES


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, LlamaForCausalLM]]:
    """Makes a folder with a random Llama, and the same model in transformers; once per kind and dtype."""
    made: dict[tuple[str, torch.dtype], tuple[Path, LlamaForCausalLM]] = {}

    def make(kind: str = "llama3", *, dtype: torch.dtype = torch.float32) -> tuple[Path, LlamaForCausalLM]:
        if (kind, dtype) not in made:
            torch.manual_seed(0)
            sizes = {"vocab_size": 199, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2}
            config = LlamaConfig(**sizes, num_attention_heads=4, max_position_embeddings=256, **SHAPES[kind])
            model = LlamaForCausalLM(config).eval()
            for parameter in model.parameters():
                parameter.data.normal_(1.0, 0.1) if parameter.ndim == 1 else parameter.data.normal_(0, 0.15)
            folder = tmp_path_factory.mktemp(kind)
            model.to(dtype).save_pretrained(folder)
            made[kind, dtype] = folder, model
        return made[kind, dtype]

    return make


@dataclass(slots=True)
class Driver:
    """Sequences over one model: blocks handed out as they grow, any number of them in one step.

    `arena` and `table` hold the adapters of the slots; without them there are none.
    """

    model: DecoderModel
    num_blocks: int = 32
    arena: Tensor | None = None
    table: Tensor | None = None
    cache: Tensor = field(init=False)
    lengths: dict[str, int] = field(default_factory=dict)
    tables: dict[str, list[int]] = field(default_factory=dict)
    free: list[int] = field(init=False)

    def __post_init__(self) -> None:
        config = self.model.config
        shape = (self.num_blocks, config.num_layers, 2, config.num_kv_heads, BLOCK_TOKENS, config.head_size)
        # NaN where nothing was written: reading it would show
        self.cache = torch.full(shape, torch.nan, dtype=self.model.dtype)
        # handed out from the end, so that a sequence's blocks are not in order
        self.free = list(range(self.num_blocks))

    def step(self, chunks: Sequence[tuple[str, Sequence[int]]], *, slots: Sequence[int] | None = None) -> list[Tensor]:
        """Runs one step over (sequence, its next tokens) pairs; the logits [tokens, V] of each."""
        spans = [self._span(name, len(tokens)) for name, tokens in chunks]
        tokens = [token for _, chunk in chunks for token in chunk]
        positions = [span.start + i for span in spans for i in range(span.num_tokens)]
        config = self.model.config
        batch = StepBatch(
            positions=torch.tensor(positions),
            attention=AttentionBatch.from_spans(spans, tile_tokens=tile_tokens(config.num_heads, config.num_kv_heads)),
            adapters=self._adapters(slots if slots is not None else [-1] * len(tokens)),
            kv_cache=self.cache,
        )
        hidden = self.model.forward(torch.tensor(tokens), batch)
        return list(self.model.logits(hidden, batch.adapters).split([span.num_tokens for span in spans]))

    def _adapters(self, slots: Sequence[int]) -> AdapterBatch:
        num_modules = len(self.model.module_order)
        return AdapterBatch(
            slots=SlotBatch.from_slots(slots),
            arena=self.arena if self.arena is not None else torch.zeros(0, dtype=self.model.dtype),
            table=self.table if self.table is not None else torch.zeros(0, num_modules, 8).long(),
            touched=range(num_modules) if self.table is not None else (),
        )

    def run(self, tokens: Sequence[int], *, name: str = "only") -> Tensor:
        """The logits [tokens, V] of one sequence in one step."""
        return self.step([(name, tokens)])[0]

    def _span(self, name: str, num_tokens: int) -> Span:
        start = self.lengths.get(name, 0)
        self.lengths[name] = start + num_tokens
        table = self.tables.setdefault(name, [])
        while len(table) * BLOCK_TOKENS < start + num_tokens:
            table.append(self.free.pop())
        return Span(start=start, num_tokens=num_tokens, block_table=table)


@pytest.fixture
def driver() -> type[Driver]:
    """Runs sequences over a model without an engine."""
    return Driver

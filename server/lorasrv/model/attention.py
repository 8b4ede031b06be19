"""Grouped-query attention of one decoder layer over the paged cache. Knows no scheduling and no other layer."""

from lorasrv_kernels.attention import paged_attention, store_kv_
from torch import Tensor

from lorasrv.model.adapted_linear import AdaptedLinear
from lorasrv.model.batch import StepBatch
from lorasrv.model.config import ModelConfig
from lorasrv.model.layers import rotate_


class Attention:
    """Query, key and value projections, rotary positions, cache, attention, output projection."""

    def __init__(self, config: ModelConfig, *, qkv: AdaptedLinear, output: AdaptedLinear, layer: int) -> None:
        """`layer` is the place of this layer in the cache."""
        self.qkv = qkv
        self.output = output
        self._layer = layer
        self._heads = [config.num_heads, config.num_kv_heads, config.num_kv_heads]
        self._head_size = config.head_size
        self._scale = config.head_size**-0.5

    def forward(self, x: Tensor, angles: Tensor, batch: StepBatch) -> Tensor:
        """x: [T, I]; angles: [T, 1, D]. Returns a new [T, I]; writes this step's keys and values into the cache."""
        heads = self.qkv.forward(x, batch).unflatten(1, (-1, self._head_size))  # [T, H + 2 Hkv, D]
        query, key, value = heads.split(self._heads, dim=1)
        rotate_(heads[:, : -self._heads[2]], angles)
        cache = batch.kv_cache[:, self._layer]
        store_kv_(cache, key, value, batch.attention)
        attended = paged_attention(query, cache, batch.attention, scale=self._scale)
        return self.output.forward(attended.flatten(1), batch)

"""Grouped-query attention of one decoder layer over the paged cache. Knows no scheduling and no other layer."""

from collections.abc import Sequence

from lorasrv_kernels.attention import paged_attention, store_kv_
from lorasrv_kernels.rowwise import rotate_
from torch import Tensor

from lorasrv.model.adapted_linear import AdaptedLinear
from lorasrv.model.batch import StepBatch
from lorasrv.model.config import ModelConfig
from lorasrv.model.layers import RMSNorm


class Attention:
    """Query, key and value projections, norms of heads, rotary positions, cache, attention, output projection."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        qkv: AdaptedLinear,
        output: AdaptedLinear,
        qk_norms: Sequence[RMSNorm],
        layer: int,
    ) -> None:
        """Takes none or two norms of heads; `layer` is the place of this layer in the cache."""
        self.qkv = qkv
        self.output = output
        self._qk_norms = tuple(qk_norms)
        self._layer = layer
        self._heads = [config.num_heads, config.num_kv_heads, config.num_kv_heads]
        self._head_size = config.head_size
        self._scale = config.head_size**-0.5
        self._window = config.windows[layer]

    def forward(self, x: Tensor, angles: Tensor, batch: StepBatch) -> Tensor:
        """x: [T, I]; angles: [T, 1, D]. Returns a new [T, I]; writes this step's keys and values into the cache."""
        heads = self.qkv.forward(x, batch.adapters).unflatten(1, (-1, self._head_size))  # [T, H + 2 Hkv, D]
        query, key, value = heads.split(self._heads, dim=1)
        if self._qk_norms:
            for part, norm in zip((query, key), self._qk_norms, strict=True):
                part.copy_(norm.forward(part, batch.adapters))
        rotate_(heads[:, : -self._heads[2]], angles)
        cache = batch.kv_cache[:, self._layer]
        store_kv_(cache, key, value, batch.attention)
        attended = paged_attention(query, cache, batch.attention, scale=self._scale, window=self._window)
        return self.output.forward(attended.flatten(1), batch.adapters)

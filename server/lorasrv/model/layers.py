"""The norm of a decoder layer, and the angles of rotary positions.

Every function works row by row: a row's result has the same bits however many rows there are. Knows no weights but the
norm's.
"""

import math

import torch
from lorasrv_kernels.replacement import replaced_scale_
from lorasrv_kernels.rowwise import rms_norm
from torch import Tensor

from lorasrv.model.batch import AdapterBatch
from lorasrv.model.rope import RopeConfig

_TABLE_ROWS = 1024


class RMSNorm:
    """Root mean square norm, https://arxiv.org/abs/1910.07467 equation 4; in float32 inside.

    Attributes:
        weight: [I] or [D].
        module: its place in the model's module order.
    """

    def __init__(self, weight: Tensor, *, epsilon: float, module: int) -> None:
        """Keeps `weight` [I] or [D], in the dtype of the model; `module` is its place in the model's module order."""
        self.weight = weight
        self._epsilon = epsilon
        self.module = module

    def forward(self, x: Tensor, adapters: AdapterBatch) -> Tensor:
        """x: [T, I] or [T, H, D], any strides, the dtype of the model. Returns a new tensor of its shape."""
        if not adapters.touches((self.module,)):
            return rms_norm(x, self.weight, self._epsilon)
        y = rms_norm(x, None, self._epsilon)
        replaced_scale_(y, self.weight, adapters.arena, adapters.table[:, self.module], slots=adapters.slots)
        return y


class RotaryTable:
    """Cosine and sine of every position, RoFormer (https://arxiv.org/abs/2104.09864) section 3.2.2; float32."""

    def __init__(self, config: RopeConfig, *, head_size: int, num_positions: int, device: torch.device | str) -> None:
        """Computes the table of positions 0 to `num_positions` - 1."""
        frequencies = inverse_frequencies(config, head_size=head_size)
        # in pieces of one shape, so that an angle's bits do not depend on how long the table is
        starts = range(0, num_positions, _TABLE_ROWS)
        pieces = [torch.arange(start, start + _TABLE_ROWS)[:, None] * frequencies for start in starts]
        cosine_and_sine = torch.stack([torch.cat([piece.cos(), piece.sin()], 1) for piece in pieces])
        self.table = cosine_and_sine.flatten(0, 1)[:num_positions].clone().to(device)  # [positions, D]

    @property
    def num_positions(self) -> int:
        """Positions the table knows."""
        return len(self.table)

    def lookup(self, positions: Tensor) -> Tensor:
        """positions: [T] int64, each below `num_positions`. Returns [T, 1, D]: cosines, then sines."""
        return self.table.index_select(0, positions).unsqueeze(1)


def inverse_frequencies(config: RopeConfig, *, head_size: int) -> Tensor:
    """The angle one position adds, per pair of a head: [D / 2] float32, on the CPU.

    `llama3` interpolates only the slow pairs, as the Llama 3.1 release does.
    """
    frequencies = 1.0 / (config.theta ** (torch.arange(0, head_size, 2, dtype=torch.float32) / head_size))
    if config.kind == "default":
        return frequencies
    if config.kind == "linear":
        return frequencies / config.factor
    wavelengths = 2 * math.pi / frequencies
    long = config.original_max_position_embeddings / config.low_freq_factor
    short = config.original_max_position_embeddings / config.high_freq_factor
    smooth = (config.original_max_position_embeddings / wavelengths - config.low_freq_factor) / (
        config.high_freq_factor - config.low_freq_factor
    )
    between = (1 - smooth) * frequencies / config.factor + smooth * frequencies
    slow = torch.where(wavelengths > long, frequencies / config.factor, between)
    return torch.where(wavelengths < short, frequencies, slow)

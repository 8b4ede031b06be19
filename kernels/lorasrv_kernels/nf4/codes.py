"""The code tables of NF4 and of its nested scales: constants of the format, one tensor per process and device.

The 16 levels are those of QLoRA (arXiv:2305.14314, appendix E). The 256 nested codes are the signed dynamic map of
"8-bit Optimizers via Block-wise Quantization" (arXiv:2110.02861, section 1.3).
"""

import functools

import torch
from torch import Tensor

BLOCK_SIZE = 64
"""Weights that share one scale (absmax)."""

NESTED_BLOCK_SIZE = 256
"""Scales that share one nested scale."""

LEVELS = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
"""The weights of the 16 codes, ascending."""

_EXPONENTS = 7
_GRID_STEPS = 65535


@functools.cache
def levels(device: torch.device) -> Tensor:
    """The weights of the 16 codes, ascending: [16] float32."""
    with torch.inference_mode(mode=False):
        return torch.tensor(LEVELS, dtype=torch.float32, device=device)


@functools.cache
def level_midpoints(device: torch.device) -> Tensor:
    """Borders between neighbouring levels, each belonging to the lower one: [15] float32."""
    with torch.inference_mode(mode=False):
        table = levels(device)
        return (table[:-1] + table[1:]) / 2


@functools.cache
def level_pairs(device: torch.device) -> Tensor:
    """The two weights of every packed byte, high nibble first: [256] int64, each the bits of two float32."""
    with torch.inference_mode(mode=False):
        table = levels(device)
        return torch.stack([table.repeat_interleave(16), table.repeat(16)], dim=1).view(torch.int64).flatten()


@functools.cache
def nested_codes(device: torch.device) -> Tensor:
    """The values of the 256 nested codes, ascending: [256] float32.

    Per decade 10^-6 ... 1 the interval [0.1, 1] is cut into 1, 2, ... 64 equal cells; the values are the cells' centres
    in both signs, and 0 and 1.
    """
    with torch.inference_mode(mode=False):
        positive = []
        for exponent in range(_EXPONENTS):
            edges = torch.linspace(0.1, 1, 2**exponent + 1, dtype=torch.float32)
            positive.append(10 ** (exponent + 1 - _EXPONENTS) * ((edges[:-1] + edges[1:]) / 2))
        magnitudes = torch.cat(positive)
        return torch.cat([-magnitudes, torch.tensor([0.0, 1.0]), magnitudes]).sort().values.to(device)


@functools.cache
def nested_code_grid() -> Tensor:
    """The nearest nested code of 65 536 equally spaced values from -1 to 1, on the CPU: [65536] uint8.

    bitsandbytes finds nested codes through this grid. It is coarser than the codes near zero, so that for instance 0
    itself gets the code of 2.1e-5; files written by it are only reproduced with the same grid.
    """
    with torch.inference_mode(mode=False):
        codes = nested_codes(torch.device("cpu")).double()
        values = torch.arange(_GRID_STEPS + 1, dtype=torch.float64) * 2 / _GRID_STEPS - 1
        return torch.bucketize(values, (codes[:-1] + codes[1:]) / 2).to(torch.uint8)


def nearest_nested_codes(values: Tensor) -> Tensor:
    """Nested codes of float32 values in [-1, 1], by the nearest point of `nested_code_grid`: uint8, on the CPU."""
    position = (values.cpu() + 1) * (_GRID_STEPS / 2) + 0.5
    return nested_code_grid()[position.int()]

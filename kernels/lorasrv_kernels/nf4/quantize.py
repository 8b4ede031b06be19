"""Quantization to NF4 with double quantization, bit-identical with bitsandbytes 0.50 up to 32 768 blocks.

Beyond them the last bit of the scales' mean may differ: bitsandbytes' own follows its number of threads there.

Knows the arithmetic; knows nothing of models or files. Per block of 64 weights, taken in row order across the whole
matrix: absmax = max |w|; code = the level nearest to w / absmax, the lower one at a midpoint. The scales in turn are
shifted by their mean and coded in 8 bits, per nested block of 256.
"""

import math

import torch
from torch import Tensor

from lorasrv_kernels.errors import KernelError
from lorasrv_kernels.nf4.codes import BLOCK_SIZE, NESTED_BLOCK_SIZE, level_midpoints, nearest_nested_codes
from lorasrv_kernels.nf4.container import NF4Weight

_CHUNK_ELEMENTS = 1 << 18
_SMALLEST_ABSMAX = 1e-38
# torch adds more numbers than these in an order that follows its threads
_SUMMED_BY_ONE_THREAD = 1 << 15


def quantize(weight: Tensor, *, chunk_rows: int | None = None) -> NF4Weight:
    """Quantizes a matrix in row chunks; no temporary is larger than a chunk in float32.

    Args:
        weight: [O, I], any floating dtype, on any device; may be a memory map. Read once, never written.
        chunk_rows: rows taken at a time, rounded up to whole blocks. The result does not depend on it.

    Raises:
        KernelError: not a non-empty floating matrix, or a weight is not finite.
    """
    if weight.ndim != 2 or weight.numel() == 0 or not weight.is_floating_point():
        raise KernelError(
            f"quantize: weight must be a non-empty floating [O, I], got {weight.dtype} {list(weight.shape)}"
        )
    out_features, in_features = weight.shape
    num_elements = weight.numel()
    packed = torch.empty(-(-num_elements // 2), dtype=torch.uint8, device=weight.device)
    absmax = torch.empty(-(-num_elements // BLOCK_SIZE), dtype=torch.float32, device=weight.device)
    step = _block_aligned_rows(chunk_rows or -(-_CHUNK_ELEMENTS // in_features), in_features)
    with torch.no_grad():
        for row in range(0, out_features, step):
            start, stop = row * in_features, min(row + step, out_features) * in_features
            _quantize_blocks(
                weight[row : row + step].reshape(-1),
                packed[start // 2 : -(-stop // 2)],
                absmax[start // BLOCK_SIZE : -(-stop // BLOCK_SIZE)],
            )
        if not absmax.isfinite().all():
            raise KernelError(f"quantize: the weight {[out_features, in_features]} has values that are not finite")
        codes, nested_absmax, offset = _quantize_scales(absmax)
    return NF4Weight(
        packed=packed,
        absmax=codes,
        nested_absmax=nested_absmax,
        offset=offset,
        out_features=(out_features,),
        in_features=in_features,
    )


def _block_aligned_rows(rows: int, in_features: int) -> int:
    period = BLOCK_SIZE // math.gcd(BLOCK_SIZE, in_features)
    return -(-rows // period) * period


def _quantize_blocks(weight: Tensor, packed: Tensor, absmax: Tensor) -> None:
    """Codes of a run of blocks [n], the last of which may be short, into packed [ceil(n / 2)] and absmax [blocks]."""
    values = weight.float()
    remainder = values.numel() % BLOCK_SIZE
    full = values.numel() - remainder
    blocks = values[:full].view(-1, BLOCK_SIZE)
    scaled = values.new_zeros(2 * len(packed))
    if full:
        scales = torch.linalg.vector_norm(blocks, math.inf, dim=1)
        absmax[: len(blocks)] = scales
        # times the reciprocal, as bitsandbytes does; it divides in a short last block
        torch.mul(blocks, 1.0 / scales.clamp(min=_SMALLEST_ABSMAX)[:, None], out=scaled[:full].view(-1, BLOCK_SIZE))
    if remainder:
        tail = values[full:]
        absmax[-1] = tail.abs().max().clamp(min=_SMALLEST_ABSMAX)
        torch.div(tail, absmax[-1], out=scaled[full : full + remainder])
    codes = torch.bucketize(scaled.clamp_(-1, 1), level_midpoints(values.device), out_int32=True).to(torch.uint8)
    torch.bitwise_or(codes[::2] << 4, codes[1::2], out=packed)


def _quantize_scales(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Nested codes [blocks], nested scales [nested blocks] and the offset [1] of the scales [blocks]."""
    offset = torch.stack([part.sum() for part in absmax.split(_SUMMED_BY_ONE_THREAD)]).sum() / len(absmax)
    padding = -len(absmax) % NESTED_BLOCK_SIZE
    shifted = torch.nn.functional.pad(absmax - offset, (0, padding)).view(-1, NESTED_BLOCK_SIZE)
    nested_absmax = shifted.abs().amax(dim=1)
    # a nested block of equal scales becomes 0 * inf, and bitsandbytes gives it code 0
    normalized = (shifted * (1.0 / nested_absmax)[:, None]).clamp(-1, 1).nan_to_num(nan=-1.0)
    codes = nearest_nested_codes(normalized).flatten()[: len(absmax)].to(absmax.device, copy=True)
    return codes, nested_absmax, offset.reshape(1)

"""`rms_norm`, `rotate_` and `silu_mul` for CUDA in Triton: one launch each, where PyTorch takes six to nine.

A row of a norm is added up by one program, in an order that depends on its width alone; PyTorch's own mean cuts rows by
how many there are. Products are not fused with sums, so that a rotation has the reference's own bits.

Knows tensors that passed the ops' checks. Nothing here has been timed on a GPU.
"""

import triton
import triton.language as tl
from torch import Tensor

from lorasrv_kernels.rowwise.reference import RmsNorm, Rotate, SiluMul

ELEMENTS = 1024
"""Numbers that one program of the activation writes."""

HEADS = 8
"""Heads that one program rotates."""


def rms_norm(call: RmsNorm) -> Tensor:
    """See `lorasrv_kernels.rowwise.rms_norm`."""
    x, weight, epsilon = call
    out = x.new_empty(x.shape)
    if not out.numel():
        return out
    num_heads, head_stride = (x.shape[1], x.stride(1)) if x.ndim == 3 else (1, 0)
    width = x.shape[-1]
    _norm_kernel[(x.shape[0], num_heads)](
        x,
        weight,
        out,
        epsilon,
        x.stride(0),
        head_stride,
        x.stride(-1),
        num_heads,
        SIZE=width,
        WIDTH=triton.next_power_of_2(width),
        num_warps=_num_warps(width),
        enable_fp_fusion=False,
    )
    return out


def rotate_(call: Rotate) -> None:
    """See `lorasrv_kernels.rowwise.rotate_`."""
    heads, angles = call
    num_tokens, num_heads, size = heads.shape
    if not heads.numel():
        return
    _rotate_kernel[(num_tokens, triton.cdiv(num_heads, HEADS))](
        heads,
        angles.contiguous(),
        *heads.stride(),
        num_heads,
        HALF=size // 2,
        WIDTH=triton.next_power_of_2(size // 2),
        HEADS=HEADS,
        num_warps=2,
        enable_fp_fusion=False,
    )


def silu_mul(call: SiluMul) -> Tensor:
    """See `lorasrv_kernels.rowwise.silu_mul`."""
    gate, up = call
    out = gate.new_empty(gate.shape)
    if not out.numel():
        return out
    num_tokens, width = gate.shape
    _silu_kernel[(num_tokens, triton.cdiv(width, ELEMENTS))](
        gate,
        up,
        out,
        *gate.stride(),
        *up.stride(),
        width,
        ELEMENTS=ELEMENTS,
        num_warps=4,
        enable_fp_fusion=False,
    )
    return out


def _num_warps(width: int) -> int:
    """By the width alone, as the order of addition follows it."""
    return 1 if width <= 256 else 4 if width <= 2048 else 8


@triton.jit
def _norm_kernel(
    x,
    weight,
    out,
    epsilon,
    token_stride,
    head_stride,
    lane_stride,
    num_heads,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """out [T, H, SIZE] <- x / sqrt(mean(x^2) + epsilon), rounded, times weight. Grid [T, H]."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    lane = tl.arange(0, WIDTH)
    inside = lane < SIZE
    row = x + token * token_stride + head.to(tl.int64) * head_stride
    wide = tl.load(row + lane.to(tl.int64) * lane_stride, mask=inside, other=0.0).to(tl.float32)
    inverse = tl.rsqrt(tl.sum(wide * wide, 0) / SIZE + epsilon)
    result = (wide * inverse).to(out.dtype.element_ty)
    if weight is not None:
        scale = tl.load(weight + lane, mask=inside, other=0.0).to(tl.float32)
        result = (result.to(tl.float32) * scale).to(out.dtype.element_ty)
    tl.store(out + (token * num_heads + head) * SIZE + lane, result, mask=inside)


@triton.jit
def _rotate_kernel(
    heads,
    angles,  # [T, 1, 2 * HALF] float32 contiguous
    token_stride,
    head_stride,
    lane_stride,
    num_heads,
    HALF: tl.constexpr,
    WIDTH: tl.constexpr,
    HEADS: tl.constexpr,
):
    """heads [T, H, 2 * HALF] turned in place. Grid [T, blocks of heads]."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    lane = tl.arange(0, WIDTH)
    inside = (head < num_heads)[:, None] & (lane < HALF)[None, :]
    cosine = tl.load(angles + token * 2 * HALF + lane, mask=lane < HALF, other=0.0)[None, :]
    sine = tl.load(angles + token * 2 * HALF + HALF + lane, mask=lane < HALF, other=0.0)[None, :]
    places = heads + token * token_stride + head.to(tl.int64)[:, None] * head_stride
    first_place = places + lane.to(tl.int64)[None, :] * lane_stride
    second_place = places + (lane + HALF).to(tl.int64)[None, :] * lane_stride
    first = tl.load(first_place, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(second_place, mask=inside, other=0.0).to(tl.float32)
    tl.store(first_place, (first * cosine - second * sine).to(heads.dtype.element_ty), mask=inside)
    tl.store(second_place, (second * cosine + first * sine).to(heads.dtype.element_ty), mask=inside)


@triton.jit
def _silu_kernel(
    gate,
    up,
    out,
    gate_token,
    gate_lane,
    up_token,
    up_lane,
    width,
    ELEMENTS: tl.constexpr,
):
    """out [T, I] <- silu(gate), rounded, times up. Grid [T, blocks of I]."""
    token = tl.program_id(0).to(tl.int64)
    lane = tl.program_id(1) * ELEMENTS + tl.arange(0, ELEMENTS)
    inside = lane < width
    at = lane.to(tl.int64)
    wide = tl.load(gate + token * gate_token + at * gate_lane, mask=inside, other=0.0).to(tl.float32)
    factor = tl.load(up + token * up_token + at * up_lane, mask=inside, other=0.0).to(tl.float32)
    result = (wide / (tl.exp(-wide) + 1.0)).to(out.dtype.element_ty)
    tl.store(out + token * width + at, (result.to(tl.float32) * factor).to(out.dtype.element_ty), mask=inside)

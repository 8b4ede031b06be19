"""The trainable low-rank update from native products, a segment and a slice at a time. Argument checks are the op's.

Knows the C interface of `cpu/lora_training.cpp`. Numbers of A and B stay float32 and activations are widened as they
are read, so that no float32 copy of them exists.
"""

import ctypes
import functools
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from lorasrv_kernels.concatenate import concatenate
from lorasrv_kernels.cpu import library
from lorasrv_kernels.cpu.isa import Isa, isa_in_use
from lorasrv_kernels.lora.training.reference import Gradients, LoraUpdate, LoraUpdateGrad

_DTYPES = {torch.float32: 0, torch.bfloat16: 1}
_POINTER, _SIZE, _NUMBER = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
_ARGUMENTS = {
    "shrink": (_POINTER, _SIZE, _SIZE, _POINTER, _SIZE, _SIZE, _POINTER, _SIZE, _NUMBER, _NUMBER),
    "expand": (_POINTER, *[_SIZE] * 3, _POINTER, _SIZE, _POINTER, _SIZE, _POINTER, _POINTER, _SIZE, _NUMBER, _NUMBER),
    "outer": (_POINTER, _SIZE, _SIZE, _POINTER, _SIZE, _SIZE, _POINTER, _NUMBER, _NUMBER),
    "scale": (*[_POINTER, _SIZE] * 2, _POINTER, _SIZE, _SIZE, _POINTER, _SIZE, _POINTER, _NUMBER, _NUMBER),
}


def serves(dtype: torch.dtype) -> bool:
    """Whether there is a native version for activations of this dtype."""
    return dtype in _DTYPES and all(_function(name) is not None for name in _ARGUMENTS)


def lora_update(call: LoraUpdate, *, isa: Isa | None = None) -> Tensor | None:
    """As the op states it; None for dtypes that `serves` does not name. `isa` is one that the machine must have."""
    if not serves(call.x.dtype):
        return None
    y, x, a, b, d, scales, out_features, segment_tokens = call
    y, x = _rows(y), _rows(x)
    result = y.new_empty(y.shape)
    slices = len(out_features)
    for segment, (start, stop) in enumerate(pairwise(accumulate(segment_tokens, initial=0))):
        own = slice(segment * slices, (segment + 1) * slices)
        stacked = concatenate(a[own])
        shrunk = x.new_empty(stop - start, len(stacked), dtype=torch.float32)
        _shrink_(x[start:stop], stacked, shrunk, isa)
        for index, ranks, columns in _slices(own, a, out_features):
            part = y[start:stop, columns]
            b_t = (scales[index] * b[index]).T.contiguous()
            _expand_(
                shrunk[:, ranks], b_t, result[start:stop, columns], isa, y=part, d=d[index] if len(d[index]) else None
            )
    return result


def lora_update_grad(call: LoraUpdateGrad, *, isa: Isa | None = None) -> Gradients | None:
    """The gradients of `lora_update`, as the reference states them; None as there."""
    if not serves(call.x.dtype):
        return None
    grad, y, x, a, b, d, scales, out_features, segment_tokens = call
    grad, x, y = _rows(grad), _rows(x), None if y is None else _rows(y)
    grad_y = grad.new_empty(0, grad.shape[1]) if y is None else grad.clone(memory_format=torch.contiguous_format)
    grad_x = x.new_empty(x.shape)
    grad_a, grad_b, grad_d = list(a), list(b), [torch.empty_like(own) for own in d]
    slices = len(out_features)
    for segment, (start, stop) in enumerate(pairwise(accumulate(segment_tokens, initial=0))):
        own, rows = slice(segment * slices, (segment + 1) * slices), slice(start, stop)
        stacked = concatenate(a[own])
        shrunk = x.new_empty(stop - start, len(stacked), dtype=torch.float32)
        back = torch.empty_like(shrunk)
        _shrink_(x[rows], stacked, shrunk, isa)
        for index, ranks, columns in _slices(own, a, out_features):
            part = grad[rows, columns]
            outer = _outer(shrunk[:, ranks], part, isa)
            factor = torch.full((1,), scales[index])
            if len(d[index]):
                assert y is not None, "the caller keeps y where a d is given"
                sums = _scale_(part, y[rows, columns], d[index], grad_y[rows, columns], isa)
                grad_d[index] = sums + scales[index] * (b[index].T * outer).sum(0)
                factor = scales[index] * d[index]
            grad_b[index] = (factor * outer).T.contiguous()
            _shrink_(part, (factor[:, None] * b[index]).T.contiguous(), back[:, ranks], isa)
        _expand_(back, stacked, grad_x[rows], isa)
        for index, ranks, _ in _slices(own, a, out_features):
            grad_a[index] = _outer(back[:, ranks], x[rows], isa)
    return grad_y, grad_x, grad_a, grad_b, grad_d


def _slices(own: slice, a: Sequence[Tensor], out_features: Sequence[int]) -> Iterator[tuple[int, slice, slice]]:
    """Of one segment: the index of each slice in the lists, its rank rows and its columns."""
    ranks = pairwise(accumulate((len(factor) for factor in a[own]), initial=0))
    columns = pairwise(accumulate(out_features, initial=0))
    for index, (first_rank, last_rank), (first, last) in zip(range(own.start, own.stop), ranks, columns, strict=True):
        yield index, slice(first_rank, last_rank), slice(first, last)


def _rows(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(1) == 1 else tensor.contiguous()


def _shrink_(x: Tensor, a: Tensor, out: Tensor, isa: Isa | None) -> None:
    """out [T, R] float32 <- x A^T."""
    a, sizes = a.contiguous(), (x.shape[1], len(a))
    kinds = _kinds(x, isa)
    _call("shrink", x.data_ptr(), x.stride(0), len(x), a.data_ptr(), *sizes, out.data_ptr(), out.stride(0), *kinds)


def _expand_(
    shrunk: Tensor, b_t: Tensor, out: Tensor, isa: Isa | None, *, y: Tensor | None = None, d: Tensor | None = None
) -> None:
    """out [T, O] <- d * (y + shrunk B^T); without y and d the product alone."""
    b_t = b_t.contiguous()
    d = None if d is None else d.contiguous()
    _call(
        "expand",
        shrunk.data_ptr(),
        shrunk.stride(0),
        *shrunk.shape,
        b_t.data_ptr(),
        out.shape[1],
        None if y is None else y.data_ptr(),
        0 if y is None else y.stride(0),
        None if d is None else d.data_ptr(),
        out.data_ptr(),
        out.stride(0),
        *_kinds(out, isa),
    )


def _outer(shrunk: Tensor, x: Tensor, isa: Isa | None) -> Tensor:
    """shrunk^T x [R, width] float32, tokens in ascending order."""
    shrunk_t = shrunk.T.contiguous()
    rank, tokens = shrunk_t.shape
    out = x.new_zeros(rank, x.shape[1], dtype=torch.float32)
    kinds = _kinds(x, isa)
    _call("outer", shrunk_t.data_ptr(), tokens, rank, x.data_ptr(), x.stride(0), x.shape[1], out.data_ptr(), *kinds)
    return out


def _scale_(grad: Tensor, y: Tensor, d: Tensor, out: Tensor, isa: Isa | None) -> Tensor:
    """out <- d * grad; returns the sums of grad * y over the tokens, float32 [O]."""
    d = d.contiguous()
    sums = d.new_empty(d.shape)
    _call(
        "scale",
        grad.data_ptr(),
        grad.stride(0),
        y.data_ptr(),
        y.stride(0),
        d.data_ptr(),
        *grad.shape,
        out.data_ptr(),
        out.stride(0),
        sums.data_ptr(),
        *_kinds(grad, isa),
    )
    return sums


def _kinds(like: Tensor, isa: Isa | None) -> tuple[int, int]:
    version = isa_in_use() if isa is None else isa
    assert version is not None, "the caller has found the library"
    return _DTYPES[like.dtype], version


def _call(name: str, *arguments: int | None) -> None:
    function = _function(name)
    assert function is not None, "the caller has found the library"
    function(*arguments)


@functools.cache
def _function(name: str) -> Callable[..., None] | None:
    return library.function(f"lorasrv_lora_training_{name}", _ARGUMENTS[name])

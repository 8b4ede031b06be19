"""Runs all decoder layers of a step in one native call, so that small steps do not wait for Python between kernels.

Knows the C structures of `decoder.cpp` and which weights it takes. The ops, called one after the other as
`lorasrv.model.decoder` does, are the specification: where they are native too, every bit is the same.
"""

import ctypes
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lorasrv_kernels.attention import AttentionBatch
from lorasrv_kernels.batch import SlotBatch
from lorasrv_kernels.cpu import library
from lorasrv_kernels.cpu.linear import DTYPES, GRANULE, serving_isa, shared_scratch
from lorasrv_kernels.nf4 import NF4Weight
from lorasrv_kernels.nf4.codes import levels, nested_codes

_ALIGN_BYTES = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Projection:
    """Modules that share their input, as one product."""

    weight: NF4Weight | Tensor  # [O, I]
    out_features: Sequence[int]
    """The width of each module."""
    bias: Tensor | None  # [O]
    first_module: int
    """The first module's place in the table of slots."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Norm:
    """The weight of a norm and its place in the table of slots."""

    weight: Tensor  # [I] or [D]
    module: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """One decoder layer: attention, then the gated feed-forward part, each behind its norm."""

    qkv: Projection
    output: Projection
    gate_up: Projection
    down: Projection
    input_norm: Norm
    post_attention_norm: Norm
    query_norm: Norm | None
    key_norm: Norm | None
    window: int
    """Positions a token sees; 0: all of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What all layers have in common."""

    hidden: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    epsilon: float
    scale: float


class NativeDecoder:
    """The layers of one model, laid out for the native call; read-only, one thread at a time."""

    def __init__(self, shape: Shape, layers: Sequence[Layer], final_norm: Norm) -> None:
        """Keeps the tensors; asks for their addresses in every step, since sharing them with a process moves them."""
        self._shape = shape
        self._layers = tuple(layers)
        self._final_norm = final_norm
        self._dtype = final_norm.weight.dtype
        self._suits = bool(layers) and all(_suits(shape, self._dtype, layer) for layer in layers)
        self._tensors = tuple(_tensors(layers, final_norm))
        self._addresses: list[int] = []
        self._laid_out = _Decoder()

    def forward(
        self,
        x: Tensor,
        angles: Tensor,
        *,
        cache: Tensor,
        attention: AttentionBatch,
        arena: Tensor,
        table: Tensor,
        slots: SlotBatch,
    ) -> Tensor | None:
        """Runs the layers over T token rows and writes their keys and values into the cache.

        Args:
            x: [T, hidden]; changed.
            angles: [T, 1, D] float32, contiguous.
            cache: [P, L, 2, Hkv, 32, D], the dtype of x.
            attention, slots: describe the same T rows, as their classes lay them out.
            arena: [N], the dtype of x; the numbers of every slot.
            table: [S, M, 8] int64.

        Returns:
            A new [T, hidden]: the final norm of the last layer's output. None, and nothing changed, where the ops must
            serve: library not built, only portable code, or weights, dtypes or strides that the kernels do not take.
        """
        function, isa = _function(), serving_isa()
        if function is None or isa is None or not self._suits or x.dtype != self._dtype or not x.is_contiguous():
            return None
        if cache.stride(5) != 1 or table.stride(2) != 1:
            return None
        threads, dtype = torch.get_num_threads(), DTYPES[x.dtype]
        out, buffers = torch.empty(x.shape, dtype=x.dtype), self._buffers(len(x))
        step = _Step(
            *(x.data_ptr(), len(x), angles.data_ptr()),
            *(arena.data_ptr(), table.data_ptr(), *table.stride()[:2]),
            *(slots.rows.data_ptr(), slots.weights.data_ptr()),
            *(slots.tile_slots.data_ptr(), slots.tile_starts.data_ptr(), len(slots.tile_slots)),
            *(slots.base_rows.data_ptr(), len(slots.base_rows)),
            *(cache.data_ptr(), *cache.stride()[:5], attention.slot_mapping.data_ptr()),
            *(attention.block_tables.data_ptr(), attention.block_tables.stride(0)),
            *(attention.tiles.data_ptr(), len(attention.tiles), out.data_ptr()),
            *(buffer.data_ptr() for buffer in buffers),
            shared_scratch(len(x), self._in_features(), dtype, isa, threads).data_ptr(),
            *(isa, threads),
        )
        function(ctypes.byref(self._model()), ctypes.byref(step))
        return out

    def _in_features(self) -> tuple[int, ...]:
        first = self._layers[0]
        return tuple(projection.weight.shape[1] for projection in (first.qkv, first.output, first.down))

    def _buffers(self, num_tokens: int) -> Sequence[Tensor]:
        """What the native call writes on the way, besides its result; each begins on a border of `_ALIGN_BYTES`."""
        hidden, attended, inner = self._in_features()
        widths = (hidden, sum(self._layers[0].qkv.out_features), attended, 2 * inner, inner)
        unit = _ALIGN_BYTES // self._dtype.itemsize
        sizes = [-(-num_tokens * width // unit) * unit for width in widths]
        buffers: Sequence[Tensor] = torch.empty(sum(sizes), dtype=self._dtype).split(sizes)
        return buffers

    def _model(self) -> "_Decoder":
        addresses = [tensor.data_ptr() for tensor in self._tensors]
        if addresses != self._addresses:
            self._laid_out = _lay_out(self._shape, self._dtype, self._layers, self._final_norm)
            self._addresses = addresses
        return self._laid_out


def _tensors(layers: Sequence[Layer], final_norm: Norm) -> Iterator[Tensor]:
    for layer in layers:
        for projection in _projections(layer):
            weight = projection.weight
            yield from _storage(weight) if isinstance(weight, NF4Weight) else (weight,)
            if projection.bias is not None:
                yield projection.bias
        yield from (norm.weight for norm in _norms(layer) if norm is not None)
    yield final_norm.weight


def _projections(layer: Layer) -> tuple[Projection, ...]:
    return layer.qkv, layer.output, layer.gate_up, layer.down


def _norms(layer: Layer) -> tuple[Norm | None, ...]:
    return layer.input_norm, layer.post_attention_norm, layer.query_norm, layer.key_norm


def _storage(weight: NF4Weight) -> tuple[Tensor, ...]:
    return weight.packed, weight.absmax, weight.nested_absmax, weight.offset


def _suits(shape: Shape, dtype: torch.dtype, layer: Layer) -> bool:
    heads, inner = shape.num_heads * shape.head_size, layer.down.weight.shape[1]
    qkv = (heads, *[shape.num_kv_heads * shape.head_size] * 2)
    expected = ((qkv, shape.hidden), ((shape.hidden,), heads), ((inner, inner), shape.hidden), ((shape.hidden,), inner))
    pairs = zip(_projections(layer), expected, strict=True)
    plain = [norm.weight for norm in _norms(layer) if norm is not None]
    for projection, (out_features, in_features) in pairs:
        weight = projection.weight
        if tuple(projection.out_features) != out_features or weight.shape != (sum(out_features), in_features):
            return False
        if in_features == 0 or in_features % GRANULE or weight.device.type != "cpu":
            return False
        if not isinstance(weight, NF4Weight):
            plain.append(weight)
        if projection.bias is not None:
            plain.append(projection.bias)
    # an op may serve other dtypes and strides, through its reference
    return dtype in DTYPES and all(tensor.dtype == dtype and tensor.is_contiguous() for tensor in plain)


# the twins of the structures in decoder.cpp, member by member
class _Projection(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("packed", "absmax", "nested_absmax", "offset", "weight")),
        ("out_features", ctypes.POINTER(ctypes.c_int64)),
        *((name, ctypes.c_int64) for name in ("num_slices", "width", "in_features")),
        ("bias", ctypes.c_void_p),
        ("first_module", ctypes.c_int64),
    )


class _Norm(ctypes.Structure):
    _fields_ = (("weight", ctypes.c_void_p), ("module", ctypes.c_int64))


class _Layer(ctypes.Structure):
    _fields_ = (
        *((name, _Projection) for name in ("qkv", "output", "gate_up", "down")),
        *((name, _Norm) for name in ("input_norm", "post_attention_norm", "query_norm", "key_norm")),
        ("window", ctypes.c_int64),
    )


class _Decoder(ctypes.Structure):
    _fields_ = (
        ("layers", ctypes.POINTER(_Layer)),
        ("num_layers", ctypes.c_int64),
        ("final_norm", _Norm),
        *((name, ctypes.c_int64) for name in ("hidden", "num_heads", "num_kv_heads", "head_size")),
        *((name, ctypes.c_double) for name in ("epsilon", "scale")),
        *((name, ctypes.c_void_p) for name in ("levels", "nested_codes")),
        ("dtype", ctypes.c_int64),
    )


# every member is a number or an address of eight bytes
class _Step(ctypes.Structure):
    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in (
            *("x", "num_tokens", "angles"),
            *("arena", "table", "slot_stride", "module_stride", "rows", "weights"),
            *("tile_slots", "tile_starts", "num_tiles", "base_rows", "num_base_rows"),
            *("cache", "block_stride", "layer_stride", "value_offset", "cache_head_stride", "position_stride"),
            *("slot_mapping", "block_tables", "block_table_stride", "attention_tiles", "num_attention_tiles"),
            *("normed", "delta", "heads", "attended", "gates", "gated", "scratch", "isa", "threads"),
        )
    )


def _lay_out(shape: Shape, dtype: torch.dtype, layers: Sequence[Layer], final_norm: Norm) -> _Decoder:
    cpu = torch.device("cpu")
    rows = [
        _Layer(
            *(_projection(projection) for projection in _projections(layer)),
            *(_norm(norm) for norm in _norms(layer)),
            layer.window,
        )
        for layer in layers
    ]
    return _Decoder(
        (_Layer * len(rows))(*rows),
        len(rows),
        _norm(final_norm),
        *(shape.hidden, shape.num_heads, shape.num_kv_heads, shape.head_size),
        *(shape.epsilon, shape.scale),
        *(levels(cpu).data_ptr(), nested_codes(cpu).data_ptr()),
        DTYPES[dtype],
    )


def _projection(projection: Projection) -> _Projection:
    weight, bias = projection.weight, projection.bias
    stored = _storage(weight) if isinstance(weight, NF4Weight) else (None, None, None, None, weight)
    addresses = [None if tensor is None else tensor.data_ptr() for tensor in (*stored, None)[:5]]
    out_features = (ctypes.c_int64 * len(projection.out_features))(*projection.out_features)
    sizes = (out_features, len(out_features), *weight.shape)
    return _Projection(*addresses, *sizes, None if bias is None else bias.data_ptr(), projection.first_module)


def _norm(norm: Norm | None) -> _Norm:
    return _Norm(None, 0) if norm is None else _Norm(norm.weight.data_ptr(), norm.module)


@functools.cache
def _function() -> Callable[..., None] | None:
    return library.function("lorasrv_decoder_layers", (ctypes.POINTER(_Decoder), ctypes.POINTER(_Step)))

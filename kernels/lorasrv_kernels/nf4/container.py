"""A weight matrix in NF4 with double quantization, in bitsandbytes' own bytes.

Knows where each byte lies; knows nothing of how codes are found (`quantize`) or turned back (`reference`).
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lorasrv_kernels.concatenate import concatenate
from lorasrv_kernels.errors import KernelError
from lorasrv_kernels.nf4.codes import BLOCK_SIZE, NESTED_BLOCK_SIZE


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class NF4Weight:
    """A matrix [O, I] of G slices, stacked by rows and each quantized on its own, e.g. the fused q, k and v.

    All four tensors are contiguous and on one device. A slice of n elements takes ceil(n / 2) bytes, ceil(n / 64)
    blocks and ceil(blocks / 256) nested blocks; slices lie one after the other in each tensor.
    """

    packed: Tensor  # [bytes] uint8
    """Two codes a byte, the earlier weight in the high nibble; rows follow each other without gaps."""
    absmax: Tensor  # [blocks] uint8
    """The nested code of each block's scale."""
    nested_absmax: Tensor  # [nested blocks] float32
    """The scale of each nested block."""
    offset: Tensor  # [G] float32
    """The mean scale of each slice."""
    out_features: tuple[int, ...]
    """Rows of each slice."""
    in_features: int

    def __post_init__(self) -> None:
        check_storage(self.packed, self.absmax, self.nested_absmax, self.offset, self.out_features, self.in_features)

    @property
    def shape(self) -> tuple[int, int]:
        """(O, I)."""
        return sum(self.out_features), self.in_features

    @property
    def num_elements(self) -> int:
        """Weights, O * I."""
        return sum(self.out_features) * self.in_features

    @property
    def num_bytes(self) -> int:
        """Bytes of the four tensors; the code tables exist once per process and are not counted."""
        return sum(tensor.nbytes for tensor in self._tensors())

    @property
    def device(self) -> torch.device:
        """Where all four tensors are."""
        return self.packed.device

    def to(self, device: torch.device | str) -> "NF4Weight":
        """The same weight on another device."""
        return self._replace(*(tensor.to(device) for tensor in self._tensors()))

    def share_memory(self) -> "NF4Weight":
        """Moves the four tensors, and all they are views of, into shared memory, in place; returns this weight."""
        for tensor in self._tensors():
            tensor.share_memory_()
        return self

    def slice(self, index: int) -> "NF4Weight":
        """One slice; a view of this weight's tensors."""
        start, stop = slice_starts(self.out_features, self.in_features)[index : index + 2]
        return NF4Weight(
            packed=self.packed[start.byte : stop.byte],
            absmax=self.absmax[start.block : stop.block],
            nested_absmax=self.nested_absmax[start.nested : stop.nested],
            offset=self.offset[index : index + 1],
            out_features=self.out_features[index : index + 1],
            in_features=self.in_features,
        )

    @classmethod
    def concatenate(cls, weights: Sequence["NF4Weight"]) -> "NF4Weight":
        """Stacks the rows of several weights; no number changes.

        Storage that lies in a row already, as in a mapped file, is not copied: the result is then a view of it.

        Raises:
            KernelError: no weights, or they differ in `in_features`.
        """
        widths = {weight.in_features for weight in weights}
        if len(widths) != 1:
            raise KernelError(f"NF4Weight.concatenate: expected weights of one in_features, got {sorted(widths)}")
        return cls(
            packed=concatenate([weight.packed for weight in weights]),
            absmax=concatenate([weight.absmax for weight in weights]),
            nested_absmax=concatenate([weight.nested_absmax for weight in weights]),
            offset=concatenate([weight.offset for weight in weights]),
            out_features=tuple(rows for weight in weights for rows in weight.out_features),
            in_features=widths.pop(),
        )

    def _tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.packed, self.absmax, self.nested_absmax, self.offset

    def _replace(self, packed: Tensor, absmax: Tensor, nested_absmax: Tensor, offset: Tensor) -> "NF4Weight":
        return NF4Weight(
            packed=packed,
            absmax=absmax,
            nested_absmax=nested_absmax,
            offset=offset,
            out_features=self.out_features,
            in_features=self.in_features,
        )


@dataclass(frozen=True, slots=True)
class SliceStart:
    """Where a slice begins in the rows of the matrix and in the three tensors of its storage."""

    row: int
    byte: int
    block: int
    nested: int


@functools.lru_cache(maxsize=1024)
def slice_starts(out_features: tuple[int, ...], in_features: int) -> tuple[SliceStart, ...]:
    """The start of every slice and, last, the end of all: G + 1 entries."""
    starts = [SliceStart(0, 0, 0, 0)]
    for rows in out_features:
        last, num_elements = starts[-1], rows * in_features
        blocks = -(-num_elements // BLOCK_SIZE)
        starts.append(
            SliceStart(
                last.row + rows,
                last.byte + -(-num_elements // 2),
                last.block + blocks,
                last.nested + -(-blocks // NESTED_BLOCK_SIZE),
            )
        )
    return tuple(starts)


def check_storage(
    packed: Tensor, absmax: Tensor, nested_absmax: Tensor, offset: Tensor, out_features: Sequence[int], in_features: int
) -> None:
    """Raises KernelError naming every tensor that does not fit the shape."""
    # int: traced with dynamic shapes, the width comes as a symbol; the storage fixes it
    end = slice_starts(tuple(out_features), int(in_features))[-1]
    expected = (
        ("packed", packed, torch.uint8, end.byte),
        ("absmax", absmax, torch.uint8, end.block),
        ("nested_absmax", nested_absmax, torch.float32, end.nested),
        ("offset", offset, torch.float32, len(out_features)),
    )
    wrong = [
        f"{name} must be contiguous {dtype} [{length}], got {tensor.dtype} {list(tensor.shape)}"
        for name, tensor, dtype, length in expected
        if tensor.dtype != dtype or tensor.shape != (length,) or not tensor.is_contiguous()
    ]
    wrong += [
        f"{name} is on {tensor.device}, packed on {packed.device}"
        for name, tensor, _, _ in expected
        if tensor.device != packed.device
    ]
    if wrong:
        raise KernelError(f"NF4 weight of slices {list(out_features)} x {in_features}: " + "; ".join(wrong))

"""The lookup of NF4 codes by `prmt`: its PTX, run in Python, against the levels. No device has run it."""

import random
import struct

import ptx
import pytest
import torch
from lorasrv_kernels.nf4.codes import levels
from lorasrv_kernels.nf4.prmt import TABLE_WORDS, lookup_asm, table_asm

DTYPES = {"bf16x2": torch.bfloat16, "f16x2": torch.float16}


def scaled_levels(scale: float, dtype: torch.dtype) -> list[int]:
    """The bits of the 16 levels times a scale, rounded as `nf4_dequantize_` rounds."""
    weights = (levels(torch.device("cpu")) * torch.tensor(scale)).to(dtype)
    return [bits & 0xFFFF for bits in weights.view(torch.int16).tolist()]


def table(scale: float, pair: str) -> list[int]:
    (bits,) = struct.unpack("<I", struct.pack("<f", scale))
    return ptx.run(table_asm(pair), TABLE_WORDS, [bits])


@pytest.mark.parametrize("pair", DTYPES)
@pytest.mark.parametrize("scale", [1.0, 0.0312, 7.7e-4, 3.0, -0.011, 0.0])
def test_a_table_holds_the_bytes_of_the_scaled_levels(pair: str, scale: float) -> None:
    words = table(scale, pair)
    low, high = (b"".join(word.to_bytes(4, "little") for word in half) for half in (words[:4], words[4:]))
    assert [first | second << 8 for first, second in zip(low, high, strict=True)] == scaled_levels(scale, DTYPES[pair])


def test_a_lookup_gives_the_numbers_of_the_codes() -> None:
    generator = random.Random(0)
    entries = [generator.getrandbits(16) for _ in range(16)]
    halves = [bytes(entry >> shift & 0xFF for entry in entries) for shift in (0, 8)]
    words = [int.from_bytes(half[first : first + 4], "little") for half in halves for first in range(0, 16, 4)]
    for word in (0, 0xFFFFFFFF, 0x76543210, 0xFEDCBA98, *(generator.getrandbits(32) for _ in range(200))):
        codes = word.to_bytes(4, "little")
        even, odd = [entries[byte >> 4] for byte in codes], [entries[byte & 15] for byte in codes]
        assert ptx.run(lookup_asm(), 8, [word, *words]) == even + odd


def test_prmt_and_lop3_are_what_their_manual_says() -> None:
    assert ptx.prmt(0x03020100, 0x07060504, 0x3210) == 0x03020100
    assert ptx.prmt(0x03020100, 0x07060504, 0x7531) == 0x07050301
    # the sign of a byte, eight times
    assert ptx.prmt(0x80FF7F00, 0x00000080, 0xCBA9) == 0xFFFFFF00
    assert ptx.lop3(0b1100, 0b1010, 0b0110, 0xD8) == 0b1010

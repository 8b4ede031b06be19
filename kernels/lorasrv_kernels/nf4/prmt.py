"""PTX that looks 4-bit codes up in 16 numbers of 16 bits held in registers. Text only; knows no Triton and no tensor.

The instruction `prmt d, a, b, s` (PTX ISA, "Data Movement and Conversion Instructions: prmt") takes the 8 bytes of a
and b and writes 4 of them, byte i the one that bits 0 to 2 of nibble i of s name; where bit 3 of the nibble is set, it
writes that byte's sign bit eight times instead. A word of four code bytes has the selectors of eight codes in it:

    lower half     odd 0, even 0, odd 1, even 1        upper half     odd 2, even 2, odd 3, even 3

because the high nibble of a byte is the even column. Codes 0 to 7 and 8 to 15 are looked up apart, and bit 3 of each
code, spread over a byte by the sign mode, chooses. Low and high bytes of the 16-bit numbers have a table each, and are
put together last. 21 instructions serve 8 codes.
"""

import struct

from lorasrv_kernels.nf4.codes import LEVELS

TABLE_WORDS = 8
"""Registers of a table: the low bytes of entries 0 to 3, 4 to 7, 8 to 11, 12 to 15, then their high bytes."""


def table_asm(pair: str) -> str:
    """PTX for $0 to $7 <- the table of the 16 levels times the float32 $8, each rounded once.

    Args:
        pair: PTX's name for two numbers of 16 bits, "bf16x2" or "f16x2".
    """
    lines = [".reg .f32 v<16>;", ".reg .b32 p<8>;"]
    lines += [f"mul.rn.f32 v{code}, $8, 0f{_bits(level):08X};" for code, level in enumerate(LEVELS)]
    lines += [f"cvt.rn.{pair}.f32 p{word}, v{2 * word + 1}, v{2 * word};" for word in range(8)]
    for word in range(4):
        lines.append(f"prmt.b32 ${word}, p{2 * word}, p{2 * word + 1}, 0x6420;")
        lines.append(f"prmt.b32 ${word + 4}, p{2 * word}, p{2 * word + 1}, 0x7531;")
    return _scoped(lines)


def lookup_asm() -> str:
    """PTX for the four code bytes in $8: $0 to $3 <- the four even columns' numbers, $4 to $7 <- the odd columns'.

    The table is in $9 to $16.
    """
    low, high = ([f"${9 + first + word}" for word in range(4)] for first in (0, 4))
    lines = [
        ".reg .b32 s<2>, m<2>, w, a, b, l, h, e, o;",
        "and.b32 s0, $8, 0x77777777;",
        "shr.u32 s1, s0, 16;",
        "shl.b32 w, $8, 4;",
        "prmt.b32 m0, w, $8, 0xd9c8;",
        "prmt.b32 m1, w, $8, 0xfbea;",
    ]
    for half in range(2):
        for name, table in (("l", low), ("h", high)):
            lines.append(f"prmt.b32 a, {table[0]}, {table[1]}, s{half};")
            lines.append(f"prmt.b32 b, {table[2]}, {table[3]}, s{half};")
            # bits of b where the mask is set, of a elsewhere
            lines.append(f"lop3.b32 {name}, a, b, m{half}, 0xd8;")
        lines.append("prmt.b32 e, l, h, 0x7351;")
        lines.append("prmt.b32 o, l, h, 0x6240;")
        lines.append(f"mov.b32 {{${2 * half}, ${2 * half + 1}}}, e;")
        lines.append(f"mov.b32 {{${2 * half + 4}, ${2 * half + 5}}}, o;")
    return _scoped(lines)


def _scoped(lines: list[str]) -> str:
    return "{\n" + "\n".join(lines) + "\n}"


def _bits(value: float) -> int:
    (bits,) = struct.unpack("<I", struct.pack("<f", value))
    return int(bits)

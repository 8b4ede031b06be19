"""Runs straight-line PTX text in Python: the few instructions that the kernels' inline assembly consists of."""

import re
from collections.abc import Callable, Sequence

import torch

_NAMED_BITS = re.compile(r"0[xf]([0-9a-fA-F]+)")


def run(text: str, outputs: int, inputs: Sequence[int]) -> list[int]:
    """The bits of operands $0 to $outputs - 1 once the text ran over the bits of those behind them."""
    registers = {f"${outputs + index}": value for index, value in enumerate(inputs)}
    for line in text.strip().strip("{}").split(";"):
        statement = line.strip()
        if not statement or statement.startswith(".reg"):
            continue
        name, operands = statement.split(None, 1)
        targets, sources = _split(operands)
        values = [_value(source, registers) for source in sources]
        results = _OPERATIONS[name](*values)
        for target, result in zip(targets, results, strict=True):
            registers[target] = result
    return [registers[f"${index}"] for index in range(outputs)]


def prmt(a: int, b: int, selector: int) -> int:
    """PTX ISA, prmt without a mode: each nibble names one of 8 bytes, and by its bit 3 the byte's sign instead."""
    pool = a.to_bytes(4, "little") + b.to_bytes(4, "little")
    result = 0
    for place in range(4):
        nibble = selector >> 4 * place & 15
        byte = pool[nibble & 7]
        if nibble & 8:
            byte = 0xFF if byte & 0x80 else 0
        result |= byte << 8 * place
    return result


def lop3(a: int, b: int, c: int, table: int) -> int:
    """PTX ISA, lop3: bit i of the result is the bit of the table that bits i of a, b and c name."""
    return sum((table >> ((a >> i & 1) * 4 + (b >> i & 1) * 2 + (c >> i & 1)) & 1) << i for i in range(32))


def _split(operands: str) -> tuple[list[str], list[str]]:
    pair = re.match(r"\{(.*?),(.*?)\},(.*)", operands)
    if pair:
        return [pair[1].strip(), pair[2].strip()], [pair[3].strip()]
    target, *sources = (operand.strip() for operand in operands.split(","))
    return [target], sources


def _value(operand: str, registers: dict[str, int]) -> int:
    bits = _NAMED_BITS.fullmatch(operand)
    if bits:
        return int(bits[1], 16)
    return int(operand) if operand.isdigit() else registers[operand]


def _multiply(a: int, b: int) -> int:
    left, right = torch.tensor([a, b], dtype=torch.uint32).view(torch.float32)
    return int((left * right).view(torch.int32)) & 0xFFFFFFFF


def _pack(dtype: torch.dtype) -> Callable[[int, int], tuple[int]]:
    def pack(upper: int, lower: int) -> tuple[int]:
        floats = torch.tensor([lower, upper], dtype=torch.uint32).view(torch.float32)
        # both round to nearest, ties to even
        return (int(floats.to(dtype).view(torch.int32)) & 0xFFFFFFFF,)

    return pack


_OPERATIONS: dict[str, Callable[..., tuple[int, ...]]] = {
    "and.b32": lambda a, b: (a & b,),
    "shr.u32": lambda a, b: (a >> b,),
    "shl.b32": lambda a, b: (a << b & 0xFFFFFFFF,),
    "prmt.b32": lambda a, b, s: (prmt(a, b, s),),
    "lop3.b32": lambda a, b, c, table: (lop3(a, b, c, table),),
    "mov.b32": lambda a: (a & 0xFFFF, a >> 16),
    "mul.rn.f32": lambda a, b: (_multiply(a, b),),
    "cvt.rn.bf16x2.f32": _pack(torch.bfloat16),
    "cvt.rn.f16x2.f32": _pack(torch.float16),
}

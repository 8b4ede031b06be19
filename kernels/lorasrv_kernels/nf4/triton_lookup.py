"""From NF4 codes to weights in Triton: ways to choose among the 16 scaled levels of a block, all with the same bits.

`gather` is Triton's own; on a device it is a shuffle per weight and goes through shared memory. `prmt` asks no other
thread: the 16 levels lie in 8 registers, 4 with their low bytes and 4 with their high bytes, and the instruction of
that name picks 4 bytes of 8 by the codes themselves (`lorasrv_kernels.nf4.prmt`). `load` does in Triton what `prmt`
does, so that the interpreter runs all but the instruction. Levels are scaled in float32 and rounded once: the weights
of `nf4_dequantize_`.

Knows one step of the product; knows no tile and no launch.
"""

import triton
import triton.language as tl

from lorasrv_kernels.nf4.prmt import lookup_asm, table_asm

_BF16_TABLE = tl.constexpr(table_asm("bf16x2"))
_FP16_TABLE = tl.constexpr(table_asm("f16x2"))
_LOOKUP = tl.constexpr(lookup_asm())
_TABLE_CONSTRAINTS = tl.constexpr(",".join(["=r"] * 8 + ["r"]))
_LOOKUP_CONSTRAINTS = tl.constexpr(",".join(["=h"] * 8 + ["r"] * 9))


@triton.jit
def weights_by_gather(codes, scale, level, dtype: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The even and the odd columns of the weights, [ROWS, COLUMNS / 2] each.

    Codes are [ROWS, COLUMNS / 2] uint8, scales [ROWS, COLUMNS / 64] and levels [16] float32.
    """
    BLOCKS: tl.constexpr = COLUMNS // 64
    table = (level[None, None, :] * scale[:, :, None]).to(dtype)
    table = tl.reshape(table, (ROWS * BLOCKS, 16))
    codes = tl.reshape(codes.to(tl.int32), (ROWS * BLOCKS, 32))
    even = tl.reshape(tl.gather(table, codes >> 4, 1), (ROWS, COLUMNS // 2))
    odd = tl.reshape(tl.gather(table, codes & 15, 1), (ROWS, COLUMNS // 2))
    return even, odd


@triton.jit
def weights_by_words(
    words, scale, levels, dtype: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PRMT: tl.constexpr
):
    """The same, columns in the order of `in_order_of_threads`, of codes that come as words of eight.

    Words are [ROWS, COLUMNS / 8] int32. With PRMT on devices of compute capability 8.0 or more, for 16 bits.
    """
    if PRMT:
        e0, e1, e2, e3, o0, o1, o2, o3 = _looked_up(words, scale, dtype, ROWS, COLUMNS)
    else:
        wide = _for_each_word(scale, ROWS, COLUMNS)
        e0 = (tl.load(levels + (words >> 4 & 15)) * wide).to(dtype)
        e1 = (tl.load(levels + (words >> 12 & 15)) * wide).to(dtype)
        e2 = (tl.load(levels + (words >> 20 & 15)) * wide).to(dtype)
        e3 = (tl.load(levels + (words >> 28 & 15)) * wide).to(dtype)
        o0 = (tl.load(levels + (words & 15)) * wide).to(dtype)
        o1 = (tl.load(levels + (words >> 8 & 15)) * wide).to(dtype)
        o2 = (tl.load(levels + (words >> 16 & 15)) * wide).to(dtype)
        o3 = (tl.load(levels + (words >> 24 & 15)) * wide).to(dtype)
    even = tl.join(tl.join(e0, e1), tl.join(e2, e3))
    odd = tl.join(tl.join(o0, o1), tl.join(o2, o3))
    return _for_threads(even, dtype, ROWS, COLUMNS), _for_threads(odd, dtype, ROWS, COLUMNS)


@triton.jit
def _looked_up(words, scale, dtype: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    t0, t1, t2, t3, t4, t5, t6, t7 = tl.inline_asm_elementwise(
        _BF16_TABLE if dtype == tl.bfloat16 else _FP16_TABLE,
        _TABLE_CONSTRAINTS,
        [scale],
        dtype=(tl.int32, tl.int32, tl.int32, tl.int32, tl.int32, tl.int32, tl.int32, tl.int32),
        is_pure=True,
        pack=1,
    )
    # one word at a time: in the registers of a thread, neighbouring words may be of different rows
    return tl.inline_asm_elementwise(
        _LOOKUP,
        _LOOKUP_CONSTRAINTS,
        [
            words,
            _for_each_word(t0, ROWS, COLUMNS),
            _for_each_word(t1, ROWS, COLUMNS),
            _for_each_word(t2, ROWS, COLUMNS),
            _for_each_word(t3, ROWS, COLUMNS),
            _for_each_word(t4, ROWS, COLUMNS),
            _for_each_word(t5, ROWS, COLUMNS),
            _for_each_word(t6, ROWS, COLUMNS),
            _for_each_word(t7, ROWS, COLUMNS),
        ],
        dtype=(tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16),
        is_pure=True,
        pack=1,
    )


@triton.jit
def _for_each_word(number, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    return tl.reshape(tl.broadcast_to(number[:, :, None], (ROWS, COLUMNS // 64, 8)), (ROWS, COLUMNS // 8))


@triton.jit
def _for_threads(weights, dtype: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    # [ROWS, thread of four, word of the thread, 2, 2]
    weights = tl.reshape(weights, (ROWS, 4, COLUMNS // 32, 2, 2))
    weights = tl.permute(weights, (0, 2, 4, 1, 3))
    weights = tl.reshape(weights, (ROWS, COLUMNS // 2))
    return weights.to(dtype, bitcast=True) if weights.dtype == tl.int16 else weights


@triton.jit
def in_order_of_threads(x, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The even and the odd columns of x [ROWS, COLUMNS] in the order in which `weights_by_words` has the weights'.

    A tensor core's product of 16 columns wants columns 2 t, 2 t + 1, 2 t + 8 and 2 t + 9 from thread t of four. Thread
    t has the four even (or odd) columns of a word, and words of its own quarter of the columns, so that it needs the
    tables of few blocks: the order of the columns is ours to choose, as long as x has the same.
    """
    # thread of four, word of the thread, 2, 2, odd
    x = tl.reshape(x, (ROWS, 4, COLUMNS // 32, 2, 2, 2))
    x = tl.permute(x, (0, 2, 3, 1, 4, 5))
    return tl.split(tl.reshape(x, (ROWS, COLUMNS // 2, 2)))

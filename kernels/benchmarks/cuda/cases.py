"""What is timed on CUDA, each against its baselines and the bytes it cannot do without; gated on a right result."""

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import torch
from lorasrv_kernels import lora, operators  # noqa: F401  registers the ops
from lorasrv_kernels.attention import BLOCK_TOKENS, AttentionBatch, Span, tile_tokens
from lorasrv_kernels.attention import triton_kernels as triton_attention
from lorasrv_kernels.batch import SlotBatch
from lorasrv_kernels.nf4 import NF4Weight, reference, triton_linear
from lorasrv_kernels.nf4.calls import Nf4Dequantize
from lorasrv_kernels.nf4.codes import levels, nested_codes
from lorasrv_kernels.nf4.triton_kernels import MAX_FUSED_TOKENS
from lorasrv_kernels.table import ABSENT_ROW, Column
from timing import Run
from torch import Tensor
from torch.nn.functional import linear, scaled_dot_product_attention

L2_BYTES = 50 << 20
"""Of an H100; copies of the data exceed it four times, so that none is found there."""

LLAMA = {
    "1B qkv": (3072, 2048),
    "1B gate_up": (16384, 2048),
    "1B down": (2048, 8192),
    "8B qkv": (6144, 4096),
    "8B o": (4096, 4096),
    "8B gate_up": (28672, 4096),
    "8B down": (4096, 14336),
}
TINY = {"tiny": (96, 128)}
RANK = 16
NUM_ADAPTERS = 32

# interpreted, they serve a CPU too
nf4_linear_ = operators.versions["nf4_linear_", "CUDA"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Contestant:
    """One way to compute the same."""

    run: Run
    copies: int
    not_run: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One line of the table. The first contestant is ours."""

    kernel: str
    shape: str
    size: int
    """Tokens, or sequences."""
    num_bytes: int
    """Read and written at least."""
    contestants: dict[str, Contestant]
    error: Callable[[], float] = field(repr=False)
    """Relative error of ours against float32."""


def cases(device: torch.device, *, small: bool) -> Iterator[Callable[[], Case]]:
    """Builders, so that only one case has its data on the device at a time."""
    shapes = TINY if small else LLAMA
    for name, (rows, columns) in shapes.items():
        for tokens in (1, 65) if small else (1, 4, 8, 16, 32, 64, 128, 256):
            yield lambda name=name, rows=rows, columns=columns, tokens=tokens: nf4_case(
                name, rows, columns, tokens, device
            )
    for name, (rows, columns) in shapes.items():
        for tokens in (3,) if small else (1, 8, 32, 64):
            yield lambda name=name, rows=rows, columns=columns, tokens=tokens: lora_case(
                name, rows, columns, tokens, device
            )
    for heads, size in ((4, 16),) if small else ((32, 64), (32, 128)):
        for sequences, length in ((2, 40),) if small else ((1, 1024), (8, 1024), (32, 1024), (64, 1024), (1, 16384)):
            yield lambda heads=heads, size=size, sequences=sequences, length=length: attention_case(
                heads, size, sequences, length, device
            )


def nf4_case(name: str, rows: int, columns: int, tokens: int, device: torch.device) -> Case:
    """The NF4 linear layer against the library's dense product and against bitsandbytes."""
    weight = random_weight(rows, columns, device)
    dtype = dtype_of(device)
    x = torch.randn(tokens, columns, device=device).to(dtype)
    out = x.new_empty(tokens, rows)
    dense = x.new_empty(rows, columns)
    reference.dequantize_(Nf4Dequantize(*storage(weight), columns, 0, dense))
    copies = [weight, *(clone(weight) for _ in range(num_copies(weight.num_bytes, device) - 1))]
    denses = [dense, *(dense.clone() for _ in range(num_copies(dense.nbytes, device) - 1))]
    contestants = {
        "ours": Contestant(run=lambda i: nf4_linear_(x, *storage(copies[i]), out, False), copies=len(copies)),
        "F.linear": Contestant(run=lambda i: linear(x, denses[i]), copies=len(denses)),
        "bitsandbytes": bitsandbytes_linear(x, copies),
    }
    # up to 64 tokens both are one kernel
    if tokens > MAX_FUSED_TOKENS:
        exact = Contestant(run=lambda i: nf4_linear_(x, *storage(copies[i]), out), copies=len(copies))
        contestants["exact"] = exact
    elif name in ("8B qkv", "tiny"):
        contestants["by shuffles"] = Contestant(run=by_shuffles(x, copies, out), copies=len(copies))

    def error() -> float:
        nf4_linear_(x, *storage(weight), out)
        exact_error = relative_error(out, x.float() @ dense.float().T)
        nf4_linear_(x, *storage(weight), out, False)
        return max(exact_error, relative_error(out, x.float() @ dense.float().T))

    num_bytes = weight.num_bytes + x.nbytes + out.nbytes
    return Case(kernel="nf4_linear", shape=f"{name} {rows}x{columns}", size=tokens, num_bytes=num_bytes,
                contestants=contestants, error=error)  # fmt: skip


def by_shuffles(x: Tensor, weights: list[NF4Weight], out: Tensor) -> Run:
    """The NF4 linear layer with the other way from codes to weights."""

    def run(index: int) -> None:
        chosen = triton_linear.tiling
        triton_linear.tiling = lambda *arguments: replace(chosen(*arguments), lookup="gather", block_columns=128)
        try:
            nf4_linear_(x, *storage(weights[index]), out)
        finally:
            triton_linear.tiling = chosen

    return run


def bitsandbytes_linear(x: Tensor, weights: list[NF4Weight]) -> Contestant:
    """bitsandbytes' own layer over the same bytes."""
    if x.device.type == "cpu" or importlib.util.find_spec("bitsandbytes") is None:
        return Contestant(run=lambda _: None, copies=1, not_run="bitsandbytes is not here, or no GPU")
    import bitsandbytes
    from bitsandbytes.functional import QuantState

    states = [
        QuantState(
            absmax=weight.absmax,
            shape=torch.Size(weight.shape),
            code=levels(x.device),
            blocksize=64,
            quant_type="nf4",
            dtype=x.dtype,
            offset=weight.offset[0],
            state2=QuantState(
                absmax=weight.nested_absmax, blocksize=256, code=nested_codes(x.device), dtype=torch.float32
            ),
        )
        for weight in weights
    ]

    def run(index: int) -> Tensor:
        return bitsandbytes.matmul_4bit(x, weights[index].packed.view(-1, 1).t(), states[index])

    return Contestant(run=run, copies=len(weights))


def lora_case(name: str, rows: int, columns: int, tokens: int, device: torch.device) -> Case:
    """Rank-16 adapters, as many distinct ones as there are tokens, up to 32; against the base product beneath them."""
    slots = [token % NUM_ADAPTERS for token in range(tokens)]
    used = len(set(slots))
    numbers = RANK * (rows + columns)
    x = torch.randn(tokens, columns, device=device).to(dtype_of(device))
    y = torch.zeros(tokens, rows, device=device, dtype=x.dtype)
    arena = (torch.randn(NUM_ADAPTERS * numbers, device=device) / 64).to(x.dtype)
    table = torch.tensor(ABSENT_ROW).repeat(NUM_ADAPTERS, 1, 1)
    table[:, 0, Column.A] = torch.arange(NUM_ADAPTERS) * numbers
    table[:, 0, Column.B_T] = table[:, 0, Column.A] + RANK * columns
    table[:, 0, Column.RANK] = RANK
    table = table.to(device)
    arenas = [arena, *(arena.clone() for _ in range(num_copies(used * numbers * arena.itemsize, device) - 1))]
    batch = SlotBatch.from_slots(slots, device=device)
    weight = random_weight(rows, columns, device)
    base = [weight, *(clone(weight) for _ in range(num_copies(weight.num_bytes, device) - 1))]
    out = torch.empty_like(y)

    on_cuda = operators.versions["lora_apply_", "CUDA"]
    apply_ = on_cuda if device.type == "cpu" else torch.ops.lorasrv.lora_apply_
    tensors = batch.rows, batch.weights, batch.tile_slots, batch.tile_starts, batch.base_rows

    def apply(index: int, *, exact: bool = False) -> None:
        apply_(y, x, arenas[index], table, [rows], *tensors, None, RANK, False, exact)

    def error() -> float:
        y.zero_()
        apply(0)
        expected = torch.empty(tokens, rows, device=device)
        for token, slot in enumerate(slots):
            own = arena[slot * numbers : (slot + 1) * numbers].float()
            a, b_t = own[: RANK * columns].view(RANK, columns), own[RANK * columns :].view(RANK, rows)
            expected[token] = (a @ x[token].float()) @ b_t
        return relative_error(y, expected)

    contestants = {
        "ours": Contestant(run=apply, copies=len(arenas)),
        "exact": Contestant(run=lambda i: apply(i, exact=True), copies=len(arenas)),
        "base product": Contestant(run=lambda i: nf4_linear_(x, *storage(base[i]), out), copies=len(base)),
    }
    num_bytes = used * numbers * arena.itemsize + x.nbytes + 2 * y.nbytes
    return Case(kernel="lora_apply", shape=f"{name} {rows}x{columns} {used} of rank {RANK}", size=tokens,
                num_bytes=num_bytes, contestants=contestants, error=error)  # fmt: skip


def attention_case(heads: int, size: int, sequences: int, length: int, device: torch.device) -> Case:
    """Decode over paged blocks in random order, against the library over contiguous keys and values."""
    kv_heads = heads // 4
    blocks = -(-length // BLOCK_TOKENS)
    dtype = dtype_of(device)
    cache = torch.randn(sequences * blocks, 2, kv_heads, BLOCK_TOKENS, size, device=device).to(dtype)
    tables = torch.randperm(sequences * blocks).view(sequences, blocks)
    spans = [Span(start=length - 1, num_tokens=1, block_table=table.tolist()) for table in tables]
    batch = AttentionBatch.from_spans(spans, tile_tokens=tile_tokens(heads, kv_heads), device=device)
    q = torch.randn(sequences, heads, size, device=device).to(dtype)
    # [N, blocks, 2, Hkv, 32, D] -> [2, N, Hkv, positions, D]
    ordered = cache[tables.to(device)].permute(2, 0, 3, 1, 4, 5).flatten(3, 4)[:, :, :, :length]
    k, v = ordered.contiguous()
    caches = [cache, *(cache.clone() for _ in range(num_copies(cache.nbytes, device) - 1))]
    pairs = [(k, v), *((k.clone(), v.clone()) for _ in caches[1:])]

    on_cuda = operators.versions["paged_attention", "CUDA"]
    attend = on_cuda if device.type == "cpu" else torch.ops.lorasrv.paged_attention

    def ours(index: int) -> Tensor:
        return attend(q, caches[index], batch.block_tables, batch.tiles, batch.tile_tokens, size**-0.5, 0)

    def library(index: int) -> Tensor:
        return scaled_dot_product_attention(q[:, :, None], *pairs[index], enable_gqa=True)

    def error() -> float:
        expected = scaled_dot_product_attention(q[:, :, None].float(), k.float(), v.float(), enable_gqa=True)
        return relative_error(ours(0), expected[:, :, 0])

    def in_turn(index: int) -> Tensor:
        enough = triton_attention.ENOUGH_PROGRAMS
        triton_attention.ENOUGH_PROGRAMS = 0
        try:
            return ours(index)
        finally:
            triton_attention.ENOUGH_PROGRAMS = enough

    contestants = {
        "ours": Contestant(run=ours, copies=len(caches)),
        "splits in turn": Contestant(run=in_turn, copies=len(caches)),
        "contiguous SDPA": Contestant(run=library, copies=len(pairs)),
    }
    return Case(kernel="attention", shape=f"{heads}/{kv_heads} heads of {size}, context {length}", size=sequences,
                num_bytes=k.nbytes + v.nbytes + 2 * q.nbytes, contestants=contestants, error=error)  # fmt: skip


def random_weight(rows: int, columns: int, device: torch.device) -> NF4Weight:
    """Any bytes are a weight."""
    blocks = rows * columns // 64
    return NF4Weight(
        packed=torch.randint(0, 256, (rows * columns // 2,), dtype=torch.uint8, device=device),
        absmax=torch.randint(0, 256, (blocks,), dtype=torch.uint8, device=device),
        nested_absmax=torch.rand(-(-blocks // 256), device=device) / 100,
        offset=torch.full((1,), 0.02, device=device),
        out_features=(rows,),
        in_features=columns,
    )


def clone(weight: NF4Weight) -> NF4Weight:
    """The same bytes elsewhere."""
    return NF4Weight(
        packed=weight.packed.clone(),
        absmax=weight.absmax.clone(),
        nested_absmax=weight.nested_absmax.clone(),
        offset=weight.offset.clone(),
        out_features=weight.out_features,
        in_features=weight.in_features,
    )


def storage(weight: NF4Weight) -> tuple[Tensor, Tensor, Tensor, Tensor, tuple[int, ...]]:
    """As the ops take it."""
    return weight.packed, weight.absmax, weight.nested_absmax, weight.offset, weight.out_features


def dtype_of(device: torch.device) -> torch.dtype:
    """bfloat16, in which the interpreter computes nonsense."""
    return torch.float32 if device.type == "cpu" else torch.bfloat16


def num_copies(num_bytes: int, device: torch.device) -> int:
    """Copies that together exceed the L2 cache four times."""
    return 1 if device.type == "cpu" else max(1, -(-4 * L2_BYTES // num_bytes))


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Of the whole result, by its norm."""
    return float((actual.float() - expected).norm() / expected.norm())

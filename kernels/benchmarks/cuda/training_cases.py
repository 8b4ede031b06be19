"""What of training is timed on CUDA: the NF4 layer's gradient, and the trainable low-rank update there and back."""

from collections.abc import Callable, Iterator

import torch
from cases import (
    LLAMA,
    RANK,
    TINY,
    Case,
    Contestant,
    clone,
    dtype_of,
    num_copies,
    random_weight,
    relative_error,
    storage,
)
from lorasrv_kernels import operators
from lorasrv_kernels.lora.training import op
from lorasrv_kernels.lora.training.reference import LoraUpdate, LoraUpdateGrad, lora_update, lora_update_grad
from lorasrv_kernels.nf4 import reference
from lorasrv_kernels.nf4.calls import Nf4Dequantize
from torch import Tensor

TOKENS = 2048
NUM_ADAPTERS = 4


def cases(device: torch.device, *, small: bool) -> Iterator[Callable[[], Case]]:
    """Builders, so that only one case has its data on the device at a time."""
    tokens = 8 if small else TOKENS
    for name, (rows, columns) in (TINY if small else LLAMA).items():
        for build in (nf4_grad_case, lora_training_case):
            yield lambda build=build, name=name, rows=rows, columns=columns: build(name, rows, columns, tokens, device)


def nf4_grad_case(name: str, rows: int, columns: int, tokens: int, device: torch.device) -> Case:
    """The gradient of the NF4 linear layer against that of a dense one."""
    weight = random_weight(rows, columns, device)
    dtype = dtype_of(device)
    grad = torch.randn(tokens, rows, device=device).to(dtype)
    dense = grad.new_empty(rows, columns)
    reference.dequantize_(Nf4Dequantize(*storage(weight), columns, 0, dense))
    copies = [weight, *(clone(weight) for _ in range(num_copies(weight.num_bytes, device) - 1))]

    def ours(index: int) -> Tensor:
        return operators.versions["nf4_linear_grad", "CUDA"](grad, *storage(copies[index]), columns)

    def error() -> float:
        return relative_error(ours(0), grad.float() @ dense.float())

    contestants = {
        "ours": Contestant(run=ours, copies=len(copies)),
        "dense product": Contestant(run=lambda _: grad @ dense, copies=1),
    }
    num_bytes = weight.num_bytes + grad.nbytes + tokens * columns * dtype.itemsize
    return Case(kernel="nf4_linear_grad", shape=f"{name} {rows}x{columns}", size=tokens, num_bytes=num_bytes,
                contestants=contestants, error=error)  # fmt: skip


def lora_training_case(name: str, rows: int, columns: int, tokens: int, device: torch.device) -> Case:
    """Four DoRA adapters of rank 16 over equal shares of the tokens, update and gradients, against library products."""
    dtype = dtype_of(device)
    y, grad = torch.randn(2, tokens, rows, device=device).to(dtype)
    x = torch.randn(tokens, columns, device=device).to(dtype)
    factors = (
        [torch.randn(RANK, columns, device=device) / columns**0.5 for _ in range(NUM_ADAPTERS)],
        [torch.randn(rows, RANK, device=device) / RANK**0.5 for _ in range(NUM_ADAPTERS)],
        [torch.rand(rows, device=device) + 0.5 for _ in range(NUM_ADAPTERS)],
        [2.0] * NUM_ADAPTERS,
        [rows],
        [tokens // NUM_ADAPTERS] * NUM_ADAPTERS,
    )
    calls = LoraUpdate(y, x, *factors), LoraUpdateGrad(grad, y, x, *factors)

    def ours(_: int) -> list[Tensor]:
        if device.type == "cpu":
            from lorasrv_kernels.lora.training import triton_gradient, triton_kernels

            return flat(triton_kernels.lora_update(calls[0]), triton_gradient.lora_update_grad(calls[1]))
        return flat(op.lora_update(*calls[0]), op.lora_update_grad(*calls[1]))

    def library(_: int) -> list[Tensor]:
        return flat(lora_update(calls[0]), lora_update_grad(calls[1]))

    def error() -> float:
        return max(relative_error(actual, exact.float()) for actual, exact in zip(ours(0), library(0), strict=True))

    contestants = {
        "ours": Contestant(run=ours, copies=1),
        "float32 products": Contestant(run=library, copies=1),
    }
    num_bytes = 5 * y.nbytes + 3 * x.nbytes
    return Case(kernel="lora_update", shape=f"{name} {rows}x{columns} {NUM_ADAPTERS} DoRA of rank {RANK}",
                size=tokens, num_bytes=num_bytes, contestants=contestants, error=error)  # fmt: skip


def flat(result: Tensor, gradients: tuple[Tensor, Tensor, list[Tensor], list[Tensor], list[Tensor]]) -> list[Tensor]:
    """One list of all."""
    grad_y, grad_x, *factors = gradients
    return [result, grad_y, grad_x, *(tensor for group in factors for tensor in group)]

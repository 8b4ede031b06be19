"""The NF4 linear layer: a row's bits, its gradient, and the ops' contracts."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from lorasrv_kernels.errors import KernelError
from lorasrv_kernels.nf4 import NF4Weight, dequantize, gradient, native, nf4_linear, quantize, reference
from lorasrv_kernels.nf4.calls import Nf4LinearGrad
from lorasrv_kernels.workspace import thread_workspace
from torch import Tensor

DTYPES = [torch.float32, torch.bfloat16]
SHAPES = [((64,), 64), ((33,), 100), ((1,), 64), ((96, 32, 32), 128), ((3, 1), 63), ((704,), 256)]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}  # a few roundings of sums of up to 704 products


def fused(rows: tuple[int, ...], in_features: int) -> NF4Weight:
    torch.manual_seed(0)
    return NF4Weight.concatenate([quantize(torch.randn(count, in_features)) for count in rows])


def storage(weight: NF4Weight) -> tuple[Any, ...]:
    return weight.packed, weight.absmax, weight.nested_absmax, weight.offset, weight.out_features


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "in_features"), SHAPES, ids=str)
def test_equals_the_dense_product(rows: tuple[int, ...], in_features: int, dtype: torch.dtype) -> None:
    weight = fused(rows, in_features)
    x = torch.randn(37, in_features).to(dtype)
    expected = x.double() @ dequantize(weight, dtype=dtype).double().T
    actual = nf4_linear(x, weight)
    assert actual.dtype == dtype
    error = (actual.double() - expected).norm() / expected.norm()
    assert error < TOLERANCE[dtype]


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(("rows", "in_features"), SHAPES, ids=str)
def test_many_tokens_in_any_order_of_addition(
    rows: tuple[int, ...], in_features: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = fused(rows, in_features)
    # panels that do not divide the rows
    monkeypatch.setattr(reference, "PANEL_BYTES", 40 * in_features)
    x = torch.randn(native.MIN_LIBRARY_TOKENS, in_features).bfloat16()
    expected = x.double() @ dequantize(weight, dtype=torch.bfloat16).double().T
    error = (nf4_linear(x, weight, exact=False).double() - expected).norm() / expected.norm()
    assert error < TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "in_features"), SHAPES, ids=str)
def test_neighbours_change_no_bit(
    rows: tuple[int, ...], in_features: int, dtype: torch.dtype, num_threads: int
) -> None:
    weight = fused(rows, in_features)
    x = torch.randn(300, in_features).to(dtype)
    together = nf4_linear(x, weight)
    for count in (1, 2, 15, 16, 17, 100, 299):
        for start in {0, 1, 13, 300 - count}:
            if start + count <= 300:
                assert torch.equal(nf4_linear(x[start : start + count], weight), together[start : start + count])
    torch.set_num_threads(3 - num_threads)
    assert torch.equal(nf4_linear(x, weight), together)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_neighbour_that_is_not_finite_changes_no_bit(dtype: torch.dtype) -> None:
    weight = fused((96,), 64)
    x = torch.randn(20, 64).to(dtype)
    expected = nf4_linear(x, weight)
    x[[3, 18]] = float("nan")
    x[[4, 19]] = float("inf")
    others = [row for row in range(20) if row not in (3, 4, 18, 19)]
    assert torch.equal(nf4_linear(x, weight)[others], expected[others])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_where_the_input_lies_changes_no_bit(dtype: torch.dtype) -> None:
    weight = fused((96, 33), 64)
    x = torch.randn(21, 64).to(dtype)
    expected = nf4_linear(x, weight)
    for shift in (1, 2, 5, 31):
        shifted = torch.empty(21 * 64 + shift, dtype=dtype)[shift:].view(21, 64).copy_(x)
        assert torch.equal(nf4_linear(shifted, weight), expected)
    assert torch.equal(nf4_linear(x.T.contiguous().T, weight), expected)
    wider = torch.randn(21, 100).to(dtype)
    wider[:, 3:67] = x
    assert torch.equal(nf4_linear(wider[:, 3:67], weight), expected)


@pytest.mark.parametrize("panel_bytes", [1, 64 * 4 * 7, 64 * 4 * 100])
def test_panels_agree_with_the_product_at_once(monkeypatch: pytest.MonkeyPatch, panel_bytes: int) -> None:
    weight = fused((96, 33), 64)
    x = torch.randn(21, 64)
    grad = torch.randn(21, 129)
    dense = dequantize(weight)
    monkeypatch.setattr(reference, "PANEL_BYTES", panel_bytes)
    torch.testing.assert_close(nf4_linear(x, weight), x @ dense.T, rtol=1e-5, atol=1e-4)
    actual = torch.ops.lorasrv.nf4_linear_grad(grad, *storage(weight), 64)
    torch.testing.assert_close(actual, grad @ dense, rtol=1e-5, atol=1e-4)


@pytest.mark.usefixtures("poisoned_memory")
def test_in_place_and_functional_are_one() -> None:
    weight = fused((96, 32), 128)
    for count in (0, 1, 16, 19):
        x = torch.randn(count, 128, dtype=torch.bfloat16)
        out = torch.empty(count, 128, dtype=torch.bfloat16)
        with torch.inference_mode():
            assert nf4_linear(x, weight, out=out) is out
        assert torch.equal(out, nf4_linear(x, weight))


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16], ids=str)
@pytest.mark.parametrize(("rows", "in_features"), [*SHAPES, ((100,), 704)], ids=str)
def test_gradient_is_that_of_the_dense_layer(rows: tuple[int, ...], in_features: int, dtype: torch.dtype) -> None:
    weight = fused(rows, in_features)
    for count in (0, 1, 21):
        x = torch.randn(count, in_features).to(dtype).requires_grad_()
        upstream = torch.randn(count, sum(rows)).to(dtype)
        nf4_linear(x, weight).backward(upstream)
        assert x.grad is not None
        expected = upstream.double() @ dequantize(weight, dtype=dtype).double()
        # float32 sums of up to 704 products, then one rounding to the dtype
        tolerance = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}[dtype]
        assert x.grad.dtype == dtype
        assert (x.grad.double() - expected).norm() <= tolerance * expected.norm()


def test_gradient_and_reference_are_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the panels; those of columns, and those of rows."""
    weight = fused((96, 33), 320)
    grad = torch.randn(21, 129)
    expected = grad @ dequantize(weight)
    for columns in (64, 128, 320):
        monkeypatch.setattr(gradient, "MIN_COLUMNS", columns)
        monkeypatch.setattr(gradient, "PANEL_BYTES", 1)
        actual = torch.ops.lorasrv.nf4_linear_grad(grad, *storage(weight), 320)
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(
        reference.linear_grad_by_panels(Nf4LinearGrad(grad, *storage(weight), 320)), expected, rtol=1e-5, atol=1e-4
    )


def test_no_more_than_a_panel_is_ever_dequantized() -> None:
    """Four bits stay four bits: of a large weight too."""
    assert gradient.panel_columns(1 << 17, torch.bfloat16, gradient.PANEL_BYTES) == gradient.MIN_COLUMNS
    weight = quantize(torch.zeros(2048, 4096))

    def scratch_bytes() -> int:
        torch.ops.lorasrv.nf4_linear_grad(torch.zeros(2, 2048), *storage(weight), 4096)
        return thread_workspace().num_bytes

    # a thread has scratch of its own
    with ThreadPoolExecutor() as threads:
        num_bytes = threads.submit(scratch_bytes).result()
    assert 0 < num_bytes <= gradient.PANEL_BYTES + (1 << 20)


def test_training_after_serving_uses_the_same_scratch() -> None:
    """Scratch memory first taken under inference mode can still be written outside it."""
    weight = fused((37,), 192)
    x = torch.randn(3, 192)
    with torch.inference_mode():
        expected = nf4_linear(x, weight, out=torch.empty(3, 37)).clone()
    assert torch.equal(nf4_linear(x, weight), expected)


def test_serving_between_two_training_steps_keeps_the_gradient() -> None:
    weight = fused((32,), 64)
    x = torch.randn(5, 64, requires_grad=True)

    def step() -> Tensor:
        (grad,) = torch.autograd.grad(nf4_linear(x, weight).square().sum(), x)
        return grad

    first = step()
    with torch.inference_mode():
        nf4_linear(x, weight, out=torch.empty(5, 32))
    with torch.no_grad():
        assert not nf4_linear(x, weight).requires_grad
    assert torch.equal(step(), first)
    assert first.abs().sum() > 0


@pytest.mark.parametrize("in_features", [64, 63])
def test_ops_keep_torch_contracts(in_features: int) -> None:
    weight = fused((6, 3), in_features)
    ops = torch.ops.lorasrv
    x = torch.randn(5, in_features)
    torch.library.opcheck(ops.nf4_linear.default, (x.clone().requires_grad_(), *storage(weight)))
    torch.library.opcheck(ops.nf4_linear_.default, (x, *storage(weight), torch.empty(5, 9)))
    torch.library.opcheck(ops.nf4_linear_.default, (x, *storage(weight), torch.empty(5, 9), False))
    torch.library.opcheck(ops.nf4_linear_grad.default, (torch.randn(5, 9), *storage(weight), in_features))
    out = torch.empty(4, in_features)
    torch.library.opcheck(ops.nf4_dequantize_.default, (*storage(weight), in_features, 2, out))


def test_refusals_name_what_was_expected() -> None:
    weight = fused((6,), 64)
    x = torch.randn(5, 64)
    with pytest.raises(KernelError, match=r"slices \[6\] x 63: packed must be .* \[189\], got torch.uint8 \[192\]"):
        nf4_linear(x[:, :63], weight)
    with pytest.raises(KernelError, match=r"x must be \[T, I\] .* got torch.int64 \[5, 64\]"):
        nf4_linear(x.long(), weight)
    with pytest.raises(KernelError, match=r"out must be contiguous torch.float32 \[5, 6\], got torch.float32 \[5, 7\]"):
        nf4_linear(x, weight, out=torch.empty(5, 7))
    with pytest.raises(KernelError, match=r"grad must be \[T, 6\] .* got torch.float32 \[5, 7\]"):
        torch.ops.lorasrv.nf4_linear_grad(torch.zeros(5, 7), *storage(weight), 64)
    with pytest.raises(KernelError, match=r"within 6 rows, got torch.float32 \[4, 64\] from row 3 on"):
        dequantize(weight, start_row=3, stop_row=7)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16], ids=str)
@pytest.mark.parametrize(("rows", "in_features"), SHAPES, ids=str)
@pytest.mark.usefixtures("poisoned_memory")
def test_rows_are_dequantized_alone_as_together(rows: tuple[int, ...], in_features: int, dtype: torch.dtype) -> None:
    weight = fused(rows, in_features)
    together = dequantize(weight, dtype=dtype)
    for start in range(0, sum(rows), 7):
        stop = min(start + 7, sum(rows))
        assert torch.equal(dequantize(weight, start_row=start, stop_row=stop, dtype=dtype), together[start:stop])

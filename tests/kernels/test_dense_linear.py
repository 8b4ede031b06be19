"""The dense linear layer: a row's bits, its gradient, and the ops' contracts."""

import pytest
import torch
from lorasrv_kernels import operators
from lorasrv_kernels.dense import dense_linear
from lorasrv_kernels.errors import KernelError

DTYPES = [torch.float32, torch.bfloat16]
SHAPES = [(64, 64), (33, 100), (1, 64), (2, 1), (3, 5), (704, 256), (1000, 63)]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}  # a few roundings of sums of up to 256 products


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_product(shape: tuple[int, int], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight = torch.randn(shape).to(dtype)
    for count in (0, 1, 16, 37):
        x = torch.randn(count, shape[1]).to(dtype)
        expected = x.double() @ weight.double().T
        error = (dense_linear(x, weight).double() - expected).norm()
        assert error <= TOLERANCE[dtype] * expected.norm()
        out = torch.empty(count, shape[0], dtype=dtype)
        with torch.inference_mode():
            assert dense_linear(x, weight, out=out) is out
        assert torch.equal(out, dense_linear(x, weight))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_neighbours_change_no_bit(shape: tuple[int, int], dtype: torch.dtype, num_threads: int) -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(shape).to(dtype), torch.randn(300, shape[1]).to(dtype)
    together = dense_linear(x, weight)
    for count in (1, 2, 15, 16, 17, 100, 299):
        for start in {0, 1, 13, 300 - count}:
            if start + count <= 300:
                assert torch.equal(dense_linear(x[start : start + count], weight), together[start : start + count])
    torch.set_num_threads(3 - num_threads)
    assert torch.equal(dense_linear(x, weight), together)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("exact", [True, False])
def test_what_is_registered_for_cuda(dtype: torch.dtype, exact: bool) -> None:
    assert torch._C._dispatch_has_kernel_for_dispatch_key("lorasrv::dense_linear_", "CUDA")
    torch.manual_seed(0)
    weight, x = torch.randn(33, 100).to(dtype), torch.randn(100, 130).to(dtype).T
    out = torch.full((130, 33), torch.nan, dtype=dtype)
    operators.versions["dense_linear_", "CUDA"](x, weight, out, exact)
    torch.testing.assert_close(out, x @ weight.T, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    if exact:
        alone = torch.empty(1, 33, dtype=dtype)
        operators.versions["dense_linear_", "CUDA"](x[70:71], weight, alone, exact)
        assert torch.equal(alone[0], out[70])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("out_features", [1, 4, 9, 15, 16, 17])
def test_where_rows_lie_changes_no_bit(out_features: int, dtype: torch.dtype) -> None:
    """Few output features and rows that are not 16-byte aligned: where MKL's float32 product alone is not enough."""
    torch.manual_seed(0)
    for in_features in (5, 63, 65):
        weight, x = torch.randn(out_features, in_features).to(dtype), torch.randn(16, in_features).to(dtype)
        expected = dense_linear(x, weight)
        for shift in range(1, 16):
            assert torch.equal(dense_linear(x[shift:], weight), expected[shift:])
            moved = torch.empty(x.numel() + shift, dtype=dtype)[shift:].view_as(x).copy_(x)
            assert torch.equal(dense_linear(moved, weight), expected)


def test_gradient() -> None:
    torch.manual_seed(0)
    weight = torch.randn(7, 5, dtype=torch.float64)
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda rows: dense_linear(rows, weight), x)
    # the weight is frozen: it gets no gradient even if it asks for one
    dense_linear(x, weight.requires_grad_()).sum().backward()
    assert weight.grad is None


def test_ops_keep_torch_contracts() -> None:
    x, weight = torch.randn(5, 8), torch.randn(3, 8)
    torch.library.opcheck(torch.ops.lorasrv.dense_linear.default, (x.clone().requires_grad_(), weight))
    torch.library.opcheck(torch.ops.lorasrv.dense_linear_.default, (x, weight, torch.empty(5, 3)))
    torch.library.opcheck(torch.ops.lorasrv.dense_linear_.default, (x, weight, torch.empty(5, 3), False))


def test_refusals_name_what_was_expected() -> None:
    x, weight = torch.randn(5, 8), torch.randn(3, 8)
    with pytest.raises(KernelError, match=r"x must be \[T, 8\], got \[5, 7\]"):
        dense_linear(x[:, :7], weight)
    with pytest.raises(KernelError, match=r"one floating dtype, got torch.float64 and torch.float32"):
        dense_linear(x.double(), weight)
    with pytest.raises(KernelError, match=r"weight must be contiguous \[O, I\], got \[8, 3\]"):
        dense_linear(x, weight.T)
    with pytest.raises(KernelError, match=r"out must be contiguous torch.float32 \[5, 3\], got torch.float32 \[5, 4\]"):
        dense_linear(x, weight, out=torch.empty(5, 4))

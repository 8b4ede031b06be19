"""Norm, rotation and gated activation: against float64, by every implementation, and row by row."""

import pytest
import torch
from lorasrv_kernels.cpu.isa import Isa, widest_isa
from lorasrv_kernels.errors import KernelError
from lorasrv_kernels.rowwise import native, reference, rms_norm, rms_norm_grad, rotate_, silu_mul, silu_mul_grad
from lorasrv_kernels.rowwise.reference import RmsNorm, RmsNormGrad, Rotate, SiluMul, SiluMulGrad
from torch import Tensor

DTYPES = [torch.float32, torch.bfloat16]
# roundings of float32; one of the silu and one of the product in 16 bits
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}


def isas() -> list[Isa]:
    """What is wider than AVX-512 runs as AVX-512."""
    widest = widest_isa()
    return [] if widest is None else [isa for isa in Isa if isa <= min(widest, Isa.AVX512)]


def angles_of(num_rows: int, head_size: int) -> Tensor:
    turns = torch.rand(num_rows, 1, head_size // 2) * 100
    return torch.cat([turns.cos(), turns.sin()], dim=-1)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(0, 64), (1, 1), (3, 63), (5, 100), (17, 704)], ids=str)
def test_activation_equals_the_formula(shape: tuple[int, int], dtype: torch.dtype) -> None:
    gate, up = (4 * torch.randn(2, *shape)).to(dtype)
    wide = gate.double()
    expected = wide * wide.sigmoid() * up.double()
    call = SiluMul(gate, up)
    results = [silu_mul(gate, up), reference.silu_mul(call)]
    if dtype != torch.float16:
        results += [native.silu_mul(call, isa=isa) for isa in isas()]
    for result in results:
        tolerance = TOLERANCE[dtype]
        torch.testing.assert_close(result.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(0, 64), (1, 1), (3, 63), (2, 3, 64), (5, 100), (17, 704)], ids=str)
def test_norm_equals_the_formula(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, weight = (4 * torch.randn(shape)).to(dtype), torch.randn(shape[-1]).to(dtype)
    wide = x.double()
    quotient = wide / (wide.square().mean(-1, keepdim=True) + 0.01).sqrt()
    for scale, expected in ((weight, quotient * weight.double()), (None, quotient)):
        call = RmsNorm(x, scale, 0.01)
        results = [rms_norm(x, scale, 0.01), reference.rms_norm(call)]
        if dtype != torch.float16:
            results += [native.rms_norm(call, isa=isa) for isa in isas()]
        for result in results:
            tolerance = TOLERANCE[dtype]
            torch.testing.assert_close(result.double(), expected, rtol=tolerance, atol=tolerance)


def test_activation_of_extreme_numbers() -> None:
    gate = torch.tensor([[-200.0, -88.0, -0.0, 0.0, 88.0, 200.0, 3e38, torch.inf, -torch.inf, torch.nan]])
    call = SiluMul(gate, torch.ones_like(gate))
    expected = reference.silu_mul(call)
    for isa in isas():
        out = native.silu_mul(call, isa=isa)
        # e^-88 is below the smallest normal number, and 0 here
        torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-35, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_size", [2, 16, 48, 64, 100])
def test_rotation_has_the_bits_of_the_reference(head_size: int, dtype: torch.dtype) -> None:
    heads, angles = torch.randn(9, 5, head_size).to(dtype), angles_of(9, head_size)
    expected = heads.clone()
    reference.rotate_(Rotate(expected, angles))
    for isa in isas():
        turned = heads.clone()
        assert native.rotate_(Rotate(turned, angles), isa=isa)
        assert torch.equal(turned, expected)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16], ids=str)
def test_what_lies_apart_in_memory(dtype: torch.dtype) -> None:
    fused, angles = torch.randn(6, 7, 32).to(dtype), angles_of(6, 32)
    expected = fused.clone()
    rotate_(fused[:, 1:5], angles)
    reference.rotate_(Rotate(expected[:, 1:5], angles))
    assert torch.equal(fused, expected)
    apart, together = torch.randn(6, 2, 64).to(dtype), torch.randn(6, 2, 32).to(dtype)
    apart[:, :, ::2] = together
    rotate_(apart[:, :, ::2], angles)
    rotate_(together, angles)
    assert torch.equal(apart[:, :, ::2], together)
    assert torch.equal(rms_norm(apart[:, :, ::2], None, 1e-5), rms_norm(together, None, 1e-5))
    assert torch.equal(rms_norm(fused[:, 1:5], None, 1e-5), rms_norm(fused, None, 1e-5)[:, 1:5])
    gate, up = torch.randn(6, 200).to(dtype).split(100, dim=1)
    assert torch.equal(silu_mul(gate, up), silu_mul(gate.contiguous(), up.T.contiguous().T))
    assert silu_mul(gate, up).is_contiguous()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_where_a_number_stands_changes_no_bit(dtype: torch.dtype, num_threads: int) -> None:
    gate, up = (4 * torch.randn(2, 100, 1000)).to(dtype)
    together, normed, weight = silu_mul(gate, up), rms_norm(gate, up[0], 1e-5), up[0]
    torch.set_num_threads(3 - num_threads)
    assert torch.equal(rms_norm(gate, weight, 1e-5), normed)
    assert torch.equal(rms_norm(gate[7:8], weight, 1e-5), normed[7:8])
    assert torch.equal(rms_norm(gate[:, None], weight, 1e-5)[:, 0], normed)
    assert torch.equal(silu_mul(gate, up), together)
    assert torch.equal(silu_mul(gate[:, 3:], up[:, 3:]), together[:, 3:])
    assert torch.equal(silu_mul(gate[7:8, :5], up[7:8, :5]), together[7:8, :5])


def test_wide_instruction_sets_give_the_same_bits() -> None:
    if Isa.AVX512 not in isas():
        pytest.skip("no AVX-512, or native library not built")
    gate, up = 4 * torch.randn(2, 10, 100)
    for kernel, call in ((native.rms_norm, RmsNorm(gate, None, 1e-5)), (native.silu_mul, SiluMul(gate, up))):
        assert torch.equal(kernel(call, isa=Isa.AVX2), kernel(call, isa=Isa.AVX512))


@pytest.mark.usefixtures("without_library")
def test_without_the_library_the_reference_serves() -> None:
    gate, up = torch.randn(2, 3, 100)
    assert native.silu_mul(SiluMul(gate, up)) is None
    assert torch.equal(silu_mul(gate, up), reference.silu_mul(SiluMul(gate, up)))
    assert native.rms_norm(RmsNorm(gate, None, 1e-5)) is None
    assert torch.equal(rms_norm(gate, None, 1e-5), reference.rms_norm(RmsNorm(gate, None, 1e-5)))
    heads, angles = torch.randn(3, 2, 20), angles_of(3, 20)
    assert not native.rotate_(Rotate(heads, angles))
    expected = heads.clone()
    reference.rotate_(Rotate(expected, angles))
    rotate_(heads, angles)
    assert torch.equal(heads, expected)


def test_every_breach_of_the_contract_is_named() -> None:
    with pytest.raises(KernelError, match=r"one shape \[T, I\] and dtype, got torch.float32 \[2, 3\]"):
        silu_mul(torch.zeros(2, 3), torch.zeros(2, 3).half())
    with pytest.raises(KernelError, match=r"weight must be .*\[3\], got torch.float64 \[2\]; epsilon .* got -1.0"):
        rms_norm(torch.zeros(2, 3), torch.zeros(2).double(), -1.0)
    with pytest.raises(KernelError, match=r"x must be floating \[T, I\] or \[T, H, I\], got torch.float32 \[3\]"):
        rms_norm(torch.zeros(3), None, 1e-5)
    with pytest.raises(KernelError, match=r"D even, got \[2, 3, 5\]"):
        rotate_(torch.zeros(2, 3, 5), torch.zeros(2, 1, 5))
    with pytest.raises(KernelError, match=r"angles must be float32 \[2, 1, 4\], got torch.float32 \[2, 4\]"):
        rotate_(torch.zeros(2, 3, 4), torch.zeros(2, 4))


def test_opcheck() -> None:
    torch.library.opcheck(torch.ops.lorasrv.rms_norm.default, (torch.randn(2, 20), torch.randn(20), 1e-5))
    torch.library.opcheck(torch.ops.lorasrv.silu_mul.default, (*torch.randn(2, 3, 20),))
    torch.library.opcheck(torch.ops.lorasrv.rotate_.default, (torch.randn(3, 2, 20), angles_of(3, 20)))


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(0, 64), (1, 1), (3, 63), (5, 100), (17, 704)], ids=str)
def test_gradient_of_the_activation(shape: tuple[int, int], dtype: torch.dtype) -> None:
    gate, up, grad = (4 * torch.randn(3, *shape)).to(dtype)
    gate[:, :1] = 0
    wide = [tensor.double().requires_grad_() for tensor in (gate, up)]
    expected = torch.autograd.grad(wide[0] * wide[0].sigmoid() * wide[1], wide, grad.double())
    call = SiluMulGrad(grad, gate, up)
    results = [silu_mul_grad(*call), reference.silu_mul_grad(call)]
    if dtype != torch.float16:
        results += [native.silu_mul_grad(call, isa=isa) for isa in isas()]
    for result in results:
        tolerance = TOLERANCE[dtype]
        torch.testing.assert_close(result.double(), torch.cat(expected, dim=1), rtol=tolerance, atol=tolerance)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(0, 64), (1, 1), (3, 63), (2, 3, 64), (5, 100), (17, 704)], ids=str)
def test_gradient_of_the_norm(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, grad = (4 * torch.randn(2, *shape)).to(dtype)
    weight = torch.randn(shape[-1]).to(dtype)
    wide = x.double().requires_grad_()
    quotient = wide / (wide.square().mean(-1, keepdim=True) + 0.01).sqrt()
    for scale, normed in ((weight, quotient * weight.double()), (None, quotient)):
        (expected,) = torch.autograd.grad(normed, wide, grad.double(), retain_graph=True)
        call = RmsNormGrad(grad, x, scale, 0.01)
        results = [rms_norm_grad(*call), reference.rms_norm_grad(call)]
        if dtype != torch.float16:
            results += [native.rms_norm_grad(call, isa=isa) for isa in isas()]
        for result in results:
            # two terms of the size of grad, which may cancel
            tolerance = TOLERANCE[dtype]
            torch.testing.assert_close(result.double(), expected, rtol=tolerance, atol=4 * tolerance)


def test_gradients_refuse_what_does_not_fit() -> None:
    x = torch.randn(3, 8)
    with pytest.raises(KernelError, match=r"grad must be torch.float32 \[3, 8\], got torch.float32 \[3, 4\]"):
        rms_norm_grad(x[:, :4], x, None, 0.01)
    with pytest.raises(KernelError, match=r"grad must be torch.float32 \[3, 8\], got torch.bfloat16"):
        silu_mul_grad(x.bfloat16(), x, x)


@pytest.mark.parametrize("op", [torch.ops.lorasrv.rms_norm_grad, torch.ops.lorasrv.silu_mul_grad], ids=str)
def test_gradients_pass_opcheck(op: object) -> None:
    tensors = torch.randn(3, 5, 64)
    last = (None, 0.01) if "norm" in str(op) else (tensors[2],)
    torch.library.opcheck(op.default, (tensors[0], tensors[1], *last))

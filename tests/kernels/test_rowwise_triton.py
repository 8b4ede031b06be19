"""Norm, rotation and activation in Triton against the reference: interpreted, on CUDA, and compiled for CUDA."""

from pathlib import Path
from typing import Any

import pytest
import torch
from interpreter import INTERPRETING, run_interpreted
from lorasrv_kernels import triton_modules
from lorasrv_kernels.rowwise import reference
from lorasrv_kernels.rowwise.reference import RmsNorm, Rotate, SiluMul
from torch import Tensor

pytest.importorskip("triton")
import aot

native = pytest.mark.skipif(INTERPRETING, reason="this is the interpreter")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# roundings of float32, and of the silu and the product in 16 bits, where the interpreter truncates
TOLERANCES = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def kernels() -> Any:
    return triton_modules.load("lorasrv_kernels.rowwise.triton_kernels")


def assert_near(actual: Tensor, expected: Tensor) -> None:
    tolerance = TOLERANCES[actual.dtype]
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@native
def test_through_the_interpreter() -> None:
    run_interpreted(__file__, native_only=("test_a_row_of_16_bits_has_the_same_bits_among_others",))


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(0, 64), (1, 1), (3, 63), (2, 3, 64), (5, 100), (3, 704)], ids=str)
def test_norm_in_every_dtype(shape: tuple[int, ...], dtype: torch.dtype, triton_device: torch.device) -> None:
    x = (4 * torch.randn(shape)).to(triton_device, dtype)
    weight = torch.randn(shape[-1]).to(triton_device, dtype)
    for scale in (weight, None):
        actual = kernels().rms_norm(RmsNorm(x, scale, 0.01))
        assert_near(actual, reference.rms_norm(RmsNorm(x, scale, 0.01)))
        assert actual.is_contiguous()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("num_heads", "size"), [(1, 2), (5, 48), (9, 64), (8, 100)])
def test_rotation_in_every_dtype(num_heads: int, size: int, dtype: torch.dtype, triton_device: torch.device) -> None:
    turns = torch.rand(3, 1, size // 2) * 100
    angles = torch.cat([turns.cos(), turns.sin()], dim=-1).to(triton_device)
    # some heads of wider rows, as in a fused product
    rows = torch.randn(3, num_heads + 2, size).to(triton_device, dtype)
    expected = rows.clone()
    kernels().rotate_(Rotate(rows[:, :-2], angles))
    reference.rotate_(Rotate(expected[:, :-2], angles))
    if dtype == torch.float32:
        assert torch.equal(rows, expected)
    assert_near(rows, expected)


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(0, 64), (1, 1), (3, 63), (2, 1025)], ids=str)
def test_activation_in_every_dtype(shape: tuple[int, int], dtype: torch.dtype, triton_device: torch.device) -> None:
    gate, up = (4 * torch.randn(shape[0], 2 * shape[1])).to(triton_device, dtype).chunk(2, dim=1)
    actual = kernels().silu_mul(SiluMul(gate, up))
    assert_near(actual, reference.silu_mul(SiluMul(gate, up)))
    assert actual.is_contiguous()


@pytest.mark.gpu
def test_columns_may_be_apart_in_any_dtype(triton_device: torch.device) -> None:
    wide = torch.randn(4, 6, 60).to(triton_device)
    x = wide[::2, :, ::3]
    assert_near(kernels().rms_norm(RmsNorm(x, None, 0.1)), reference.rms_norm(RmsNorm(x, None, 0.1)))
    gate, up = wide[:, 0, ::2], wide[:, 1, 1::2]
    assert_near(kernels().silu_mul(SiluMul(gate, up)), reference.silu_mul(SiluMul(gate, up)))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_row_of_16_bits_has_the_same_bits_among_others(dtype: torch.dtype, triton_device: torch.device) -> None:
    rows_have_the_same_bits(dtype, triton_device)


@pytest.mark.gpu
def test_a_row_has_the_same_bits_among_others(triton_device: torch.device) -> None:
    rows_have_the_same_bits(torch.float32, triton_device)


def rows_have_the_same_bits(dtype: torch.dtype, device: torch.device) -> None:
    x, weight = torch.randn(37, 300).to(device, dtype), torch.randn(300).to(device, dtype)
    all_rows, activated = kernels().rms_norm(RmsNorm(x, weight, 1e-5)), kernels().silu_mul(SiluMul(x, x))
    for row in (0, 5, 36):
        assert torch.equal(kernels().rms_norm(RmsNorm(x[row : row + 1], weight, 1e-5))[0], all_rows[row])
        assert torch.equal(kernels().silu_mul(SiluMul(x[row : row + 1], x[row : row + 1]))[0], activated[row])


@native
@pytest.mark.aot
@pytest.mark.parametrize("capability", [80, 90])
def test_compiles(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capability: int) -> None:
    """At the shapes of an 8B Llama: nothing spills, and memory is read and written in whole 16 bytes."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    with torch.device("meta"):
        x, weight = torch.empty(8, 4096, dtype=torch.bfloat16), torch.empty(4096, dtype=torch.bfloat16)
        heads, angles = torch.empty(8, 48, 128, dtype=torch.bfloat16), torch.empty(8, 1, 128)
        gate, up = torch.empty(8, 28672, dtype=torch.bfloat16).chunk(2, dim=1)

    def layer() -> None:
        kernels().rms_norm(RmsNorm(x, weight, 1e-5))
        kernels().rotate_(Rotate(heads[:, :40], angles))
        kernels().silu_mul(SiluMul(gate, up))

    launches = aot.record(monkeypatch, layer)
    assert [launch.grid for launch in launches] == [(8, 1), (8, 5), (8, 14)]
    for launch in launches:
        kernel = aot.compile_launch(launch, capability)
        kernel.check(capability)
        assert "LDG.E.128" in kernel.sass
        assert "STG.E.128" in kernel.sass

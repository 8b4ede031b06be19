"""The Triton kernels of the trainable low-rank update against the reference, on CUDA or interpreted; and compiled."""

from pathlib import Path

import pytest
import torch
from interpreter import INTERPRETING, run_interpreted
from lora_training import Batch
from lorasrv_kernels.lora.training import reference
from lorasrv_kernels.lora.training.reference import LoraUpdate, LoraUpdateGrad
from torch import Tensor

pytest.importorskip("triton")
import aot
from lorasrv_kernels.lora.training import triton_gradient, triton_kernels
from lorasrv_kernels.lora.training.triton_plan import TILING, Tiling

native = pytest.mark.skipif(INTERPRETING, reason="this is the interpreter")
# several blocks of everything at sizes that the interpreter gets through
SMALL = Tiling(tokens=16, ranks=16, depth=32, columns=32)
# of numbers about 1: two orders of addition; then one rounding, where the interpreter cuts bits off
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}
FORBIDDEN = ("ATOM", "ATOMG", "RED", "REDG")


@pytest.fixture(autouse=True)
def _poisoned(poisoned_memory: None) -> None:
    """What is read before it is written shows."""


def results(batch: Batch, device: torch.device, tiling: Tiling = SMALL) -> list[Tensor]:
    """The update and every gradient."""
    there = batch.to(device)
    update = triton_kernels.lora_update(there.call(), tiling=tiling)
    gradients = triton_gradient.lora_update_grad(there.grad_call(), tiling=tiling)
    return [tensor.cpu() for tensor in (update, *flat(gradients))]


def expected(batch: Batch) -> list[Tensor]:
    return [reference.lora_update(batch.call()), *flat(reference.lora_update_grad(batch.grad_call()))]


def flat(gradients: reference.Gradients) -> list[Tensor]:
    grad_y, grad_x, *factors = gradients
    return [grad_y, grad_x, *(factor for group in factors for factor in group)]


def check(batch: Batch, device: torch.device, tiling: Tiling = SMALL) -> None:
    for actual, exact in zip(results(batch, device, tiling), expected(batch), strict=True):
        assert actual.shape == exact.shape
        assert actual.dtype == exact.dtype
        tolerance = TOLERANCE[actual.dtype]
        # numbers are sums of products of a size up to 6, scales included
        torch.testing.assert_close(actual, exact, rtol=tolerance, atol=60 * TOLERANCE[torch.float32])


@pytest.mark.gpu
@pytest.mark.parametrize("in_features", [1, 63])
@pytest.mark.parametrize("out_features", [[1], [40, 33]], ids=str)
@pytest.mark.parametrize("with_d", [False, True], ids=["lora", "dora"])
def test_any_size(with_d: bool, out_features: list[int], in_features: int, triton_device: torch.device) -> None:
    batch = Batch.random(
        [5, 18, 9, 0, 2], in_features, out_features, torch.float32, ranks=(8, 3, 0, 40, 1), with_d=with_d
    )
    check(batch, triton_device)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_any_dtype(dtype: torch.dtype, triton_device: torch.device) -> None:
    check(Batch.random([5, 18, 3, 7], 64, [40, 33], dtype), triton_device)


@pytest.mark.gpu
@pytest.mark.parametrize("segments", [[0], [0, 0, 0], [1]], ids=str)
def test_smallest_batches(segments: list[int], triton_device: torch.device) -> None:
    check(Batch.random(segments, 64, [40, 33], torch.float32), triton_device)


@pytest.mark.gpu
def test_the_tiling_that_trains(triton_device: torch.device) -> None:
    check(Batch.random([5, 40], 70, [70, 33], torch.float32), triton_device, TILING)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_adapters_trained_together_or_apart_are_equal(dtype: torch.dtype, triton_device: torch.device) -> None:
    batch = Batch.random([5, 18, 3, 2], 24, [34, 3], dtype, ranks=(8, 3, 0, 20))
    together, start = results(batch, triton_device), 0
    for index, tokens in enumerate(batch.segment_tokens):
        rows = slice(start, start + tokens)
        start += tokens
        update, grad_y, grad_x, *factors = results(batch.segment(index), triton_device)
        pairs = [(together[0][rows], update), (together[2][rows], grad_x)]
        pairs += [(together[1][rows], grad_y)] if len(grad_y) else []
        # A, B and d of two slices of four segments each
        for group in range(3):
            joint = together[3 + 8 * group + 2 * index :][:2]
            pairs += zip(joint, factors[2 * group : 2 * group + 2], strict=True)
        assert all(torch.equal(left, right) for left, right in pairs)


@pytest.mark.gpu
def test_views(triton_device: torch.device) -> None:
    batch = Batch.random([7, 5], 24, [10, 6], torch.float32)
    names = {name: getattr(batch, name) for name in Batch.__slots__}
    names["y"] = torch.empty(12, 40)[:, 3:19].copy_(batch.y)
    names["x"] = torch.empty(12, 48)[:, ::2].copy_(batch.x)
    names["grad"] = batch.grad.T.contiguous().T
    for left, right in zip(results(Batch(**names), triton_device), results(batch, triton_device), strict=True):
        assert torch.equal(left, right)


@pytest.mark.parametrize("name", ["lora_update", "lora_update_grad"])
def test_registered_for_cuda(name: str) -> None:
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"lorasrv::{name}", "CUDA")


@native
def test_through_the_interpreter() -> None:
    run_interpreted(__file__)


@pytest.mark.aot
@native
@pytest.mark.parametrize(
    ("with_d", "dtype", "capability"),
    [
        (False, torch.bfloat16, 90),
        (True, torch.bfloat16, 80),
        (True, torch.bfloat16, 90),
        (True, torch.float32, 80),
        (True, torch.float32, 90),
    ],
    ids=str,
)
def test_fits_a_device(
    with_d: bool, dtype: torch.dtype, capability: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Two launches forward and five backward at the shape of an 8B Llama's q, k and v, without spills or atomics."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    segments, out_features = [300, 212], [4096, 1024, 1024]
    with torch.device("meta"):
        y, grad = torch.empty(2, 512, 6144, dtype=dtype)
        x, a = torch.empty(512, 4096, dtype=dtype), [torch.empty(16, 4096)] * 6
        b = [torch.empty(width, 16) for width in out_features] * 2
        d = [torch.empty(width if with_d else 0) for width in out_features] * 2
    rest = (x, a, b, d, [2.0] * 6, out_features, segments)
    launches = aot.record(monkeypatch, lambda: triton_kernels.lora_update(LoraUpdate(y, *rest)))
    grad_call = LoraUpdateGrad(grad, y if with_d else None, *rest)
    launches += aot.record(monkeypatch, lambda: triton_gradient.lora_update_grad(grad_call))
    names = ["shrink", "expand", "shrink", "shrink", "expand", "outer", "outer"]
    assert [launch.name for launch in launches] == names
    for launch in launches:
        compiled = aot.compile_launch(launch, capability)
        compiled.check(capability)
        assert not any(f" {name}." in compiled.sass for name in FORBIDDEN)
        # float32 products are exact, which tensor cores are not
        assert ("HMMA" in compiled.sass) == (dtype != torch.float32)

"""The trainable low-rank update: values and gradients, several adapters in one batch, and what its contract refuses."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from lora_training import Batch
from lorasrv_kernels.cpu import library
from lorasrv_kernels.cpu.isa import Isa, widest_isa
from lorasrv_kernels.errors import KernelError
from lorasrv_kernels.lora.training import LowRank, lora_update, native, op, reference
from lorasrv_kernels.lora.training.reference import LoraUpdate
from torch import Tensor

SEGMENTS = [5, 70, 9, 0, 1, 33]
DTYPES = [torch.float32, torch.bfloat16]
# float32 sums of up to 128 products of numbers of a size up to 6, which may cancel; what has the activations' dtype is
# rounded once to it
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 4e-3, torch.float16: 5e-4}

Update = Callable[..., Tensor]
Gradient = Callable[..., reference.Gradients]


def implementations(dtype: torch.dtype) -> dict[str, tuple[Update, Gradient]]:
    """What this machine can run, by name."""
    found: dict[str, tuple[Update, Gradient]] = {
        "op": (lambda call: op.lora_update(*call), lambda call: op.lora_update_grad(*call)),
        "reference": (reference.lora_update, reference.lora_update_grad),
    }
    widest = widest_isa()
    if widest is not None and native.serves(dtype):
        # what is wider than AVX-512 runs as AVX-512
        for isa in (isa for isa in Isa if isa <= min(widest, Isa.AVX512)):
            found[isa.name] = partial(native.lora_update, isa=isa), partial(native.lora_update_grad, isa=isa)
    return found


def expected_gradients(batch: Batch) -> tuple[Tensor, list[Tensor]]:
    """The result in float64, and its gradients as PyTorch finds them in the reference."""
    exact = batch.double().trainable()
    result = reference.lora_update(exact.call())
    return result.detach(), list(torch.autograd.grad(result, exact.tensors(), exact.grad))


def gradients(batch: Batch, gradient: Gradient) -> list[Tensor]:
    """In the order of `Batch.tensors`."""
    has_d = batch.has_d()
    grad_y, grad_x, a, b, d = gradient(batch.grad_call())
    assert has_d or grad_y.shape == (0, batch.y.shape[1])
    return [grad_y if has_d else batch.grad, grad_x, *(factor for factor in (*a, *b, *d) if factor.numel())]


def check_close(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """Within the tolerance of the dtype of what was computed, relative to the norm, and to numbers of 1."""
    assert actual.shape == expected.shape
    tolerance = TOLERANCE[actual.dtype] if actual.dtype == dtype else TOLERANCE[torch.float32]
    assert (actual.double() - expected).norm() <= tolerance * (expected.norm() + expected.numel() ** 0.5)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("in_features", [1, 63, 100, 1100])
@pytest.mark.parametrize("out_features", [[1], [63], [128], [96, 1, 100]], ids=str)
@pytest.mark.parametrize("with_d", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16], ids=str)
def test_values_and_gradients(dtype: torch.dtype, with_d: bool, out_features: list[int], in_features: int) -> None:
    batch = Batch.random(SEGMENTS, in_features, out_features, dtype, with_d=with_d)
    expected, expected_grads = expected_gradients(batch)
    for update, gradient in implementations(dtype).values():
        check_close(update(batch.call()), expected, dtype)
        for actual, exact in zip(gradients(batch, gradient), expected_grads, strict=True):
            check_close(actual, exact, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_backward_gives_every_gradient(dtype: torch.dtype) -> None:
    batch = Batch.random(SEGMENTS, 100, [96, 63], dtype).trainable()
    result = batch.update()
    assert result.dtype == dtype
    result.backward(batch.grad)
    _, expected = expected_gradients(batch)
    for tensor, exact in zip(batch.tensors(), expected, strict=True):
        assert tensor.grad is not None
        check_close(tensor.grad, exact, dtype)


@pytest.mark.parametrize("with_d", [False, True], ids=["lora", "dora"])
def test_gradcheck(with_d: bool) -> None:
    """In float64: the op's own gradient, and that of the reference's formula, against differences."""
    batch = Batch.random([2, 3, 1, 2], 3, [4, 3], torch.float64, ranks=(2, 0, 1), with_d=with_d).trainable()
    _, _, *factors = batch.call()

    def function(update: Update, y: Tensor, x: Tensor, *_tensors: Tensor) -> Tensor:
        return update(LoraUpdate(y, x, *factors))

    for update, _ in implementations(torch.float64).values():
        assert torch.autograd.gradcheck(partial(function, update), batch.tensors())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_adapters_trained_together_or_apart_are_equal(dtype: torch.dtype) -> None:
    batch = Batch.random(SEGMENTS, 100, [96, 63], dtype)
    for name, (update, gradient) in implementations(dtype).items():
        together = update(batch.call())
        grad_y, grad_x, *factors = gradient(batch.grad_call())
        start = 0
        for index, tokens in enumerate(batch.segment_tokens):
            alone, rows = batch.segment(index), slice(start, start + tokens)
            start += tokens
            own_y, own_x, *own_factors = gradient(alone.grad_call())
            pairs = [(together[rows], update(alone.call())), (grad_x[rows], own_x)]
            pairs += [(grad_y[rows], own_y)] if len(own_y) else []
            for joint, own in zip(factors, own_factors, strict=True):
                pairs += zip(joint[2 * index : 2 * index + 2], own, strict=True)
            for left, right in pairs:
                assert torch.equal(left, right), (name, index)


# without it the library's products serve, whose bits may follow the number of threads
@pytest.mark.skipif(library.load() is None, reason="native library not built (make native)")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_threads_and_wide_instruction_sets_change_no_bit(dtype: torch.dtype, num_threads: int) -> None:
    batch = Batch.random([100, 64], 300, [200, 63], dtype, ranks=(16, 5))
    found = implementations(dtype)

    def results(name: str) -> list[Tensor]:
        update, gradient = found[name]
        return [update(batch.call()), *gradients(batch, gradient)]

    expected = results("op")
    if Isa.AVX512.name in found:
        assert all(map(torch.equal, results(Isa.AVX512.name), results(Isa.AVX2.name)))
    torch.set_num_threads(3 - num_threads)
    assert all(map(torch.equal, results("op"), expected))


def test_tokens_without_an_adapter_keep_their_bits() -> None:
    batch = Batch.random([4, 3, 5], 64, [32, 8], torch.float32)
    nothing = Batch(**{name: getattr(batch, name) for name in Batch.__slots__} | {"adapters": [[None, None]] * 3})
    for update, gradient in implementations(torch.float32).values():
        assert torch.equal(update(batch.call())[7:], batch.y[7:])
        grad_y, grad_x, *_ = gradient(batch.grad_call())
        assert torch.equal(grad_y[7:], batch.grad[7:])
        assert not grad_x[7:].any()
        assert torch.equal(update(nothing.call()), batch.y)


@pytest.mark.parametrize("segments", [[], [0], [0, 0]], ids=str)
def test_an_empty_batch(segments: list[int]) -> None:
    batch = Batch.random(segments, 64, [32, 8], torch.float32).trainable()
    result = batch.update()
    assert result.shape == (0, 40)
    result.sum().backward()
    for tensor in batch.tensors():
        assert tensor.grad is None or not tensor.grad.any()


def test_gradients_are_added_to_views_of_a_flat_buffer() -> None:
    """As an optimizer keeps them: numbers and gradients of an adapter in one run each."""
    batch = Batch.random([7], 12, [10], torch.float32, ranks=(4,), with_d=False)
    (one,) = batch.adapters[0]
    assert one is not None
    flat, gradient = torch.cat([one.a.flatten(), one.b.flatten()]), torch.ones(4 * 12 + 4 * 10)

    def leaf(start: int, *shape: int) -> Tensor:
        stop = start + shape[0] * shape[1]
        view = flat[start:stop].view(shape).requires_grad_()
        view.grad = gradient[start:stop].view(shape)
        return view

    own = LowRank(a=leaf(0, 4, 12), b=leaf(48, 10, 4), scale=one.scale)
    lora_update(batch.y, batch.x, segment_tokens=[7], adapters=[[own]], out_features=[10]).backward(batch.grad)
    _, (_, _, grad_a, grad_b) = expected_gradients(batch)
    check_close(gradient - 1, torch.cat([grad_a.flatten(), grad_b.flatten()]), torch.float32)


def test_where_tensors_lie_changes_no_bit() -> None:
    batch = Batch.random([7, 5], 12, [10, 6], torch.float32, ranks=(4, 2, 3))
    strided = {name: getattr(batch, name) for name in Batch.__slots__}
    strided["y"] = torch.empty(12, 40)[:, 3:19].copy_(batch.y)
    strided["x"] = torch.empty(12, 24)[:, ::2].copy_(batch.x)
    strided["grad"] = batch.grad.T.contiguous().T
    strided["adapters"] = [
        [LowRank(a=one.a.T.contiguous().T, b=one.b.T.contiguous().T, d=one.d, scale=one.scale) for one in row if one]
        for row in batch.adapters
    ]
    elsewhere = Batch(**strided)
    for update, gradient in implementations(torch.float32).values():
        results = [[update(each.call()), *gradients(each, gradient)] for each in (batch, elsewhere)]
        torch.testing.assert_close(*results)


@pytest.mark.usefixtures("without_library")
def test_without_the_library_the_reference_serves() -> None:
    batch = Batch.random(SEGMENTS, 100, [96, 63], torch.float32)
    assert not native.serves(torch.float32)
    assert torch.equal(batch.update(), reference.lora_update(batch.call()))
    _, gradient = implementations(torch.float32)["op"]
    assert all(map(torch.equal, gradients(batch, gradient), gradients(batch, reference.lora_update_grad)))


def test_opcheck() -> None:
    batch = Batch.random([3, 2], 12, [10, 6], torch.float32, ranks=(4, 0, 3))
    torch.library.opcheck(torch.ops.lorasrv.lora_update.default, batch.trainable().call())
    for with_d in (True, False):
        batch = Batch.random([3, 2], 12, [10, 6], torch.float32, ranks=(4, 0, 3), with_d=with_d)
        torch.library.opcheck(torch.ops.lorasrv.lora_update_grad.default, batch.grad_call())


def test_every_breach_of_the_contract_is_named() -> None:
    low_rank = LowRank(a=torch.zeros(2, 63), b=torch.zeros(32, 3), d=torch.zeros(5), scale=1.0)
    with pytest.raises(
        KernelError,
        match=r"x must be \[T, I\], T the sum of \[3\], got \[2, 64\]; y must be torch.float32 \[2, 32\], "
        r"got torch.float64 \[2, 31\]; a\[0\] must be torch.float32 \[2, 64\], got torch.float32 \[2, 63\]; "
        r"b\[0\] must be torch.float32 \[32, 2\].*d\[0\] must be torch.float32 \[32\], got torch.float32 \[5\]",
    ):
        lora_update(
            torch.zeros(2, 31, dtype=torch.float64),
            torch.zeros(2, 64),
            segment_tokens=[3],
            adapters=[[low_rank]],
            out_features=[32],
        )
    with pytest.raises(KernelError, match=r"must have 2 entries each, one per segment and slice, got 1, 1, 1, 1"):
        lora_update(torch.zeros(3, 32), torch.zeros(3, 64), segment_tokens=[1, 2], adapters=[[None]], out_features=[32])

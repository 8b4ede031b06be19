"""What storing an update costs, against the figures measured for adapters of known sizes."""

from types import SimpleNamespace

import pytest
import torch
from lorasrv.merge.fold import fold, measure
from lorasrv.merge.update import Update
from lorasrv_adapters.normalize import ReplacedRows
from lorasrv_kernels.nf4 import dequantize, quantize

SIZE, RANK = 1024, 16


class Sources:
    """One Gaussian matrix as a base, in float32 or as NF4 decodes it, and an update of a given size for it."""

    def __init__(self, *, dequantized: bool, size: float) -> None:
        generator = torch.Generator().manual_seed(0)
        weight = torch.randn(SIZE, SIZE, generator=generator)
        self.matrix = dequantize(quantize(weight), dtype=torch.float32) if dequantized else weight
        delta = torch.randn(SIZE, RANK, generator=generator) @ torch.randn(RANK, SIZE, generator=generator)
        self.delta = delta * (size * weight.norm() / delta.norm())
        self.modules = ("m",)

    def weight(self, _):
        return self.matrix.clone()

    def update(self, *_):
        return Update(delta=self.delta)

    def figures(self, dtype):
        folded = fold(self, self, "m", in_nf4=dtype is None)
        return measure("m", folded, quantize(folded.weight) if dtype is None else folded.weight.to(dtype))


# the update's share that NF4 keeps, and its error over the update: 2048 x 2048 Gaussian, rank 16
TABLE = [
    (0.002, True, 0.004, 1.05),
    (0.01, True, 0.015, 1.09),
    (0.05, True, 0.28, 1.03),
    (0.2, True, 0.99, 0.46),
    (0.002, False, 1.00, 11.2),
    (0.01, False, 1.00, 4.9),
    (0.05, False, 0.99, 2.0),
    (0.2, False, 1.00, 0.64),
]


@pytest.mark.parametrize(("size", "dequantized", "kept", "error"), TABLE, ids=str)
def test_nf4_keeps_what_was_measured(size, dequantized, kept, error):
    found = Sources(dequantized=dequantized, size=size).figures(None)
    assert found.size == pytest.approx(size, rel=0.02)
    # chance alone moves the share by error / (size of the matrix), a fortieth of 1 % at most
    assert found.kept == pytest.approx(kept, abs=0.02)
    assert found.error == pytest.approx(error, rel=0.05)
    assert not found.rounded


@pytest.mark.parametrize(
    ("dtype", "size", "error", "rounded"),
    [
        (torch.bfloat16, 0.002, 0.83, True),
        (torch.bfloat16, 0.01, 0.17, False),
        (torch.bfloat16, 0.05, 0.03, False),
        (torch.float16, 0.002, 0.104, False),
        (torch.float16, 0.0004, 0.52, True),
        (torch.float32, 1e-5, 0.0, False),
    ],
    ids=str,
)
def test_16_bits_keep_everything_and_round_it(dtype, size, error, rounded):
    found = Sources(dequantized=True, size=size).figures(dtype)
    assert found.kept == pytest.approx(1, abs=0.005)
    assert found.error == pytest.approx(error, rel=0.1, abs=0.005)
    assert found.rounded == rounded


def test_replaced_rows_are_exact_and_counted():
    source = Sources(dequantized=False, size=0.1)
    rows = ReplacedRows(values=torch.full((2, SIZE), 1e-9), ids=torch.tensor([3, 7]))
    source.update = lambda *_: Update(rows=rows)
    folded = fold(source, source, "m")
    assert torch.equal(folded.weight[[3, 7]], rows.values)
    assert torch.equal(folded.weight[:3], source.matrix[:3])
    expected = source.matrix[[3, 7]].norm() / source.matrix.norm()
    assert measure("m", folded, folded.weight).size == pytest.approx(float(expected), rel=1e-4)


def test_an_update_of_zero_is_kept():
    source = Sources(dequantized=True, size=0.0)
    found = source.figures(None)
    assert (found.size, found.kept, found.error) == (0, 1, 0)


def test_a_module_without_an_update_has_no_figures():
    source = SimpleNamespace(weight=lambda _: torch.ones(2, 2), modules=())
    folded = fold(source, source, "other")
    assert torch.equal(folded.weight, torch.ones(2, 2))
    assert measure("other", folded, folded.weight) is None

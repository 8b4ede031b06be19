"""A group of linear layers of which some have a bias."""

import torch
from lorasrv.model.adapted_linear import AdaptedLinear
from lorasrv.model.batch import StepBatch
from lorasrv_kernels.attention import AttentionBatch, Span
from lorasrv_kernels.batch import SlotBatch


def batch_of(num_tokens: int) -> StepBatch:
    span = Span(start=0, num_tokens=num_tokens, block_table=[0])
    return StepBatch(
        positions=torch.arange(num_tokens),
        attention=AttentionBatch.from_spans([span], tile_tokens=16),
        slots=SlotBatch.from_slots([-1] * num_tokens),
        kv_cache=torch.zeros(0),
        arena=torch.zeros(0),
        table=torch.zeros(0, 3, 4, dtype=torch.int64),
    )


def test_each_module_adds_its_own_bias() -> None:
    torch.manual_seed(0)
    weights, x = [torch.randn(width, 64) for width in (5, 3, 8)], torch.randn(7, 64)
    biases = [torch.randn(5), None, torch.randn(8)]
    group = AdaptedLinear(weights, first_module=0, biases=biases)
    plain = AdaptedLinear(weights, first_module=0)
    expected = plain.forward(x, batch_of(7)) + torch.cat([biases[0], torch.zeros(3), biases[2]])
    assert torch.equal(group.forward(x, batch_of(7)), expected)
    assert torch.equal(group.bias(0), biases[0])
    assert group.bias(1) is None
    assert torch.equal(group.bias(2), biases[2])
    assert [plain.bias(place) for place in range(3)] == [None, None, None]

"""A group of linear layers of which some have a bias."""

import torch
from lorasrv.model.adapted_linear import AdaptedLinear
from lorasrv.model.batch import AdapterBatch
from lorasrv_kernels.batch import SlotBatch
from lorasrv_kernels.table import ABSENT_ROW, Column, floats_at


def no_adapters(num_tokens: int) -> AdapterBatch:
    slots = SlotBatch.from_slots([-1] * num_tokens)
    return AdapterBatch(slots=slots, arena=torch.zeros(0), table=torch.zeros(0, 3, 8, dtype=torch.int64), touched=())


def test_each_module_adds_its_own_bias() -> None:
    torch.manual_seed(0)
    weights, x = [torch.randn(width, 64) for width in (5, 3, 8)], torch.randn(7, 64)
    biases = [torch.randn(5), None, torch.randn(8)]
    group = AdaptedLinear(weights, first_module=0, biases=biases)
    plain = AdaptedLinear(weights, first_module=0)
    expected = plain.forward(x, no_adapters(7)) + torch.cat([biases[0], torch.zeros(3), biases[2]])
    assert torch.equal(group.forward(x, no_adapters(7)), expected)
    assert torch.equal(group.bias(0), biases[0])
    assert group.bias(1) is None
    assert torch.equal(group.bias(2), biases[2])
    assert [plain.bias(place) for place in range(3)] == [None, None, None]


def test_an_adapters_bias_stands_in_place_of_the_bases() -> None:
    torch.manual_seed(0)
    weights, x = [torch.randn(width, 64) for width in (5, 3)], torch.randn(3, 64)
    biases = [torch.randn(5), torch.randn(3)]
    group = AdaptedLinear(weights, first_module=0, biases=biases)
    arena, table = torch.zeros(32), torch.tensor([[ABSENT_ROW, ABSENT_ROW]])
    table[0, 1, Column.BIAS] = 0
    own = floats_at(arena, 0, 3)
    own.copy_(torch.tensor([10.0, 20.0, 30.0]))
    adapters = AdapterBatch(slots=SlotBatch.from_slots([0, -1, 0]), arena=arena, table=table, touched={1})
    products = AdaptedLinear(weights, first_module=0).forward(x, no_adapters(3))
    expected = torch.stack([torch.cat([biases[0], bias]) for bias in (own, biases[1], own)]) + products
    assert torch.equal(group.forward(x, adapters), expected)

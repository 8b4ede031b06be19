"""Norm, rotary positions and activation: equal to transformers, and row by row."""

import pytest
import torch
from lorasrv.model.batch import AdapterBatch
from lorasrv.model.layers import RMSNorm, RotaryTable
from lorasrv.model.rope import RopeConfig
from lorasrv_kernels.batch import SlotBatch
from lorasrv_kernels.rowwise import reference, rotate_, silu_mul
from torch.nn import functional
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRMSNorm, LlamaRotaryEmbedding, apply_rotary_pos_emb

DTYPES = [torch.float32, torch.bfloat16]
NO_ADAPTERS = AdapterBatch(slots=SlotBatch.from_slots([]), arena=torch.empty(0), table=torch.empty(0), touched=())


@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_equals_transformers(dtype):
    torch.manual_seed(0)
    x, weight = torch.randn(7, 96).to(dtype), torch.randn(96).to(dtype)
    oracle = LlamaRMSNorm(96, eps=1e-5)
    oracle.weight.data = weight
    assert torch.equal(reference.rms_norm(reference.RmsNorm(x, weight, 1e-5)), oracle(x))
    # the mean is added up in another order, which may move the last bit before each rounding
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 8e-3}[dtype]
    normed = RMSNorm(weight, epsilon=1e-5, module=0).forward(x, NO_ADAPTERS)
    torch.testing.assert_close(normed, oracle(x), rtol=tolerance, atol=0)


ROPES = {
    "default": {"rope_type": "default", "rope_theta": 10000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 256,
    },
}


@pytest.mark.parametrize("kind", ROPES)
def test_rotation_equals_transformers(kind):
    torch.manual_seed(0)
    values = dict(ROPES[kind])
    config = LlamaConfig(
        hidden_size=256, num_attention_heads=4, rope_parameters=dict(values), max_position_embeddings=3000
    )
    positions = torch.tensor([0, 1, 17, 300, 1500, 2999])
    heads = torch.randn(6, 4, 64)
    cosine, sine = LlamaRotaryEmbedding(config)(heads, positions[None])
    expected, _ = apply_rotary_pos_emb(heads, heads, cosine[0], sine[0])
    rope = RopeConfig(kind=values.pop("rope_type"), theta=values.pop("rope_theta"), **values)
    table = RotaryTable(rope, head_size=64, num_positions=3000, device="cpu")
    assert table.num_positions == 3000
    rotate_(heads, table.lookup(positions))
    torch.testing.assert_close(heads, expected, rtol=0, atol=1e-6)


def test_an_angle_does_not_depend_on_the_length_of_the_table():
    short, long = (RotaryTable(RopeConfig(), head_size=64, num_positions=n, device="cpu").table for n in (1100, 2500))
    assert torch.equal(short, long[:1100])


@pytest.mark.parametrize("dtype", DTYPES)
def test_activation_equals_torch(dtype):
    torch.manual_seed(0)
    gate, up = (3 * torch.randn(5, 2 * 100)).to(dtype).split(100, dim=1)
    torch.testing.assert_close(
        silu_mul(gate, up), functional.silu(gate) * up, rtol=1e-2 if dtype.itemsize == 2 else 1e-6, atol=1e-6
    )
    assert not silu_mul(torch.full((1, 1), -200.0), torch.ones(1, 1)).isnan()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [344, 1025])
def test_rows_do_not_depend_on_their_number(dtype, width):
    torch.manual_seed(0)
    gate, up = (3 * torch.randn(2, 40, width)).to(dtype)
    norm = RMSNorm(torch.randn(width).to(dtype), epsilon=1e-6, module=0)
    both = torch.cat([gate, up], dim=1)

    def layers(start: int, stop: int) -> torch.Tensor:
        split = both[start:stop].chunk(2, dim=1)
        activations = [
            silu_mul(gate[start:stop], up[start:stop]),
            silu_mul(*split),
            norm.forward(gate[start:stop], NO_ADAPTERS),
        ]
        heads = both[start:stop].unflatten(1, (2, width))[:, :1]
        return torch.cat([*activations, norm.forward(heads, NO_ADAPTERS).flatten(1)], dim=1)

    alone = torch.cat([layers(row, row + 1) for row in range(40)])
    for stop in (2, 3, 7, 16, 17, 40):
        assert torch.equal(layers(0, stop), alone[:stop])

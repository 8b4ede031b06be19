"""Logits against transformers, and rows that do not depend on neighbours, chunks or decoding."""

import itertools
import json
import random

import pytest
import torch
from lorasrv.model.batch import AdapterBatch
from lorasrv.model.loader import load_model
from lorasrv_adapters.base import table_order
from lorasrv_kernels.batch import SlotBatch
from lorasrv_kernels.nf4 import NF4Weight, dequantize
from lorasrv_kernels.table import ABSENT_ROW, Column

KINDS = ["llama2", "llama3", "tied", "head_dim", "linear"]
DTYPES = [torch.float32, torch.bfloat16]


def prompt(length: int, *, seed: int = 0) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(199) for _ in range(length)]


@torch.no_grad()
def oracle_logits(oracle, tokens):
    return oracle(torch.tensor([tokens])).logits[0]


@pytest.mark.parametrize("kind", KINDS)
def test_logits_equal_transformers(tiny, driver, kind):
    folder, oracle = tiny(kind)
    model = load_model(folder, dtype=torch.float32, device="cpu", quantize=False)
    tokens = prompt(100)
    expected = oracle_logits(oracle, tokens)
    assert expected.abs().max() > 1
    torch.testing.assert_close(driver(model).run(tokens), expected, rtol=0, atol=2e-5)


def test_the_older_spelling_gives_the_same_logits(tiny, driver, tmp_path):
    folder, _ = tiny("llama3")
    raw = json.loads((folder / "config.json").read_text())
    rope = raw.pop("rope_parameters")
    raw["rope_theta"] = rope.pop("rope_theta")
    raw["rope_scaling"] = rope
    raw["torch_dtype"] = raw.pop("dtype")
    (tmp_path / "config.json").write_text(json.dumps(raw))
    (tmp_path / "model.safetensors").symlink_to(folder / "model.safetensors")
    new, old = (load_model(where, dtype=torch.float32, device="cpu") for where in (folder, tmp_path))
    assert torch.equal(driver(new).run(prompt(90)), driver(old).run(prompt(90)))


@pytest.mark.parametrize("kind", ["llama3", "tied"])
def test_nf4_logits_equal_transformers_with_the_dequantized_weights(tiny, driver, kind):
    folder, oracle = tiny(kind)
    model = load_model(folder, dtype=torch.float32, device="cpu")
    before = oracle_logits(oracle, prompt(70))
    state = oracle.state_dict()
    original = {name: tensor.clone() for name, tensor in state.items()}
    quantized = {name: weight for name, weight in model.stored() if isinstance(weight, NF4Weight)}
    assert len(quantized) == 14
    try:
        for name, weight in quantized.items():
            state[name].copy_(dequantize(weight))
        expected = oracle_logits(oracle, prompt(70))
    finally:
        for name, tensor in original.items():
            state[name].copy_(tensor)
    assert (expected - before).abs().max() > 0.1
    torch.testing.assert_close(driver(model).run(prompt(70)), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("quantize", [True, False])
def test_chunks_and_decoding_equal_one_prefill_bit_for_bit(tiny, driver, dtype, quantize):
    model = load_model(tiny()[0], dtype=dtype, device="cpu", quantize=quantize)
    tokens = prompt(83)
    whole = driver(model).run(tokens)
    for cuts in ([37, 70], [5, 32, 64], [80, 81, 82], list(range(1, 83))):
        sequence = driver(model)
        edges = [0, *cuts, 83]
        pieces = [sequence.run(tokens[start:stop]) for start, stop in itertools.pairwise(edges)]
        assert torch.equal(torch.cat(pieces), whole)


@pytest.mark.parametrize("dtype", DTYPES)
def test_neighbours_do_not_change_a_bit(tiny, driver, dtype):
    model = load_model(tiny()[0], dtype=dtype, device="cpu")
    prompts = {f"s{i}": prompt(length, seed=i) for i, length in enumerate([3, 40, 1, 77, 16])}
    alone = {name: driver(model).run(tokens) for name, tokens in prompts.items()}
    together = driver(model)
    rng = random.Random(1)
    done = dict.fromkeys(prompts, 0)
    while any(done[name] < len(tokens) for name, tokens in prompts.items()):
        open_names = [name for name, tokens in prompts.items() if done[name] < len(tokens)]
        chosen = rng.sample(open_names, rng.randint(1, len(open_names)))
        chunks = [(name, prompts[name][done[name] :][: rng.randint(1, 20)]) for name in chosen]
        for (name, chunk), logits in zip(chunks, together.step(chunks), strict=True):
            assert torch.equal(logits, alone[name][done[name] : done[name] + len(chunk)])
            done[name] += len(chunk)


def random_adapter(model) -> tuple[torch.Tensor, torch.Tensor, dict[str, tuple[torch.Tensor, ...]]]:
    """An arena with rank rows and scales for every other product, its table of one slot, and the same as matrices."""
    torch.manual_seed(3)
    arena, entries, matrices = torch.zeros(0), [], {}
    for place, name in enumerate(model.module_order):
        module = model.base.modules[name]
        out_features, in_features = module.out_features, module.in_features
        entries.append(list(ABSENT_ROW))
        if place % 2 or module.kind not in ("linear", "head"):
            continue
        a, b, d = 0.2 * torch.randn(3, in_features), 0.2 * torch.randn(out_features, 3), 0.5 + torch.rand(out_features)
        for column, piece in ((Column.A, a), (Column.B_T, b.t()), (Column.D, d)):
            entries[-1][column] = len(arena)
            padded = torch.nn.functional.pad(piece.flatten(), (0, -piece.numel() % 32))
            arena = torch.cat([arena, padded])
        entries[-1][Column.RANK] = 3
        matrices[name] = (a, b, d)
    return arena, torch.tensor([entries]), matrices


@torch.no_grad()
def test_each_module_has_its_own_row_of_the_adapter_table(tiny, driver):
    folder, oracle = tiny("head_dim")
    model = load_model(folder, dtype=torch.float32, device="cpu", quantize=False)
    arena, table, matrices = random_adapter(model)
    plain = driver(model).run(prompt(40))
    mixed = driver(model, arena=arena, table=table).step(
        [("adapted", prompt(40)), ("base", prompt(40))], slots=[0] * 40 + [-1] * 40
    )
    original = {name: oracle.get_submodule(name).weight.clone() for name in matrices}
    try:
        for name, (a, b, d) in matrices.items():
            weight = oracle.get_submodule(name).weight
            weight.copy_(d[:, None] * weight + b @ a)
        expected = oracle_logits(oracle, prompt(40))
    finally:
        for name, weight in original.items():
            oracle.get_submodule(name).weight.copy_(weight)
    torch.testing.assert_close(mixed[0], expected, rtol=0, atol=1e-4)
    assert torch.equal(mixed[1], plain)


def test_logits_are_float32_and_of_the_rows_asked(tiny, driver):
    model = load_model(tiny()[0], dtype=torch.bfloat16, device="cpu")
    logits = driver(model).run(prompt(20))
    assert logits.dtype == torch.float32
    hidden = torch.randn(20, 64, dtype=torch.bfloat16)
    two, all_rows = (
        model.logits(
            rows, AdapterBatch(slots=SlotBatch.from_slots([-1] * len(rows)), arena=rows, table=rows, touched=())
        )
        for rows in (hidden[[19, 4]], hidden)
    )
    assert torch.equal(two, all_rows[[19, 4]])


def test_positions_end_where_asked(tiny):
    assert load_model(tiny()[0], dtype=torch.float32, device="cpu", max_positions=50).max_positions == 50
    assert load_model(tiny()[0], dtype=torch.float32, device="cpu", max_positions=9999).max_positions == 256


def test_base_tells_adapters_what_they_need(tiny):
    folder, oracle = tiny("llama3")
    model = load_model(folder, dtype=torch.bfloat16, device="cpu")
    named = dict(oracle.named_modules())
    del named[""]
    assert model.base.modules.keys() == named.keys()
    for name, module in model.base.modules.items():
        if module.kind != "other":
            assert module.weight_shape == tuple(named[name].weight.shape), name
    kinds = [model.base.modules[name].kind for name in model.module_order]
    assert kinds == ["linear"] * 14 + ["head", "embedding"] + ["norm"] * 5
    assert table_order(model.base) == model.module_order
    assert not model.base.tied
    endings = [name.rsplit(".", 1)[1] for name in model.module_order[:7]]
    assert endings == ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    for name in model.module_order[:7]:
        weight = oracle.get_submodule(name).weight
        rows = model.base.weight_rows(name, 3, 20)
        assert rows.dtype == torch.float32
        torch.testing.assert_close(rows, weight[3:20].detach(), rtol=0, atol=0.1)
        assert torch.equal(rows, rows.bfloat16().float())
    for name in ("lm_head", "model.embed_tokens"):
        weight = oracle.get_submodule(name).weight.detach().bfloat16().float()
        assert torch.equal(model.base.weight_rows(name, 3, 20), weight[3:20])
    with pytest.raises(KeyError):
        model.base.weight_rows("model.layers.0.mlp", 0, 1)


def test_a_tied_head_has_the_rows_of_the_embedding(tiny):
    model = load_model(tiny("tied")[0], dtype=torch.float32, device="cpu")
    assert model.base.tied
    assert model.base.modules["lm_head"].kind == "head"
    assert torch.equal(*(model.base.weight_rows(name, 0, 199) for name in ("lm_head", "model.embed_tokens")))


def test_digest_names_what_is_served(tiny):
    folder, _ = tiny("llama3")

    def digest(**options) -> str:
        return load_model(folder, **{"dtype": torch.float32, "device": "cpu", **options}).base.digest

    assert len(digest()) == 64
    assert digest() == digest()
    assert digest(quantize=False) != digest()
    assert digest(dtype=torch.bfloat16) == digest()


def test_dense_rows_are_a_copy(tiny):
    model = load_model(tiny()[0], dtype=torch.float32, device="cpu", quantize=False)
    name = model.module_order[1]
    rows = model.base.weight_rows(name, 0, 4)
    expected = rows.clone()
    rows.zero_()
    assert torch.equal(model.base.weight_rows(name, 0, 4), expected)

"""AdaLoRA as plain LoRA: PEFT answers the same, and the server serves the same."""

import json
from collections.abc import Callable
from pathlib import Path

import convertible_adapters as tiny
import pytest
import torch
from lorasrv_adapters.adalora import adalora_to_lora
from lorasrv_adapters.checkpoint import read_checkpoint
from lorasrv_adapters.convert import convert_checkpoint
from lorasrv_adapters.errors import AdapterConversionError, AdapterIncompatibleError
from lorasrv_adapters.raw import RawAdapter
from plain_base import base_of
from safetensors.torch import load_file, save_file
from torch import Tensor

pytestmark = [
    # said of AdaLoRA's own keys, and of modules pruned to rank 0
    pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:.*LoRA tensor.s. have invalid shape.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:Initializing zero-element tensors:UserWarning"),
]

MASKS = {
    "model.layers.0.self_attn.q_proj": [True, False, True, True, False],
    "model.layers.0.self_attn.v_proj": [False] * 5,
    "model.layers.1.self_attn.q_proj": [True] * 5,
    "model.layers.1.self_attn.v_proj": [False, False, False, True, False],
}
RANKS = {name: sum(mask) for name, mask in MASKS.items()}


@pytest.fixture(params=["pruned", "unpruned", "zeroed", "narrow"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    folder = tmp_path / "adalora"
    tiny.save_adalora(folder, masks=MASKS if request.param in ("pruned", "narrow") else None)
    if request.param in ("zeroed", "narrow"):
        tensors = load_file(folder / "adapter_model.safetensors")
        for name, tensor in tensors.items():
            if request.param == "narrow":
                tensors[name] = tensor.bfloat16()
            elif name.endswith("lora_E"):
                tensor[1::2] = 0
        save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    return folder


def read_config(folder: Path) -> dict[str, object]:
    config: dict[str, object] = json.loads((folder / "adapter_config.json").read_text())
    return config


def test_peft_answers_the_same(folder: Path, tmp_path: Path) -> None:
    convert_checkpoint(folder, tmp_path / "lora")
    assert read_config(tmp_path / "lora")["peft_type"] == "LORA"
    expected = tiny.logits(tiny.load(folder))
    # logits are of order 10; the same sum in another order
    torch.testing.assert_close(tiny.logits(tiny.load(tmp_path / "lora")), expected, atol=1e-5, rtol=0)
    assert (tiny.logits(tiny.new_llama()) - expected).abs().max() > 0.1


def test_the_server_serves_the_same(folder: Path, tmp_path: Path) -> None:
    conversion = convert_checkpoint(folder, tmp_path / "lora")
    base = base_of(tiny.new_llama())
    before, after = read_checkpoint(folder, base), read_checkpoint(tmp_path / "lora", base)
    assert after.kind == conversion.kind == "lora"
    assert after.ranks == {name: rank for name, rank in before.ranks.items() if rank}
    for name, module in after.modules.items():
        expected = before.modules[name].b @ before.modules[name].a
        # products are of order 1
        torch.testing.assert_close(module.b @ module.a, expected, atol=1e-6, rtol=0)
        assert conversion.ranks[name][1] == module.rank


BESIDE: dict[str, dict[str, object]] = {
    "all biases": {"bias": "all"},
    "biases of the targets": {"bias": "lora_only"},
    "saved modules": {"modules_to_save": ["lm_head", "embed_tokens"]},
    "rows of the embedding": {"trainable_token_indices": [3, 7]},
}


@pytest.mark.parametrize("name", BESIDE)
def test_what_was_trained_beside_the_factors_survives(name: str, tmp_path: Path) -> None:
    tiny.save_adalora(tmp_path / "adalora", masks=MASKS, biased=True, **BESIDE[name])
    convert_checkpoint(tmp_path / "adalora", tmp_path / "lora")
    expected = tiny.logits(tiny.load(tmp_path / "adalora", biased=True))
    # logits are of order 10; the same sum in another order
    torch.testing.assert_close(tiny.logits(tiny.load(tmp_path / "lora", biased=True)), expected, atol=1e-5, rtol=0)


def test_masks_prune_rows_that_the_file_still_has(tmp_path: Path) -> None:
    for name, masks in (("full", None), ("pruned", MASKS)):
        tiny.save_adalora(tmp_path / name, masks=masks)
    (tmp_path / "full" / "adapter_config.json").write_bytes((tmp_path / "pruned" / "adapter_config.json").read_bytes())
    for name in ("full", "pruned"):
        convert_checkpoint(tmp_path / name, tmp_path / f"{name}-lora")
    full, pruned = (load_file(tmp_path / f"{name}-lora" / "adapter_model.safetensors") for name in ("full", "pruned"))
    assert full.keys() == pruned.keys()
    assert all(torch.equal(full[name], pruned[name]) for name in full)


def test_peft_finds_every_tensor_and_module_of_the_result(tmp_path: Path) -> None:
    tiny.save_adalora(tmp_path / "adalora", masks=MASKS)
    conversion = convert_checkpoint(tmp_path / "adalora", tmp_path / "lora")
    assert conversion.ranks == {name: (rank, rank) for name, rank in RANKS.items()}
    loaded = tiny.load(tmp_path / "lora")
    result = loaded.load_adapter(tmp_path / "lora", adapter_name="again")
    assert not result.unexpected_keys
    assert not [key for key in result.missing_keys if "lora_" in key]
    layers = {name: module for name, module in loaded.get_base_model().named_modules() if hasattr(module, "lora_A")}
    assert {name: module.r["default"] for name, module in layers.items()} == {k: v for k, v in RANKS.items() if v}
    assert {module.scaling["default"] for module in layers.values()} == {1.0}


Q, V = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.v_proj"


def adapter(**config: object) -> RawAdapter:
    generator = torch.Generator().manual_seed(0)
    tensors: dict[str, Tensor] = {}
    for module in (Q, V):
        for role, shape in (("A", (3, 6)), ("B", (4, 3)), ("E", (3, 1))):
            tensors[f"base_model.model.{module}.lora_{role}"] = torch.randn(shape, generator=generator)
    required = {
        "peft_type": "ADALORA",
        "init_r": 3,
        "lora_alpha": 2,
        "target_modules": ["q_proj", "v_proj"],
        "total_step": 10,
    }
    return RawAdapter(config=required | config, tensors=tensors)


def changed(before: RawAdapter, change: Callable[[dict[str, Tensor]], object]) -> RawAdapter:
    tensors = dict(before.tensors)
    change(tensors)
    return RawAdapter(config=before.config, tensors=tensors)


def emptied(module: str, **config: object) -> RawAdapter:
    """The adapter with one module that has lost all its ranks."""
    return changed(adapter(**config), lambda t: t.update({f"base_model.model.{module}.lora_E": torch.zeros(3, 1)}))


def test_the_config_names_ranks_once_and_keeps_everything_else() -> None:
    schedule = {"target_r": 2, "tinit": 1, "tfinal": 1, "deltaT": 1, "beta1": 0.8, "beta2": 0.8, "total_step": 9}
    carried = {"peft_version": "0.1", "lora_dropout": 0.5, "modules_to_save": ["lm_head"], "loftq_config": {}}
    masks = {f"{Q}.lora_E": [True, False, True], f"{V}.lora_E": [True] * 3}
    before = adapter(**schedule, **carried, orth_reg_weight=0.5, r=64, init_lora_weights="gaussian", rank_pattern=masks)
    converted = adalora_to_lora(before).config
    patterns = {"rank_pattern": {V: 3}, "alpha_pattern": {V: 3}}
    assert converted == {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 2,
        "use_rslora": False,
        "init_lora_weights": True,
        "target_modules": ["q_proj", "v_proj"],
        **patterns,
        **carried,
    }


def test_both_factors_take_the_root_so_that_neither_is_badly_scaled() -> None:
    tiny_singular_values = changed(
        adapter(), lambda t: t.update({n: t[n] * 1e-12 for n in list(t) if n.endswith("lora_E")})
    )
    converted = adalora_to_lora(tiny_singular_values).tensors
    for module in (Q, V):
        a, b = (converted[f"base_model.model.{module}.lora_{role}.weight"] for role in "AB")
        assert 1e-8 < a.abs().max() < 1e-4
        assert 1e-8 < b.abs().max() < 1e-4


def test_a_module_without_rank_is_excluded_beside_those_that_were() -> None:
    converted = adalora_to_lora(emptied(Q, exclude_modules=["o_proj"]))
    assert converted.config["exclude_modules"] == ["o_proj", Q]
    assert not [name for name in converted.tensors if Q in name]


def test_a_module_without_rank_stays_where_a_regular_expression_excludes() -> None:
    converted = adalora_to_lora(emptied(Q, exclude_modules=".*o_proj"))
    assert converted.config["exclude_modules"] == ".*o_proj"
    a, b = (converted.tensors[f"base_model.model.{Q}.lora_{role}.weight"] for role in "AB")
    assert (a.shape, b.shape) == ((1, 6), (4, 1))
    assert not a.any()
    assert not b.any()


def test_a_module_without_rank_stays_where_it_has_a_trained_bias() -> None:
    bias = {f"base_model.model.{Q}.base_layer.bias": torch.ones(4)}
    converted = adalora_to_lora(changed(emptied(Q, bias="lora_only"), lambda t: t.update(bias)))
    assert "exclude_modules" not in converted.config
    assert f"base_model.model.{Q}.lora_A.weight" in converted.tensors
    assert torch.equal(converted.tensors[f"base_model.model.{Q}.base_layer.bias"], torch.ones(4))


def test_a_truncated_adapter_is_still_recognized_as_truncated(tmp_path: Path) -> None:
    tiny.save_adalora(tmp_path / "adalora", masks=None)
    path = tmp_path / "adalora" / "adapter_model.safetensors"
    tensors = {name: tensor for name, tensor in load_file(path).items() if "layers.1" not in name}
    save_file(tensors, path, {"format": "pt"})
    convert_checkpoint(tmp_path / "adalora", tmp_path / "lora")
    with pytest.raises(AdapterIncompatibleError, match=r"layers.1.self_attn.q_proj is targeted .* but has no tensors"):
        read_checkpoint(tmp_path / "lora", base_of(tiny.new_llama()))


QA, QB, QE = (f"base_model.model.{Q}.lora_{role}" for role in "ABE")
REFUSALS: dict[str, tuple[RawAdapter, str]] = {
    "nothing left": (
        changed(emptied(Q), lambda t: t.update({f"base_model.model.{V}.lora_E": torch.zeros(3, 1)})),
        "no module has any rank left",
    ),
    "no E": (changed(adapter(), lambda t: t.pop(QE)), "expected lora_A, lora_B, lora_E, found lora_A, lora_B$"),
    "rank": (adapter(init_r=4), f"{Q}: lora_A has rank 3; the config says 4"),
    "rank after pruning": (
        changed(
            adapter(rank_pattern={f"{Q}.lora_E": [True, False, False]}),
            lambda t: t.update({QA: torch.ones(2, 6), QB: torch.ones(4, 2), QE: torch.ones(2, 1)}),
        ),
        "lora_A has rank 2; the config says 1 or 3",
    ),
    "shapes": (changed(adapter(), lambda t: t.update({QE: torch.ones(2, 1)})), "the shapes do not fit together"),
    "a mask too many": (
        adapter(rank_pattern={"model.layers.9.o_proj.lora_E": [True] * 3}),
        "rank_pattern names 'model.layers.9.o_proj', which has no tensors",
    ),
    "a mask too long": (adapter(rank_pattern={f"{Q}.lora_E": [True] * 4}), "rank_pattern=.*lists of 3 booleans"),
    "no scale": (adapter(lora_alpha=0), "lora_alpha=0: AdaLoRA needs a positive value"),
    "LoRA's scaling": (adapter(use_rslora=True), "use_rslora=true: what it means would not survive"),
    "LoRA's patterns": (adapter(alpha_pattern={"q_proj": 3}), "alpha_pattern=.*would not survive"),
    "DoRA": (adapter(use_dora=True), "use_dora=true: what it means would not survive"),
    "an unknown key": (adapter(shiny="x"), "shiny=.*would not survive"),
    "nan": (changed(adapter(), lambda t: t[QA].fill_(float("nan"))), "lora_A.weight' holds NaN or infinity"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_does_not_fit_together_is_refused_by_name(name: str) -> None:
    broken, reason = REFUSALS[name]
    with pytest.raises(AdapterConversionError, match=reason):
        adalora_to_lora(broken)


def test_names_that_patterns_would_confuse_are_refused() -> None:
    def add_module_that_ends_alike(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if V in name]:
            tensors[name.replace(V, f"x.{Q}")] = tensors[name]
        tensors[QE] = torch.tensor([[1.0], [0.0], [1.0]])

    with pytest.raises(AdapterConversionError, match=f"x.{Q}: lora_A has rank 3; the config says 2"):
        adalora_to_lora(changed(adapter(), add_module_that_ends_alike))

"""PiSSA and its kin as plain LoRA: PEFT on the base it changed, against PEFT and the normal form on the plain base."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import convertible_adapters as tiny
import pytest
import torch
from lorasrv_adapters.checkpoint import read_checkpoint
from lorasrv_adapters.convert import convert_checkpoint
from lorasrv_adapters.errors import AdapterConversionError
from lorasrv_adapters.initial_weights import changes_base, subtract_initial
from lorasrv_adapters.raw import RawAdapter
from plain_base import base_of
from safetensors.torch import load_file
from torch import Tensor

TARGETS = ["q_proj", "v_proj", "down_proj"]
PATTERNS = {
    "rank_pattern": {"layers.1.self_attn.q_proj": 3, "down_proj": 6, r".*\.v_proj": 2},
    "alpha_pattern": {"^model.layers.0.self_attn.q_proj": 2, "q_proj": 9},
}
OPTIONS: dict[str, dict[str, object]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": PATTERNS,
    "rslora-patterns": {**PATTERNS, "use_rslora": True},
    "dora": {"use_dora": True},
    "dora-rslora-patterns": {**PATTERNS, "use_dora": True, "use_rslora": True},
    "head": {"target_modules": [*TARGETS, "lm_head"]},
    "embedding": {"target_modules": [*TARGETS, "embed_tokens"]},
}
CASES = [("pissa", options) for options in OPTIONS if options != "head"] + [
    (init, options)
    for init in ("pissa_niter_4", "olora", "corda", "lora_ga")
    for options in ("plain", "dora-rslora-patterns")
]


def save(folder: Path, init: str, options: str, base: torch.nn.Module | None = None) -> tiny.PeftModel:
    chosen = {"r": 4, "lora_alpha": 10, "target_modules": TARGETS, "init_lora_weights": init} | OPTIONS[options]
    return tiny.save_before_and_after(folder, base or tiny.new_llama(), **chosen)


@pytest.mark.parametrize(("init", "options"), CASES, ids=["-".join(case) for case in CASES])
def test_peft_answers_as_on_the_base_it_changed(tmp_path: Path, init: str, options: str) -> None:
    expected = tiny.logits(save(tmp_path, init, options))
    convert_checkpoint(tmp_path / "trained", tmp_path / "lora", initial=tmp_path / "initial")
    # logits are of order 10; the same sum in another order
    torch.testing.assert_close(tiny.logits(tiny.load(tmp_path / "lora")), expected, atol=1e-5, rtol=0)
    set_init(tmp_path / "trained", True)
    assert (tiny.logits(tiny.load(tmp_path / "trained")) - expected).abs().max() > 0.1


BESIDE: dict[str, dict[str, object]] = {
    "all biases": {"bias": "all"},
    "biases of the targets": {"bias": "lora_only"},
    "saved modules": {"modules_to_save": ["lm_head", "embed_tokens"]},
    "rows of the embedding": {"trainable_token_indices": [3, 7]},
}


@pytest.mark.parametrize("name", BESIDE)
def test_what_was_trained_beside_the_factors_survives(name: str, tmp_path: Path) -> None:
    chosen = {"r": 4, "target_modules": TARGETS, "init_lora_weights": "pissa"} | BESIDE[name]
    expected = tiny.logits(tiny.save_before_and_after(tmp_path, tiny.new_llama(biased=True), **chosen))
    convert_checkpoint(tmp_path / "trained", tmp_path / "lora", initial=tmp_path / "initial")
    # logits are of order 10; the same sum in another order
    torch.testing.assert_close(tiny.logits(tiny.load(tmp_path / "lora", biased=True)), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("options", ["plain", "dora-rslora-patterns"])
def test_it_is_served_as_the_weights_that_were_trained(tmp_path: Path, options: str) -> None:
    trained = save(tmp_path, "pissa", options)
    conversion = convert_checkpoint(tmp_path / "trained", tmp_path / "lora", initial=tmp_path / "initial")
    base = base_of(tiny.new_llama())
    served = read_checkpoint(tmp_path / "lora", base)
    merged = trained.merge_and_unload()
    assert len(served.modules) == 6
    for name, module in served.modules.items():
        weight = base.weights[name] if module.d is None else module.d[:, None] * base.weights[name]
        # weights are of order 1
        torch.testing.assert_close(weight + module.b @ module.a, merged.get_submodule(name).weight, atol=1e-5, rtol=0)
        assert conversion.ranks[name] == (module.rank // 2, module.rank)


@pytest.mark.parametrize("marked", ["pissa", True])
def test_initial_weights_may_be_saved_under_either_init(tmp_path: Path, marked: object) -> None:
    save(tmp_path, "pissa", "plain")
    set_init(tmp_path / "initial", marked)
    convert_checkpoint(tmp_path / "trained", tmp_path / "lora", initial=tmp_path / "initial")
    assert read_config(tmp_path / "lora")["init_lora_weights"] is True


def test_an_adapter_saved_under_init_true_is_converted_when_initial_weights_are_given(tmp_path: Path) -> None:
    expected = tiny.logits(save(tmp_path, "pissa", "plain"))
    set_init(tmp_path / "trained", True)
    convert_checkpoint(tmp_path / "trained", tmp_path / "lora", initial=tmp_path / "initial")
    torch.testing.assert_close(tiny.logits(tiny.load(tmp_path / "lora")), expected, atol=1e-5, rtol=0)


def test_a_head_is_refused_because_a_tied_base_had_its_embedding_changed(tmp_path: Path) -> None:
    tied = tiny.new_llama(tied=True)
    before = tied.get_input_embeddings().weight.detach().clone()
    save(tmp_path, "pissa", "head", base=tied)
    assert (tied.get_input_embeddings().weight - before).abs().max() > 0.1
    with pytest.raises(
        AdapterConversionError, match=r"lm_head lies outside the layers.*ties it to its token embedding"
    ):
        convert_checkpoint(tmp_path / "trained", tmp_path / "lora", initial=tmp_path / "initial")


def test_the_unchanged_weight_that_peft_saves_with_an_embedding_stays(tmp_path: Path) -> None:
    save(tmp_path, "pissa", "embedding")
    convert_checkpoint(tmp_path / "trained", tmp_path / "lora", initial=tmp_path / "initial")
    copy = "base_model.model.model.embed_tokens.base_layer.weight"
    before, after = (load_file(tmp_path / name / "adapter_model.safetensors")[copy] for name in ("trained", "lora"))
    assert torch.equal(before, after)


def read_config(folder: Path) -> dict[str, object]:
    config: dict[str, object] = json.loads((folder / "adapter_config.json").read_text())
    return config


def set_init(folder: Path, init: object) -> None:
    (folder / "adapter_config.json").write_text(json.dumps(read_config(folder) | {"init_lora_weights": init}))


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_16", "olora", "OLoRA", "corda", "lora_ga"])
def test_these_initializations_change_the_base(init: str) -> None:
    assert changes_base(init)


@pytest.mark.parametrize("init", [True, False, None, "gaussian", "eva", "orthogonal", "mica", "loftq"])
def test_these_do_not_by_their_own_weights(init: object) -> None:
    assert not changes_base(init)


MODULE = "model.layers.0.self_attn.q_proj"
A, B = f"base_model.model.{MODULE}.lora_A.weight", f"base_model.model.{MODULE}.lora_B.weight"


def adapter(seed: int = 0, **config: object) -> RawAdapter:
    generator = torch.Generator().manual_seed(seed)
    tensors = {A: torch.randn(2, 6, generator=generator), B: torch.randn(4, 2, generator=generator)}
    required = {
        "peft_type": "LORA",
        "target_modules": ["q_proj"],
        "r": 2,
        "lora_alpha": 3,
        "init_lora_weights": "pissa",
    }
    return RawAdapter(config=required | config, tensors=tensors)


def test_the_config_doubles_ranks_and_keeps_scales_and_everything_else() -> None:
    patterns = {"rank_pattern": {"z": 2, "a.*": 5}, "alpha_pattern": {"y": 7, "b": 1.5}}
    carried = {
        "peft_version": "0.1",
        "lora_dropout": 0.5,
        "bias": "all",
        "exclude_modules": ["o"],
        "corda_config": None,
    }
    before = adapter(**patterns, **carried, lora_ga_config={"direction": "x"})
    converted = subtract_initial(before, adapter(1, **patterns)).config
    assert converted == {
        **before.config,
        "r": 4,
        "lora_alpha": 6,
        "rank_pattern": {"z": 4, "a.*": 10},
        "alpha_pattern": {"y": 14, "b": 3},
        "init_lora_weights": True,
        "lora_ga_config": None,
    }
    assert list(converted["rank_pattern"]) == ["z", "a.*"]  # type: ignore[call-overload]
    assert json.dumps([converted["lora_alpha"], converted["alpha_pattern"]]) == '[6, {"y": 14, "b": 3}]'


def test_the_defaults_of_a_config_without_rank_and_alpha_are_doubled() -> None:
    tensors = {A: torch.ones(8, 6), B: torch.ones(4, 8)}
    config = {"peft_type": "LORA", "target_modules": ["q_proj"], "init_lora_weights": "olora"}
    initial = RawAdapter(config=config, tensors={A: tensors[A], B: 2 * tensors[B]})
    converted = subtract_initial(RawAdapter(config=config, tensors=tensors), initial)
    assert (converted.config["r"], converted.config["lora_alpha"]) == (16, 16)


def test_rank_stabilized_alphas_grow_by_the_root() -> None:
    converted = subtract_initial(adapter(use_rslora=True), adapter(1, use_rslora=True)).config
    assert converted["lora_alpha"] == pytest.approx(3 * math.sqrt(2), rel=1e-15)


def test_other_tensors_are_carried_over_as_they_are() -> None:
    before = adapter(modules_to_save=["lm_head"], bias="all", lora_bias=True)
    others = {
        "base_model.model.lm_head.weight": torch.randn(5, 6),
        f"base_model.model.{MODULE}.base_layer.bias": torch.randn(4),
        f"base_model.model.{MODULE}.lora_B.bias": torch.randn(4),
        f"base_model.model.{MODULE}.lora_magnitude_vector": torch.randn(4),
        "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta": torch.randn(1, 6),
    }
    converted = subtract_initial(RawAdapter(config=before.config, tensors=before.tensors | others), adapter(1))
    assert {name: tensor for name, tensor in converted.tensors.items() if name not in (A, B)} == others


def test_narrow_weights_stay_narrow_and_mixed_ones_lose_nothing() -> None:
    def cast(adapter: RawAdapter, dtype: torch.dtype) -> RawAdapter:
        return RawAdapter(config=adapter.config, tensors={name: t.to(dtype) for name, t in adapter.tensors.items()})

    half, brain = torch.float16, torch.bfloat16
    trained, initial = cast(adapter(), half), cast(adapter(1), brain)
    assert subtract_initial(trained, cast(adapter(1), half)).tensors[A].dtype == half
    mixed = subtract_initial(trained, initial).tensors
    assert mixed[A].dtype == torch.float32
    assert torch.equal(mixed[B][:, :2], trained.tensors[B].float())
    assert torch.equal(mixed[B][:, 2:], -initial.tensors[B].float())


Change = Callable[[dict[str, Tensor]], object]


def changed(adapter: RawAdapter, change: Change) -> RawAdapter:
    tensors = dict(adapter.tensors)
    change(tensors)
    return RawAdapter(config=adapter.config, tensors=tensors)


OTHER = "base_model.model.model.layers.1.self_attn.q_proj"
REFUSALS: dict[str, tuple[RawAdapter, RawAdapter, str]] = {
    "another rank": (adapter(), adapter(1, r=3), "initial adapter: its r is another"),
    "another alpha": (adapter(), adapter(1, lora_alpha=4), "its lora_alpha is another"),
    "another scaling": (adapter(), adapter(1, use_rslora=True), "its use_rslora is another"),
    "another order of patterns": (
        adapter(rank_pattern={"a": 2, "b": 3}),
        adapter(1, rank_pattern={"b": 3, "a": 2}),
        "its rank_pattern is another",
    ),
    "another alpha pattern": (adapter(), adapter(1, alpha_pattern={"a": 1}), "its alpha_pattern is another"),
    "the same weights": (adapter(), adapter(), "its weights are the trained ones"),
    "no initial change": (
        adapter(),
        changed(adapter(1), lambda t: t.update({B: torch.zeros(4, 2)})),
        "B A is zero, so nothing was taken out of the base",
    ),
    "a module less": (
        changed(adapter(), lambda t: t.update({f"{OTHER}.lora_A.weight": t[A], f"{OTHER}.lora_B.weight": t[B]})),
        adapter(1),
        "initial adapter: it has no model.layers.1.self_attn.q_proj",
    ),
    "a module more": (
        adapter(),
        changed(adapter(1), lambda t: t.update({f"{OTHER}.lora_A.weight": t[A], f"{OTHER}.lora_B.weight": t[B]})),
        "it has model.layers.1.self_attn.q_proj, which was not trained",
    ),
    "another shape": (
        adapter(),
        changed(adapter(1), lambda t: t.update({A: torch.ones(2, 5)})),
        r"q_proj.lora_A has shape \[2, 5\], the trained one \[2, 6\]",
    ),
    "rank against config": (adapter(r=3), adapter(1, r=3), "lora_A has rank 2; the config says 3"),
    "shapes against each other": (
        changed(adapter(), lambda t: t.update({B: torch.ones(4, 3)})),
        adapter(1),
        "the shapes do not fit together",
    ),
    "a factor less": (changed(adapter(), lambda t: t.pop(B)), adapter(1), "expected lora_A, lora_B, found lora_A$"),
    "an initial factor less": (adapter(), changed(adapter(1), lambda t: t.pop(A)), "initial adapter: .* found lora_B$"),
    "a factor of AdaLoRA": (
        changed(adapter(), lambda t: t.update({A.replace("A.weight", "E"): torch.ones(2, 1)})),
        adapter(1),
        "found lora_A, lora_B, lora_E",
    ),
    "a factor twice": (
        changed(adapter(), lambda t: t.update({A.replace(".weight", ".default.weight"): t[A]})),
        adapter(1),
        "the module has a second lora_A",
    ),
    "no factor": (changed(adapter(), dict.clear), adapter(1), "there is no tensor of a low-rank module"),
    "no prefix": (
        changed(adapter(), lambda t: t.update({A.removeprefix("base_model.model."): t.pop(A)})),
        adapter(1),
        "does not start with 'base_model.model.'",
    ),
    "nan": (changed(adapter(), lambda t: t[A].fill_(float("nan"))), adapter(1), f"'{A}' holds NaN or infinity"),
    "tied factors": (
        changed(
            adapter(ensure_weight_tying=True),
            lambda t: t.update({f"{OTHER}.lora_embedding_A": t[A], f"{OTHER}.lora_embedding_B": t[B]}),
        ),
        adapter(1),
        "ensure_weight_tying shares the factors",
    ),
    "LoftQ": (adapter(), adapter(1, init_lora_weights="loftq"), "initial adapter: .*LoftQ"),
    "block-diagonal": (adapter(use_bdlora={"nblocks": 2}), adapter(1), "use_bdlora=.*would not survive"),
    "an unknown key": (adapter(shiny=1), adapter(1), "shiny=1: what it means would not survive"),
    "a malformed rank": (adapter(r="two"), adapter(1), "r=.*must be an integer"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_does_not_belong_together_is_refused_by_name(name: str) -> None:
    trained, initial, reason = REFUSALS[name]
    with pytest.raises(AdapterConversionError, match=reason):
        subtract_initial(trained, initial)


def test_everything_wrong_is_in_one_error() -> None:
    with pytest.raises(AdapterConversionError) as caught:
        subtract_initial(
            changed(adapter(shiny=1), lambda t: t.pop(A)), changed(adapter(1, lora_alpha=9), lambda t: t.pop(B))
        )
    assert len(caught.value.reasons) == 4

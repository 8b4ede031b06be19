"""An adapter with one key or one tensor changed answers as PEFT does with it, or is refused by name.

Where PEFT only warns, or says nothing of a tensor that it does not use, the server must refuse.
"""

import copy
import dataclasses
import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft_mutations import (
    CONFIG_VALUES,
    OFF,
    REMOVED,
    TENSOR_CHANGES,
    Specimen,
    Tensors,
    change_tensor,
    read_folder,
    write_folder,
)
from peft_options import MASKS, Option, save_option
from peft_outcome import Bench, Outcome, logits_of, outcome_of_peft, outcome_of_server
from recorded_engine import Served
from tiny_peft import new_base, save_base

# fp32 on both sides; logits of these models reach 30, sums run over 192 products in another order
TOLERANCE = 1e-4
NUM_TOKENS = 1
PROMPT = (7, 66, 12, 200, 65, 40, 3, 150)
"""With the tokens whose rows some of the adapters bring."""

BASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "biased": {"attention_bias": True, "mlp_bias": True},
    "tied": {"tied": True},
}
SIZES = {"hidden_size": 64, "intermediate_size": 96}
Q, V = "layers.1.self_attn.q_proj", "layers.1.self_attn.v_proj"
AB = (f"{Q}.lora_A.weight", f"{V}.lora_B.weight")
EMBEDDING, HEAD = "model.embed_tokens", "lm_head"
TIED: dict[str, Any] = {"ensure_weight_tying": True}
ENDS: dict[str, Any] = {"target_modules": ["q_proj", "embed_tokens", "lm_head"]}
ON_ENDS = (
    f"{HEAD}.base_layer.weight", f"{HEAD}.lora_A.weight", f"{HEAD}.lora_B.weight",
    f"{EMBEDDING}.base_layer.weight", f"{EMBEDDING}.lora_embedding_A", f"{EMBEDDING}.lora_embedding_B",
)  # fmt: skip
MAGNITUDES = (f"{HEAD}.lora_magnitude_vector", f"{EMBEDDING}.lora_magnitude_vector")
SAVED = (f"{HEAD}.weight", f"{EMBEDDING}.weight", "model.norm.weight", "layers.1.input_layernorm.weight")
ROWS = (f"{HEAD}.token_adapter.trainable_tokens_delta", f"{EMBEDDING}.token_adapter.trainable_tokens_delta")

ALL = {key: [*values, *OFF, REMOVED] for key, values in CONFIG_VALUES.items()}
LIVE = CONFIG_VALUES
OF_ADALORA = ("init_r", "rank_pattern", "target_r", "tinit", "tfinal", "total_step", "orth_reg_weight")
LAYERS = {key: ALL[key] for key in ("layers_to_transform", "layers_pattern", "target_modules", "exclude_modules")}
PATTERNS = {key: ALL[key] for key in ("rank_pattern", "alpha_pattern", "r", "lora_alpha", "use_rslora")}
INITS = {"init_lora_weights": ALL["init_lora_weights"]}
BESIDE = {
    key: ALL[key]
    for key in ("bias", "modules_to_save", "trainable_token_indices", "ensure_weight_tying", "target_modules")
}


def specimen(
    base: str, kind: str, *tensors: str, config: Mapping[str, list[Any]] | None = None, **option: Any
) -> Specimen:
    return Specimen(base=base, kind=kind, option=option, tensors=tensors, config=config or {})


SPECIMENS: dict[str, Specimen] = {
    "lora": specimen("biased", "lora", *AB, config=ALL),
    "lora-square": specimen("plain", "lora", f"{Q}.lora_A.weight", f"{Q}.lora_B.weight", config=INITS, r=64),
    "lora-odd": specimen("plain", "lora", config=INITS, r=3),
    "lora-layers": specimen("plain", "lora", *AB, config=LAYERS, layers_to_transform=[1], layers_pattern=["layers"]),
    "lora-patterns": specimen(
        "plain", "lora", *AB, config=PATTERNS, rank_pattern={"layers.1.*q_proj": 6}, alpha_pattern={"v_proj": 3}
    ),
    "lora-bias-all": specimen("biased", "lora", f"{Q}.base_layer.bias", "layers.1.mlp.up_proj.bias", bias="all"),
    "lora-bias-only": specimen("biased", "lora", f"{Q}.base_layer.bias", bias="lora_only"),
    "lora-lora-bias": specimen("plain", "lora", f"{Q}.lora_B.bias", config=INITS, lora_bias=True),
    "lora-saved": specimen("plain", "lora", *SAVED, modules_to_save=["lm_head", "embed_tokens", "norm"]),
    "lora-ends": specimen("plain", "lora", config=INITS, **ENDS),
    "lora-tokens": specimen(
        "plain", "lora", *ROWS, trainable_token_indices={"embed_tokens": [7, 66], "lm_head": [12, 40]}
    ),
    "rslora": specimen("plain", "rslora", *AB),
    "dora": specimen("biased", "dora", *AB, f"{Q}.lora_magnitude_vector", config=LIVE),
    "dora-ends": specimen("plain", "dora", *ON_ENDS, *MAGNITUDES, config=INITS, **ENDS),
    "dora-beside": specimen(
        "biased",
        "dora",
        config=BESIDE,
        bias="all",
        modules_to_save=["lm_head", "norm"],
        trainable_token_indices=[7, 66],
    ),
    "adalora": specimen(
        "plain",
        "adalora",
        f"{Q}.lora_A",
        f"{Q}.lora_B",
        f"{Q}.lora_E",
        config=LIVE | {key: ALL[key] for key in OF_ADALORA},
    ),
    "adalora-saved": specimen(
        "biased",
        "adalora",
        *SAVED[:1],
        f"{Q}.base_layer.bias",
        config=PATTERNS,
        modules_to_save=["lm_head"],
        bias="all",
    ),
    "tied-tokens": specimen("tied", "lora", ROWS[1], config=BESIDE, trainable_token_indices=[7, 66], **TIED),
    "tied-saved": specimen("tied", "lora", *SAVED, modules_to_save=["lm_head", "embed_tokens", "norm"], **TIED),
    "tied-ends": specimen("tied", "dora", *ON_ENDS, *MAGNITUDES, target_modules=["q_proj", "embed_tokens"], **TIED),
    "tied-head": specimen("tied", "lora", *ON_ENDS[1:3], *ON_ENDS[4:], target_modules=["q_proj", "lm_head"], **TIED),
    "tied-head-alone": specimen("tied", "lora", *ON_ENDS[:3], config=BESIDE, target_modules=["q_proj", "lm_head"]),
    "tied-embedding-alone": specimen(
        "tied", "lora", *ON_ENDS[3:], config=BESIDE, target_modules=["q_proj", "embed_tokens"]
    ),
}
"""A new kind of tensor needs one that has it."""
MASKED = "adalora"

HARMLESS = (
    # these bases have no other layers
    "fan_in_fan_out is set to True but the target module is `torch.nn.Linear`. Setting fan_in_fan_out to False.",
    # of initialization, when the tensors are there
    "`init_lora_weights` is 'eva' but `eva_config` is not specified",
    "`eva_config` specified but will be ignored",
    # AdaLoRA's rank is init_r
    "Note that `r` is not used in AdaLora and will be ignored.",
)
"""What PEFT warns of and what is without effect, so that the server need not refuse it."""
HARMLESS_OF_ADALORA = ("The following rank_pattern keys did not match",)
"""Said of every mask that AdaLoRA itself wrote."""
HARMLESS_IF_OFF = ("Unexpected keyword arguments", "The configuration file contains a `runtime_config` key.")
"""The same, if the value says that the key is not used."""

STRUCTURAL = {
    "peft_type", "r", "init_r", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern",
    "use_dora", "rank_pattern", "bias", "lora_bias", "modules_to_save", "trainable_token_indices",
    "ensure_weight_tying",
}  # fmt: skip
"""Keys that say which tensors there must be: naming a module that then lacks them, or has too many, will do."""


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Bench]:
    benches: dict[str, Bench] = {}

    def make(name: str) -> Bench:
        if name not in benches:
            folder = save_base(tmp_path_factory.mktemp(name), **BASES[name], **SIZES)
            served, oracle = Served.load(folder, {}, torch.float32), new_base(**BASES[name], **SIZES)
            for module, facts in served.model.base.modules.items():
                if facts.kind == "linear":
                    rows = served.model.base.weight_rows(module, 0, facts.out_features)
                    oracle.get_submodule(module).weight.data = rows
            benches[name] = Bench(served, oracle)
        return benches[name]

    return make


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One for all, written anew by every test: making thousands would take longer than the tests."""
    return tmp_path_factory.mktemp("changed")


@dataclasses.dataclass(frozen=True, slots=True)
class Original:
    """A specimen as PEFT wrote it, and what PEFT says of it unchanged."""

    config: dict[str, Any]
    tensors: Tensors
    peft: Outcome


@pytest.fixture(scope="module")
def original(bench: Callable[[str], Bench], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Original]:
    originals: dict[str, Original] = {}

    def make(name: str) -> Original:
        if name not in originals:
            specimen, folder = SPECIMENS[name], tmp_path_factory.mktemp("specimen")
            oracle = bench(specimen.base).oracle
            option = Option(config=dict(specimen.option), masks=MASKS if name == MASKED else None)
            save_option(copy.deepcopy(oracle), folder, kind=specimen.kind, option=option)
            config, tensors = read_folder(folder)
            originals[name] = Original(config, tensors, outcome_of_peft(oracle, folder))
        return originals[name]

    return make


def split(tensor_name: str) -> tuple[str, str]:
    """Splits a tensor's name into its module and what it is there."""
    name = tensor_name.removeprefix("base_model.model.")
    marks = (".lora_", ".base_layer.", ".token_adapter.", ".weight", ".bias")
    end = min(name.index(mark) for mark in marks if mark in name)
    return name[:end], name[end:]


def check(bench: Bench, original: Original, folder: Path, named: set[str], harmless: tuple[str, ...]) -> None:
    ours = outcome_of_server(bench, folder, PROMPT, num_tokens=NUM_TOKENS)
    if ours.logits is None:
        assert any(re.search(rf"(?<!\w){re.escape(name)}(?!\w)", ours.refusal) for name in named), ours.refusal
        return
    theirs = outcome_of_peft(bench.oracle, folder)
    assert theirs.refusal == ""
    assert {text for text in theirs.complaints - original.peft.complaints if not text.startswith(harmless)} == set()
    assert theirs.model is not None
    expected = logits_of(theirs.model, ours.token_ids, NUM_TOKENS)
    # some changes make large logits, whose rounding errors are as large as they are
    assert (ours.logits - expected).abs().max() <= TOLERANCE * max(1.0, expected.abs().max().item() / 30)


def renames(change: str, tensor: str) -> bool:
    ((new, _),) = TENSOR_CHANGES[change](f"base_model.model.{tensor}", torch.ones(1))
    return new != f"base_model.model.{tensor}"


def tensor_cases() -> Iterator[tuple[str, str, str]]:
    for name, specimen in SPECIMENS.items():
        for tensor in specimen.tensors:
            for change in TENSOR_CHANGES:
                if not change.startswith("renamed") or renames(change, tensor):
                    yield name, tensor, change


def config_cases() -> Iterator[tuple[str, str, Any]]:
    for name, specimen in SPECIMENS.items():
        for key, values in specimen.config.items():
            for value in values:
                yield name, key, value


TENSOR_CASES, CONFIG_CASES = list(tensor_cases()), list(config_cases())


@pytest.mark.parametrize(("name", "tensor", "change"), TENSOR_CASES, ids=["-".join(case) for case in TENSOR_CASES])
def test_a_changed_tensor_is_served_as_peft_serves_it_or_refused_by_name(
    name: str,
    tensor: str,
    change: str,
    bench: Callable[[str], Bench],
    original: Callable[[str], Original],
    folder: Path,
) -> None:
    unchanged = original(name)
    (whole,) = (whole for whole, _ in unchanged.tensors if whole.endswith(tensor))
    tensors = change_tensor(unchanged.tensors, whole, TENSOR_CHANGES[change])
    write_folder(folder, unchanged.config, tensors)
    new_names = {new for new, _ in tensors} - {old for old, _ in unchanged.tensors}
    check(bench(SPECIMENS[name].base), unchanged, folder, {split(whole)[0], *new_names}, ())


@pytest.mark.parametrize(
    ("name", "key", "value"),
    CONFIG_CASES,
    ids=[f"{name}-{key}-{json.dumps(value)[:60]}" for name, key, value in CONFIG_CASES],
)
def test_a_changed_key_is_served_as_peft_serves_it_or_refused_by_name(
    name: str,
    key: str,
    value: Any,
    bench: Callable[[str], Bench],
    original: Callable[[str], Original],
    folder: Path,
) -> None:
    unchanged = original(name)
    config = {other: kept for other, kept in unchanged.config.items() if other != key}
    if value != REMOVED:
        config[key] = value
    write_folder(folder, config, unchanged.tensors)
    tested = bench(SPECIMENS[name].base)
    named = {key, *(["AdaLoRA"] if key == "peft_type" else [])} | (
        set(tested.served.model.base.modules) if key in STRUCTURAL else set()
    )
    harmless = HARMLESS + (HARMLESS_IF_OFF if value in OFF else ())
    harmless += HARMLESS_OF_ADALORA if SPECIMENS[name].kind == "adalora" else ()
    check(tested, unchanged, folder, named, harmless)


@pytest.mark.parametrize("name", SPECIMENS)
def test_unchanged_specimens_are_served_and_changes_can_be_seen(
    name: str, bench: Callable[[str], Bench], original: Callable[[str], Original], folder: Path
) -> None:
    tested, unchanged = bench(SPECIMENS[name].base), original(name)
    write_folder(folder, unchanged.config, unchanged.tensors)
    ours = outcome_of_server(tested, folder, PROMPT, num_tokens=NUM_TOKENS)
    assert ours.refusal == ""
    assert ours.logits is not None
    assert unchanged.peft.model is not None
    expected = logits_of(unchanged.peft.model, ours.token_ids, NUM_TOKENS)
    assert (ours.logits - expected).abs().max() <= TOLERANCE
    assert (expected - logits_of(tested.oracle, ours.token_ids, NUM_TOKENS)).abs().max() > 100 * TOLERANCE


@pytest.mark.parametrize("name", SPECIMENS)
def test_every_tensor_is_like_one_that_is_changed(name: str, original: Callable[[str], Original]) -> None:
    kind = SPECIMENS[name].kind
    changed = [tensor for other in SPECIMENS.values() if other.kind in (kind, "lora") for tensor in other.tensors]
    present = {split(tensor)[1] for tensor, _ in original(name).tensors}
    assert {role for role in present if not any(tensor.endswith(role) for tensor in changed)} == set()


def test_every_key_that_peft_knows_is_changed() -> None:
    fields = {field.name for config in (peft.LoraConfig, peft.AdaLoraConfig) for field in dataclasses.fields(config)}
    assert fields | {"no_such_key"} == set(CONFIG_VALUES)

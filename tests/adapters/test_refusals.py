"""A folder is served completely or refused, with every reason named."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from lorasrv_adapters.checkpoint import read_checkpoint, write_checkpoint
from lorasrv_adapters.config import parse_adapter_config
from lorasrv_adapters.errors import AdapterCorruptError, AdapterIncompatibleError, SourceNotFoundError
from lorasrv_adapters.normalize import adapter_digest, normalize
from torch import Tensor

Tensors = dict[str, Tensor]
Config = dict[str, object]
WriteRaw = Callable[[Path, Mapping[str, object], Mapping[str, Tensor]], Path]

Q, V = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj"
A, B = f"base_model.model.{Q}.lora_A.weight", f"base_model.model.{Q}.lora_B.weight"
MAGNITUDE = f"base_model.model.{Q}.lora_magnitude_vector"


def with_value(tensor: Tensor, value: float) -> Tensor:
    changed = tensor.clone()
    changed.view(-1)[-1] = value
    return changed


CHANGES: dict[str, tuple[Callable[[Tensors], object], str]] = {
    "nan": (lambda t: t.update({A: with_value(t[A], float("nan"))}), "q_proj.lora_A.weight' holds NaN or infinity"),
    "infinity": (lambda t: t.update({B: with_value(t[B], float("inf"))}), "q_proj.lora_B.weight' holds NaN"),
    "missing B": (lambda t: t.pop(B), f"{Q}: lora_B is missing"),
    "missing A": (lambda t: t.pop(A), f"{Q}: lora_A is missing"),
    "missing module": (lambda t: (t.pop(A), t.pop(B)), f"{Q} is targeted by the config, but has no tensors"),
    "wrong in-features": (lambda t: t.update({A: torch.ones(4, 15)}), r"lora_A has shape \[4, 15\].*needs \[4, 16\]"),
    "wrong out-features": (lambda t: t.update({B: torch.ones(23, 4)}), r"lora_B has shape \[23, 4\].*needs \[24, 4\]"),
    "transposed": (lambda t: t.update({A: t[A].T}), "lora_A has rank 16; the config says 4"),
    "one dimension": (lambda t: t.update({A: torch.ones(4)}), r"lora_A has shape \[4\]"),
    "rank against config": (lambda t: t.update({A: torch.ones(3, 16), B: torch.ones(24, 3)}), "has rank 3.* says 4"),
    "ranks against each other": (lambda t: t.update({B: torch.ones(24, 3)}), r"lora_B has shape \[24, 3\]"),
    "unknown tensor": (lambda t: t.update({f"{A}.old": torch.ones(1)}), "lora_A.weight.old' is not used: its name"),
    "no prefix": (lambda t: t.update({f"{Q}.lora_C": torch.ones(1)}), "does not start with 'base_model.model.'"),
    "magnitude without DoRA": (lambda t: t.update({MAGNITUDE: torch.ones(24)}), "belongs to DoRA"),
    "lora_E without AdaLoRA": (
        lambda t: t.update({f"base_model.model.{Q}.lora_E": torch.ones(4, 1)}),
        "belongs to AdaLoRA",
    ),
    "lora bias": (
        lambda t: t.update({f"base_model.model.{Q}.lora_B.bias": torch.ones(24)}),
        "lora_B.bias is there, but the config does not have it",
    ),
    "trained bias": (
        lambda t: t.update({f"base_model.model.{Q}.base_layer.bias": torch.ones(24)}),
        "base_layer.bias is there, but",
    ),
    "embedding": (
        lambda t: t.update({"base_model.model.model.embed_tokens.lora_embedding_A": torch.ones(4, 50)}),
        r"embed_tokens has tensors \(lora_embedding_A\), but the config does not target it",
    ),
    "trained tokens": (
        lambda t: t.update(
            {"base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta": torch.ones(1, 4)}
        ),
        r"embed_tokens has tensors \(trainable_tokens_delta\), but",
    ),
    "saved module": (
        lambda t: t.update({"base_model.model.lm_head.weight": torch.ones(50, 16)}),
        "lm_head: weight is not the weight of this base",
    ),
    "module outside the base": (
        lambda t: t.update({A.replace("layers.0", "layers.9"): t[A], B.replace("layers.0", "layers.9"): t[B]}),
        r"layers\.9.* is no module of the base",
    ),
    "untargeted module": (
        lambda t: t.update({A.replace("layers.0", "layers.1"): t[A], B.replace("layers.0", "layers.1"): t[B]}),
        r"layers.1.self_attn.q_proj has tensors \(lora_A, lora_B\), but the config does not target it",
    ),
    "no module": (lambda t: t.clear(), f"{Q} is targeted by the config, but has no tensors"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_wrong_tensors_are_refused_by_name(
    name: str, tmp_path: Path, base: object, lora_config: Config, lora_tensors: Tensors, write_raw: WriteRaw
) -> None:
    change, reason = CHANGES[name]
    change(lora_tensors)
    with pytest.raises(AdapterIncompatibleError, match=reason):
        read_checkpoint(write_raw(tmp_path / "a", lora_config, lora_tensors), base)


def test_config_and_tensor_reasons_come_in_one_error(
    tmp_path: Path, base: object, lora_config: Config, lora_tensors: Tensors, write_raw: WriteRaw
) -> None:
    lora_tensors[A] = with_value(lora_tensors[A], float("nan"))
    del lora_tensors[B.replace(Q, V)]
    lora_config |= {"target_parameters": ["w"], "use_qalora": True}
    with pytest.raises(AdapterIncompatibleError) as caught:
        read_checkpoint(write_raw(tmp_path / "a", lora_config, lora_tensors), base)
    text = " ".join(caught.value.reasons)
    assert len(caught.value.reasons) == 4
    assert all(word in text for word in ("target_parameters", "use_qalora", "NaN", f"{V}: lora_B is missing"))


def test_many_reasons_are_counted_in_the_message_and_all_kept(base: object, lora_config: Config) -> None:
    config = parse_adapter_config(lora_config)
    with pytest.raises(AdapterIncompatibleError, match="and 82 more") as caught:
        normalize(config, {f"junk.{index}": torch.ones(1) for index in range(100)}, base)
    assert len(caught.value.reasons) == 102


def test_zero_b_is_allowed(base: object, lora_config: Config, lora_tensors: Tensors) -> None:
    zeroed = {name: tensor * ("lora_A" in name) for name, tensor in lora_tensors.items()}
    adapter = normalize(parse_adapter_config(lora_config), zeroed, base)
    assert all(not module.b.any() for module in adapter.modules.values())


def test_targets_that_name_nothing_in_the_base_are_allowed_as_in_peft(
    base: object, lora_config: Config, lora_tensors: Tensors
) -> None:
    config = parse_adapter_config(lora_config | {"target_modules": [Q, V, "c_attn"]})
    assert set(normalize(config, lora_tensors, base).modules) == {Q, V}


def test_a_second_spelling_of_a_magnitude_is_refused(base: object, lora_config: Config, lora_tensors: Tensors) -> None:
    for ending in ("", ".weight"):
        lora_tensors[MAGNITUDE + ending] = torch.ones(24)
    with pytest.raises(AdapterIncompatibleError, match="a second lora_magnitude_vector"):
        normalize(parse_adapter_config(lora_config | {"use_dora": True}), lora_tensors, base)


def test_a_dora_row_of_norm_zero_is_refused(base: object, lora_config: Config, lora_tensors: Tensors) -> None:
    base.weights[Q][3] = 0
    lora_tensors[B][3] = 0
    for name in (Q, V):
        lora_tensors[f"base_model.model.{name}.lora_magnitude_vector"] = torch.ones(base.modules[name].out_features)
    with pytest.raises(AdapterIncompatibleError, match=f"{Q}: a row .* norm zero"):
        normalize(parse_adapter_config(lora_config | {"use_dora": True}), lora_tensors, base)


def test_dora_norms_do_not_depend_on_the_chunks(
    base: object, lora_config: Config, lora_tensors: Tensors, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = parse_adapter_config(lora_config | {"use_dora": True})
    for name in (Q, V):
        lora_tensors[f"base_model.model.{name}.lora_magnitude_vector"] = torch.ones(base.modules[name].out_features)
    whole = normalize(config, lora_tensors, base)
    monkeypatch.setattr("lorasrv_adapters.normalize.NORM_CHUNK_ELEMENTS", 5 * 16)
    base.largest_read = 0
    chunked = normalize(config, lora_tensors, base)
    assert base.largest_read == 5
    torch.testing.assert_close(chunked.modules[Q].d, whole.modules[Q].d, rtol=1e-6, atol=0)


def test_scaled_values_beyond_float32_are_refused(base: object, lora_config: Config, lora_tensors: Tensors) -> None:
    config = parse_adapter_config(lora_config | {"lora_alpha": 1e300})
    with pytest.raises(AdapterIncompatibleError, match="beyond float32"):
        normalize(config, lora_tensors, base)


def test_adalora_masks_and_shapes_are_checked(base: object) -> None:
    config: Config = {"peft_type": "ADALORA", "init_r": 2, "total_step": 10, "target_modules": [Q]}
    tensors = {
        f"base_model.model.{Q}.lora_A": torch.ones(2, 16),
        f"base_model.model.{Q}.lora_B": torch.ones(24, 2),
        f"base_model.model.{Q}.lora_E": torch.ones(2, 1),
    }
    masks = {"rank_pattern": {f"{V}.lora_E": [True, False]}}
    with pytest.raises(AdapterIncompatibleError, match=f"rank_pattern names '{V}'"):
        normalize(parse_adapter_config(config | masks), tensors, base)
    wrong = {f"base_model.model.{Q}.lora_E": torch.ones(2)}
    with pytest.raises(AdapterIncompatibleError, match=r"lora_E has shape \[2\]"):
        normalize(parse_adapter_config(config), tensors | wrong, base)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_truncated_and_missing_files(
    name: str, tmp_path: Path, base: object, lora_config: Config, lora_tensors: Tensors
) -> None:
    write_checkpoint(tmp_path / "a", lora_config, lora_tensors)
    path = tmp_path / "a" / name
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(AdapterCorruptError, match=name):
        read_checkpoint(tmp_path / "a", base)
    path.unlink()
    with pytest.raises(SourceNotFoundError, match=name):
        read_checkpoint(tmp_path / "a", base)


def test_a_link_in_place_of_the_config_is_refused(
    tmp_path: Path, base: object, lora_config: Config, lora_tensors: Tensors
) -> None:
    write_checkpoint(tmp_path / "a", lora_config, lora_tensors)
    config = tmp_path / "a" / "adapter_config.json"
    config.rename(tmp_path / "secret.json")
    config.symlink_to(tmp_path / "secret.json")
    with pytest.raises(AdapterCorruptError, match="symbolic link"):
        read_checkpoint(tmp_path / "a", base)


def test_the_digest_covers_config_names_types_shapes_and_bytes(lora_config: Config, lora_tensors: Tensors) -> None:
    config = parse_adapter_config(lora_config)
    digests = {
        adapter_digest(config, lora_tensors),
        adapter_digest(parse_adapter_config(lora_config | {"lora_alpha": 7}), lora_tensors),
        adapter_digest(config, lora_tensors | {A: with_value(lora_tensors[A], 0.5)}),
        adapter_digest(config, lora_tensors | {A: lora_tensors[A].reshape(8, 8)}),
        adapter_digest(config, lora_tensors | {A: lora_tensors[A].view(torch.int32)}),
        adapter_digest(config, {name.replace("q_proj", "k_proj"): tensor for name, tensor in lora_tensors.items()}),
    }
    assert len(digests) == 6
    backwards = dict(reversed(lora_tensors.items()))
    assert adapter_digest(config, backwards) in digests
    assert all(len(digest) == 64 for digest in digests)


def test_a_folder_is_written_completely_or_not_at_all(
    tmp_path: Path, lora_config: Config, lora_tensors: Tensors, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(AdapterIncompatibleError):
        write_checkpoint(tmp_path / "a", lora_config | {"use_qalora": True}, lora_tensors)
    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", raise_disk_full)
        with pytest.raises(OSError, match="disk full"):
            write_checkpoint(tmp_path / "a", lora_config, lora_tensors)
    assert list(tmp_path.iterdir()) == []
    write_checkpoint(tmp_path / "a", lora_config, lora_tensors)
    assert {path.name for path in (tmp_path / "a").iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    assert json.loads((tmp_path / "a" / "adapter_config.json").read_text()) == lora_config
    with pytest.raises(FileExistsError):
        write_checkpoint(tmp_path / "a", lora_config, lora_tensors)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def raise_disk_full(_: int) -> None:
    raise OSError(28, "disk full")

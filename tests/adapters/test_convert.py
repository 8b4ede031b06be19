"""Folders in, folders out: which conversion is done, what is refused, and that nothing is half-written."""

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from lorasrv_adapters.convert import convert_checkpoint
from lorasrv_adapters.errors import (
    AdapterConversionError,
    AdapterCorruptError,
    AdapterIncompatibleError,
    SourceNotFoundError,
)
from safetensors.torch import load_file, save_file
from torch import Tensor

Tensors = dict[str, Tensor]
Config = dict[str, object]

ADALORA: Config = {"peft_type": "ADALORA", "init_r": 3, "lora_alpha": 2, "target_modules": ["q_proj"], "total_step": 10}
MODULE = "model.layers.0.self_attn.q_proj"


def write(folder: Path, config: Mapping[str, object], tensors: Tensors, *, pickled: bool = False) -> Path:
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(config))
    (folder / "README.md").write_text("about it")
    if pickled:
        torch.save(tensors, folder / "adapter_model.bin")
    else:
        save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def read(folder: Path) -> tuple[Config, Tensors]:
    assert sorted(path.name for path in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    return json.loads((folder / "adapter_config.json").read_text()), load_file(folder / "adapter_model.safetensors")


def adalora_tensors() -> Tensors:
    shapes = {"A": (3, 6), "B": (4, 3), "E": (3, 1)}
    return {f"base_model.model.{MODULE}.lora_{role}": torch.randn(shape) for role, shape in shapes.items()}


def others_of(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.parent.iterdir())


def test_a_pickle_changes_only_its_format(tmp_path: Path, lora_config: Config, lora_tensors: Tensors) -> None:
    config = lora_config | {"peft_version": "0.9", "rank_pattern": {"z": 4, "a": 4}, "lora_dropout": 0.1}
    tensors = {name: tensor.bfloat16() if "lora_A" in name else tensor for name, tensor in lora_tensors.items()}
    conversion = convert_checkpoint(write(tmp_path / "old", config, tensors, pickled=True), tmp_path / "new")
    written_config, written = read(tmp_path / "new")
    assert json.dumps(written_config) == json.dumps(config)
    assert written.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert written[name].dtype == tensor.dtype
        assert torch.equal(written[name], tensor)
    assert (conversion.steps, conversion.kind) == (("pickle -> safetensors",), "lora")
    assert conversion.ranks == {name.split(".lora")[0].removeprefix("base_model.model."): (4, 4) for name in tensors}
    assert conversion.num_bytes == sum(tensor.nbytes for tensor in tensors.values())


def test_one_call_does_everything_that_applies(tmp_path: Path) -> None:
    tensors = adalora_tensors()
    tensors[f"base_model.model.{MODULE}.lora_E"][1] = 0
    for name, pickled in (("pickled", True), ("plain", False)):
        convert_checkpoint(write(tmp_path / name, ADALORA, tensors, pickled=pickled), tmp_path / f"{name}-lora")
    once, twice = (read(tmp_path / f"{name}-lora") for name in ("pickled", "plain"))
    assert once[0] == twice[0]
    assert all(torch.equal(tensor, twice[1][name]) for name, tensor in once[1].items())
    assert once[1][f"base_model.model.{MODULE}.lora_A.weight"].shape == (2, 6)


def test_safetensors_win_over_a_pickle_beside_them(tmp_path: Path) -> None:
    source = write(tmp_path / "old", ADALORA, adalora_tensors())
    (source / "adapter_model.bin").write_bytes(b"never opened")
    assert convert_checkpoint(source, tmp_path / "new").steps == ("AdaLoRA -> LoRA",)


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora", "corda", "lora_ga"])
def test_without_initial_weights_the_error_says_what_to_do(
    tmp_path: Path, lora_config: Config, lora_tensors: Tensors, init: str
) -> None:
    source = write(tmp_path / "old", lora_config | {"init_lora_weights": init}, lora_tensors)
    with pytest.raises(AdapterConversionError, match=rf"init_lora_weights='{init}' changed the base.*--initial.*save_"):
        convert_checkpoint(source, tmp_path / "new")
    assert others_of(source) == ["old"]


def test_initial_weights_may_be_pickled_too(tmp_path: Path, lora_config: Config, lora_tensors: Tensors) -> None:
    config = lora_config | {"init_lora_weights": "pissa"}
    source = write(tmp_path / "old", config, lora_tensors)
    initial = write(tmp_path / "first", config, {n: t + 1 for n, t in lora_tensors.items()}, pickled=True)
    conversion = convert_checkpoint(source, tmp_path / "new", initial=initial)
    assert conversion.steps == ("LoRA initialized with pissa -> LoRA",)
    assert set(conversion.ranks.values()) == {(4, 8)}
    assert read(tmp_path / "new")[0]["r"] == 8


def test_the_record_of_the_base_goes_along_unless_the_base_is_another(
    tmp_path: Path, lora_config: Config, lora_tensors: Tensors
) -> None:
    record = json.dumps({"base_digest": "3" * 64})
    source = write(tmp_path / "adalora", ADALORA, adalora_tensors())
    (source / "provenance.json").write_text(record)
    convert_checkpoint(source, tmp_path / "lora")
    assert json.loads((tmp_path / "lora" / "provenance.json").read_text()) == {"base_digest": "3" * 64}
    source = write(tmp_path / "pissa", lora_config | {"init_lora_weights": "pissa"}, lora_tensors)
    (source / "provenance.json").write_text(record)
    initial = write(tmp_path / "initial", lora_config, {name: tensor + 1 for name, tensor in lora_tensors.items()})
    convert_checkpoint(source, tmp_path / "plain", initial=initial)
    assert not (tmp_path / "plain" / "provenance.json").exists()


@pytest.mark.parametrize("init", [False, None, "gaussian", "eva", "orthogonal", "mica"])
def test_initial_weights_are_refused_where_the_base_was_left_alone(
    tmp_path: Path, lora_config: Config, lora_tensors: Tensors, init: object
) -> None:
    source = write(tmp_path / "old", lora_config | {"init_lora_weights": init}, lora_tensors)
    with pytest.raises(AdapterConversionError, match=r"LORA with init_lora_weights=.* leaves the base alone"):
        convert_checkpoint(source, tmp_path / "new", initial=source)


def test_adalora_has_no_initial_weights(tmp_path: Path) -> None:
    source = write(tmp_path / "old", ADALORA, adalora_tensors())
    with pytest.raises(AdapterConversionError, match=r"ADALORA with .* leaves the base alone"):
        convert_checkpoint(source, tmp_path / "new", initial=source)


def test_loftq_is_refused_with_the_reason(tmp_path: Path, lora_config: Config, lora_tensors: Tensors) -> None:
    source = write(tmp_path / "old", lora_config | {"init_lora_weights": "loftq"}, lora_tensors)
    with pytest.raises(AdapterConversionError, match="a quantized base in the place of the original"):
        convert_checkpoint(source, tmp_path / "new", initial=source)


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"use_dora": True}, {"init_lora_weights": "gaussian"}])
def test_what_is_plain_already_is_left_alone(
    tmp_path: Path, lora_config: Config, lora_tensors: Tensors, options: Config
) -> None:
    source = write(tmp_path / "old", lora_config | options, lora_tensors)
    with pytest.raises(AdapterConversionError, match="there is nothing to convert"):
        convert_checkpoint(source, tmp_path / "new")
    assert others_of(source) == ["old"]


def test_what_the_conversion_and_the_server_refuse_is_in_one_error(tmp_path: Path) -> None:
    config = ADALORA | {"use_bdlora": {"nblocks": 2}, "init_lora_weights": "pissa", "layers_pattern": ["layers"]}
    with pytest.raises(AdapterConversionError) as caught:
        convert_checkpoint(write(tmp_path / "old", config, adalora_tensors()), tmp_path / "new")
    assert [reason.partition(": ")[2].partition("=")[0] for reason in caught.value.reasons] == [
        "use_bdlora",
        "layers_pattern",
    ]


def test_a_result_that_would_not_be_served_is_not_written(
    tmp_path: Path, lora_config: Config, lora_tensors: Tensors
) -> None:
    source = write(tmp_path / "old", lora_config | {"shiny": 1}, lora_tensors, pickled=True)
    with pytest.raises(AdapterIncompatibleError, match="shiny=1: the key is unknown"):
        convert_checkpoint(source, tmp_path / "new")
    assert others_of(source) == ["old"]


def test_a_folder_with_content_is_never_written_to(tmp_path: Path) -> None:
    source = write(tmp_path / "old", ADALORA, adalora_tensors())
    before = {path: path.read_bytes() for path in source.iterdir()}
    with pytest.raises(FileExistsError, match="is not empty"):
        convert_checkpoint(source, source)
    assert {path: path.read_bytes() for path in source.iterdir()} == before


def test_missing_and_damaged_files_are_told_apart(tmp_path: Path, lora_config: Config, lora_tensors: Tensors) -> None:
    source = write(tmp_path / "old", lora_config | {"init_lora_weights": "olora"}, lora_tensors)
    with pytest.raises(SourceNotFoundError, match=r"adapter_config\.json"):
        convert_checkpoint(tmp_path, tmp_path / "new")
    initial = write(tmp_path / "first", lora_config, lora_tensors)
    (initial / "adapter_config.json").write_text("[]")
    with pytest.raises(AdapterConversionError, match=r"initial adapter: adapter_config.json is not a JSON object"):
        convert_checkpoint(source, tmp_path / "new", initial=initial)
    with pytest.raises(AdapterCorruptError, match="is not a JSON object"):
        convert_checkpoint(initial, tmp_path / "new")
    (source / "adapter_model.safetensors").unlink()
    with pytest.raises(SourceNotFoundError, match=r"there is no adapter_model\.safetensors"):
        convert_checkpoint(source, tmp_path / "new")

"""`lorasrv convert` on tiny folders."""

import json

import pytest
import torch
from safetensors.torch import save_file

MODULES = ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj", "model.layers.2.self_attn.q_proj"]
SURVIVORS = {MODULES[0]: [1.0, 0.0, 2.0], MODULES[1]: [0.0, 0.0, 0.0], MODULES[2]: [0.0, -3.0, 0.0]}
ADALORA = {"peft_type": "ADALORA", "init_r": 3, "lora_alpha": 2, "target_modules": ["q_proj"], "total_step": 9}
LORA = {"peft_type": "LORA", "r": 3, "lora_alpha": 2, "target_modules": ["q_proj"]}


@pytest.fixture
def adapter(tmp_path):
    def write(config, *, name="adapter", seed=0, pickled=False):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "adapter_config.json").write_text(json.dumps(config))
        torch.manual_seed(seed)
        ending = "" if config["peft_type"] == "ADALORA" else ".weight"
        tensors = {}
        for module in MODULES:
            tensors[f"base_model.model.{module}.lora_A{ending}"] = torch.randn(3, 6)
            tensors[f"base_model.model.{module}.lora_B{ending}"] = torch.randn(4, 3)
            if not ending:
                tensors[f"base_model.model.{module}.lora_E"] = torch.tensor(SURVIVORS[module])[:, None]
        if pickled:
            torch.save(tensors, folder / "adapter_model.bin")
        else:
            save_file(tensors, folder / "adapter_model.safetensors")
        return folder

    return write


def test_it_says_what_was_done(lorasrv, adapter, tmp_path):
    end = lorasrv("convert", adapter(ADALORA), "--out", tmp_path / "new")
    assert (end.code, end.err) == (0, "")
    assert [line.split(maxsplit=1) for line in end.out.splitlines()] == [
        ["field", "value"],
        ["done", "AdaLoRA -> LoRA"],
        ["kind", "lora"],
        ["modules", "2, and 1 of rank 0 left out"],
        ["ranks", "3 -> 1-2"],
        ["size", "0.0 MiB"],
        ["written", str(tmp_path / "new")],
    ]
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


def test_json_has_every_module(lorasrv, adapter, tmp_path):
    report = lorasrv("convert", adapter(ADALORA), "--out", tmp_path / "new", "--json").json
    assert report == {
        "converted": True,
        "out": str(tmp_path / "new"),
        "steps": ["AdaLoRA -> LoRA"],
        "kind": "lora",
        "num_bytes": 3 * (6 + 4) * 4,
        "modules": [
            {"module": module, "rank_before": 3, "rank_after": rank}
            for module, rank in zip(MODULES, (2, 0, 1), strict=True)
        ],
    }


def test_a_pickle_becomes_what_check_accepts(lorasrv, adapter, tmp_path):
    source = adapter(LORA, pickled=True)
    refusal = lorasrv("check", source)
    assert refusal.code == 3
    assert "lorasrv convert" in refusal.err
    report = lorasrv("convert", source, "--out", tmp_path / "new", "--json").json
    assert report["steps"] == ["pickle -> safetensors"]
    assert "lorasrv convert" not in lorasrv("check", tmp_path / "new").err


def test_initial_weights_double_the_rank(lorasrv, adapter, tmp_path):
    trained = adapter(LORA | {"init_lora_weights": "pissa", "use_rslora": True})
    initial = adapter(LORA | {"use_rslora": True}, name="initial", seed=1)
    end = lorasrv("convert", trained, "--initial", initial, "--out", tmp_path / "new")
    assert end.code == 0
    for line in ("LoRA initialized with pissa -> LoRA", "rslora", "3 -> 6"):
        assert line in end.out


def test_a_refusal_is_status_3_with_every_reason_and_writes_nothing(lorasrv, adapter, tmp_path):
    source = adapter(ADALORA | {"use_bdlora": {"nblocks": 2}, "shiny": 1})
    end = lorasrv("convert", source, "--out", tmp_path / "new")
    assert (end.code, end.out) == (3, "")
    assert "2 things are wrong" in end.err
    refusal = lorasrv("convert", source, "--out", tmp_path / "new", "--json")
    assert (refusal.code, refusal.json["converted"]) == (3, False)
    for reason, key in zip(refusal.json["reasons"], ("use_bdlora", "shiny"), strict=True):
        assert key in reason
        assert reason in end.err
    assert not (tmp_path / "new").exists()


def test_without_initial_weights_the_flag_is_named(lorasrv, adapter, tmp_path):
    end = lorasrv("convert", adapter(LORA | {"init_lora_weights": "olora"}), "--out", tmp_path / "new")
    assert end.code == 3
    assert "--initial" in end.err


def test_a_missing_folder_is_status_4(lorasrv, adapter, tmp_path):
    assert lorasrv("convert", tmp_path / "none", "--out", tmp_path / "new").code == 4
    source = adapter(LORA | {"init_lora_weights": "pissa"})
    assert lorasrv("convert", source, "--initial", tmp_path / "none", "--out", tmp_path / "new").code == 4


def test_a_place_that_is_taken_is_wrong_usage(lorasrv, adapter, tmp_path):
    source = adapter(ADALORA)
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    for out in (source, tmp_path / "file"):
        end = lorasrv("convert", source, "--out", out)
        assert end.code == 2
        assert f"{out} exists and is not an empty folder" in end.err
    assert lorasrv("convert", source, "--out", tmp_path / "empty").code == 0
    assert lorasrv("convert", source).code == 2

"""A whole merge: what the new folder holds and answers, what is refused, and that nothing is left after a refusal."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from lorasrv.embedded import embedded_adapters, embedded_base
from lorasrv.engine.request import Request, SamplingParams
from lorasrv.errors import DiskFullError, MergeError, MergeRefusedError, MergeVerificationError, ModelLoadError
from lorasrv.merge import files
from lorasrv.merge.app import merge
from lorasrv.merge.config import MergeConfig
from lorasrv.merge.fold import Folded
from lorasrv.merge.report import REPORT_NAME
from lorasrv.merge.update import AdapterUpdates, Update
from lorasrv.model.loader import load_model
from lorasrv.model.quantize_folder import quantize_folder
from lorasrv.model.tensors import EMBEDDING, HEAD
from lorasrv.model.tokenizer import Tokenizer
from lorasrv_adapters.errors import AdapterIncompatibleError
from peft_options import KINDS, OPTIONS, Option
from recorded_engine import Served, run_engine
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

# fp32 on both sides, sums in another order; logits of these models reach 30
LOGIT_TOLERANCE = 1e-4
ALL_LINEAR = Option(config={"target_modules": "all-linear"})


def requests(served: Served, adapter_id: str) -> list[Request]:
    sampling = SamplingParams(max_new_tokens=6, temperature=0.0, ignore_eos=True)
    return [
        Request(
            request_id=prompt,
            prompt_token_ids=tuple(served.tokenizer.encode(prompt)),
            sampling=sampling,
            lease=served.lease(adapter_id),
        )
        for prompt in ("The sea", "x", "It was said that the law of the land")
    ]


def answers(served: Served, adapter_id: str = "") -> tuple[dict[str, list[int]], torch.Tensor]:
    """Greedy tokens by prompt, and the logits that chose them."""
    asked = requests(served, adapter_id)
    run = run_engine(served, asked, max_rank=64)
    rows = [run.runner.rows[one.request_id, place] for one in asked for place in range(6)]
    return {one.request_id: run.token_ids(one.request_id) for one in asked}, torch.stack(rows)


def served_as_stored(folder: Path) -> Served:
    return Served(load_model(folder, dtype=torch.float32, quantize=False), Tokenizer(folder))


@pytest.mark.parametrize("kind", KINDS)
def test_merged_logits_are_those_of_the_served_unmerged_model(base, merged, tmp_path, kind):
    llama = base()
    adapter = llama.save_adapter(tmp_path / "adapter", kind=kind, option=ALL_LINEAR)
    outcome = merged(llama.folder, adapter, weights="auto", dtype="float32")
    assert outcome.record["weights"] == "dequantized"
    unmerged, expected = answers(Served.load(llama.folder, {"one": adapter}, torch.float32), "one")
    tokens, logits = answers(served_as_stored(outcome.folder))
    assert tokens == unmerged
    assert (logits - expected).abs().max() <= LOGIT_TOLERANCE


@pytest.mark.parametrize("adapter_id", embedded_adapters())
def test_every_embedded_adapter_answers_merged_as_unmerged(tmp_path, adapter_id):
    adapter = embedded_adapters()[adapter_id]
    outcome = merge(MergeConfig(adapters=((str(adapter), 1.0),), out=tmp_path / "merged", dtype="float32"))
    assert outcome.record["verification"]["agreement"] == 1
    unmerged, expected = answers(Served.load(embedded_base(), {"one": adapter}, torch.float32), "one")
    tokens, logits = answers(served_as_stored(outcome.folder))
    assert tokens == unmerged
    assert (logits - expected).abs().max() <= LOGIT_TOLERANCE


def test_several_shards_are_one_model(base, merged, tmp_path):
    llama = base("qwen2")
    adapter = llama.save_adapter(tmp_path / "adapter", kind="dora", option=ALL_LINEAR)
    whole = merged(llama.folder, adapter, out=tmp_path / "whole").folder
    outcome = merged(llama.folder, adapter, shard_bytes=100_000)
    shards = sorted(outcome.folder.glob("*.safetensors"))
    assert len(shards) > 3
    assert all(path.stat().st_size < 110_000 for path in shards)
    index = json.loads((outcome.folder / "model.safetensors.index.json").read_text())
    tensors = {name: tensor for path in shards for name, tensor in load_file(path).items()}
    assert index["weight_map"] == {name: path.name for path in shards for name in load_file(path)}
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    expected = load_file(whole / "model.safetensors")
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], tensor) for name, tensor in expected.items())
    again = merged(outcome.folder, adapter, out=tmp_path / "of shards")
    assert again.record["verification"]["holds"]
    AutoModelForCausalLM.from_pretrained(outcome.folder)


@pytest.mark.parametrize(
    ("option", "untied"),
    [
        (ALL_LINEAR, False),
        (Option(config={"target_modules": ["embed_tokens"]}), True),
        (Option(config={"target_modules": ["lm_head"]}), True),
        (Option(config={"modules_to_save": ["lm_head"]}), True),
        (Option(config={"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True}), False),
        (Option(config={"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}), False),
        (Option(config={"trainable_token_indices": [7, 66]}), False),
    ],
    ids=str,
)
def test_embedding_and_head_stay_one_table_unless_they_diverge(base, merged, tmp_path, option, untied):
    llama = base(tied=True)
    adapter = llama.save_adapter(tmp_path / "adapter", kind="lora", option=option)
    outcome = merged(llama.folder, adapter)
    config = json.loads((outcome.folder / "config.json").read_text())
    tensors = load_file(outcome.folder / "model.safetensors")
    assert outcome.record["untied"] == untied
    assert config["tie_word_embeddings"] is not untied
    assert (HEAD in tensors) == untied
    assert not untied or not torch.equal(tensors[HEAD], tensors[EMBEDDING])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("weights", ["dequantized", "original"])
def test_an_adapter_that_does_nothing_changes_nothing(base, merged, tmp_path, kind, weights):
    llama = base()
    adapter = llama.save_adapter(tmp_path / "adapter", kind=kind, option=ALL_LINEAR)
    tensors = load_file(adapter / "adapter_model.safetensors")
    served = load_model(llama.folder, dtype=torch.float32, quantize=weights == "dequantized").base
    for name, tensor in tensors.items():
        if "lora_B" in name:
            tensor.zero_()
        if "magnitude" in name:
            module = name.removeprefix("base_model.model.").removesuffix(".lora_magnitude_vector")
            rows = served.weight_rows(module, 0, len(tensor))
            tensors[name] = torch.linalg.vector_norm(rows, dim=1)
    save_file(tensors, adapter / "adapter_model.safetensors")
    outcome = merged(llama.folder, adapter, weights=weights)
    # DoRA's factor is a quotient of norms, and may be one unit in the last place off 1
    tolerance = 1e-6 if "dora" in kind else 0
    for name, weight in load_file(outcome.folder / "model.safetensors").items():
        module = name.removesuffix(".weight")
        expected = served.weight_rows(module, 0, len(weight))
        assert (weight - expected).abs().max() <= tolerance * expected.abs().max(), name
    assert outcome.record["verification"]["effect"] < 1e-9


def test_a_quantized_base_gives_what_its_16_bit_folder_gives(base, merged, tmp_path):
    llama = base("qwen3", tied=True)
    adapter = llama.save_adapter(tmp_path / "adapter", kind="dora", option=ALL_LINEAR)
    quantize_folder(llama.folder, tmp_path / "nf4")
    one = merged(llama.folder, adapter, weights="dequantized")
    other = merged(tmp_path / "nf4", adapter, weights="dequantized", out=tmp_path / "other")
    expected = load_file(one.folder / "model.safetensors")
    found = load_file(other.folder / "model.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    config = json.loads((other.folder / "config.json").read_text())
    assert "quantization_config" not in config
    assert one.record["base_digest"] == other.record["base_digest"]
    with pytest.raises(ModelLoadError, match="in 4 bits only"):
        merged(tmp_path / "nf4", adapter, out=tmp_path / "original")


def test_nf4_of_dequantized_weights_is_refused_with_its_figures(base, merged, tmp_path):
    llama = base()
    adapter = llama.save_adapter(tmp_path / "adapter", kind="lora", option=ALL_LINEAR)
    _shrink(adapter, 0.01)
    options = {"weights": "dequantized", "quantize": "nf4"}
    with pytest.raises(MergeRefusedError, match=r"--weights original.*unmerged.*--force") as caught:
        merged(llama.folder, adapter, **options)
    assert len(caught.value.figures) == 14
    assert max(kept for _, _, kept, _ in caught.value.figures) < 0.3
    assert min(error for *_, error in caught.value.figures) > 0.8
    assert _left(tmp_path) == ["adapter"]
    forced = merged(llama.folder, adapter, **options, force=True)
    assert not forced.record["verification"]["holds"]
    assert forced.record["verification"]["lost"] > 0.5


def test_nf4_of_original_weights_keeps_the_update(base, merged, tmp_path):
    llama = base()
    adapter = llama.save_adapter(tmp_path / "adapter", kind="dora", option=ALL_LINEAR)
    outcome = merged(llama.folder, adapter, quantize="nf4")
    assert all(one["kept"] == pytest.approx(1, abs=0.1) for one in outcome.record["modules"])
    assert outcome.record["verification"]["lost"] < 0.5
    config = json.loads((outcome.folder / "config.json").read_text())
    assert config["quantization_config"]["bnb_4bit_quant_type"] == "nf4"
    # the same codes as quantizing the merged 32-bit model
    wide = merged(llama.folder, adapter, out=tmp_path / "wide").folder
    quantize_folder(wide, tmp_path / "quantized")
    ours, expected = (load_file(path / "model.safetensors") for path in (outcome.folder, tmp_path / "quantized"))
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_the_result_is_of_the_type_asked_for_and_its_small_updates_are_named(base, merged, tmp_path, dtype):
    llama = base()
    adapter = llama.save_adapter(tmp_path / "adapter", kind="lora", option=ALL_LINEAR)
    _shrink(adapter, 0.004)
    outcome = merged(llama.folder, adapter, dtype=dtype)
    assert all(
        tensor.dtype == getattr(torch, dtype) for tensor in load_file(outcome.folder / "model.safetensors").values()
    )
    assert json.loads((outcome.folder / "config.json").read_text())["dtype"] == dtype
    assert all(one["rounded"] == (dtype == "bfloat16") for one in outcome.record["modules"])


def test_what_a_type_cannot_hold_is_named(base, merged, tmp_path):
    llama = base()
    adapter = llama.save_adapter(tmp_path / "adapter", kind="lora", option=Option(config={"bias": "none"}))
    _shrink(adapter, 1e6)
    with pytest.raises(MergeError) as caught:
        merged(llama.folder, adapter, dtype="float16")
    assert len(caught.value.reasons) == 4
    assert all("beyond the range of float16" in reason for reason in caught.value.reasons)
    assert _left(tmp_path) == ["adapter"]


def test_a_wrong_merge_is_found_and_not_kept(base, merged, tmp_path, monkeypatch):
    llama = base()
    adapter = llama.save_adapter(tmp_path / "adapter", kind="lora", option=ALL_LINEAR)
    right = AdapterUpdates.update

    def wrong(self: AdapterUpdates, name: str, weight: torch.Tensor) -> Update:
        delta = right(self, name, weight).delta
        return Update(delta=delta * 0.999 if name.endswith("layers.1.mlp.down_proj") else delta)

    monkeypatch.setattr(AdapterUpdates, "update", wrong)
    with pytest.raises(MergeVerificationError, match=r"logits differ by up to .* beyond the tolerance"):
        merged(llama.folder, adapter)
    assert _left(tmp_path) == ["adapter"]


def test_the_weights_are_those_that_the_adapter_records_to_be_trained_on(base, merged, tmp_path):
    llama = base()
    adapter = llama.save_adapter(tmp_path / "adapter", kind="dora", option=ALL_LINEAR)
    digests = {
        quantization: load_model(llama.folder, dtype=torch.float32, quantize=quantization == "nf4").base.digest
        for quantization in ("nf4", "none")
    }

    def record(quantization: str, digest: str) -> None:
        provenance = {"base_digest": digest, "base_quantization": quantization}
        (adapter / "provenance.json").write_text(json.dumps(provenance))

    for place, (quantization, weights) in enumerate((("nf4", "dequantized"), ("none", "original"))):
        record(quantization, digests[quantization])
        for asked, expected in (("auto", weights), ("original", "original"), ("dequantized", "dequantized")):
            outcome = merged(llama.folder, adapter, weights=asked, out=tmp_path / f"{asked} {place}")
            assert outcome.record["weights"] == expected
            assert outcome.record["base_digest"] == digests[quantization]
    record("nf4", "0" * 64)
    with pytest.raises(AdapterIncompatibleError, match="trained on a base with digest"):
        merged(llama.folder, adapter, weights="auto")


def test_an_update_that_no_adapter_can_express_is_verified_too(base, tmp_path, monkeypatch):
    llama = base("qwen2", tied=True)
    option = Option(config={"target_modules": ["q_proj", "down_proj", "lm_head"], "bias": "all"})
    folders = [llama.save_adapter(tmp_path / kind, kind=kind, option=option) for kind in ("lora", "dora")]
    adapters = tuple((str(folder), 0.5) for folder in folders)
    config = MergeConfig(base=str(llama.folder), adapters=adapters, combine="ties", out=tmp_path / "merged")
    outcome = merge(config)
    assert outcome.record["verification"]["holds"]
    assert outcome.record["verification"]["effect"] > 0.01
    fold = files.fold

    def wrong(*arguments: object, **options: object) -> Folded:
        folded = fold(*arguments, **options)
        return folded if folded.delta is None else replace(folded, weight=folded.weight - 0.01 * folded.delta)

    monkeypatch.setattr(files, "fold", wrong)
    with pytest.raises(MergeVerificationError):
        merge(replace(config, out=tmp_path / "wrong"))
    assert not (tmp_path / "wrong").exists()


def test_a_small_update_that_is_missing_is_found_in_16_bits_too(base, merged, tmp_path, monkeypatch):
    llama = base()
    adapter = llama.save_adapter(tmp_path / "adapter", kind="lora", option=ALL_LINEAR)
    _shrink(adapter, 0.03)
    monkeypatch.setattr(AdapterUpdates, "update", lambda *_: Update())
    with pytest.raises(MergeVerificationError, match=r"of what the adapter does, beyond the tolerance of 0\.5"):
        merged(llama.folder, adapter, dtype="bfloat16", tolerance=100.0)
    assert _left(tmp_path) == ["adapter"]


def test_own_prompts_are_verified_with_and_have_to_be_some(base, merged, tmp_path):
    llama = base()
    adapter = llama.save_adapter(tmp_path / "adapter", kind="lora", option=ALL_LINEAR)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("abc\n\nxyz 1\n")
    assert merged(llama.folder, adapter, prompts=prompts).record["verification"]["tokens"] == 8
    prompts.write_text("\n")
    with pytest.raises(MergeError, match="holds no prompt"):
        merged(llama.folder, adapter, prompts=prompts, out=tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_everything_beside_the_weights_comes_along(base, merged, tmp_path):
    llama = base()
    for name in ("generation_config.json", "chat_template.jinja", "tokenizer.json", "tokenizer_config.json"):
        if not (llama.folder / name).exists():
            (llama.folder / name).write_text("{}")
    adapter = llama.save_adapter(tmp_path / "adapter", kind="lora", option=OPTIONS["list"])
    outcome = merged(llama.folder, adapter)
    for name in ("generation_config.json", "chat_template.jinja", "tokenizer.json", "tokenizer_config.json"):
        assert (outcome.folder / name).read_bytes() == (llama.folder / name).read_bytes()
    record = json.loads((outcome.folder / "merge.json").read_text())
    assert record["adapters"][0]["kind"] == "lora"
    assert len(record["adapters"][0]["digest"]) == len(record["base_digest"]) == 64
    assert str(tmp_path) not in json.dumps(record)
    page = (outcome.folder / REPORT_NAME).read_text()
    assert "layer 1" in page
    assert "http" not in page


def test_a_folder_in_the_way_is_left_alone(base, merged, tmp_path):
    llama = base()
    adapter = llama.save_adapter(tmp_path / "adapter", kind="lora", option=OPTIONS["list"])
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "file").write_text("mine")
    with pytest.raises(FileExistsError, match="choose another"):
        merged(llama.folder, adapter)
    assert (tmp_path / "merged" / "file").read_text() == "mine"
    with pytest.raises(FileNotFoundError, match="make it first"):
        merged(llama.folder, adapter, out=tmp_path / "nowhere" / "merged")


def test_a_full_disk_leaves_nothing(base, merged, tmp_path, monkeypatch):
    llama = base()
    adapter = llama.save_adapter(tmp_path / "adapter", kind="lora", option=OPTIONS["list"])

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    for place in ("os.posix_fallocate", "os.pwrite", "os.fsync", "shutil.copyfile", "pathlib.Path.write_text"):
        with monkeypatch.context() as patched:
            patched.setattr(place, full)
            with pytest.raises(DiskFullError):
                merged(llama.folder, adapter)
        assert _left(tmp_path) == ["adapter"]
    merged(llama.folder, adapter)


def _shrink(adapter: Path, factor: float) -> None:
    tensors = load_file(adapter / "adapter_model.safetensors")
    changed = {name: tensor * factor if "lora_B" in name else tensor for name, tensor in tensors.items()}
    save_file(changed, adapter / "adapter_model.safetensors", {"format": "pt"})


def _left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())

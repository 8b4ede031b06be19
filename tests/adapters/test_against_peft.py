"""PEFT itself decides what an adapter means: its saved folders, its merged weights, its logits."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from lorasrv_adapters.checkpoint import read_checkpoint, write_checkpoint
from lorasrv_adapters.errors import AdapterIncompatibleError
from lorasrv_adapters.normalize import NormalizedModule
from plain_base import base_of
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*r. is not used in AdaLora.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to True but the target module is:UserWarning"),
    # said of AdaLoRA's own keys, and of modules pruned to rank 0
    pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:.*LoRA tensor.s. have invalid shape.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:Initializing zero-element tensors:UserWarning"),
]

ATTENTION = ["q_proj", "v_proj"]
PATTERNS = {"rank_pattern": {"layers.1.self_attn.q_proj": 3, "down_proj": 6, r".*\.v_proj": 2}}
CASES = {
    "lora": {"r": 4, "lora_alpha": 10, "target_modules": ATTENTION},
    "lora-all-linear": {"r": 3, "lora_alpha": 7, "target_modules": "all-linear"},
    "lora-regex": {"r": 3, "lora_alpha": 7, "target_modules": r".*layers\.[01]\..*(q|gate|down)_proj"},
    "lora-excluded": {"r": 3, "target_modules": "all-linear", "exclude_modules": ["layers.0.mlp.up_proj", "o_proj"]},
    "lora-layers": {"r": 3, "target_modules": ATTENTION, "layers_to_transform": [1]},
    "lora-layers-pattern": {"target_modules": ATTENTION, "layers_to_transform": 0, "layers_pattern": "layers"},
    "lora-dropout-gaussian": {
        "r": 2,
        "lora_dropout": 0.3,
        "init_lora_weights": "gaussian",
        "target_modules": ATTENTION,
    },
    "lora-patterns": {
        "r": 4,
        "lora_alpha": 10,
        "target_modules": [*ATTENTION, "down_proj"],
        **PATTERNS,
        "alpha_pattern": {"^model.layers.0.self_attn.q_proj": 2, "q_proj": 9},
    },
    "rslora": {"r": 4, "lora_alpha": 10, "use_rslora": True, "target_modules": [*ATTENTION, "up_proj"]},
    "rslora-patterns": {"r": 4, "use_rslora": True, "target_modules": [*ATTENTION, "down_proj"], **PATTERNS},
    "dora": {"r": 4, "lora_alpha": 10, "use_dora": True, "target_modules": [*ATTENTION, "down_proj"]},
    "dora-rslora-patterns": {
        "r": 4,
        "use_dora": True,
        "use_rslora": True,
        "target_modules": [*ATTENTION, "down_proj"],
        **PATTERNS,
    },
}
MASKS = {
    "layers.0.self_attn.q_proj": [True, False, True, True, False],
    "layers.0.self_attn.v_proj": [False] * 5,
    "layers.1.self_attn.q_proj": [True] * 5,
    "layers.1.self_attn.v_proj": [False, False, False, True, False],
}


def new_llama() -> nn.Module:
    torch.manual_seed(3)
    config = transformers.LlamaConfig(
        vocab_size=50,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return transformers.LlamaForCausalLM(config).eval()


def randomize(model: nn.Module) -> None:
    torch.manual_seed(5)
    for name, parameter in model.named_parameters():
        if "magnitude" in name:
            parameter.data *= 0.5 + torch.rand_like(parameter)
        elif "lora_" in name:
            parameter.data = torch.randn_like(parameter) * 0.2


def save_lora(folder: Path, options: dict[str, object]) -> None:
    model = peft.get_peft_model(new_llama(), peft.LoraConfig(**options))
    randomize(model)
    model.save_pretrained(folder)


def save_adalora(folder: Path, *, masks: dict[str, list[bool]] | None) -> None:
    config = peft.AdaLoraConfig(init_r=5, target_r=2, lora_alpha=7, total_step=10, target_modules=ATTENTION, r=13)
    model = peft.get_peft_model(new_llama(), config)
    randomize(model)
    if masks is not None:
        model.peft_config["default"].rank_pattern = {f"model.{name}.lora_E": mask for name, mask in masks.items()}
    model.save_pretrained(folder)


@pytest.fixture(params=[*CASES, "dora-inert", "adalora", "adalora-unpruned", "adalora-zeroed"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    folder = tmp_path / "adapter"
    if request.param in CASES:
        save_lora(folder, CASES[request.param])
        return folder
    if request.param == "dora-inert":
        save_lora(folder, CASES["dora"])
        change_config(folder, fan_in_fan_out=True, qalora_group_size=3, megatron_core="nothing", revision="main")
        return folder
    save_adalora(folder, masks=MASKS if request.param == "adalora" else None)
    if request.param == "adalora-zeroed":
        zero_some_singular_values(folder)
    return folder


def change_config(folder: Path, **changes: object) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def zero_some_singular_values(folder: Path) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith("lora_E"):
            tensor[1::2] = 0
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})


def adapted_weight(module: NormalizedModule, weight: Tensor) -> Tensor:
    scaled = weight if module.d is None else module.d[:, None] * weight
    return scaled + module.b @ module.a


class NormalForm(nn.Module):
    """y = d * (W x) + B (A x)."""

    def __init__(self, linear: nn.Linear, module: NormalizedModule) -> None:
        super().__init__()
        self.linear, self.module = linear, module

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        scaled = y if self.module.d is None else self.module.d * y
        return scaled + (x @ self.module.a.T) @ self.module.b.T


def test_weights_equal_a_merged_peft_model(folder: Path) -> None:
    base = base_of(new_llama())
    adapter = read_checkpoint(folder, base)
    merged = peft.PeftModel.from_pretrained(new_llama(), folder).merge_and_unload()
    for name, weight in base.weights.items():
        ours = adapted_weight(adapter.modules[name], weight) if name in adapter.modules else weight
        torch.testing.assert_close(ours, merged.get_submodule(name).weight, atol=1e-6, rtol=0)


def test_logits_equal_an_unmerged_peft_model(folder: Path) -> None:
    tokens = torch.randint(0, 50, (2, 9), generator=torch.Generator().manual_seed(1))
    model = new_llama()
    adapter = read_checkpoint(folder, base_of(model))
    for name, module in adapter.modules.items():
        model.set_submodule(name, NormalForm(model.get_submodule(name), module))
    theirs = peft.PeftModel.from_pretrained(new_llama(), folder).eval()
    with torch.inference_mode():
        plain, expected = new_llama()(tokens).logits, theirs(tokens).logits
        torch.testing.assert_close(model(tokens).logits, expected, atol=1e-5, rtol=0)
    assert (plain - expected).abs().max() > 1e-2


def test_a_written_folder_means_the_same_to_peft(folder: Path, tmp_path: Path) -> None:
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    write_checkpoint(tmp_path / "written", config, tensors)
    tokens = torch.arange(12).reshape(1, 12)
    with torch.inference_mode():
        logits = [
            peft.PeftModel.from_pretrained(new_llama(), path).eval()(tokens).logits
            for path in (folder, tmp_path / "written")
        ]
    assert torch.equal(*logits)
    base = base_of(new_llama())
    assert read_checkpoint(folder, base).digest == read_checkpoint(tmp_path / "written", base).digest


def test_adalora_drops_what_was_pruned(tmp_path: Path) -> None:
    save_adalora(tmp_path / "a", masks=MASKS)
    adapter = read_checkpoint(tmp_path / "a", base_of(new_llama()))
    assert adapter.kind == "adalora"
    assert adapter.ranks == {f"model.{name}": sum(mask) for name, mask in MASKS.items()}
    assert adapter.max_rank == 5


def test_adalora_masks_over_tensors_that_were_not_compacted_are_refused_as_in_peft(tmp_path: Path) -> None:
    save_adalora(tmp_path / "full", masks=None)
    save_adalora(tmp_path / "pruned", masks=MASKS)
    pruned_config = (tmp_path / "pruned" / "adapter_config.json").read_text()
    (tmp_path / "full" / "adapter_config.json").write_text(pruned_config)
    with pytest.raises(AdapterIncompatibleError, match=r"q_proj: lora_A has rank 5; the config says 3"):
        read_checkpoint(tmp_path / "full", base_of(new_llama()))
    with pytest.raises(RuntimeError, match="size mismatch"):
        peft.PeftModel.from_pretrained(new_llama(), tmp_path / "full")


@pytest.fixture(scope="module")
def dora_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("dora") / "adapter"
    save_lora(folder, CASES["dora"])
    return folder


@pytest.mark.parametrize("ending", ["", ".weight", ".default.weight"])
def test_dora_magnitudes_are_known_in_every_spelling(dora_folder: Path, tmp_path: Path, ending: str) -> None:
    tensors = load_file(dora_folder / "adapter_model.safetensors")
    assert any(name.endswith(".lora_magnitude_vector") for name in tensors)
    renamed = {name + ending if "magnitude" in name else name: tensor for name, tensor in tensors.items()}
    config = json.loads((dora_folder / "adapter_config.json").read_text())
    write_checkpoint(tmp_path / "renamed", config, renamed)
    base = base_of(new_llama())
    expected, actual = read_checkpoint(dora_folder, base), read_checkpoint(tmp_path / "renamed", base)
    for name, module in expected.modules.items():
        assert torch.equal(actual.modules[name].d, module.d)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_narrow_files_are_widened_exactly(dora_folder: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(dora_folder / "adapter_model.safetensors").items()}
    config = json.loads((dora_folder / "adapter_config.json").read_text())
    write_checkpoint(tmp_path / "narrow", config, tensors)
    write_checkpoint(tmp_path / "wide", config, {name: tensor.float() for name, tensor in tensors.items()})
    base = base_of(new_llama())
    narrow, wide = (read_checkpoint(tmp_path / name, base) for name in ("narrow", "wide"))
    assert narrow.digest != wide.digest
    for name, module in wide.modules.items():
        assert torch.equal(narrow.modules[name].b, module.b)

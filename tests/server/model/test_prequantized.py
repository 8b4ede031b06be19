"""bitsandbytes checkpoints: read bit for bit, written so that transformers loads them, refused by name."""

import json
import warnings
from pathlib import Path

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from lorasrv.errors import ModelLoadError
from lorasrv.model.loader import load_model
from lorasrv.model.quantized_writer import write_quantized
from lorasrv_kernels.nf4 import NF4Weight, dequantize
from safetensors.torch import load_file, save_file
from transformers import BitsAndBytesConfig, LlamaForCausalLM

CPU = {"dtype": torch.bfloat16, "device": "cpu"}
PARTS = ("packed", "absmax", "nested_absmax", "offset")
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


def load_in_transformers(folder: Path, **options) -> LlamaForCausalLM:
    with warnings.catch_warnings():
        # bitsandbytes and transformers warn about what they deprecate in each other
        warnings.simplefilter("ignore")
        return LlamaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, device_map="cpu", **options)


@pytest.fixture(scope="module")
def written_by_bitsandbytes(tiny, tmp_path_factory) -> Path:
    """The tiny llama3 in NF4, double quantized, as transformers and bitsandbytes save it."""
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model = load_in_transformers(tiny(dtype=torch.bfloat16)[0], quantization_config=settings)
    folder = tmp_path_factory.mktemp("bitsandbytes")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder)
    return folder


@pytest.fixture
def changed(written_by_bitsandbytes, tmp_path):
    """The same folder with tensors changed: one to add, None to leave out; and settings of q_proj changed."""

    def write(changes: dict[str, torch.Tensor | None], **settings) -> Path:
        tensors = load_file(written_by_bitsandbytes / "model.safetensors")
        key = f"{Q_PROJ}.quant_state.bitsandbytes__nf4"
        state = {**json.loads(bytes(tensors[key].tolist())), **settings}
        tensors[key] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
        for name, tensor in changes.items():
            tensors.pop(name, None)
            if tensor is not None:
                tensors[name] = tensor
        save_file(tensors, tmp_path / "model.safetensors")
        (tmp_path / "config.json").write_bytes((written_by_bitsandbytes / "config.json").read_bytes())
        return tmp_path

    return write


def assert_same(first, second) -> None:
    for (name, one), (other_name, other) in zip(first.stored(), second.stored(), strict=True):
        assert name == other_name
        assert isinstance(one, NF4Weight) == isinstance(other, NF4Weight)
        if isinstance(one, NF4Weight):
            assert all(torch.equal(getattr(one, part), getattr(other, part)) for part in PARTS), name
        else:
            assert torch.equal(one, other), name


def test_their_folder_is_bit_for_bit_what_we_quantize(tiny, written_by_bitsandbytes):
    ours = load_model(tiny(dtype=torch.bfloat16)[0], **CPU)
    theirs = load_model(written_by_bitsandbytes, **CPU)
    assert sum(isinstance(weight, NF4Weight) for _, weight in theirs.stored()) == 14
    assert_same(ours, theirs)
    assert ours.base.digest == theirs.base.digest


def test_one_base_has_one_digest(tiny, written_by_bitsandbytes, tmp_path):
    """Served in another dtype that holds its numbers, stored in another one, or quantized before."""
    source, _ = tiny(dtype=torch.bfloat16)
    wide = {name: tensor.float() for name, tensor in load_file(source / "model.safetensors").items()}
    save_file(wide, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((source / "config.json").read_bytes())
    write_quantized(load_model(source, **CPU), source=source, folder=tmp_path / "out")
    folders = (source, tmp_path, tmp_path / "out", written_by_bitsandbytes)
    digests = {
        load_model(folder, dtype=dtype, device="cpu").base.digest
        for folder in folders
        for dtype in (torch.float32, torch.bfloat16)
    }
    assert len(digests) == 1
    wide["model.layers.1.input_layernorm.weight"][5] += 0.01
    save_file(wide, tmp_path / "model.safetensors")
    assert load_model(tmp_path, dtype=torch.float32).base.digest not in digests


def test_their_folder_is_not_copied_but_where_products_are_fused(written_by_bitsandbytes):
    model = load_model(written_by_bitsandbytes, **CPU)
    size = (written_by_bitsandbytes / "model.safetensors").stat().st_size
    weights = dict(model.stored())
    for module, mapped in {"self_attn.o_proj": True, "mlp.down_proj": True, "mlp.up_proj": False}.items():
        weight = weights[f"model.layers.1.{module}.weight"]
        assert isinstance(weight, NF4Weight)
        for part in ("packed", "absmax", "nested_absmax"):
            assert (getattr(weight, part).untyped_storage().nbytes() == size) == mapped, (module, part)
    for name, weight in weights.items():
        if not isinstance(weight, NF4Weight):
            # where PyTorch would put them, so that no sum depends on the file
            assert weight.data_ptr() % 64 == 0, name


@pytest.mark.parametrize("kind", ["llama3", "tied"])
def test_transformers_loads_our_folder(tiny, tmp_path, kind):
    source, _ = tiny(kind, dtype=torch.bfloat16)
    model = load_model(source, **CPU)
    (source / "tokenizer.json").write_text("{}")
    write_quantized(model, source=source, folder=tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    theirs = load_in_transformers(tmp_path / "out")
    for name, weight in model.stored():
        parameter = theirs.get_parameter(name)
        if isinstance(weight, NF4Weight):
            assert torch.equal(parameter.data.flatten(), weight.packed)
            assert torch.equal(parameter.quant_state.absmax, weight.absmax)
            # bitsandbytes 0.50 dequantizes blocks that cross rows wrongly on the CPU
            if weight.in_features % 64 == 0:
                expected = dequantize_4bit(parameter.data, parameter.quant_state)
                assert torch.equal(dequantize(weight, dtype=torch.bfloat16), expected), name
        else:
            assert torch.equal(weight, parameter), name
    assert_same(load_model(tmp_path / "out", **CPU), model)


def state_of(model: LlamaForCausalLM) -> dict[str, torch.Tensor]:
    """Every weight and, for the quantized ones, all that bitsandbytes keeps beside it."""
    tensors = {}
    for name, parameter in model.named_parameters():
        tensors[name] = parameter.data.clone()
        if hasattr(parameter, "quant_state"):
            packed = parameter.quant_state.as_dict(packed=True)
            state = packed.pop("quant_state.bitsandbytes__nf4")
            tensors |= {f"{name}.{part}": tensor.clone() for part, tensor in packed.items()}
            tensors[f"{name}.state"] = json.loads(bytes(state.tolist()))
    return tensors


def test_from_transformers_to_us_and_back_nothing_changes(written_by_bitsandbytes, tmp_path):
    write_quantized(load_model(written_by_bitsandbytes, **CPU), source=written_by_bitsandbytes, folder=tmp_path / "out")
    before, after = (load_in_transformers(folder) for folder in (written_by_bitsandbytes, tmp_path / "out"))
    one, other = state_of(before), state_of(after)
    assert one.keys() == other.keys()
    assert sum(name.endswith(".state") for name in one) == 14
    for name, value in one.items():
        same = torch.equal(value, other[name]) if isinstance(value, torch.Tensor) else value == other[name]
        assert same, name
    tokens = torch.arange(24)[None]
    with torch.inference_mode():
        # when training, because otherwise bitsandbytes repacks weights on some CPUs, and fails where blocks cross rows
        assert torch.equal(before.train()(tokens).logits, after.train()(tokens).logits)


def test_our_folder_is_written_whole_or_not_at_all(tiny, tmp_path):
    source, _ = tiny(dtype=torch.bfloat16)
    model = load_model(source, **CPU)
    with pytest.raises(ModelLoadError):
        write_quantized(model, source=tmp_path / "nowhere", folder=tmp_path / "out")
    assert not list(tmp_path.iterdir())
    (tmp_path / "out").mkdir()
    with pytest.raises(FileExistsError):
        write_quantized(model, source=source, folder=tmp_path / "out")


def test_the_checkpoint_decides_tensor_by_tensor(changed, tiny, driver):
    """One of three fused modules in 16 bit: served apart, and written back as it was."""
    wide = load_file(tiny(dtype=torch.bfloat16)[0] / "model.safetensors")[Q_PROJ]
    parts = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", "quant_state.bitsandbytes__nf4")
    folder = changed({**{f"{Q_PROJ}.{part}": None for part in parts}, Q_PROJ: wide})
    mixed = load_model(folder, dtype=torch.float32, device="cpu")
    weights = dict(mixed.stored())
    assert torch.equal(weights[Q_PROJ], wide.float())
    assert isinstance(weights[Q_PROJ.replace("q_proj", "k_proj")], NF4Weight)
    logits = driver(mixed).run([5, 6, 7])
    dense = load_model(tiny(dtype=torch.bfloat16)[0], dtype=torch.float32, device="cpu", quantize=False)
    for name, weight in weights.items():
        if isinstance(weight, NF4Weight):
            dict(dense.stored())[name].copy_(dequantize(weight))
    assert torch.equal(driver(dense).run([5, 6, 7]), logits)
    write_quantized(mixed, source=folder, folder=folder / "out")
    skipped = json.loads((folder / "out" / "config.json").read_text())["quantization_config"]["llm_int8_skip_modules"]
    assert Q_PROJ.removesuffix(".weight") in skipped
    assert_same(load_model(folder / "out", dtype=torch.float32, device="cpu"), mixed)


def test_packed_bytes_may_be_kept_under_a_float_dtype(changed, written_by_bitsandbytes):
    packed = load_file(written_by_bitsandbytes / "model.safetensors")[Q_PROJ]
    folder = changed({Q_PROJ: packed.flatten().view(torch.bfloat16).view(-1, 1)})
    assert_same(load_model(folder, **CPU), load_model(written_by_bitsandbytes, **CPU))


@pytest.mark.parametrize(
    ("changes", "settings", "reason"),
    [
        ({}, {"blocksize": 128}, "blocksize must be 64, got 128"),
        ({}, {"nested_blocksize": 512}, "nested_blocksize must be 256"),
        ({}, {"quant_type": "fp4"}, "quant_type must be"),
        ({}, {"shape": [64, 32]}, "shape must be"),
        ({}, {"nested_offset": None}, "nested_offset must be a finite number"),
        ({f"{Q_PROJ}.nested_absmax": None, f"{Q_PROJ}.nested_quant_map": None}, {}, "only double quantization"),
        ({f"{Q_PROJ}.absmax": None}, {}, f"{Q_PROJ}.absmax is missing"),
        ({f"{Q_PROJ}.quant_map": torch.zeros(16)}, {}, "quant_map is not the table"),
        ({f"{Q_PROJ}.absmax": torch.zeros(3, dtype=torch.uint8)}, {}, "absmax must be U8 [64]"),
        ({Q_PROJ: torch.zeros(9, 1, dtype=torch.uint8)}, {}, "takes 2048 bytes, got 9"),
        ({f"{Q_PROJ}.quant_state.bitsandbytes__fp4": torch.zeros(1)}, {}, "fp4 is not served"),
        ({f"{Q_PROJ}.quant_state.bitsandbytes__nf4": torch.zeros(4, dtype=torch.uint8)}, {}, "quant_type must be"),
        ({"lm_head.weight.absmax": torch.zeros(4, dtype=torch.uint8)}, {}, "lm_head.weight.absmax is not part"),
    ],
)
def test_other_formats_are_refused_by_name(changed, changes, settings, reason):
    with pytest.raises(ModelLoadError) as caught:
        load_model(changed(changes, **settings), **CPU)
    assert reason in str(caught.value)

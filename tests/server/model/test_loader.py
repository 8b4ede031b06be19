"""What is read from a folder, what is refused, and how much memory it takes."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lorasrv.errors import ModelLoadError
from lorasrv.model.loader import load_model
from lorasrv_kernels.nf4 import NF4Weight, quantize
from safetensors.torch import load_file, save_file

CPU = {"dtype": torch.float32, "device": "cpu"}


@pytest.fixture
def rewrite(tiny, tmp_path):
    """Copies a tiny folder with some tensors changed: a tensor to add, None to leave out."""

    def write(changes: dict[str, torch.Tensor | None], *, kind: str = "llama3") -> Path:
        folder, _ = tiny(kind)
        tensors = load_file(folder / "model.safetensors")
        for name, tensor in changes.items():
            tensors.pop(name, None)
            if tensor is not None:
                tensors[name] = tensor
        save_file(tensors, tmp_path / "model.safetensors")
        (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
        return tmp_path

    return write


def reasons(folder: Path) -> str:
    with pytest.raises(ModelLoadError) as caught:
        load_model(folder, **CPU)
    return "\n".join(caught.value.reasons)


def test_every_wrong_tensor_is_named_at_once(rewrite):
    folder = rewrite(
        {
            "model.norm.weight": None,
            "model.layers.1.mlp.up_proj.weight": torch.zeros(3, 64),
            "model.layers.0.self_attn.q_proj.bias": torch.zeros(64),
            "model.layers.2.input_layernorm.weight": torch.zeros(64),
            "lm_head.weight": torch.zeros(199, 64, dtype=torch.int8),
        }
    )
    lines = reasons(folder).splitlines()
    assert len(lines) == 5
    for name in ("model.norm", "layers.1.mlp.up_proj", "q_proj.bias", "layers.2.input_layernorm", "lm_head"):
        assert any(name in line for line in lines)


def test_what_old_checkpoints_store_besides_is_ignored(rewrite):
    load_model(rewrite({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8)}), **CPU)


def test_a_head_beside_a_tied_embedding_must_equal_it(rewrite, tiny):
    embedding = load_file(tiny("tied")[0] / "model.safetensors")["model.embed_tokens.weight"]
    load_model(rewrite({"lm_head.weight": embedding.clone()}, kind="tied"), **CPU)
    assert "tie_word_embeddings" in reasons(rewrite({"lm_head.weight": embedding + 1}, kind="tied"))


def test_weights_that_are_not_finite_are_named(rewrite):
    weight = torch.ones(160, 64)
    weight[3, 3] = torch.nan
    assert "model.layers.1.mlp.up_proj.weight" in reasons(rewrite({"model.layers.1.mlp.up_proj.weight": weight}))


def test_pickles_are_not_read(tiny, tmp_path):
    (tmp_path / "config.json").write_bytes((tiny()[0] / "config.json").read_bytes())
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    assert "pytorch_model.bin would run code" in reasons(tmp_path)


def test_damaged_files_are_named(rewrite):
    folder = rewrite({})
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:-100])
    assert "model.safetensors cannot be read" in reasons(folder)


def split_into_shards(folder: Path, *, names: tuple[str, str] = ("a.safetensors", "b.safetensors")) -> None:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    ordered = sorted(tensors)
    halves = [ordered[: len(ordered) // 2], ordered[len(ordered) // 2 :]]
    weight_map = {}
    for file_name, half in zip(names, halves, strict=True):
        save_file({name: tensors[name] for name in half}, folder / file_name)
        weight_map |= dict.fromkeys(half, file_name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_shards_equal_one_file(rewrite, tiny):
    folder = rewrite({})
    split_into_shards(folder)
    assert load_model(folder, **CPU).base.digest == load_model(tiny()[0], **CPU).base.digest


def test_missing_and_foreign_shards_are_named(rewrite):
    folder = rewrite({})
    split_into_shards(folder)
    (folder / "b.safetensors").unlink()
    assert "b.safetensors" in reasons(folder)
    index = {"weight_map": {"model.norm.weight": "../elsewhere.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    save_file({"model.norm.weight": torch.ones(64)}, folder.parent / "elsewhere.safetensors")
    assert "../elsewhere.safetensors" in reasons(folder)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_each_linear_is_quantized_on_its_own_from_what_is_stored(tiny, stored):
    folder, _ = tiny("head_dim", dtype=stored)
    tensors = load_file(folder / "model.safetensors")
    model = load_model(folder, dtype=torch.bfloat16, device="cpu")
    for name, weight in model.stored():
        if isinstance(weight, NF4Weight):
            expected = quantize(tensors[name])
            for part in ("packed", "absmax", "nested_absmax", "offset"):
                assert torch.equal(getattr(weight, part), getattr(expected, part))
        else:
            assert torch.equal(weight, tensors[name].bfloat16())
    assert {name for name, _ in model.stored()} == set(tensors)


def test_the_model_outlives_its_files(rewrite, driver):
    folder = rewrite({})
    model = load_model(folder, quantize=False, **CPU)
    before = driver(model).run([1, 2, 3])
    with (folder / "model.safetensors").open("r+b") as file:
        file.write(b"\0" * (folder / "model.safetensors").stat().st_size)
    assert torch.equal(driver(model).run([1, 2, 3]), before)


LARGE = {"vocab_size": 512, "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 8}

MEASURE = """
import json, sys, threading, time
from pathlib import Path
import torch
from lorasrv.model.loader import load_model
from lorasrv_kernels.nf4 import NF4Weight

def anonymous_bytes():
    line = next(line for line in open("/proc/self/status") if line.startswith("RssAnon"))
    return 1024 * int(line.split()[1])

baseline, peak, done = anonymous_bytes(), 0, False
def watch():
    global peak
    while not done:
        peak = max(peak, anonymous_bytes())
        time.sleep(0.0005)

thread = threading.Thread(target=watch)
thread.start()
model = load_model(Path(sys.argv[1]), dtype=torch.bfloat16, device="cpu")
done = True
thread.join()
storages = {}
for name, weight in model.stored():
    if isinstance(weight, NF4Weight):
        for tensor in (weight.packed, weight.absmax, weight.nested_absmax, weight.offset):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
print(json.dumps({"peak": peak - baseline, "model": model.num_bytes, "quantized": sum(storages.values())}))
"""


@pytest.fixture
def large_folder(tmp_path):
    """A random model of 103 million parameters in bfloat16, a file per layer."""
    hidden, inner = LARGE["hidden_size"], LARGE["intermediate_size"]
    torch.manual_seed(0)
    weight_map: dict[str, str] = {}

    def write(file_name: str, shapes: dict[str, tuple[int, ...]]) -> None:
        tensors = {name: torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02) for name, shape in shapes.items()}
        save_file(tensors, tmp_path / file_name)
        weight_map.update(dict.fromkeys(shapes, file_name))

    for layer in range(LARGE["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        square = {f"self_attn.{name}_proj.weight": (hidden, hidden) for name in "qkvo"}
        wide = {f"mlp.{name}_proj.weight": (inner, hidden) for name in ("gate", "up")}
        norms = {f"{name}_layernorm.weight": (hidden,) for name in ("input", "post_attention")}
        shapes = {**square, **wide, "mlp.down_proj.weight": (hidden, inner), **norms}
        write(f"layer-{layer}.safetensors", {prefix + name: shape for name, shape in shapes.items()})
    rest = {"model.embed_tokens.weight": (512, hidden), "lm_head.weight": (512, hidden), "model.norm.weight": (hidden,)}
    write("rest.safetensors", rest)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    config = {"architectures": ["LlamaForCausalLM"], "num_attention_heads": 16, "dtype": "bfloat16", **LARGE}
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads RssAnon from /proc")
def test_loading_stays_in_four_bits(large_folder):
    hidden, inner, layers = LARGE["hidden_size"], LARGE["intermediate_size"], LARGE["num_hidden_layers"]
    sizes = ([hidden * hidden] * 4 + [hidden * inner] * 3) * layers
    assert sum(sizes) >= 100_000_000
    command = [sys.executable, "-c", MEASURE, str(large_folder)]
    environment = {"PYTHONPATH": ":".join(sys.path), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert run.returncode == 0, run.stderr
    measured = json.loads(run.stdout)
    bound = sum(math.ceil(n / 2) + math.ceil(n / 64) + 4 * math.ceil(n / 16384) + 4 for n in sizes)
    assert measured["quantized"] <= bound
    two_layers = 2 * 2 * sum(sizes) // layers
    assert measured["peak"] < measured["model"] + two_layers, measured

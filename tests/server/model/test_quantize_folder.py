"""From 16 bit to a folder in NF4 that is served where it lies in memory: same numbers, no copies, shared pages."""

import json
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from lorasrv.errors import DiskFullError, ModelLoadError
from lorasrv.model import loader, safetensors_writer
from lorasrv.model.loader import load_model
from lorasrv.model.quantize_folder import quantize_folder
from lorasrv_kernels.nf4 import NF4Weight
from safetensors.torch import load_file, save_file
from tiny_peft import FAMILIES, save_base
from transformers import AutoModelForCausalLM

PARTS = ("packed", "absmax", "nested_absmax")


@pytest.fixture
def changed(tiny, tmp_path):
    """The tiny llama3 in bfloat16 with some tensors replaced."""

    def write(changes: dict[str, torch.Tensor]) -> Path:
        folder, _ = tiny(dtype=torch.bfloat16)
        (tmp_path / "source").mkdir()
        save_file(load_file(folder / "model.safetensors") | changes, tmp_path / "source" / "model.safetensors")
        (tmp_path / "source" / "config.json").write_bytes((folder / "config.json").read_bytes())
        return tmp_path / "source"

    return write


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("kind", ["llama3", "tied", "head_dim"])
def test_the_folder_serves_what_its_source_does(tiny, driver, tmp_path, kind, dtype):
    source, _ = tiny(kind, dtype=torch.bfloat16)
    written = quantize_folder(source, tmp_path / "out")
    original, mapped = (load_model(folder, dtype=dtype) for folder in (source, tmp_path / "out"))
    assert mapped.base.digest == original.base.digest
    assert torch.equal(driver(mapped).run(range(40)), driver(original).run(range(40)))
    file = tmp_path / "out" / "model.safetensors"
    assert (written.num_quantized, written.num_bytes) == (14, file.stat().st_size)
    assert written.num_wide == len(list(original.stored())) - 14
    assert written.num_parameters == sum(tensor.numel() for tensor in load_file(source / "model.safetensors").values())
    assert written.source_bytes == 2 * written.num_parameters
    assert written.bits_per_parameter == 8 * file.stat().st_size / written.num_parameters


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_loads_every_family(driver, tmp_path, family):
    source = save_base(tmp_path / "source", family)
    quantize_folder(source, tmp_path / "out")
    original, mapped = (load_model(folder, dtype=torch.float32) for folder in (source, tmp_path / "out"))
    assert mapped.base.digest == original.base.digest
    assert torch.equal(driver(mapped).run(range(20)), driver(original).run(range(20)))
    with warnings.catch_warnings():
        # bitsandbytes and transformers warn about what they deprecate in each other
        warnings.simplefilter("ignore")
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32, device_map="cpu")
    for name, weight in mapped.stored():
        parameter = theirs.get_parameter(name)
        if isinstance(weight, NF4Weight):
            state = parameter.quant_state
            assert torch.equal(parameter.data.flatten(), weight.packed), name
            assert torch.equal(state.absmax, weight.absmax), name
            assert torch.equal(state.state2.absmax, weight.nested_absmax), name
            assert torch.equal(state.offset, weight.offset[0]), name
            assert (state.dtype, state.blocksize, state.state2.blocksize) == (torch.float32, 64, 256)
        else:
            assert torch.equal(parameter, weight), name


def test_nothing_is_quantized_or_copied_when_it_is_loaded(tiny, tmp_path, monkeypatch):
    quantize_folder(tiny(dtype=torch.bfloat16)[0], tmp_path / "out")
    size = (tmp_path / "out" / "model.safetensors").stat().st_size
    monkeypatch.setattr(loader, "quantize", lambda _: pytest.fail("it is quantized already"))
    model = load_model(tmp_path / "out", dtype=torch.bfloat16)
    for name, weight in model.stored():
        tensors = [getattr(weight, part) for part in PARTS] if isinstance(weight, NF4Weight) else [weight]
        assert all(tensor.untyped_storage().nbytes() == size for tensor in tensors), name
        if not isinstance(weight, NF4Weight):
            assert weight.data_ptr() % 64 == 0, name
    # one matrix each for q, k and v together, o, gate and up together, down
    for layer in model._layers:
        assert [len(group._parts) for group in layer.groups()] == [1, 1, 1, 1]


def test_wide_tensors_keep_their_dtype_or_take_the_one_asked_for(changed, tmp_path):
    norm = "model.layers.1.input_layernorm.weight"
    source = changed({norm: torch.full((64,), 1.5)})
    quantize_folder(source, tmp_path / "same")
    quantize_folder(source, tmp_path / "float16", dtype=torch.float16)
    same, float16 = (load_file(tmp_path / name / "model.safetensors") for name in ("same", "float16"))
    assert (same[norm].dtype, same["lm_head.weight"].dtype) == (torch.float32, torch.bfloat16)
    assert {tensor.dtype for tensor in float16.values()} == {torch.float16, torch.float32, torch.uint8}
    assert torch.equal(float16[norm], torch.full((64,), 1.5, dtype=torch.float16))
    for name, dtype in (("same", "bfloat16"), ("float16", "float16")):
        config = json.loads((tmp_path / name / "config.json").read_text())
        assert (config["dtype"], config["quantization_config"]["bnb_4bit_compute_dtype"]) == (dtype, dtype)


def test_numbers_beyond_the_dtype_are_named(changed, tmp_path):
    names = ("model.norm.weight", "model.layers.0.input_layernorm.weight")
    source = changed({name: torch.full((64,), 1e5) for name in names})
    with pytest.raises(ModelLoadError) as caught:
        quantize_folder(source, tmp_path / "out", dtype=torch.float16)
    assert len(caught.value.reasons) == 2
    assert all(name in str(caught.value) for name in names)
    assert not (tmp_path / "out").exists()


def test_a_quantized_folder_is_refused(tiny, tmp_path):
    quantize_folder(tiny(dtype=torch.bfloat16)[0], tmp_path / "out")
    with pytest.raises(ModelLoadError, match="14 of 14 matrices are quantized already"):
        quantize_folder(tmp_path / "out", tmp_path / "again")


def test_what_cannot_be_quantized_leaves_nothing(changed, tmp_path):
    name = "model.layers.1.mlp.down_proj.weight"
    source = changed({name: torch.full((64, 160), torch.inf)})
    with pytest.raises(ModelLoadError, match=name):
        quantize_folder(source, tmp_path / "out")
    (source / "model.safetensors").unlink()
    with pytest.raises(ModelLoadError, match="neither"):
        quantize_folder(source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("call", ["posix_fallocate", "pwrite"])
def test_a_full_disk_leaves_nothing_and_says_what_was_needed(tiny, tmp_path, monkeypatch, call):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors_writer.os, call, fail)
    with pytest.raises(DiskFullError) as caught:
        quantize_folder(tiny(dtype=torch.bfloat16)[0], tmp_path / "out")
    assert not list(tmp_path.iterdir())
    monkeypatch.undo()
    quantize_folder(tiny(dtype=torch.bfloat16)[0], tmp_path / "out")
    assert caught.value.needed_bytes == sum(path.stat().st_size for path in (tmp_path / "out").iterdir())


def test_progress_ends_at_the_number_of_parameters(tiny, tmp_path):
    calls = []
    written = quantize_folder(
        tiny(dtype=torch.bfloat16)[0], tmp_path / "out", progress=lambda done, total: calls.append((done, total))
    )
    assert [total for _, total in calls] == [written.num_parameters] * 21
    assert calls == sorted(calls)
    assert calls[-1][0] == written.num_parameters


READER = """
import sys
import warnings
from pathlib import Path
import torch
from lorasrv.model.loader import load_model

def anonymous_bytes():
    line = next(line for line in open("/proc/self/status") if line.startswith("RssAnon"))
    return 1024 * int(line.split()[1])

before = anonymous_bytes()
model = load_model(Path(sys.argv[1]), dtype=torch.bfloat16)
after = anonymous_bytes()
# reads every page
digest = model.base.digest
print(digest, after - before, flush=True)
sys.stdin.read()
"""
SIZES = {"vocab_size": 512, "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 4}


@pytest.fixture(scope="module")
def few_megabytes(tmp_path_factory) -> Path:
    """A random model of 13 million parameters, quantized."""
    hidden, inner = SIZES["hidden_size"], SIZES["intermediate_size"]
    shapes = {"model.embed_tokens": (512, hidden), "lm_head": (512, hidden), "model.norm": (hidden,)}
    for layer in range(SIZES["num_hidden_layers"]):
        square = {f"self_attn.{name}_proj": (hidden, hidden) for name in "qkvo"}
        wide = {f"mlp.{name}_proj": (inner, hidden) for name in ("gate", "up")} | {"mlp.down_proj": (hidden, inner)}
        norms = {f"{name}_layernorm": (hidden,) for name in ("input", "post_attention")}
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in (square | wide | norms).items()}
    torch.manual_seed(0)
    source = tmp_path_factory.mktemp("source")
    tensors = {f"{name}.weight": torch.empty(shape, dtype=torch.bfloat16).normal_() for name, shape in shapes.items()}
    save_file(tensors, source / "model.safetensors")
    config = {"architectures": ["LlamaForCausalLM"], "num_attention_heads": 8, "dtype": "bfloat16", **SIZES}
    (source / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 64}))
    quantize_folder(source, source / "out")
    return source / "out"


def kilobytes_mapped(pid: int, file: Path) -> dict[str, int]:
    """What /proc says of a process's mappings of a file, summed up."""
    total: dict[str, int] = {}
    inside = False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        key, _, rest = line.partition(":")
        if not key.isidentifier():
            inside = line.endswith(str(file))
        elif inside and rest.endswith("kB"):
            total[key] = total.get(key, 0) + int(rest.split()[0])
    return total


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="reads /proc")
def test_two_processes_share_the_pages(few_megabytes):
    file = few_megabytes / "model.safetensors"
    command = [sys.executable, "-c", READER, str(few_megabytes)]
    environment = {"PYTHONPATH": ":".join(sys.path), "OMP_NUM_THREADS": "1"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "env": environment, "text": True}
    size = file.stat().st_size
    with subprocess.Popen(command, **pipes) as first, subprocess.Popen(command, **pipes) as second:
        reports = [process.stdout.readline().split() for process in (first, second)]
        mapped = [kilobytes_mapped(process.pid, file) for process in (first, second)]
        for process in (first, second):
            process.stdin.close()
    assert reports[0][0] == reports[1][0]
    for report, pages in zip(reports, mapped, strict=True):
        assert pages["Private_Dirty"] == 0
        # the pages of a file system in memory count as dirty; the system may take a few back at any time
        assert 1024 * (pages["Shared_Clean"] + pages["Shared_Dirty"]) > 0.9 * size
        # Python's own objects and the table of positions
        assert int(report[1]) < size // 3, size

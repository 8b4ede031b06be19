"""The memory map: what is a view of it, and for how long."""

import json
import struct
from pathlib import Path

import pytest
import torch
from lorasrv.model.checkpoint import Checkpoint
from safetensors.torch import save_file

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.uint8, torch.int64, torch.bool, torch.float64]


def mappings(file: Path) -> list[str]:
    return [line for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(str(file))]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tensors_are_read_as_they_were_written(tmp_path, dtype):
    tensors = {"a": torch.arange(6).view(2, 3).to(dtype), "empty": torch.zeros(0, 3).to(dtype)}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with Checkpoint(tmp_path) as checkpoint:
        assert checkpoint.shapes == {"a": (2, 3), "empty": (0, 3)}
        for name, tensor in tensors.items():
            assert torch.equal(checkpoint.tensor(name), tensor)
            assert torch.equal(checkpoint.stored_bytes(name), tensor.flatten().view(torch.uint8))


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads /proc")
def test_the_map_is_read_only_and_lives_as_long_as_its_views(tmp_path):
    file = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(5), "b": torch.zeros(5)}, file)
    with Checkpoint(tmp_path) as checkpoint:
        view = checkpoint.tensor("a")
    assert [line.split()[1] for line in mappings(file)] == ["r--s"]
    assert torch.equal(view, torch.ones(5))
    del view, checkpoint
    assert not mappings(file)


def test_a_tensor_at_an_odd_place_is_copied(tmp_path):
    header = {
        "a": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]},
        "b": {"dtype": "F32", "shape": [2], "data_offsets": [3, 11]},
        "c": {"dtype": "F32", "shape": [0], "data_offsets": [11, 11]},
    }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    content = struct.pack("<Q", len(text)) + text + b"\1\2\3" + struct.pack("<2f", 1.5, -2.0)
    (tmp_path / "model.safetensors").write_bytes(content)
    with Checkpoint(tmp_path) as checkpoint:
        assert torch.equal(checkpoint.tensor("b"), torch.tensor([1.5, -2.0]))
        assert checkpoint.tensor("c").shape == (0,)
        assert checkpoint.tensor("a").untyped_storage().nbytes() == len(content)
        assert checkpoint.tensor("b").untyped_storage().nbytes() == 8

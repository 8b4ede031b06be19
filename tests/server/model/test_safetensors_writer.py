"""The layout of a mapped file, and that it is a safetensors file like any other."""

import os
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lorasrv.model.checkpoint import Checkpoint
from lorasrv.model.safetensors_writer import SafetensorsLayout, SafetensorsWriter, StoredTensor
from safetensors.torch import load_file

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.uint8]


@st.composite
def runs(draw):
    count = iter(range(100))

    def run():
        dtype = draw(st.sampled_from(DTYPES))
        shapes = draw(st.lists(st.tuples(st.integers(1, 40), st.integers(1, 4)), min_size=1, max_size=3))
        return [StoredTensor(name=f"{next(count)}.weight", dtype=dtype, shape=shape) for shape in shapes]

    return [run() for _ in range(draw(st.integers(1, 12)))]


@settings(deadline=None, max_examples=60)
@given(runs=runs())
def test_every_tensor_is_aligned_and_no_byte_is_lost(runs):
    layout = SafetensorsLayout(runs)
    spans = sorted((layout.starts[name], layout.starts[name] + t.num_bytes) for name, t in layout.tensors.items())
    assert len(layout.header) % 64 == 0
    assert [start for start, _ in spans] == [len(layout.header), *(stop for _, stop in spans[:-1])]
    assert spans[-1][1] == layout.num_bytes
    for run in runs:
        starts = [layout.starts[tensor.name] for tensor in run]
        assert all(start % tensor.dtype.itemsize == 0 for start, tensor in zip(starts, run, strict=True))
        assert starts[1:] == [start + tensor.num_bytes for start, tensor in zip(starts, run, strict=True)][:-1]
        if sum(tensor.num_bytes for tensor in run) % 64 == 0:
            assert starts[0] % 64 == 0


def stored(name: str, *shape: int, dtype: torch.dtype = torch.bfloat16) -> StoredTensor:
    return StoredTensor(name=name, dtype=dtype, shape=shape)


def test_the_file_is_read_by_the_library_and_by_us(tmp_path):
    tensors = {"odd": torch.randn(3, 7), "wide": torch.randn(600, 1024), "bytes": torch.arange(5, dtype=torch.uint8)}
    expected = {"odd": tensors["odd"], "wide": tensors["wide"].bfloat16(), "bytes": tensors["bytes"]}
    path = tmp_path / "model.safetensors"
    layout = SafetensorsLayout([[stored(name, *each.shape, dtype=each.dtype)] for name, each in expected.items()])
    with SafetensorsWriter(path, layout) as file:
        for name in reversed(tensors):
            file.write(name, tensors[name])
    assert path.stat().st_size == layout.num_bytes
    theirs = load_file(path)
    with Checkpoint(tmp_path) as checkpoint:
        for name, tensor in expected.items():
            assert torch.equal(theirs[name], tensor)
            assert torch.equal(checkpoint.tensor(name), tensor)


def test_each_tensor_is_written_once_and_in_its_shape(tmp_path):
    layout = SafetensorsLayout([[stored("a", 2), stored("b", 3)]])
    file = SafetensorsWriter(tmp_path / "file", layout)
    with pytest.raises(ValueError, match=r"a is \[2\].*got \[1, 2\]"):
        file.write("a", torch.zeros(1, 2))
    file.write("a", torch.zeros(2))
    with pytest.raises(ValueError, match="once"):
        file.write("a", torch.zeros(2))
    with pytest.raises(ValueError, match="never written: b"), file:
        pass
    with pytest.raises(FileExistsError):
        SafetensorsWriter(tmp_path / "file", layout)


def test_what_the_system_writes_in_part_is_written_on(tmp_path, monkeypatch):
    write = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda file, content, start: write(file, content[:5], start))
    layout = SafetensorsLayout([[stored("a", 9)]])
    with SafetensorsWriter(tmp_path / "file", layout) as file:
        file.write("a", torch.arange(9))
    assert torch.equal(load_file(tmp_path / "file")["a"], torch.arange(9).bfloat16())


def test_the_space_is_taken_before_the_first_tensor(tmp_path):
    layout = SafetensorsLayout([[stored("a", 1 << 20)]])
    with pytest.raises(ValueError, match="never written"), SafetensorsWriter(tmp_path / "file", layout):
        assert Path(tmp_path / "file").stat().st_blocks * 512 >= layout.num_bytes

"""What the header check lets through, and how fast it says no."""

import contextlib
import os
import struct
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lorasrv_adapters.errors import AdapterCorruptError, AdapterIncompatibleError, SourceNotFoundError
from lorasrv_adapters.weights import WEIGHTS_NAME, WeightLimits, read_weights
from safetensors.torch import save

Pack = Callable[..., bytes]


def entry(start: int, stop: int, *, dtype: str = "F32", shape: list[int] | None = None) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape or [(stop - start) // 4], "data_offsets": [start, stop]}


def read(tmp_path: Path, content: bytes, limits: WeightLimits | None = None) -> dict[str, torch.Tensor]:
    (tmp_path / WEIGHTS_NAME).write_bytes(content)
    return read_weights(tmp_path, limits or WeightLimits())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_what_the_library_writes_is_read_unchanged(tmp_path: Path, dtype: torch.dtype) -> None:
    written = {
        "matrix": torch.randn(3, 5).to(dtype),
        "vector": torch.randn(7).to(dtype),
        "empty": torch.empty(0, 4, dtype=dtype),
    }
    tensors = read(tmp_path, save(written, {"format": "pt"}))
    assert tensors.keys() == written.keys()
    for name, tensor in written.items():
        assert tensors[name].dtype == dtype
        assert torch.equal(tensors[name], tensor)


def test_tensors_at_odd_offsets_are_read(tmp_path: Path, pack_safetensors: Pack) -> None:
    header = {"half": entry(0, 2, dtype="F16", shape=[1]), "full": entry(2, 10, shape=[2])}
    content = pack_safetensors(header, struct.pack("<e2f", 0.5, 1.25, -3.0))
    tensors = read(tmp_path, content)
    assert tensors["half"].tolist() == [0.5]
    assert tensors["full"].tolist() == [1.25, -3.0]
    assert tensors["full"].data_ptr() % 4 == 0


def test_later_changes_to_the_file_do_not_reach_the_tensors(tmp_path: Path, pack_safetensors: Pack) -> None:
    tensors = read(tmp_path, pack_safetensors({"a": entry(0, 8)}, bytes(8)))
    with (tmp_path / WEIGHTS_NAME).open("r+b") as file:
        file.seek(-8, 2)
        file.write(b"\xff" * 8)
    assert tensors["a"].tolist() == [0, 0]


MALFORMED = {
    "empty file": lambda _: b"",
    "no header": lambda _: b"\x01\x00",
    "header of 2^63 bytes": lambda pack: pack(b"{}", length=1 << 63),
    "truncated header": lambda pack: pack(b"{}", length=200),
    "not json": lambda pack: pack(b"\x80\x81{"),
    "a list": lambda pack: pack([]),
    "a very deep list": lambda pack: pack(b"[" * 50_000),
    "truncated data": lambda pack: pack({"a": entry(0, 8)}, bytes(7)),
    "trailing junk": lambda pack: pack({"a": entry(0, 8)}, bytes(9)),
    "overlapping offsets": lambda pack: pack({"a": entry(0, 8), "b": entry(4, 12)}, bytes(12)),
    "the same bytes twice": lambda pack: pack({"a": entry(0, 8), "b": entry(0, 8)}, bytes(8)),
    "a hole": lambda pack: pack({"a": entry(0, 8), "b": entry(12, 16)}, bytes(16)),
    "duplicate tensors": lambda pack: pack(
        b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
        bytes(8),
    ),
    "duplicate keys in an entry": lambda pack: pack(
        b'{"a":{"dtype":"F32","shape":[2],"shape":[2],"data_offsets":[0,8]}}', bytes(8)
    ),
    "a shape that is not its bytes": lambda pack: pack({"a": entry(0, 8, shape=[3])}, bytes(8)),
    "a huge shape of no bytes": lambda pack: pack({"a": entry(0, 0, shape=[0, 1 << 60])}),
    "a negative size": lambda pack: pack({"a": entry(0, 8, shape=[-1, -2])}, bytes(8)),
    "a boolean size": lambda pack: pack({"a": entry(0, 4, shape=[True])}, bytes(4)),
    "offsets the wrong way round": lambda pack: pack({"a": entry(8, 0, shape=[2])}, bytes(8)),
    "three offsets": lambda pack: pack({"a": entry(0, 8) | {"data_offsets": [0, 8, 8]}}, bytes(8)),
    "an unknown key": lambda pack: pack({"a": entry(0, 8) | {"extra": 1}}, bytes(8)),
    "metadata that is no text": lambda pack: pack({"__metadata__": {"a": 1}}),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_files_are_corrupt(tmp_path: Path, pack_safetensors: Pack, name: str) -> None:
    with pytest.raises(AdapterCorruptError, match=WEIGHTS_NAME):
        read(tmp_path, MALFORMED[name](pack_safetensors))


@pytest.mark.parametrize("dtype", ["F64", "I64", "BOOL", "F8_E4M3", "U8", "C64"])
def test_other_element_types_are_refused_by_name(tmp_path: Path, pack_safetensors: Pack, dtype: str) -> None:
    with pytest.raises(AdapterIncompatibleError, match=dtype):
        read(tmp_path, pack_safetensors({"a": entry(0, 8, dtype=dtype, shape=[1])}, bytes(8)))


def test_three_dimensions_are_refused(tmp_path: Path, pack_safetensors: Pack) -> None:
    with pytest.raises(AdapterIncompatibleError, match="3 dimensions"):
        read(tmp_path, pack_safetensors({"a": entry(0, 8, shape=[1, 2, 1])}, bytes(8)))


def test_a_header_of_100_000_tensors_is_refused_at_once(tmp_path: Path, pack_safetensors: Pack) -> None:
    one = b'"%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    content = pack_safetensors(b"{" + b",".join(one % index for index in range(100_000)) + b"}")
    assert len(content) < WeightLimits().header_bytes
    (tmp_path / WEIGHTS_NAME).write_bytes(content)
    start = time.process_time()
    with pytest.raises(AdapterIncompatibleError, match="20000 tensors"):
        read_weights(tmp_path)
    assert time.process_time() - start < 0.1


def test_tensors_are_counted_even_where_braces_are_few(tmp_path: Path, pack_safetensors: Pack) -> None:
    content = pack_safetensors({"a": entry(0, 4), "b": entry(4, 8)}, bytes(8))
    with pytest.raises(AdapterIncompatibleError, match="2 tensors"):
        read(tmp_path, content, WeightLimits(num_tensors=1))


def test_long_headers_are_refused_before_they_are_read(tmp_path: Path, pack_safetensors: Pack) -> None:
    with pytest.raises(AdapterIncompatibleError, match="the header has 9000000 bytes"):
        read(tmp_path, pack_safetensors(b" " * 9_000_000))


def test_large_files_are_refused_before_they_are_read(tmp_path: Path, pack_safetensors: Pack) -> None:
    with pytest.raises(AdapterIncompatibleError, match="holds 8 bytes; the limit is 4"):
        read(tmp_path, pack_safetensors({"a": entry(0, 8)}, bytes(8)), WeightLimits(total_bytes=4))


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.pt", "adapter_model.pth", "adapter_model.pkl"])
def test_pickles_are_refused_with_a_way_out(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\x80\x04.")
    with pytest.raises(AdapterIncompatibleError, match=f"{name} is a pickle.*lorasrv convert"):
        read_weights(tmp_path)


def test_a_missing_file_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(SourceNotFoundError):
        read_weights(tmp_path)


def test_links_and_pipes_are_not_opened(tmp_path: Path, pack_safetensors: Pack) -> None:
    (tmp_path / "elsewhere").write_bytes(pack_safetensors({"a": entry(0, 8)}, bytes(8)))
    (tmp_path / WEIGHTS_NAME).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(AdapterCorruptError, match="symbolic link"):
        read_weights(tmp_path)
    (tmp_path / WEIGHTS_NAME).unlink()
    os.mkfifo(tmp_path / WEIGHTS_NAME)
    with pytest.raises(AdapterCorruptError, match="not a regular file"):
        read_weights(tmp_path)


@settings(deadline=None)
@given(st.data())
def test_any_changed_byte_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    content = bytearray(save({"a": torch.ones(2, 3), "b": torch.zeros(4)}, {"format": "pt"}))
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(AdapterCorruptError, AdapterIncompatibleError):
        read(tmp_path_factory.mktemp("fuzz"), bytes(content))

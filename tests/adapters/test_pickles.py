"""Pickles are read elsewhere, as tensors or not at all."""

import io
import os
import pickle
import signal
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lorasrv_adapters import pickles
from lorasrv_adapters.errors import (
    AdapterConversionError,
    AdapterCorruptError,
    AdapterIncompatibleError,
    SourceNotFoundError,
)
from lorasrv_adapters.pickles import TimeLimits, find_pickle, read_pickle
from lorasrv_adapters.unpickle import explain, read_tensors
from lorasrv_adapters.weights import WeightLimits
from torch import nn


class Call:
    """Pickles as a call, which an unpickler that runs code would make."""

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.function, self.arguments


def zipped(program: bytes, *, zeros: int = 0) -> bytes:
    """A file as torch writes it, around any pickle, with one compressed storage of so many MiB of zeros."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in {"data.pkl": program, "version": b"3\n", "byteorder": b"little"}.items():
            archive.writestr(f"a/{name}", content)
        with archive.open("a/data/0", "w") as storage:
            for _ in range(zeros):
                storage.write(bytes(1 << 20))
    return file.getvalue()


def saved(content: object, *, zip_format: bool = True) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, _use_new_zipfile_serialization=zip_format)
    return file.getvalue()


def program_of(file: bytes) -> bytes:
    with zipfile.ZipFile(io.BytesIO(file)) as archive:
        return archive.read("archive/data.pkl")


def never_hashed() -> bytes:
    """A dictionary whose one key is a tuple of tuples, 60 levels deep, each twice the one below: 2**60 to hash."""
    levels = b"".join(b"h%ch%c\x86q%c" % (level, level, level + 1) for level in range(60))
    return zipped(b"\x80\x02K\x01\x85q\x00" + levels + b"}h\x3cK\x01s.")


NUMBER = b"J" + (1 << 16).to_bytes(4, "little")
"""How a pickle says 65536, here the number of elements."""


def bomb(mebibytes: int) -> bytes:
    """A tensor of zeros, compressed to a thousandth of its size."""
    program = program_of(saved({"a": torch.zeros(1 << 16)}))
    return zipped(program.replace(NUMBER, b"J" + (mebibytes << 18).to_bytes(4, "little")), zeros=mebibytes)


def claim() -> bytes:
    """A file of the old format that says it holds 4 TiB."""
    file = saved({"a": torch.zeros(1 << 16)}, zip_format=False)
    return file.replace(NUMBER, b"\x8a\x06" + (1 << 40).to_bytes(6, "little"))


@pytest.fixture
def write(tmp_path: Path) -> Callable[[bytes], Path]:
    def write(content: bytes) -> Path:
        (tmp_path / "adapter_model.bin").write_bytes(content)
        return tmp_path / "adapter_model.bin"

    return write


Write = Callable[[bytes], Path]


@pytest.mark.parametrize("zip_format", [True, False], ids=["zip", "legacy"])
def test_tensors_arrive_bit_for_bit(write: Write, zip_format: bool) -> None:
    matrix = torch.randn(6, 4)
    tensors = OrderedDict(
        wide=matrix,
        view=matrix[1:5:2, 1:],
        transposed=matrix.T,
        half=torch.randn(3).half(),
        brain=torch.randn(2, 2).bfloat16(),
        parameter=nn.Parameter(torch.randn(3)),
        nan=torch.tensor([float("nan"), float("-inf"), -0.0]),
        empty=torch.zeros(0, 3),
    )
    read = read_pickle(write(saved(tensors, zip_format=zip_format)))
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert (read[name].dtype, read[name].shape) == (tensor.dtype, tensor.shape)
        bits = torch.int32 if tensor.itemsize == 4 else torch.int16
        assert torch.equal(read[name].view(bits), tensor.detach().contiguous().view(bits))


HOSTILE: dict[str, tuple[Callable[[], bytes], str]] = {
    "time": (never_hashed, "more than 1 seconds of processor time"),
    "memory": (lambda: bomb(400), "is refused: it asks for more memory than its size explains"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_time_and_memory_are_bounded(write: Write, name: str) -> None:
    content, reason = HOSTILE[name]
    with pytest.raises(AdapterConversionError, match=f"adapter_model.bin.*{reason}"):
        read_pickle(write(content()), time=TimeLimits(cpu_seconds=1, wall_seconds=60))


def test_no_code_of_the_file_runs(write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # torch's own switch back to the unsafe way must not reach the process either
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    content = {"a": torch.ones(1), "b": Call(os.system, f"touch {tmp_path}/ran")}
    with pytest.raises(AdapterConversionError, match=r"it asks for 'posix.system'; only tensors are accepted"):
        read_pickle(write(saved(content)))
    assert not (tmp_path / "ran").exists()


CALLS = {
    "'eval'": Call(eval, "1"),
    "'exec'": Call(exec, "1"),
    "'getattr'": Call(getattr, "text", "upper"),
    "'__import__'": Call(__import__, "os"),
    "'io.open'": Call(io.open, "/dev/null"),
    "'posix.system'": Call(os.system, "true"),
    "'torch.serialization.load'": Call(torch.load, "x"),
    "'torch.hub.load'": Call(torch.hub.load, "x", "y"),
    "test_pickles.zipped'": Call(zipped, b""),
}


@pytest.mark.parametrize("zip_format", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("function", CALLS)
def test_calls_are_refused_by_name(function: str, zip_format: bool) -> None:
    content = saved({"a": CALLS[function]}, zip_format=zip_format)
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed") as caught:
        read_tensors(io.BytesIO(content), max_bytes=1000)
    assert f"{function}; only tensors are accepted" in explain(caught.value)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "cannot be read as a dictionary of tensors"),
        (b"garbage" * 99, "cannot be read as a dictionary of tensors"),
        (saved({"a": torch.ones(1)})[:300], "cannot be read as a dictionary of tensors"),
        (zipped(b"\x80\x02}"), "cannot be read as a dictionary of tensors"),
        (claim(), "more memory than its size explains"),
    ],
    ids=["empty", "garbage", "truncated", "unfinished", "claim"],
)
def test_what_is_no_weights_file_is_explained(content: bytes, reason: str) -> None:
    with pytest.raises(Exception) as caught:  # noqa: PT011
        read_tensors(io.BytesIO(content), max_bytes=1 << 20)
    assert reason in explain(caught.value)


def refusals(content: object, max_bytes: int = 1 << 20) -> list[str]:
    tensors, reasons = read_tensors(io.BytesIO(saved(content)), max_bytes=max_bytes)
    assert bool(tensors) is not bool(reasons)
    return reasons


def test_everything_that_is_no_accepted_tensor_is_named_at_once() -> None:
    nested: dict[str, object] = {"a": torch.ones(1)}
    content = {
        "good": torch.ones(2),
        "step": 7,
        "state": nested,
        "double": torch.ones(2).double(),
        "whole": torch.ones(2).int(),
        "sparse": torch.eye(2).to_sparse(),
        "meta": torch.empty(2, device="meta"),
        3: torch.ones(1),
    }
    assert refusals(content) == [
        "'step' is of type int instead of a tensor",
        "'state' is of type dict instead of a tensor",
        "'double' has element type torch.float64; accepted are torch.float32, torch.float16, torch.bfloat16",
        "'whole' has element type torch.int32; accepted are torch.float32, torch.float16, torch.bfloat16",
        "'sparse' is not a dense tensor with values",
        "'meta' is not a dense tensor with values",
        "a key is of type int instead of a name",
    ]


def test_other_contents_are_refused() -> None:
    assert refusals({}) == ["it holds no tensors"]
    assert refusals([torch.ones(1)]) == ["it holds one list instead of a dictionary of tensors"]
    itself: dict[str, object] = {}
    itself["a"] = itself
    assert refusals(itself) == ["'a' is of type dict instead of a tensor"]


def test_a_view_that_repeats_one_element_is_no_way_to_more_memory() -> None:
    assert refusals({"a": torch.zeros(1).expand(1 << 20, 1 << 20)}) == [
        f"its tensors claim {1 << 42} bytes, more than its size explains"
    ]


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Put another program in the place of the one that reads pickles."""

    def replace(source: str) -> None:
        path = tmp_path / "program.py"
        path.write_text(f"import json, os, sys, time\nweights, reasons = sys.argv[1:3]\n{source}")
        monkeypatch.setattr(pickles, "_PROGRAM", path)

    return replace


Program = Callable[[str], None]


def test_the_process_has_no_secrets_and_no_paths_of_its_caller(
    write: Write, program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(b"x")
    for name in ("here", "imports", "home"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "imports"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    program("json.dump([*os.environ, os.getcwd(), *sys.path], open(reasons, 'w'))")
    with pytest.raises(AdapterConversionError) as caught:
        read_pickle(path)
    text = "\n".join(caught.value.reasons)
    for name in ("PATH", "TMPDIR", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES"):
        assert f"is refused: {name}\n" in text
    for secret in ("PYTHONPATH", "HOME", str(tmp_path)):
        assert secret not in text


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("os.abort()", f"ended by signal {signal.SIGABRT.value}"),
        ("sys.exit(1)", "failed with status 1"),
        ("open(reasons, 'w').write('{')", "no reason was given"),
        ("json.dump(['\\x1b[2J' + 'x' * 999], open(reasons, 'w'))", r"refused: \\x1b\[2Jx{300,400}$"),
    ],
)
def test_however_the_process_fails_the_file_is_refused(
    write: Write, program: Program, source: str, reason: str
) -> None:
    program(source)
    with pytest.raises(AdapterConversionError, match=reason):
        read_pickle(write(b"x"))


def test_the_process_cannot_make_us_read_another_file(write: Write, program: Program, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text('["secret"]')
    program(f"os.symlink('{tmp_path}/secret', reasons)")
    with pytest.raises(AdapterConversionError, match="no reason was given"):
        read_pickle(write(b"x"))


def test_what_the_process_wrote_is_read_strictly(write: Write, program: Program) -> None:
    program("open(weights, 'wb').write(b'x' * 99)")
    with pytest.raises(AdapterCorruptError, match="shorter than its header says"):
        read_pickle(write(b"x"))


def test_waiting_is_bounded(write: Write, program: Program) -> None:
    program("time.sleep(60)")
    with pytest.raises(AdapterConversionError, match=r"more than 0\.2 seconds"):
        read_pickle(write(b"x"), time=TimeLimits(wall_seconds=0.2))


def test_the_limits_of_weights_hold(write: Write, tmp_path: Path) -> None:
    path = write(saved({"a": torch.ones(3, 3, 3)}))
    with pytest.raises(AdapterIncompatibleError, match="3 dimensions; the limit is 2"):
        read_pickle(path)
    with pytest.raises(AdapterConversionError, match=r"adapter_model.bin has \d+ bytes; the limit is 20"):
        read_pickle(path, WeightLimits(total_bytes=10, header_bytes=10))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter_model.bin"]


def test_links_and_missing_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceNotFoundError):
        read_pickle(tmp_path / "adapter_model.bin")
    (tmp_path / "adapter_model.bin").symlink_to("/etc/passwd")
    with pytest.raises(AdapterCorruptError, match="is a symbolic link"):
        read_pickle(tmp_path / "adapter_model.bin")


def test_pickles_are_found_by_the_names_they_have(tmp_path: Path) -> None:
    assert find_pickle(tmp_path) is None
    for name in ("adapter_model.pth", "adapter_model.bin"):
        (tmp_path / name).touch()
        assert find_pickle(tmp_path) == tmp_path / name

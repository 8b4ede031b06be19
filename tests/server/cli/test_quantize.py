"""`lorasrv quantize` on the embedded base."""

import resource
import sys

import pytest
import torch
from lorasrv.cli.console import show_progress
from lorasrv.embedded import embedded_base
from lorasrv.model import quantize_folder
from lorasrv.model.loader import load_model

FIGURES = ["folder", "num_quantized", "num_wide", "num_parameters", "source_bytes", "num_bytes", "bits_per_parameter"]


def test_the_folder_is_served_as_its_source_is(lorasrv, tmp_path):
    end = lorasrv("quantize", embedded_base(), "--out", tmp_path / "out", "--json")
    assert (end.code, list(end.json)) == (0, FIGURES)
    assert end.json["bits_per_parameter"] == round(8 * end.json["num_bytes"] / end.json["num_parameters"], 3)
    digests = {load_model(folder, dtype=torch.bfloat16).base.digest for folder in (embedded_base(), tmp_path / "out")}
    assert len(digests) == 1
    for name in ("generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (embedded_base() / name).read_bytes()


def test_people_get_columns_and_progress_in_lines(lorasrv, tmp_path):
    end = lorasrv("quantize", embedded_base(), "--out", tmp_path / "out", "--dtype", "float32")
    header, *rows = [line.split() for line in end.out.splitlines()]
    assert header == ["figure", "value"]
    assert [name for name, _ in rows] == FIGURES
    assert dict(rows)["folder"] == str(tmp_path / "out")
    lines = end.err.splitlines()
    assert lines[0] == f"reading {embedded_base()}"
    assert lines[-2:] == ["quantizing: 100 %", f"to serve it: lorasrv serve {tmp_path / 'out'}"]
    assert load_model(tmp_path / "out", dtype=torch.float32).config.stored_dtype == "float32"


def test_an_existing_folder_and_a_quantized_base_are_refused(lorasrv, tmp_path):
    (tmp_path / "out").mkdir()
    end = lorasrv("quantize", "org/not-downloaded", "--out", tmp_path / "out")
    assert (end.code, end.out) == (1, "")
    assert "exists; choose another folder" in end.err
    (tmp_path / "out").rmdir()
    assert lorasrv("quantize", embedded_base(), "--out", tmp_path / "out").code == 0
    again = lorasrv("quantize", tmp_path / "out", "--out", tmp_path / "again")
    assert again.code == 3
    assert "quantized already" in again.err
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_missing_base_is_status_3_and_a_missing_parent_status_4(lorasrv, tmp_path):
    assert lorasrv("quantize", tmp_path / "none", "--out", tmp_path / "out").code == 3
    assert lorasrv("quantize", embedded_base(), "--out", tmp_path / "none" / "out").code == 4
    assert not list(tmp_path.iterdir())


def test_no_room_is_status_7_and_leaves_nothing(lorasrv, tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        end = lorasrv("quantize", embedded_base(), "--out", tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (end.code, end.out) == (7, "")
    assert "it takes 4" in end.err
    assert not list(tmp_path.iterdir())


def test_an_interruption_leaves_nothing(lorasrv, tmp_path, monkeypatch):
    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(quantize_folder, "quantize", interrupt)
    assert lorasrv("quantize", embedded_base(), "--out", tmp_path / "out").code == 130
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("terminal", [False, True])
def test_progress_is_a_bar_on_a_terminal_and_a_line_a_tenth_elsewhere(capsys, monkeypatch, terminal):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    monkeypatch.setenv("TERM", "xterm")
    with show_progress("counting") as progress:
        for done in range(0, 31, 1):
            progress(done, 30)
    err = capsys.readouterr().err
    if terminal:
        assert "counting" in err
        assert "\x1b[" in err
    else:
        assert err.splitlines() == [f"counting: {10 * tenth} %" for tenth in range(1, 11)]

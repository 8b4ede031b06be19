"""`lorasrv merge` on the embedded base and adapters."""

import json

import pytest
from lorasrv.embedded import embedded_adapters

ADAPTER = next(iter(embedded_adapters().values()))


def test_the_record_comes_as_json(lorasrv, tmp_path):
    end = lorasrv("merge", "--adapter", ADAPTER, "--out", tmp_path / "out", "--json")
    assert end.code == 0
    record = json.loads((tmp_path / "out" / "merge.json").read_text())
    assert end.json == {"merged": True, "folder": str(tmp_path / "out"), **record}
    assert end.json["verification"]["holds"]


def test_people_get_a_line_a_module_and_what_to_make_of_it(lorasrv, tmp_path):
    end = lorasrv("merge", "--adapter", ADAPTER, "--out", tmp_path / "out")
    header, *rows = end.out.splitlines()
    assert header.split() == ["module", "update", "/", "weight", "update", "kept", "error", "/", "update"]
    assert len(rows) == len(json.loads((tmp_path / "out" / "merge.json").read_text())["modules"])
    assert "verified at" in end.err
    assert end.err.splitlines()[-1] == f"to serve it: lorasrv serve {tmp_path / 'out'}"


def test_a_refusal_is_status_3_with_its_figures(lorasrv, tmp_path):
    flags = ("merge", "--adapter", ADAPTER, "--out", tmp_path / "out", "--quantize", "nf4")
    end = lorasrv(*flags, "--json")
    assert (end.code, end.json["merged"]) == (3, False)
    assert all(0 < one["kept"] < 1.05 and one["error"] > 0 for one in end.json["modules"])
    num_modules = len(end.json["modules"])
    end = lorasrv(*flags)
    assert (end.code, len(end.out.splitlines())) == (3, 1 + num_modules)
    assert "--weights original" in end.err
    assert not list(tmp_path.iterdir())
    end = lorasrv(*flags, "--weights", "original")
    assert end.code == 0
    assert "unmerged loses nothing" in end.err


def test_a_result_beyond_the_tolerance_is_status_1(lorasrv, tmp_path):
    end = lorasrv("merge", "--adapter", ADAPTER, "--out", tmp_path / "out", "--tolerance", "1e-9", "--json")
    assert (end.code, end.json["merged"]) == (1, False)
    assert "beyond the tolerance" in end.json["reasons"][0]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("flags", "code", "reason"),
    [
        (["--adapter", "none"], 3, "out is missing"),
        (["--out", "none"], 3, "adapter is missing"),
        (["--out", "none", "--adapter", "no-such-folder"], 4, "no-such-folder"),
        (["--out", "none", "--adapter", ADAPTER, "--base", "no-such-base"], 3, "no-such-base"),
        (["--out", "none", "--adapter", ADAPTER, "--dtype", "int8"], 2, "expected one of"),
    ],
    ids=str,
)
def test_what_cannot_be_merged(lorasrv, tmp_path, monkeypatch, flags, code, reason):
    monkeypatch.chdir(tmp_path)
    end = lorasrv("merge", *flags)
    assert end.code == code
    assert reason in end.err
    assert not list(tmp_path.iterdir())

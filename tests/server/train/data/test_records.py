"""Every kind of data file gives the same records; damaged ones are named with their place."""

import json
from pathlib import Path

import pytest
from lorasrv.errors import TrainingDataError
from lorasrv.train.data.records import read_records

ROWS = [{"prompt": "Two, and", "completion": "\nthree \u2603"}, {"prompt": "four", "completion": '"five"'}]


def write(path: Path, kind: str) -> Path:
    if kind == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n\n" for row in ROWS), encoding="utf-8")
    elif kind == ".json":
        path.write_text(json.dumps(ROWS), encoding="utf-8")
    else:
        path.write_text('\ufeffprompt,completion\n"Two, and","\nthree \u2603"\nfour,"""five"""\n', encoding="utf-8")
    return path


@pytest.mark.parametrize("kind", [".jsonl", ".json", ".csv"])
def test_every_format_gives_the_same_fields(tmp_path: Path, kind: str) -> None:
    records = list(read_records(write(tmp_path / f"data{kind}", kind)))
    assert [dict(record.fields) for record in records] == ROWS
    assert len({record.place for record in records}) == 2


def test_parquet(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(arrow.Table.from_pylist(ROWS), tmp_path / "data.parquet")
    assert [dict(record.fields) for record in read_records(tmp_path / "data.parquet")] == ROWS


def test_a_text_file_is_one_record(tmp_path: Path) -> None:
    (tmp_path / "play.txt").write_text("Enter\n\nGhost", encoding="utf-8")
    (record,) = read_records(tmp_path / "play.txt")
    assert (record.fields, record.place) == ({"text": "Enter\n\nGhost"}, "play.txt")


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', "a.jsonl:2: not JSON"),
        ("a.jsonl", b'{"text": "x"}\n7\n', "a.jsonl:2: expected an object, got int"),
        ("a.json", b'{"text": "x"}', "a.json: expected a list of objects, got dict"),
        ("a.json", b'[{"text": "x"}, []]', "a.json[1]: expected an object, got list"),
        ("a.csv", b"a,b\n1,2\n1\n", "a.csv:3: expected 2 columns"),
        ("a.csv", b"a,b\n1,2,3\n", "a.csv:2: expected 2 columns"),
        ("a.csv", b'a,b\n"1,2\n', "a.csv:1: not CSV: unexpected end"),
        ("a.txt", b"abc\xff", "not UTF-8 at byte 3"),
        ("a.xml", b"<a/>", "unknown kind of file"),
    ],
)
def test_damage_is_named_with_its_place(tmp_path: Path, name: str, content: bytes, expected: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(TrainingDataError) as caught:
        list(read_records(tmp_path / name))
    assert expected in str(caught.value)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(TrainingDataError, match=r"none\.jsonl: cannot be read: No such file"):
        list(read_records(tmp_path / "none.jsonl"))

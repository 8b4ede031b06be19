"""Data files as records: one mapping of fields each, with the place it came from.

Reads JSON lines, JSON, CSV, Parquet (extra `parquet`) and plain text; does not know what the fields mean.
"""

import csv
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorasrv.errors import TrainingDataError


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One entry of a data file.

    Attributes:
        fields: what it holds, by name.
        place: where it is, for messages: "file.jsonl:12".
    """

    fields: Mapping[str, object]
    place: str


def read_records(path: Path) -> Iterator[Record]:
    """Yields the records of a file in its order; the kind of file is told by its suffix. A text file is one record.

    Raises:
        TrainingDataError: the file is missing, of an unknown kind, or holds something that is no record.
    """
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise TrainingDataError([f"{path}: unknown kind of file; known are {', '.join(_READERS)}"])
    try:
        yield from reader(path)
    except OSError as error:
        raise TrainingDataError([f"{path}: cannot be read: {error.strerror}"]) from error
    except UnicodeDecodeError as error:
        raise TrainingDataError([f"{path}: not UTF-8 at byte {error.start}"]) from error


def _read_json_lines(path: Path) -> Iterator[Record]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                place = f"{path.name}:{number}"
                yield _record(_parse(line, place), place)


def _read_json(path: Path) -> Iterator[Record]:
    content = _parse(path.read_text(encoding="utf-8"), path.name)
    if not isinstance(content, list):
        raise TrainingDataError([f"{path.name}: expected a list of objects, got {type(content).__name__}"])
    for number, entry in enumerate(content):
        place = f"{path.name}[{number}]"
        yield _record(entry, place)


def _read_csv(path: Path) -> Iterator[Record]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        try:
            for row in reader:
                place = f"{path.name}:{reader.line_num}"
                if None in row or None in row.values():
                    raise TrainingDataError([f"{place}: expected {len(reader.fieldnames or ())} columns, as in line 1"])
                yield Record(fields=row, place=place)
        except csv.Error as error:
            raise TrainingDataError([f"{path.name}:{reader.line_num}: not CSV: {error}"]) from error


def _read_parquet(path: Path) -> Iterator[Record]:
    try:
        from pyarrow import ArrowInvalid, parquet  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise TrainingDataError([f"{path.name}: Parquet needs pyarrow: pip install 'lorasrv[parquet]'"]) from error
    try:
        with parquet.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches():
                for fields in batch.to_pylist():
                    yield Record(fields=fields, place=f"{path.name}[{number}]")
                    number += 1
    except ArrowInvalid as error:
        raise TrainingDataError([f"{path.name}: not Parquet: {error}"]) from error


def _read_text(path: Path) -> Iterator[Record]:
    yield Record(fields={"text": path.read_text(encoding="utf-8")}, place=path.name)


def _parse(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise TrainingDataError([f"{place}: not JSON: {error.msg} at column {error.colno}"]) from error


def _record(entry: object, place: str) -> Record:
    if not isinstance(entry, dict):
        raise TrainingDataError([f"{place}: expected an object, got {type(entry).__name__}"])
    return Record(fields=entry, place=place)


_READERS: Mapping[str, Callable[[Path], Iterator[Record]]] = {
    ".jsonl": _read_json_lines,
    ".ndjson": _read_json_lines,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
    ".txt": _read_text,
}

"""How commands speak: data on stdout, everything else on stderr.

Colour and boxes appear only where a terminal is on the other end and NO_COLOR is not set; a pipe gets plain columns
that are never cut. It knows no command.
"""

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from rich.text import Text


def print_json(value: Any) -> None:
    """Write one JSON document to stdout, one line; times and paths are written as text."""
    print(json.dumps(value, ensure_ascii=False, default=str), flush=True)


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Write rows to stdout: a table on a terminal, aligned plain columns elsewhere."""
    if not sys.stdout.isatty():
        print_columns(columns, rows)
        return
    table = Table(*columns)
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    Console(file=sys.stdout).print(table)


def print_columns(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Write rows to stdout as plain columns, two spaces apart."""
    lines = [columns, *rows]
    widths = [max(len(line[index]) for line in lines) for index in range(len(columns))]
    for line in lines:
        cells = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        print("  ".join(cells).rstrip(), flush=True)


def say(message: str) -> None:
    """Write a line of progress to stderr."""
    print(message, file=sys.stderr, flush=True)


@contextmanager
def show_progress(title: str) -> Iterator[Callable[[int, int], None]]:
    """Give a function that takes how much is done and of how much; a bar on a terminal, a line a tenth elsewhere."""
    if sys.stderr.isatty():
        with Progress(console=Console(file=sys.stderr), transient=True) as bar:
            task = bar.add_task(title)
            yield lambda done, total: bar.update(task, completed=done, total=total)
        return
    tenths = 0

    def say_tenth(done: int, total: int) -> None:
        nonlocal tenths
        if 10 * done // total > tenths:
            tenths = 10 * done // total
            say(f"{title}: {10 * tenths} %")

    yield say_tenth


def print_error(error: BaseException) -> None:
    """Write an error to stderr; where it lists several things wrong, each on its own line."""
    details = getattr(error, "reasons", ()) or [f"{field}: {text}" for field, text in getattr(error, "violations", ())]
    title = Text("lorasrv: ", style="bold red")
    console = Console(file=sys.stderr, soft_wrap=True, highlight=False)
    if len(details) > 1:
        console.print(title + Text(f"{len(details)} things are wrong:"))
        for detail in details:
            console.print(Text(f"  - {detail}"))
    else:
        console.print(title + Text(str(error) or type(error).__name__))

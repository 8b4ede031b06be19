"""How the demo shows itself: answers growing side by side on a terminal, plain lines elsewhere, a table at the end."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich import box
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from lorasrv.demo.session import Answer, Display, Question, Report, Voice

_PLAIN_WIDTH = 120
_COLOURS = ("white", "cyan", "magenta", "yellow", "green", "blue", "red")


@contextmanager
def progress_display() -> Iterator[Display]:
    """The display that suits stderr: live on a terminal, one line per event elsewhere."""
    if not sys.stderr.isatty():
        yield PlainDisplay()
        return
    console = Console(stderr=True)
    with Live(console=console, transient=True, refresh_per_second=12) as live:
        yield LiveDisplay(live)


class PlainDisplay:
    """One line on stderr per event."""

    def adapter_loaded(self, voice: Voice, *, took_seconds: float) -> None:
        """Tell that an adapter is there."""
        self._line(_loaded_text(voice, took_seconds))

    def asked(self, questions: Sequence[Question]) -> None:
        """Tell how much is asked."""
        self._line(_asked_text(questions))

    def text_came(self, index: int, text: str) -> None:
        """Pieces are too many for lines."""

    def answered(self, index: int, answer: Answer) -> None:
        """Tell that an answer is whole."""
        del index
        self._line(f"{_name(answer.adapter_id)}: {_one_line(answer.prompt + answer.text)}")

    def _line(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)


class LiveDisplay:
    """Every answer on a line of its own, growing while it is generated."""

    def __init__(self, live: Live) -> None:
        self._live = live
        self._questions: Sequence[Question] = ()
        self._texts: list[str] = []

    def adapter_loaded(self, voice: Voice, *, took_seconds: float) -> None:
        """Leave a line above the live part."""
        self._live.console.print(_loaded_text(voice, took_seconds), highlight=False)

    def asked(self, questions: Sequence[Question]) -> None:
        """Begin one line per question."""
        self._live.console.print(_asked_text(questions), highlight=False)
        self._questions = questions
        self._texts = [""] * len(questions)
        self._draw()

    def text_came(self, index: int, text: str) -> None:
        """Let the line grow."""
        self._texts[index] += text
        self._draw()

    def answered(self, index: int, answer: Answer) -> None:
        """The line is whole already."""

    def _draw(self) -> None:
        grid = Table.grid(padding=(0, 2))
        grid.add_column(no_wrap=True)
        grid.add_column(no_wrap=True, overflow="ellipsis")
        colours = _colours([question.voice.adapter_id for question in self._questions])
        width = max(20, self._live.console.width - 30)
        for question, text in zip(self._questions, self._texts, strict=True):
            adapter_id = question.voice.adapter_id
            # the newest words are at the end
            line = _one_line(question.prompt + text)[-width:]
            grid.add_row(Text(_name(adapter_id), style=f"bold {colours[adapter_id]}"), Text(line))
        self._live.update(grid)


def print_report(report: Report) -> None:
    """Write the closing table to stdout."""
    is_terminal = sys.stdout.isatty()
    console = Console(file=sys.stdout, width=None if is_terminal else _PLAIN_WIDTH)
    table = Table("adapter", "kind", "ranks", box=box.ROUNDED)
    table.add_column("text", overflow="fold")
    table.add_column("tokens", justify="right")
    table.add_column("first token", justify="right", no_wrap=True)
    colours = _colours([answer.adapter_id for answer in report.answers])
    for index, answer in enumerate(report.answers):
        table.add_row(
            Text(_name(answer.adapter_id), style=colours[answer.adapter_id]),
            answer.kind,
            _ranks_text(answer.ranks),
            _answer_text(answer),
            str(len(answer.token_ids)),
            f"{answer.ttft_seconds * 1000:.0f} ms",
            end_section=index + 1 == len(report.answers) or report.answers[index + 1].prompt != answer.prompt,
        )
    console.print(table)
    console.print(
        f"{len(report.answers)} requests in one batch; "
        f"most adapters in one step, counted by the engine: {report.max_adapters_in_one_step}",
        highlight=False,
    )


def _colours(adapter_ids: Sequence[str]) -> dict[str, str]:
    distinct = list(dict.fromkeys(adapter_ids))
    return {adapter_id: _COLOURS[index % len(_COLOURS)] for index, adapter_id in enumerate(distinct)}


def _loaded_text(voice: Voice, took_seconds: float) -> str:
    ranks = _ranks_text(voice.ranks)
    return f"loaded {voice.adapter_id} ({voice.kind}, ranks {ranks}) in {took_seconds:.2f} s, while the server runs"


def _asked_text(questions: Sequence[Question]) -> str:
    num_voices = len({question.voice.adapter_id for question in questions})
    return f"asking {len(questions)} questions of {num_voices} voices at once"


def _answer_text(answer: Answer) -> Text:
    text = _one_line(answer.prompt + answer.text)
    num_bold = len(_one_line(answer.prompt))
    return Text.assemble((text[:num_bold], "bold"), text[num_bold:])


def _name(adapter_id: str) -> str:
    return adapter_id or "(base)"


def _ranks_text(ranks: tuple[int, ...]) -> str:
    return "-".join(str(rank) for rank in dict.fromkeys(ranks)) or "-"


def _one_line(text: str) -> str:
    return " ".join(text.split())

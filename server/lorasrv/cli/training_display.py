"""What a person sees of a training run: a bar on a terminal, a line now and then elsewhere; audits on stdout."""

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.text import Text

from lorasrv.cli.console import print_json, print_table, say
from lorasrv.train.config import TrainConfig
from lorasrv.train.observer import RunObserver, RunStart, StepReport

if TYPE_CHECKING:
    from lorasrv.train.app import Outcome
    from lorasrv.train.audit import Audit, AuditedExample
    from lorasrv.train.memory import MemoryPart

_SECONDS_BETWEEN_LINES = 10.0
_COLUMNS_WITH_BAR = 100


@contextmanager
def training_display(config: TrainConfig) -> Iterator[RunObserver]:
    """Gives what shows a run, as it is told of it."""
    if not sys.stderr.isatty():
        yield _Lines()
        return
    console = Console(file=sys.stderr)
    # the words say more than the bar, and are cut where both do not fit
    bar = (BarColumn(),) if console.width >= _COLUMNS_WITH_BAR else ()
    columns = (TextColumn("step {task.completed}/{task.total}"), *bar, TextColumn("{task.description}"))
    with Progress(*columns, console=console) as progress:
        yield _Bar(progress, max_steps=config.run.max_steps)


class _Bar(RunObserver):
    """A bar whose words follow the steps; evaluations stay above it."""

    def __init__(self, progress: Progress, *, max_steps: int) -> None:
        self._progress = progress
        self._task = progress.add_task("reading base and data", total=max_steps)

    def run_started(self, start: RunStart) -> None:
        self._progress.update(self._task, completed=start.first_step, description="first step")

    def step_finished(self, report: StepReport) -> None:
        self._progress.update(self._task, completed=report.step, description=_describe(report))
        if report.evaluations:
            self._progress.console.print(f"step {report.step}: {_evaluations(report)}", highlight=False)


class _Lines(RunObserver):
    """A line at the first step, at the last, at evaluations, and now and then between them."""

    def __init__(self) -> None:
        self._max_steps = 0
        self._next_line_seconds = 0.0

    def run_started(self, start: RunStart) -> None:
        self._max_steps = start.max_steps
        after = f", going on after step {start.first_step}" if start.first_step else ""
        say(f"training {', '.join(start.jobs)} for {start.max_steps} steps{after}")

    def step_finished(self, report: StepReport) -> None:
        now = time.monotonic()
        if report.evaluations or report.step == self._max_steps or now >= self._next_line_seconds:
            self._next_line_seconds = now + _SECONDS_BETWEEN_LINES
            held_out = f", {_evaluations(report)}" if report.evaluations else ""
            say(f"step {report.step}/{self._max_steps}: {_describe(report)}{held_out}")


def describe_outcome(outcome: "Outcome") -> str:
    """What became of a job, in a line."""
    ranks = list(outcome.ranks.values())
    loss = ""
    if outcome.held_out_loss is not None:
        before, after = outcome.held_out_loss
        loss = f", held-out loss {before:.3f} before and {after:.3f} after, nats a token"
    spread = "-".join(str(rank) for rank in sorted({min(ranks), max(ranks)}))
    return f"rank {spread}{loss}; {outcome.folder / 'report.html'} tells how it went"


def show_audits(audits: Mapping[str, "Audit"], *, as_json: bool) -> None:
    """Write what would be learned: in colour on a terminal, between double brackets elsewhere."""
    if as_json:
        print_json({name: asdict(audit) for name, audit in audits.items()})
        return
    console = Console(file=sys.stdout, highlight=False, soft_wrap=True)
    for name, audit in audits.items():
        for sample in audit.samples:
            learned = sum(on for _, on in sample.pieces)
            console.print(
                f"-- {name}, {sample.place}: {sample.num_tokens} tokens, {learned} learned parts", style="dim"
            )
            console.print(_marked(sample, in_colour=console.is_terminal))
        say(f"{name}: {_counts(audit)}")


def show_memory(parts: Sequence["MemoryPart"], *, as_json: bool) -> None:
    """Write an estimate of memory, by part."""
    resident = sum(part.num_bytes for part in parts if not part.paged)
    if as_json:
        print_json({"parts": [asdict(part) for part in parts], "resident_bytes": resident})
        return
    rows = [(part.name + (" (paged)" if part.paged else ""), _gib(part.num_bytes)) for part in parts]
    print_table(("memory", "GiB"), [*rows, ("together, without what is paged", _gib(resident))])


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.3f}"


def _marked(sample: "AuditedExample", *, in_colour: bool) -> Text:
    text = Text()
    for piece, learned in sample.pieces:
        if in_colour:
            text.append(piece, style="bold green" if learned else "dim")
        else:
            text.append(f"[[{piece}]]" if learned else piece)
    return text


def _counts(audit: "Audit") -> str:
    tally = audit.tally
    lost = {"dropped": tally.dropped, "truncated": tally.truncated, "without anything to learn": tally.unsupervised}
    parts = [
        f"{tally.samples} samples, {tally.examples} examples of up to {audit.longest} tokens",
        f"{tally.supervised_tokens} of {tally.tokens} tokens learned",
        f"{audit.held_out} examples held out",
        f"{audit.steps_per_epoch:.1f} steps an epoch",
        *(f"{count} {what}" for what, count in lost.items() if count),
    ]
    return "; ".join(parts)


def _describe(report: "StepReport") -> str:
    losses = _by_job({name: f"{job.loss:.3f}" for name, job in report.jobs.items()})
    rate = max(job.learning_rate for job in report.jobs.values())
    speed = f"{report.tokens / report.seconds:.0f} tokens/s, {report.memory_bytes / 2**30:.2f} GiB"
    return f"loss {losses}, lr {rate:.1e}, {speed}, {_duration(report.seconds_left)} left"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _evaluations(report: "StepReport") -> str:
    return "held out " + _by_job({name: f"{loss:.3f}" for name, loss in report.evaluations.items()})


def _by_job(values: dict[str, str]) -> str:
    return next(iter(values.values())) if len(values) == 1 else " ".join(f"{k}={v}" for k, v in values.items())

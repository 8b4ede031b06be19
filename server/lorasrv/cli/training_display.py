"""What a person sees of a training run: a bar on a terminal, a line now and then elsewhere; audits on stdout."""

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from lorasrv.cli.console import print_json, print_table, say
from lorasrv.train.config import TrainConfig

if TYPE_CHECKING:
    from lorasrv.train.audit import Audit, AuditedExample
    from lorasrv.train.memory import MemoryPart
    from lorasrv.train.run import StepReport

_SECONDS_BETWEEN_LINES = 10.0


@contextmanager
def training_display(config: TrainConfig) -> Iterator[Callable[["StepReport"], None]]:
    """Gives a function that shows a step."""
    max_steps = config.run.max_steps
    if sys.stderr.isatty():
        columns = (TextColumn("step {task.completed}/{task.total}"), BarColumn(), TimeRemainingColumn())
        with Progress(*columns, TextColumn("{task.description}"), console=Console(file=sys.stderr)) as bar:
            task = bar.add_task("", total=max_steps)

            def show(report: "StepReport") -> None:
                bar.update(task, completed=report.step, description=_describe(report))
                if report.evaluations:
                    bar.console.print(f"step {report.step}: {_evaluations(report)}", highlight=False)

            yield show
        return
    last = -_SECONDS_BETWEEN_LINES

    def show_line(report: "StepReport") -> None:
        nonlocal last
        now = time.monotonic()
        if report.evaluations or report.step in (1, max_steps) or now - last >= _SECONDS_BETWEEN_LINES:
            last = now
            held_out = f", {_evaluations(report)}" if report.evaluations else ""
            say(f"step {report.step}/{max_steps}: {_describe(report)}{held_out}")

    yield show_line


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
    return f"loss {losses}, learning rate {rate:.2e}, {report.tokens / report.seconds:.0f} tokens/s"


def _evaluations(report: "StepReport") -> str:
    return "held out " + _by_job({name: f"{loss:.3f}" for name, loss in report.evaluations.items()})


def _by_job(values: dict[str, str]) -> str:
    return next(iter(values.values())) if len(values) == 1 else " ".join(f"{k}={v}" for k, v in values.items())

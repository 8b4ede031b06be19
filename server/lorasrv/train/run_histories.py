"""The histories of a run, a job each, and the page about each in the end. Knows jobs and files; no model."""

import json
from collections.abc import Mapping, Sequence

from lorasrv.train.checkpoint import checkpoint_folder
from lorasrv.train.data.files import JobData
from lorasrv.train.history import HISTORY_NAME, History, Row
from lorasrv.train.job import TrainingJob
from lorasrv.train.observer import RunObserver, RunStart, StepReport
from lorasrv.train.report import render_report


class RunHistories(RunObserver):
    """The histories of all jobs of a run, each beside its checkpoints until the run ends."""

    def __init__(self, jobs: Sequence[TrainingJob]) -> None:
        self._jobs = {job.name: job for job in jobs}
        self._histories = {job.name: History(checkpoint_folder(job.out) / HISTORY_NAME) for job in jobs}
        self._ranks: dict[str, dict[str, int]] = {}

    def run_started(self, start: RunStart) -> None:
        """Keeps what earlier histories say of the steps that are not done again."""
        for name, history in self._histories.items():
            history.start(start.first_step)
            for row in history.rows():
                self._ranks[name] = row.get("ranks", self._ranks.get(name, {}))

    def step_finished(self, report: StepReport) -> None:
        """Adds a step to the history of every job that took part."""
        for name in report.jobs:
            ranks = dict(report.jobs[name].ranks)
            changed = self._ranks.get(name) != ranks
            self._ranks[name] = ranks
            self._histories[name].append(report, name, ranks=ranks if changed else None)

    def files(self, name: str, facts: Mapping[str, str], *, held_out_before: float | None) -> dict[str, bytes]:
        """What is put beside a finished adapter: the history, and the page about it."""
        job, rows = self._jobs[name], self._histories[name].rows()
        page = render_report(
            f"Training of {job.out.name}",
            rows,
            facts={**facts, "run": _length(rows)},
            modules=list(job.ranks()),
            held_out_before=held_out_before,
        )
        content = "".join(json.dumps(row) + "\n" for row in rows)
        return {HISTORY_NAME: content.encode(), "report.html": page.encode()}


def run_facts(
    job: TrainingJob, data: JobData, base_name: str, before: float | None, after: float | None
) -> dict[str, str]:
    """What a page says of a job in words: its base, method, data and held-out loss, before and after."""
    config, ranks, tally = job.config, list(job.ranks().values()), data.tally
    lowest, highest = min(ranks), max(ranks)
    spread = f"{lowest}" if lowest == highest else f"{lowest} to {highest}, {sum(ranks) / len(ranks):.3g} on average,"
    facts = {
        "base": base_name,
        "method": f"{config.method}, rank {spread} in {len(ranks)} modules",
        "data": f"{len(data.examples)} examples, and {len(data.held_out)} held out; "
        f"{tally.supervised_tokens / tally.tokens:.1%} of {tally.tokens} tokens are learned",
        "batch": f"{config.batch_size} examples a step",
    }
    if after is not None and before is not None:
        best = "" if job.best is None else f"; the best, after step {job.best.step}, was taken"
        facts["held-out loss"] = f"{before:.4f} before, {after:.4f} after, in nats a token{best}"
    return facts


def _length(rows: Sequence[Row]) -> str:
    """How long a run was; its tokens are those of all jobs."""
    minutes, seconds = divmod(round(sum(row["seconds"] for row in rows)), 60)
    return f"{len(rows)} steps over {sum(row['tokens'] for row in rows)} tokens in {minutes} min {seconds} s"

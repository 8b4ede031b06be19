"""What happened in a run, step by step: one JSON object a line, written as it happens.

Knows no model and no picture of it (see `lorasrv.train.report`).
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorasrv.train.observer import StepReport

HISTORY_NAME = "metrics.jsonl"

Row = Mapping[str, Any]
"""step, loss, learning_rate, gradient_norm, tokens, seconds; held_out_loss after evaluations; ranks after changes."""


@dataclass(frozen=True, slots=True)
class History:
    """The rows of one job, in a file that others may follow while it grows."""

    path: Path

    def start(self, step: int) -> None:
        """Keeps the rows of the first `step` steps, and no other."""
        kept = [row for row in self.rows() if row["step"] <= step]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text("".join(json.dumps(row) + "\n" for row in kept))

    def append(self, report: StepReport, job: str, *, ranks: Mapping[str, int] | None) -> None:
        """Adds a step of a job; `ranks` are given where they changed."""
        result = report.jobs[job]
        row: dict[str, Any] = {
            "step": report.step,
            "loss": result.loss,
            "learning_rate": result.learning_rate,
            "gradient_norm": result.gradient_norm,
            "tokens": report.tokens,
            "seconds": round(report.seconds, 6),
        }
        if job in report.evaluations:
            row["held_out_loss"] = report.evaluations[job]
        if ranks is not None:
            row["ranks"] = dict(ranks)
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def rows(self) -> list[Row]:
        """All rows; a last line that was cut off is left out."""
        if not self.path.exists():
            return []
        lines = self.path.read_text().splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.endswith("\n")]

"""What a run tells those who watch it: where it starts, every step, every checkpoint.

Numbers and names only; knows no tensor, and none of those who watch.
"""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class RunStart:
    """A run whose base is loaded and whose data is read.

    Attributes:
        base_digest: of the base as it is held.
        jobs: their names.
        first_step: how many steps a run before this did.
        max_steps: how many there will be, with those.
    """

    base_digest: str
    jobs: tuple[str, ...]
    first_step: int
    max_steps: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """What a step of one job did.

    Attributes:
        loss: mean over its supervised tokens, in nats.
        learning_rate: the highest of its groups'.
        gradient_norm: before clipping.
        ranks: by module, after it.
    """

    loss: float
    learning_rate: float
    gradient_norm: float
    ranks: Mapping[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    """A step of a run.

    Attributes:
        step: counted from 1.
        tokens: of all jobs.
        seconds: it took.
        seconds_left: until the last step, if the others take as long as those of this run did on average.
        memory_bytes: the most that was ever in use: of the device, on a CPU of the process.
        num_shrinks: how often it ran out of memory and was begun again, to keep less or in smaller pieces.
        jobs: by name, what each job did.
        evaluations: by name, the held-out loss in nats a token, where there was an evaluation.
    """

    step: int
    tokens: int
    seconds: float
    seconds_left: float
    memory_bytes: int
    num_shrinks: int
    jobs: dict[str, StepResult]
    evaluations: dict[str, float]


class RunObserver:
    """Told what a run does, on its thread; what it raises ends the run. Does nothing by itself."""

    def run_started(self, start: RunStart) -> None:
        """Before the first step."""

    def step_finished(self, report: StepReport) -> None:
        """After every step, and its evaluation if it had one."""

    def checkpoint_written(self, step: int, seconds: float) -> None:
        """After the checkpoint of `step` steps, which took so long."""


class Observers(RunObserver):
    """Several, told in turn."""

    def __init__(self, *observers: RunObserver) -> None:
        self._observers = observers

    def run_started(self, start: RunStart) -> None:
        """Tells all of them."""
        for observer in self._observers:
            observer.run_started(start)

    def step_finished(self, report: StepReport) -> None:
        """Tells all of them."""
        for observer in self._observers:
            observer.step_finished(report)

    def checkpoint_written(self, step: int, seconds: float) -> None:
        """Tells all of them."""
        for observer in self._observers:
            observer.checkpoint_written(step, seconds)

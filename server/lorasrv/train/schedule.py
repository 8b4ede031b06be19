"""How large the learning rate is at each step. Knows no optimizer."""

import math

from lorasrv.train.config import Schedule


def learning_rate_factor(schedule: Schedule, step: int, *, max_steps: int, warmup: float) -> float:
    """The part of the highest learning rate that step `step`, counted from 0, takes.

    It rises in the first `warmup` part of all steps, at least to reach 1, and then stays, falls in a line to 0, or
    falls along half a cosine.
    """
    rising = round(warmup * max_steps)
    if step < rising:
        return (step + 1) / rising
    if schedule == "constant":
        return 1.0
    done = (step - rising) / max(1, max_steps - rising)
    return 1.0 - done if schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))

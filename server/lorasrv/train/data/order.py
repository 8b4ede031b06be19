"""In which order examples are learned, and how a step is cut into micro-batches.

Both are functions of the seed and the step alone, so that a run that was interrupted goes on as it would have.
"""

import random
from collections.abc import Sequence
from functools import lru_cache
from typing import TypeVar

from lorasrv.errors import TrainingDataError

Item = TypeVar("Item")


class ExampleOrder:
    """Every example once an epoch, shuffled anew in each; a step goes on where the one before ended."""

    def __init__(self, num_examples: int, *, batch_size: int, seed: int) -> None:
        """Takes how many examples there are, and how many a step takes."""
        self._num_examples = num_examples
        self._batch_size = batch_size
        self._seed = seed
        self._epoch = lru_cache(maxsize=2)(self._shuffled)

    def step(self, step: int) -> list[int]:
        """The examples of a step, counted from 0."""
        places = range(step * self._batch_size, (step + 1) * self._batch_size)
        return [self._epoch(place // self._num_examples)[place % self._num_examples] for place in places]

    def epochs(self, step: int) -> float:
        """Epochs done after `step` steps."""
        return step * self._batch_size / self._num_examples

    def _shuffled(self, epoch: int) -> list[int]:
        # text seeds are hashed the same way in every process and version
        return random.Random(f"{self._seed} {epoch}").sample(range(self._num_examples), self._num_examples)


def micro_batches(items: Sequence[Item], lengths: Sequence[int], *, max_tokens: int) -> list[list[Item]]:
    """Packs items into as few batches of at most `max_tokens` tokens as first-fit-decreasing finds, each in order.

    Raises:
        TrainingDataError: an item alone is longer.
    """
    longest = max(lengths, default=0)
    if longest > max_tokens:
        raise TrainingDataError(
            [f"an example has {longest} tokens, a micro-batch takes {max_tokens}; raise --micro-batch-tokens"]
        )
    batches: list[list[int]] = []
    room: list[int] = []
    for place in sorted(range(len(items)), key=lambda place: (-lengths[place], place)):
        fitting = next((index for index, free in enumerate(room) if free >= lengths[place]), None)
        if fitting is None:
            fitting = len(batches)
            batches.append([])
            room.append(max_tokens)
        batches[fitting].append(place)
        room[fitting] -= lengths[place]
    return [[items[place] for place in sorted(batch)] for batch in batches]

"""Every example once an epoch, in an order that the seed decides; micro-batches hold what a step holds."""

import pytest
from lorasrv.errors import TrainingDataError
from lorasrv.train.data.order import ExampleOrder, micro_batches


@pytest.mark.parametrize(("examples", "batch"), [(10, 3), (3, 10), (7, 7), (1, 1)])
def test_every_example_once_an_epoch(examples: int, batch: int) -> None:
    order = ExampleOrder(examples, batch_size=batch, seed=1)
    taken = [place for step in range(3 * examples) for place in order.step(step)]
    epochs = [taken[start : start + examples] for start in range(0, 3 * examples * batch, examples)]
    assert all(sorted(epoch) == list(range(examples)) for epoch in epochs)
    assert order.epochs(examples) == batch


def test_the_seed_and_the_epoch_decide_the_order() -> None:
    first, again, other = (ExampleOrder(50, batch_size=50, seed=seed) for seed in (1, 1, 2))
    assert first.step(3) == again.step(3)
    assert first.step(3) != other.step(3)
    assert first.step(3) != first.step(4)


def test_micro_batches_hold_everything_once_within_their_room() -> None:
    lengths = [5, 9, 1, 7, 3, 10, 2, 2]
    batches = micro_batches("abcdefgh", lengths, max_tokens=10)
    assert sorted("".join(map("".join, batches))) == list("abcdefgh")
    sizes = dict(zip("abcdefgh", lengths, strict=True))
    assert all(sum(sizes[item] for item in batch) <= 10 for batch in batches)
    assert len(batches) == 4


def test_an_item_beyond_the_room() -> None:
    with pytest.raises(TrainingDataError, match="an example has 11 tokens, a micro-batch takes 10"):
        micro_batches("ab", [11, 2], max_tokens=10)

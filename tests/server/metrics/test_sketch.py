"""The sketch that finds the heaviest adapters."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st
from lorasrv.metrics.adapters import SpaceSaving

streams = st.lists(st.tuples(st.sampled_from("abcdefghij"), st.integers(1, 9)), max_size=60)


@given(streams, st.integers(1, 6))
def test_never_overstates_and_keeps_the_heavy(stream, capacity):
    sketch = SpaceSaving(capacity)
    true: Counter[str] = Counter()
    kept: set[str] = set()
    for item, weight in stream:
        kept.add(item)
        kept.discard(sketch.add(item, weight))
        true[item] += weight
    assert len(kept) <= capacity
    assert all(sketch.lower_bound(item) <= true[item] for item in true)
    assert {item for item in true if true[item] > true.total() / capacity} <= kept


def test_is_exact_while_everything_fits():
    sketch = SpaceSaving(2)
    for item in "aab":
        assert sketch.add(item, 2) is None
    assert (sketch.lower_bound("a"), sketch.lower_bound("b"), sketch.lower_bound("c")) == (4, 2, 0)
    sketch.remove("a")
    assert sketch.add("c", 1) is None
    assert sketch.lower_bound("a") == 0


def test_a_newcomer_inherits_the_weight_of_the_one_it_displaces():
    sketch = SpaceSaving(2)
    sketch.add("a", 5)
    sketch.add("b", 4)
    assert sketch.add("c", 2) == "b"
    # "c" may weigh up to 6 now, of which 2 are certain, so "a" is the lightest
    assert sketch.lower_bound("c") == 2
    assert sketch.add("d", 1) == "a"

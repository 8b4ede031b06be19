"""Patterns mean what PEFT's own matching functions say, or are refused."""

from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lorasrv_adapters.patterns import PatternError, PatternTable, Targets

peft_matching = pytest.importorskip("peft.tuners.tuners_utils")
peft_other = pytest.importorskip("peft.utils.other")

NAMES = [f"model.layers.{layer}.{part}" for layer in (0, 1, 10) for part in ("self_attn.q_proj", "mlp.up_proj")]
PIECES = [
    "model",
    "layers",
    ".",
    r"\.",
    "0",
    "1",
    "10",
    r"\d+",
    "q_proj",
    "up_proj",
    ".*",
    "(q|up)_proj",
    "[01]",
    "^",
    "$",
    "mlp",
    "|",
]

patterns = st.lists(st.sampled_from(PIECES), min_size=1, max_size=6).map("".join).filter(lambda text: "||" not in text)
endings = st.sampled_from(["q_proj", "up_proj", "mlp.up_proj", "proj", "layers.0.mlp.up_proj", NAMES[0], ".q_proj", ""])
selections = patterns | st.lists(endings, max_size=3).map(tuple)


@settings(deadline=None)
@given(table=st.lists(st.tuples(patterns, st.integers(1, 9)), max_size=4, unique_by=lambda row: row[0]))
def test_tables_agree_with_peft(table: list[tuple[str, int]]) -> None:
    ours = PatternTable(table)
    for name in NAMES:
        key = peft_other.get_pattern_key(list(dict(table)), name)
        assert ours.find(name, 0) == dict(table).get(key, 0)


@settings(deadline=None)
@given(
    include=selections,
    exclude=selections | st.just(()),
    layers=st.lists(st.sampled_from([0, 1, 2, 10]), max_size=2).map(tuple),
    layers_pattern=st.lists(st.sampled_from(["layers", "h", "(h|layers)"]), max_size=2).map(tuple),
    saved=st.lists(st.sampled_from(["q_proj", "mlp", "proj", r"layers\.1", "up|q"]), max_size=2).map(tuple),
)
def test_targets_agree_with_peft(
    include: str | tuple[str, ...],
    exclude: str | tuple[str, ...],
    layers: tuple[int, ...],
    layers_pattern: tuple[str, ...],
    saved: tuple[str, ...],
) -> None:
    if isinstance(include, str):
        layers, layers_pattern = (), ()
    config = SimpleNamespace(
        target_modules=include,
        exclude_modules=exclude,
        layers_to_transform=list(layers) or None,
        layers_pattern=list(layers_pattern),
        target_parameters=None,
        modules_to_save=list(saved) or None,
    )
    targets = Targets(include=include, exclude=exclude, layers=layers, layers_pattern=layers_pattern, saved=saved)
    expected = {name for name in NAMES if peft_matching.check_target_module_exists(config, name)}
    assert targets.select(NAMES, all_linear=()) == expected


@pytest.mark.parametrize("spelling", ["all-linear", "ALL-LINEAR"])
def test_all_linear_is_every_linear_layer(spelling: str) -> None:
    names, linear = [*NAMES, "lm_head", "model.norm"], NAMES
    assert Targets(include=spelling).select(names, all_linear=linear) == set(NAMES)
    assert Targets(include=spelling, exclude=("q_proj",)).select(names, all_linear=linear) == {
        name for name in NAMES if "mlp" in name
    }


def test_patterns_that_take_exponential_time_in_python_take_none_here() -> None:
    targets = Targets(include=r"(.*)*\.zz")
    assert targets.select(["model.layers.0.self_attn.rotary.q_proj" * 3], all_linear=()) == frozenset()


@pytest.mark.parametrize(
    "pattern", ["(", "a" * 1025, r"(?=q)q", r"(q)\1", "[[:alpha:]]", "[a--b]", "a{1000}{1000}", r"\Qq", "\ud800"]
)
def test_patterns_whose_meaning_cannot_be_kept_are_refused(pattern: str) -> None:
    with pytest.raises(PatternError):
        PatternTable([(pattern, 1)])
    with pytest.raises(PatternError):
        Targets(include=pattern)


def test_endless_tables_are_refused() -> None:
    with pytest.raises(PatternError, match="3000 patterns"):
        PatternTable([(f"p{index}", 1) for index in range(3000)])

"""Module names against the patterns of an adapter's config, with PEFT's meaning and in linear time.

PEFT's patterns are Python regular expressions, which can take exponential time. Here they run in RE2; what RE2 cannot
parse, or could read differently, is refused. This module knows names and patterns, no tensors.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import re2  # type: ignore[import-untyped]

MAX_PATTERN_CHARS = 1024
"""Longest pattern that is compiled."""

MAX_PATTERNS = 2048
"""Most patterns in one table."""

ALL_LINEAR = "all-linear"
"""Stands for every linear layer of the base."""

# sets that Python reads literally, or warns about, and RE2 may read as classes
_AMBIGUOUS = ("[[", "--", "&&", "~~", "||")


V = TypeVar("V")


class PatternError(ValueError):
    """A pattern is too long, or its meaning cannot be kept."""


@dataclass(frozen=True, slots=True)
class Pattern:
    """One compiled pattern, anchored where its source says so."""

    _compiled: "re2._Regexp"

    def matches(self, name: str) -> bool:
        """Whether the pattern matches from the start of `name`."""
        return self._compiled.match(name) is not None

    def number(self, name: str) -> int | None:
        """The group "index" of a match from the start of `name`, as a number; None without a match."""
        match = self._compiled.match(name)
        return None if match is None else int(str(match.group("index")))


class PatternTable(Generic[V]):
    """`rank_pattern` and `alpha_pattern`: the first pattern that matches decides.

    A pattern matches a whole module name, or its end after a dot (PEFT's `get_pattern_key`).

    Raises:
        PatternError: There are too many patterns, or one of them cannot be compiled.
    """

    def __init__(self, patterns: Sequence[tuple[str, V]]) -> None:
        if len(patterns) > MAX_PATTERNS:
            raise PatternError(f"{len(patterns)} patterns; at most {MAX_PATTERNS} are accepted")
        self._table = [(compile_pattern(key, r"(.*\.)?({})$"), value) for key, value in patterns]

    def find(self, name: str, default: V) -> V:
        """Return the value of the first pattern that matches `name`, or the default."""
        return next((value for pattern, value in self._table if pattern.matches(name)), default)


@dataclass(frozen=True, slots=True, kw_only=True)
class Targets:
    """Which modules a config says the adapter has (PEFT's `check_target_module_exists`).

    Attributes:
        include: Names and dotted name endings, or one regular expression for the whole name, or "all-linear".
        exclude: Names and dotted name endings, or one regular expression for the whole name; it wins.
        layers: Only the decoder layers of these numbers, if any are given; needs a list of names.
        layers_pattern: Patterns for the segment before the layer number; empty: any segment.

    Raises:
        PatternError: A pattern cannot be compiled.
    """

    include: str | tuple[str, ...]
    exclude: str | tuple[str, ...] = ()
    layers: tuple[int, ...] = ()
    layers_pattern: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self.select(())

    def select(self, names: Iterable[str]) -> frozenset[str]:
        """Return the names that PEFT would adapt, given the names of all linear layers."""
        included = _matcher(self.include)
        excluded = _matcher(self.exclude) if self.exclude else lambda _: False
        layers = [compile_pattern(key, r"(?:^|.*?\.){}\.(?P<index>\d+)\.") for key in self.layers_pattern]
        layers = layers or [compile_pattern(r".*?\.[^.]*", r"{}\.(?P<index>\d+)\.")]
        return frozenset(
            name for name in names if included(name) and not excluded(name) and self._in_layers(name, layers)
        )

    def _in_layers(self, name: str, patterns: Sequence[Pattern]) -> bool:
        # PEFT asks for the layer only where a name's ending was matched, not where the whole name is listed
        if not self.layers or name in self.include:
            return True
        numbers = (pattern.number(name) for pattern in patterns)
        return next((number for number in numbers if number is not None), -1) in self.layers


def compile_pattern(source: str, frame: str = "{}") -> Pattern:
    """Compile one pattern of a config inside a frame such as `(.*\\.)?({})$`.

    Raises:
        PatternError: It is too long, Python or RE2 cannot parse it, or they could read it differently.
    """
    if len(source) > MAX_PATTERN_CHARS:
        raise PatternError(f"a pattern of {len(source)} characters; at most {MAX_PATTERN_CHARS} are accepted")
    if any(token in source for token in _AMBIGUOUS):
        raise PatternError(f"pattern {source!r} holds one of {', '.join(_AMBIGUOUS)}, whose meaning is ambiguous")
    framed = frame.replace("{}", source)
    options = re2.Options()
    options.log_errors = False
    try:
        re.compile(framed)
        return Pattern(re2.compile(framed, options))
    except (re.error, re2.error, OverflowError, RecursionError, UnicodeError) as error:
        raise PatternError(f"pattern {source!r} cannot be used: {error}") from error


def _matcher(selection: str | tuple[str, ...]) -> Callable[[str], bool]:
    if isinstance(selection, str):
        if selection.lower() == ALL_LINEAR:
            return lambda _: True
        return compile_pattern(selection, r"(?:{})$").matches
    endings = frozenset(selection)
    return lambda name: any(ending in endings for ending in _endings(name))


def _endings(name: str) -> Iterable[str]:
    """The name itself and every rest of it after a dot."""
    yield name
    for position, character in enumerate(name):
        if character == ".":
            yield name[position + 1 :]

"""Module names against the patterns of an adapter's config, with PEFT's meaning and in linear time.

PEFT's patterns are Python regular expressions, which can take exponential time. Here they run in RE2, and only those
written in the part of the syntax that both engines read alike; the rest is refused. This module knows names and
patterns, no tensors.
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

MAX_PATTERN_BYTES = 1 << 16
"""Memory of one compiled pattern; the names of all modules of a layer, spelled out, take a quarter."""

MAX_TABLE_INSTRUCTIONS = 1 << 17
"""RE2 instructions of one table's patterns together; a module's full name takes about 80."""

ALL_LINEAR = "all-linear"
"""Stands for every linear layer of the base."""

# Python and RE2 differ in: {,n}, {01}, [[:alpha:]], \12, \B, possessive and repeated quantifiers, inline flags,
# beyond ASCII, and in group names that stand twice
_COMMON_SYNTAX = re.compile(
    r"""(?:
        (?: [A-Za-z0-9_ \-:=@/,;<>~!%&'"`#.]
          | \\[dDwWsS.\-\\^$|?*+()\[\]{}/]
          | \[\^?-? (?: \\[dDwWsS] | CHARACTER(?:-CHARACTER)? )* -?\]
          | \)
        ) (?: (?:[*+?]|\{(?:0|[1-9][0-9]*)(?:,(?:0|[1-9][0-9]*)?)?\}) \?? )?
      | \( (?:\?:)?
      | [\^$|]
      | \\[bA]
    )*+""".replace("CHARACTER", r"(?:[A-Za-z0-9_ .:@/,^$?*+()|]|\\[.\-\\^\]\[])"),
    re.VERBOSE,
)

# names, and dots that match any character
_LITERAL = re.compile(r"[\w.]*", re.ASCII)

V = TypeVar("V")


class PatternError(ValueError):
    """A pattern is too long, or its meaning cannot be kept."""


@dataclass(frozen=True, slots=True)
class Pattern:
    """One compiled pattern, anchored where its source says so."""

    _compiled: "re2._Regexp"

    @property
    def num_instructions(self) -> int:
        """Its size once compiled; matching a name takes at most this many steps for each character."""
        return int(self._compiled.programsize)

    def matches(self, name: str) -> bool:
        """Whether the pattern matches from the start of `name`."""
        return self._compiled.match(name) is not None

    def covers(self, name: str) -> bool:
        """Whether the pattern matches all of `name`."""
        return self._compiled.fullmatch(name) is not None

    def number(self, name: str) -> int | None:
        """The group "idx" of a match from the start of `name`, -1 if it takes no part; None without a match."""
        match = self._compiled.match(name)
        return None if match is None else int(str(match.group("idx") or -1))


class PatternTable(Generic[V]):
    """`rank_pattern` and `alpha_pattern`: the first pattern that matches decides.

    A pattern matches a whole module name, or its end after a dot (PEFT's `get_pattern_key`).

    Raises:
        PatternError: There are too many patterns, or one of them cannot be compiled.
    """

    def __init__(self, patterns: Sequence[tuple[str, V]]) -> None:
        compiled = compile_patterns([key for key, _ in patterns], r"(.*\.)?({})$")
        self._rows: dict[str, list[_Row[V]]] = {}
        for place, ((key, value), pattern) in enumerate(zip(patterns, compiled, strict=True)):
            self._rows.setdefault(_literal_tail(key), []).append(_Row(place, key, pattern, value))

    def unmatched(self, names: Iterable[str]) -> list[str]:
        """Return the keys that match none of these names."""
        found: list[_Row[V]] = []
        names = tuple(names)
        for tail, rows in self._rows.items():
            candidates = [name for name in names if name.endswith(tail)]
            found += [row for row in rows if not any(map(row.pattern.matches, candidates))]
        return [row.key for row in sorted(found, key=lambda row: row.place)]

    def find(self, name: str, default: V) -> V:
        """Return the value of the first pattern that matches `name`, or the default."""
        firsts = [
            row
            for tail, rows in self._rows.items()
            if name.endswith(tail) and (row := next((row for row in rows if row.pattern.matches(name)), None))
        ]
        return min(firsts, key=lambda row: row.place).value if firsts else default


@dataclass(frozen=True, slots=True)
class _Row(Generic[V]):
    place: int
    key: str
    pattern: Pattern
    value: V


def _literal_tail(key: str) -> str:
    """What every name that a key matches ends with; only names that do are compared, which for keys that spell out all
    modules of a large base is a small part."""
    return key.rpartition(".")[2] if _LITERAL.fullmatch(key) else ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Targets:
    """Which modules a config says the adapter has (PEFT's `check_target_module_exists`).

    Attributes:
        include: Names and dotted name endings, or one regular expression for the whole name, or "all-linear".
        exclude: Names and dotted name endings, or one regular expression for the whole name; it wins.
        layers: Only the decoder layers of these numbers, if any are given; needs a list of names.
        layers_pattern: Patterns for the segment before the layer number; empty: any segment.
        saved: `modules_to_save`: a module that one of these patterns matches as a segment of its name is not adapted,
            and one whose name ends with one of these texts is replaced as a whole.

    Raises:
        PatternError: A pattern cannot be compiled.
    """

    include: str | tuple[str, ...]
    exclude: str | tuple[str, ...] = ()
    layers: tuple[int, ...] = ()
    layers_pattern: tuple[str, ...] = ()
    saved: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self.select((), all_linear=())

    @property
    def are_all_linear(self) -> bool:
        """Whether every linear layer is meant, whatever its name."""
        return isinstance(self.include, str) and self.include.lower() == ALL_LINEAR

    def names_one_of(self, names: Iterable[str]) -> bool:
        """Whether the targets name one of these modules, by the last segment of a name or by the whole expression."""
        if isinstance(self.include, str):
            return any(map(compile_pattern(self.include).covers, names))
        return not {target.rpartition(".")[2] for target in self.include}.isdisjoint(names)

    def excluded(self, names: Iterable[str]) -> frozenset[str]:
        """Return the names that are never adapted."""
        return frozenset(filter(self._excluded(), names))

    def replaced(self, names: Iterable[str]) -> frozenset[str]:
        """Return the names of modules that `modules_to_save` brings as a whole."""
        return frozenset(name for name in names if name.endswith(self.saved)) if self.saved else frozenset()

    def select(self, names: Iterable[str], *, all_linear: Iterable[str]) -> frozenset[str]:
        """Return the names that PEFT would adapt.

        Args:
            names: Names of modules.
            all_linear: What "all-linear" stands for.
        """
        included = frozenset(all_linear).__contains__ if self.are_all_linear else _matcher(self.include)
        excluded = self._excluded()
        in_layers = self._layer_matcher() if self.layers else lambda _: True
        return frozenset(name for name in names if included(name) and not excluded(name) and in_layers(name))

    def _excluded(self) -> Callable[[str], bool]:
        by_key = _matcher(self.exclude) if self.exclude else lambda _: False
        saved = compile_patterns(self.saved, r"(^|.*\.){}($|\..*)")
        return lambda name: by_key(name) or any(pattern.matches(name) for pattern in saved)

    def _layer_matcher(self) -> Callable[[str], bool]:
        patterns = compile_patterns(self.layers_pattern, r"(?:^|.*?\.){}\.(?P<idx>\d+)\.")
        patterns = patterns or compile_patterns([r".*?\.[^.]*"], r"{}\.(?P<idx>\d+)\.")
        layers, listed = frozenset(self.layers), frozenset(self.include)

        def matches(name: str) -> bool:
            # PEFT asks for the layer only where a name's ending was matched, not where the whole name is listed
            if name in listed:
                return True
            numbers = (pattern.number(name) for pattern in patterns)
            return next((number for number in numbers if number is not None), -1) in layers

        return matches


def compile_patterns(sources: Sequence[str], frame: str) -> list[Pattern]:
    """Compile the patterns of one table, each inside the frame.

    Raises:
        PatternError: There are too many, they are too large together, or one of them cannot be compiled.
    """
    if len(sources) > MAX_PATTERNS:
        raise PatternError(f"{len(sources)} patterns; at most {MAX_PATTERNS} are accepted")
    patterns: list[Pattern] = []
    num_instructions = 0
    for source in sources:
        patterns.append(compile_pattern(source, frame))
        num_instructions += patterns[-1].num_instructions
        if num_instructions > MAX_TABLE_INSTRUCTIONS:
            raise PatternError(f"the patterns up to {source!r} are too large together")
    return patterns


def compile_pattern(source: str, frame: str = "{}") -> Pattern:
    """Compile one pattern of a config inside a frame such as `(.*\\.)?({})$`.

    Raises:
        PatternError: It is too long or too large, RE2 cannot parse it, or Python could read it differently.
    """
    if len(source) > MAX_PATTERN_CHARS:
        raise PatternError(f"a pattern of {len(source)} characters; at most {MAX_PATTERN_CHARS} are accepted")
    if not _COMMON_SYNTAX.fullmatch(source):
        raise PatternError(f"pattern {source!r} is written in syntax that is not supported")
    options = re2.Options()
    options.log_errors = False
    options.max_mem = MAX_PATTERN_BYTES
    try:
        return Pattern(re2.compile(frame.replace("{}", source), options))
    except re2.error as error:
        raise PatternError(f"pattern {source!r} cannot be used: {error}") from error


def _matcher(selection: str | tuple[str, ...]) -> Callable[[str], bool]:
    if isinstance(selection, str):
        return compile_pattern(selection).covers
    endings = frozenset(selection)
    return lambda name: any(ending in endings for ending in _endings(name))


def _endings(name: str) -> Iterable[str]:
    """The name itself and every rest of it after a dot."""
    yield name
    for position, character in enumerate(name):
        if character == ".":
            yield name[position + 1 :]

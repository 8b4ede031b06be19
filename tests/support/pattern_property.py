"""What must hold of any pattern: refused, or read as Python reads it inside PEFT's frames, in bounded time."""

import re
import warnings

from lorasrv_adapters.patterns import MAX_PATTERN_BYTES, PatternError, PatternTable, Targets, compile_pattern

NAMES = ["", "q", "a.q", "h.1.q", "h.10.a.q", "x.h.0.q_1", "aaaa.1", "h-1.Q", "[:a].1", "x{,3}", "x{01}", "a1]", "\t2 "]
"""Short, because Python's engine may take exponential time in them."""

TOKENS = [
    *"aqhx01_.-|^$()[]{}*+?,:\\& ~#",
    *(rf"\{letter}" for letter in "dDwWsSbBAZzQEpCnt017.-[{_x"),
    *("(?:", "(?P<idx>", "(?P<n>", "(?i)", "(?i:", "(?=", "(?<=", "(?>", "(?#", "(?P=n)", ")*", ")+?", "){2}", "){,2}"),
    *("{0}", "{2}", "{,3}", "{01}", "{2,}", "{1,2}?", "{1001}", ".*", ".*?", "a*+", "a++", "a|", "||", "()"),
    *(
        "[a-q]",
        "[^a]",
        "[]a]",
        "[^]a]",
        "[[:alpha:]]",
        "[^[:alpha:]]",
        "[a[:digit:]]",
        "[:digit:]",
        r"[\w-x]",
        r"[a-\d]",
    ),
    *(
        "[a-]",
        "[-a]",
        "[a--b]",
        "[a&&b]",
        "[^-.]",
        r"[\d.]",
        r"\12",
        "(a)" * 12 + r"\12",
        "layers",
        r"\.",
        "é",
        "\u212a",
    ),
]
"""Pieces of patterns: what both engines know, and everything that only one knows or that they read differently."""

SEEDS = [token.encode() for token in TOKENS] + [
    rb".*layers\.[01]\..*(q|up)",
    rb"(.*)*\.zz",
    rb"model\.h\.\d+\.(q|a\.q)",
]

_MOST_INSTRUCTIONS = MAX_PATTERN_BYTES // 16


def check_pattern(source: str) -> bool:
    """Check a pattern in every place where a config can have one; returns whether any place accepts it."""
    try:
        compiled = compile_pattern(source)
    except PatternError:
        compiled = None
    else:
        # RE2 takes at most this many steps for a character of a name
        assert compiled.num_instructions <= _MOST_INSTRUCTIONS
    comparable = len(re.findall(r"[*+{?]", source)) <= 4
    accepted = [check(source, comparable) for check in (_check_table, _check_whole, _check_layers)]
    assert compiled is not None or not any(accepted[1:2])
    return any(accepted)


def _check_table(source: str, comparable: bool) -> bool:
    try:
        table = PatternTable([(source, 1)])
    except PatternError:
        return False
    theirs = _python(rf"(.*\.)?({source})$")
    for name in NAMES if comparable else ():
        assert table.find(name, 0) == (theirs.match(name) is not None), (source, name)
    return True


def _check_whole(source: str, comparable: bool) -> bool:
    if not source or source.lower() == "all-linear":
        return False
    try:
        targets = Targets(include=source)
    except PatternError:
        return False
    theirs = _python(source)
    if comparable:
        assert targets.select(NAMES, all_linear=NAMES) == {name for name in NAMES if theirs.fullmatch(name)}, source
    return True


def _check_layers(source: str, comparable: bool) -> bool:
    try:
        targets = Targets(include=("q", "a.q"), layers=(1, 10), layers_pattern=(source,))
    except PatternError:
        return False
    theirs = _python(rf"(?:^|.*?\.){source}\.(?P<idx>\d+)\.")
    if comparable:
        candidates = {name for name in NAMES if name in ("q", "a.q") or name.endswith((".q", ".a.q"))}
        expected = {"q", "a.q"} | {
            name for name in candidates if (match := theirs.match(name)) and match["idx"] in ("1", "10")
        }
        assert targets.select(NAMES, all_linear=NAMES) == expected, source
    return True


def _python(pattern: str) -> re.Pattern[str]:
    """What we accept, Python must accept: PEFT would stop with an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return re.compile(pattern)

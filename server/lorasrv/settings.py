"""What one configuration value is: its names, how it is read from text, and its help.

A frozen dataclass declares its fields with `setting()`; the command line, the environment and the YAML file are all
derived from that one declaration. The module does not know which settings exist, nor where their values come from.
"""

import math
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

Parse = Callable[[object], object]


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One configuration value, however it is given.

    Attributes:
        name: The dataclass field it fills.
        key: The YAML key; `--key-with-dashes` is the flag and `LORASRV_KEY` the environment variable.
        help: One sentence with the unit.
        metavar: The word that stands for the value in the help page; empty for a switch.
        parse: Text (flag, environment) or a YAML value to the field's value; raises ValueError with what was expected.
        repeated: Given any number of times as a flag, as a list in YAML, comma separated in the environment.
        positional: Given without a flag name on the command line.
        default: The field's default.
    """

    name: str
    key: str
    help: str
    metavar: str
    parse: Parse
    repeated: bool
    positional: bool
    default: object

    @property
    def flag(self) -> str:
        """`--max-rank` for the key `max_rank`."""
        return "--" + self.key.replace("_", "-")

    @property
    def variable(self) -> str:
        """`LORASRV_MAX_RANK` for the key `max_rank`."""
        return "LORASRV_" + self.key.upper()

    def read(self, value: object) -> object:
        """Turn a YAML value or a text into the field's value.

        Raises:
            ValueError: The value is not of the kind expected; the text says which kind is.
        """
        if not self.repeated:
            return self.parse(value)
        return tuple(self.parse(item) for item in _items(value))


def setting(
    default: object,
    parse: Parse,
    help: str,
    *,
    metavar: str = "",
    key: str = "",
    repeated: bool = False,
    positional: bool = False,
) -> Any:
    """Declare a dataclass field that is also a flag, a YAML key and an environment variable (see `Setting`)."""
    options = {
        "help": help,
        "metavar": metavar,
        "parse": parse,
        "key": key,
        "repeated": repeated,
        "positional": positional,
    }
    return field(default=default, metadata=options)


def settings_of(config_class: type) -> tuple[Setting, ...]:
    """The settings that a dataclass declares, in its order."""
    return tuple(
        Setting(
            name=entry.name,
            default=entry.default,
            key=entry.metadata["key"] or entry.name,
            **{name: entry.metadata[name] for name in ("help", "metavar", "parse", "repeated", "positional")},
        )
        for entry in fields(config_class)
    )


def integer(value: object) -> int:
    """A whole number, as an int or as text."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, str) and re.fullmatch(r"\s*[+-]?\d+\s*", value):
        return int(value)
    raise ValueError(f"expected a whole number, got {value!r}")


def number(value: object) -> float:
    """A finite number; `2e-4` is one in YAML too, where it is read as text."""
    if isinstance(value, str):
        with suppress(ValueError):
            value = float(value)
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    raise ValueError(f"expected a number, got {value!r}")


def seconds(value: object) -> float:
    """A number of seconds; `30`, `2.5` and `30s` are the same kind."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, str) and (match := re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*s?\s*", value)):
        return float(match[1])
    raise ValueError(f"expected a number of seconds, got {value!r}")


_UNITS: dict[str, int] = {"": 1, "B": 1} | {
    f"{letter}{suffix}": int(base**power)
    for power, letter in enumerate("KMGT", start=1)
    for suffix, base in (("B", 1000), ("IB", 1024))
}


def size(value: object) -> int:
    """A size in bytes: a whole number, or text such as `512MiB` (1024 based) or `2GB` (1000 based)."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, str) and (match := re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", value)):
        scale = _UNITS.get(match[2].upper())
        if scale is not None and not ("." in match[1] and scale == 1):
            return round(float(match[1]) * scale) if "." in match[1] else int(match[1]) * scale
    raise ValueError(f"expected a size in bytes such as 512MiB, 2GB or 1048576, got {value!r}")


def text(value: object) -> str:
    """Text that is not empty."""
    if isinstance(value, str) and value:
        return value
    raise ValueError(f"expected text, got {value!r}")


def folder(value: object) -> Path:
    """A path; `~` is the home folder, and a relative path starts in the working folder."""
    return Path(text(value)).expanduser().absolute()


def switch(value: object) -> bool:
    """True or false; as text one of true, false, yes, no, on, off, 1, 0."""
    if isinstance(value, bool):
        return value
    word = str(value).strip().lower()
    if word in ("true", "yes", "on", "1"):
        return True
    if word in ("false", "no", "off", "0"):
        return False
    raise ValueError(f"expected true or false, got {value!r}")


def choice(*words: str) -> Parse:
    """One of a few words."""

    def parse(value: object) -> str:
        # YAML 1.1 reads an unquoted on or off as a truth value.
        word = {True: "on", False: "off"}[value] if isinstance(value, bool) else value
        if word in words:
            return str(word)
        raise ValueError(f"expected one of {', '.join(words)}, got {value!r}")

    return parse


def pair(value: object) -> tuple[str, str]:
    """`ID=SOURCE`, as an adapter is named on the command line."""
    name, sign, source = str(value).partition("=")
    if isinstance(value, str) and sign and name.strip() and source.strip():
        return name.strip(), source.strip()
    raise ValueError(f"expected ID=SOURCE, got {value!r}")


def by_pattern(parse: Parse) -> Parse:
    """`REGEX=VALUE`: a value for the modules that an expression matches."""

    def parse_pair(value: object) -> tuple[str, object]:
        pattern, sign, rest = str(value).rpartition("=")
        if isinstance(value, str) and sign and pattern:
            return pattern, parse(rest)
        raise ValueError(f"expected REGEX=VALUE, got {value!r}")

    return parse_pair


def _items(value: object) -> list[object]:
    """The items of a repeated setting: a YAML list or mapping, or comma separated text."""
    if isinstance(value, str):
        return [item.strip() for item in value.split(",") if item.strip()]
    if isinstance(value, Mapping):
        return [f"{name}={source}" for name, source in value.items()]
    if isinstance(value, list | tuple):
        return list(value)
    raise ValueError(f"expected a list, got {value!r}")

"""Typed, bounded reading of an untrusted JSON object, which collects every reason instead of stopping at the first.

It knows JSON types and limits; it knows no key.
"""

import json
import math
from collections import Counter
from collections.abc import Callable, Mapping
from itertools import islice
from typing import TypeGuard, TypeVar

from lorasrv_adapters.errors import AdapterCorruptError

MAX_JSON_BYTES = 1 << 20
MAX_JSON_DEPTH = 16
MAX_JSON_CONTAINERS = 20_000
MAX_TEXT_CHARS = 4096
MAX_ITEMS = 20_000

V = TypeVar("V")


def parse_json(content: bytes, name: str) -> object:
    """Decode JSON within limits: 1 MiB, 16 levels, 20 000 lists and objects, no duplicate keys, no NaN or Infinity.

    Args:
        content: The bytes.
        name: What the bytes are, for messages.

    Raises:
        AdapterCorruptError: The content is no JSON, or is beyond the limits.
    """
    if len(content) > MAX_JSON_BYTES:
        raise AdapterCorruptError([f"{name} has {len(content)} bytes; at most {MAX_JSON_BYTES} are accepted"])
    if content.count(b"[") + content.count(b"{") > MAX_JSON_CONTAINERS:
        raise AdapterCorruptError([f"{name} holds more than {MAX_JSON_CONTAINERS} lists and objects"])
    try:
        # UTF-8 only, where json.loads on bytes would also take UTF-16 and UTF-32
        value = json.loads(content.decode(), object_pairs_hook=unique_keys, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise AdapterCorruptError([f"{name} is not valid JSON: {error}"]) from error
    if _depth_exceeds(value, MAX_JSON_DEPTH):
        raise AdapterCorruptError([f"{name} is nested deeper than {MAX_JSON_DEPTH} levels"])
    return value


def unique_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """Build an object, refusing duplicate keys (a hook for `json.loads`)."""
    result = dict(pairs)
    if len(result) != len(pairs):
        key, count = Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f"duplicate key {key[:200]!r}, {count} times")
    return result


def is_live(value: object) -> bool:
    """Whether a config value switches something on: anything but null, false and empty."""
    return value is not None and value is not False and value not in ({}, [], "")


class Fields:
    """The fields of one JSON object.

    Attributes:
        raw: The object.
        reasons: Everything found wrong so far, one sentence each.
        valid: False once a value could not be read, so that a default stands in its place.
    """

    def __init__(self, raw: Mapping[str, object], name: str) -> None:
        self.raw = raw
        self.reasons: list[str] = []
        self.valid = True
        self._name = name

    def refuse(self, key: str, reason: str) -> None:
        """Note that the key's value cannot be honoured."""
        self.reasons.append(f"{self._name}: {ascii(key[:80])[1:-1]}={_brief(self.raw.get(key))}: {reason}")

    def flag(self, key: str) -> bool:
        """Return a boolean; absent or null is false."""
        value = self.raw.get(key)
        if value is None or isinstance(value, bool):
            return bool(value)
        return self._invalid(key, "must be true or false", False)

    def integer(self, key: str, *, default: int, low: int, high: int) -> int:
        """Return an integer within bounds; absent is the default."""
        value = self.raw.get(key, default)
        if _is_integer(value, low, high):
            return value
        return self._invalid(key, f"must be an integer from {low} to {high}", default)

    def number(self, key: str, *, default: float) -> float:
        """Return a finite number; absent is the default."""
        value = self.raw.get(key, default)
        if _is_number(value):
            return float(value)
        return self._invalid(key, "must be a finite number", default)

    def text(self, key: str) -> str:
        """Return a string; absent or null is empty."""
        value = self.raw.get(key)
        if value is None:
            return ""
        if isinstance(value, str) and len(value) <= MAX_TEXT_CHARS:
            return value
        return self._invalid(key, f"must be a string of at most {MAX_TEXT_CHARS} characters", "")

    def texts(self, key: str) -> str | tuple[str, ...]:
        """Return one string or several; absent or null is none."""
        value = self.raw.get(key)
        if isinstance(value, str):
            return value
        if value is None:
            return ()
        if isinstance(value, list) and len(value) <= MAX_ITEMS and all(isinstance(item, str) for item in value):
            return tuple(value)
        return self._invalid(key, f"must be a string or a list of at most {MAX_ITEMS} strings", ())

    def integers(self, key: str) -> tuple[int, ...]:
        """Return one non-negative integer or several; absent or null is none."""
        value = self.raw.get(key)
        items = value if isinstance(value, list) else [] if value is None else [value]
        if len(items) <= MAX_ITEMS and all(_is_integer(item, 0, 1 << 31) for item in items):
            return tuple(items)
        return self._invalid(key, f"must be a non-negative integer or a list of at most {MAX_ITEMS}", ())

    def integer_table(self, key: str, *, low: int, high: int) -> tuple[tuple[str, int], ...]:
        """Return an object of bounded integers as pairs in the file's order; absent or null is none."""
        return self._table(
            key, lambda item: _is_integer(item, low, high), int, f"must map names to integers from {low} to {high}"
        )

    def number_table(self, key: str) -> tuple[tuple[str, float], ...]:
        """Return an object of finite numbers as pairs in the file's order; absent or null is none."""
        return self._table(key, _is_number, float, "must map names to finite numbers")

    def mask_table(self, key: str, length: int) -> tuple[tuple[str, tuple[bool, ...]], ...]:
        """Return an object of lists of `length` booleans as pairs in the file's order; absent or null is none."""
        return self._table(
            key, lambda item: _is_mask(item, length), _mask, f"must map names to lists of {length} booleans"
        )

    def integers_table(self, key: str) -> tuple[tuple[str, tuple[int, ...]], ...]:
        """Return an object of lists of non-negative integers as pairs in the file's order; absent or null is none."""
        return self._table(
            key,
            lambda item: isinstance(item, list) and all(_is_integer(id_, 0, 1 << 31) for id_ in item),
            tuple,
            "must map names to lists of non-negative integers",
        )

    def _table(
        self, key: str, accepts: Callable[[object], bool], convert: Callable[..., V], rule: str
    ) -> tuple[tuple[str, V], ...]:
        value = self.raw.get(key)
        if value is None:
            return ()
        if isinstance(value, Mapping) and len(value) <= MAX_ITEMS and all(map(accepts, value.values())):
            return tuple((str(name), convert(item)) for name, item in value.items())
        return self._invalid(key, f"{rule}, at most {MAX_ITEMS}", ())

    def _invalid(self, key: str, reason: str, default: V) -> V:
        self.valid = False
        self.refuse(key, reason)
        return default


def _is_integer(value: object, low: int, high: int) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _is_number(value: object) -> TypeGuard[int | float]:
    # an integer beyond the floats would overflow in isfinite
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) <= 1e300 if isinstance(value, int) else math.isfinite(value)


def _is_mask(value: object, length: int) -> TypeGuard[list[bool]]:
    return isinstance(value, list) and len(value) == length and all(isinstance(item, bool) for item in value)


def _mask(value: list[bool]) -> tuple[bool, ...]:
    return tuple(value)


def _brief(value: object) -> str:
    # no more of it than can be shown
    if isinstance(value, Mapping):
        value = dict(islice(value.items(), 80))
    elif isinstance(value, str | list):
        value = value[:80]
    text = json.dumps(value, default=str)
    return text if len(text) <= 80 else text[:77] + "..."


def _refuse_constant(name: str) -> object:
    raise ValueError(f"{name} is not a JSON number")


def _depth_exceeds(value: object, limit: int) -> bool:
    level: list[object] = [value]
    for _ in range(limit):
        level = [
            child
            for item in level
            if isinstance(item, dict | list)
            for child in (item.values() if isinstance(item, dict) else item)
        ]
        if not level:
            return False
    return any(isinstance(item, dict | list) for item in level)

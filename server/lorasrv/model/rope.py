"""Rotary position settings of a `config.json`, in the spellings of transformers 4 and 5.

Knows the keys and what they mean; the tables are computed in `lorasrv.model.layers`.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

RopeKind = Literal["default", "linear", "llama3"]

_LLAMA3_KEYS = ("factor", "low_freq_factor", "high_freq_factor")
_KEYS = {
    "default": ("rope_theta",),
    "linear": ("rope_theta", "factor"),
    "llama3": ("rope_theta", *_LLAMA3_KEYS, "original_max_position_embeddings"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeConfig:
    """How positions become angles. `factor` and what follows it matter only for the kinds that use them."""

    kind: RopeKind = "default"
    theta: float = 10000.0
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


def parse_rope(raw: Mapping[str, Any], *, max_position_embeddings: int, reasons: list[str]) -> RopeConfig:
    """Reads `rope_theta` with `rope_scaling` (transformers 4) or `rope_parameters` (transformers 5).

    Args:
        raw: the whole `config.json`.
        max_position_embeddings: stands in where `original_max_position_embeddings` is absent.
        reasons: everything that cannot be honoured is appended here.
    """
    old, new = raw.get("rope_scaling") or {}, raw.get("rope_parameters") or {}
    if not isinstance(old, Mapping) or not isinstance(new, Mapping):
        reasons.append("rope_scaling and rope_parameters must be objects")
        return RopeConfig()
    if old and new and any(new[key] != value for key, value in old.items() if key in new):
        reasons.append("rope_scaling and rope_parameters contradict each other; keep one of them")
    values = {"rope_theta": raw.get("rope_theta", 10000.0), **new, **old}
    kind = values.pop("rope_type", None) or values.pop("type", None) or "default"
    values.pop("type", None)
    if kind not in _KEYS:
        reasons.append(f"rope type {json.dumps(kind)} is not served; default, linear and llama3 are")
        return RopeConfig()
    if kind == "llama3":
        values.setdefault("original_max_position_embeddings", max_position_embeddings)
    _check_keys(kind, values, reasons)
    numbers = {key: values[key] for key in _KEYS[kind] if _is_positive(values.get(key))}
    theta = float(numbers.pop("rope_theta", 10000.0))
    original = int(numbers.pop("original_max_position_embeddings", 8192))
    factors = {key: float(value) for key, value in numbers.items()}
    known = cast(RopeKind, kind)
    return RopeConfig(kind=known, theta=theta, original_max_position_embeddings=original, **factors)


def _check_keys(kind: str, values: Mapping[str, Any], reasons: list[str]) -> None:
    inert = {"partial_rotary_factor": 1, "attention_factor": 1}
    for key, value in values.items():
        if key not in _KEYS[kind] and value is not None and inert.get(key) != value:
            reasons.append(f"rope key {key} = {json.dumps(value)} is not honoured for rope type {kind}")
    for key in _KEYS[kind]:
        if not _is_positive(values.get(key)):
            reasons.append(f"rope key {key} must be a number above 0, got {json.dumps(values.get(key))}")
    if kind == "llama3" and values.get("high_freq_factor") == values.get("low_freq_factor"):
        reasons.append("rope keys high_freq_factor and low_freq_factor must differ")


def _is_positive(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf

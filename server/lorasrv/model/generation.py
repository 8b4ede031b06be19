"""Sampling defaults and end tokens a model folder states in `generation_config.json`. Knows no requests."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorasrv.errors import ModelLoadError
from lorasrv.model.config import parse_token_ids, read_json

_READ = {"do_sample", "temperature", "top_k", "top_p", "eos_token_id", "bos_token_id", "pad_token_id"}
_INERT = {
    "transformers_version",
    "_from_model_config",
    "max_length",
    "max_new_tokens",
    "use_cache",
    "cache_implementation",
}
_NEUTRAL: Mapping[str, float] = {
    "repetition_penalty": 1,
    "length_penalty": 1,
    "typical_p": 1,
    "num_beams": 1,
    "min_p": 0,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationDefaults:
    """What a model's makers recommend; `None` where they say nothing."""

    temperature: float | None = None
    """0 where the folder asks for greedy decoding."""
    top_k: int | None = None
    top_p: float | None = None
    eos_ids: tuple[int, ...] = ()
    """Empty where the folder says nothing; `config.json` decides then."""
    not_applied: tuple[str, ...] = ()
    """Keys with a live value that this server does not sample with, for the log."""


def read_generation_defaults(folder: Path) -> GenerationDefaults:
    """Reads `generation_config.json`; a folder without one states no defaults.

    Raises:
        ModelLoadError: the file is no JSON object or a value is of the wrong kind; lists everything.
    """
    path = folder / "generation_config.json"
    return parse_generation_defaults(read_json(path)) if path.exists() else GenerationDefaults()


def parse_generation_defaults(raw: Mapping[str, Any]) -> GenerationDefaults:
    """Reads the content of a `generation_config.json`.

    Raises:
        ModelLoadError: a value is of the wrong kind; lists everything.
    """
    reasons: list[str] = []
    eos_ids = parse_token_ids("eos_token_id", raw.get("eos_token_id"), reasons)
    temperature, top_k, top_p = (_number(raw, key, reasons) for key in ("temperature", "top_k", "top_p"))
    if reasons:
        raise ModelLoadError([f"generation_config.json: {reason}" for reason in reasons])
    if raw.get("do_sample") is False:
        temperature = 0.0
    return GenerationDefaults(
        temperature=temperature,
        top_k=None if top_k is None else int(top_k),
        top_p=top_p,
        eos_ids=eos_ids,
        not_applied=tuple(sorted(key for key, value in raw.items() if _is_live(key, value))),
    )


def _number(raw: Mapping[str, Any], key: str, reasons: list[str]) -> float | None:
    value = raw.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or value < 0:
        reasons.append(f"{key} must be a number of at least 0, got {value!r}")
        return None
    return float(value)


def _is_live(key: str, value: object) -> bool:
    if key in _READ or key in _INERT or value is None or value is False or value in ([], {}):
        return False
    return _NEUTRAL.get(key) != value

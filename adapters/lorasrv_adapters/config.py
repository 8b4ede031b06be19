"""`adapter_config.json` read strictly: every key with a live value is honoured, known to change nothing, or refused.

Nothing named in the file is imported, evaluated or looked up. This module knows PEFT's keys, no tensors and no base.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypedDict

from lorasrv_adapters.errors import AdapterCorruptError, AdapterIncompatibleError
from lorasrv_adapters.fields import Fields, is_live, parse_json
from lorasrv_adapters.inert import check_adalora_schedule, check_inert_values
from lorasrv_adapters.keys import (
    HONOURED,
    INERT,
    INERT_ADALORA,
    INERT_INITS,
    NOT_OF_ADALORA,
    OFF_WHEN_EMPTY,
    UNSUPPORTED,
)
from lorasrv_adapters.patterns import PatternError, PatternTable, Targets

Kind = Literal["lora", "rslora", "dora", "adalora"]
Bias = Literal["none", "all", "lora_only"]

CONFIG_NAME = "adapter_config.json"
MAX_KEYS = 512
MAX_RANK = 1 << 16
DEFAULT_RANK = 8
DEFAULT_ALPHA = 8.0
DEFAULT_INIT_RANK = 12

ADALORA_EPSILON = 1e-5
"""PEFT divides by `init_r + 1e-5`, for pruned modules too (peft/tuners/adalora/layer.py)."""

_BASE_CHANGED = (
    "the adapter is only valid on a base changed by this initialization; "
    "write it as plain LoRA with `lorasrv convert ADAPTER --initial INITIAL --out DIR`"
)
_BASE_REQUANTIZED = "the adapter is only valid on the base that LoftQ quantized anew, and cannot be converted"


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterConfig:
    """The part of `adapter_config.json` that says what the tensors mean.

    Attributes:
        kind: The method; a DoRA with rank-stabilized scaling is "dora" with `use_rslora`.
        base_model: `base_model_name_or_path` as written, for information only.
        targets: Which modules must have tensors.
        rank: Rank of modules that no pattern matches; AdaLoRA: `init_r`.
        alpha: Numerator of the scale of modules that no pattern matches.
        use_rslora: Scale by the square root of the rank instead of the rank.
        rank_pattern: Ranks by module pattern, in the file's order, which matters.
        alpha_pattern: Numerators by module pattern, in the file's order, which matters.
        masks: AdaLoRA only: by module, which of the `rank` initial rows survive.
        bias: Whose trained biases the adapter brings: nobody's, all modules', or those of the modules it targets.
        lora_bias: Whether every B has a bias.
        token_ids: `trainable_token_indices`: by the ending of a module's name, which rows of its weight the adapter
            brings; an empty ending stands for the token embedding.
        tie: Adapt a tied head together with the embedding.
        init: The initialization if it is one that PEFT, which runs it before it reads the tensors, has only for some
            ranks: "orthogonal" or "mica".
    """

    kind: Kind
    base_model: str
    targets: Targets
    rank: int
    alpha: float
    use_rslora: bool = False
    rank_pattern: tuple[tuple[str, int], ...] = ()
    alpha_pattern: tuple[tuple[str, float], ...] = ()
    masks: Mapping[str, tuple[bool, ...]] = field(default_factory=dict)
    bias: Bias = "none"
    lora_bias: bool = False
    token_ids: tuple[tuple[str, tuple[int, ...]], ...] = ()
    tie: bool = False
    init: str = ""

    def scale(self, rank: int, alpha: float) -> float:
        """Return the factor on B A for a module of this configured rank and alpha."""
        if self.kind == "adalora":
            return alpha / (rank + ADALORA_EPSILON)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    def canonical(self) -> bytes:
        """Return canonical JSON of what changes the adapter's result, and of nothing else."""
        content = {
            "kind": self.kind,
            "rank": self.rank,
            "alpha": self.alpha,
            "use_rslora": self.use_rslora,
            "rank_pattern": self.rank_pattern,
            "alpha_pattern": self.alpha_pattern,
            "masks": self.masks,
            "token_ids": self.token_ids,
        }
        return json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def parse_adapter_config(source: bytes | Mapping[str, object]) -> AdapterConfig:
    """Parse the content of `adapter_config.json`.

    Args:
        source: The file's bytes, or the decoded object.

    Raises:
        AdapterCorruptError: The bytes are no JSON object, or are beyond the limits.
        AdapterIncompatibleError: Keys or values that cannot be honoured; all of them are listed.
    """
    config, reasons = examine_adapter_config(source)
    if config is None or reasons:
        raise AdapterIncompatibleError(reasons)
    return config


def examine_adapter_config(source: bytes | Mapping[str, object]) -> tuple[AdapterConfig | None, list[str]]:
    """Parse as far as possible: the config (None if it cannot be told) and every reason to refuse it.

    Raises:
        AdapterCorruptError: The bytes are no JSON object, or are beyond the limits.
    """
    raw = parse_json(source, CONFIG_NAME) if isinstance(source, bytes) else source
    if not isinstance(raw, Mapping):
        raise AdapterCorruptError([f"{CONFIG_NAME} is not a JSON object"])
    if len(raw) > MAX_KEYS:
        raise AdapterCorruptError([f"{CONFIG_NAME} has {len(raw)} keys; at most {MAX_KEYS} are accepted"])
    fields = Fields(raw, CONFIG_NAME)
    method = raw.get("peft_type")
    if method not in ("LORA", "ADALORA"):
        return None, [f"peft_type {str(method)[:80]!r} is not supported; LORA and ADALORA are"]
    adalora = method == "ADALORA"
    _refuse_keys(fields, INERT | INERT_ADALORA if adalora else INERT)
    config = _adalora_config(fields) if adalora else _lora_config(fields)
    return config if fields.valid else None, fields.reasons


def _refuse_keys(fields: Fields, inert: Mapping[str, str]) -> None:
    for key, value in fields.raw.items():
        if value is None or key in HONOURED or key in inert:
            continue
        if key in UNSUPPORTED:
            if is_live(value) or value == "" or key not in OFF_WHEN_EMPTY:
                fields.refuse(key, f"not supported: {UNSUPPORTED[key]}")
        elif is_live(value):
            fields.refuse(key, "the key is unknown")
    check_inert_values(fields)
    init = fields.raw.get("init_lora_weights", True)
    if not (init is None or isinstance(init, bool) or (isinstance(init, str) and init in INERT_INITS)):
        fields.refuse("init_lora_weights", _BASE_REQUANTIZED if init == "loftq" else _BASE_CHANGED)


def _lora_config(fields: Fields) -> AdapterConfig:
    use_dora, use_rslora, lora_bias = (fields.flag(key) for key in ("use_dora", "use_rslora", "lora_bias"))
    if lora_bias and use_dora:
        fields.refuse("lora_bias", "DoRA does not have it")
    init = fields.raw.get("init_lora_weights", True)
    if lora_bias and not isinstance(init, bool):
        fields.refuse("lora_bias", "PEFT has it only with init_lora_weights true or false")
    if use_dora and init == "mica":
        fields.refuse("init_lora_weights", "DoRA does not have it")
    if is_live(fields.raw.get("init_r")):
        fields.refuse("init_r", "the key belongs to AdaLoRA")
    for key in ("rank_pattern", "alpha_pattern"):
        if fields.raw.get(key, {}) is None:
            fields.refuse(key, "must be an object")
    rank_pattern = fields.integer_table("rank_pattern", low=1, high=MAX_RANK)
    alpha_pattern = fields.number_table("alpha_pattern")
    _check_patterns(fields, "rank_pattern", rank_pattern)
    _check_patterns(fields, "alpha_pattern", alpha_pattern)
    if any(alpha == 0 for _, alpha in alpha_pattern):
        fields.refuse("alpha_pattern", "a scale of zero would serve the plain base")
    alpha = fields.number("lora_alpha", default=DEFAULT_ALPHA)
    if alpha == 0:
        fields.refuse("lora_alpha", "a scale of zero would serve the plain base")
    return AdapterConfig(
        kind="dora" if use_dora else "rslora" if use_rslora else "lora",
        base_model=fields.text("base_model_name_or_path"),
        targets=_targets(fields),
        rank=fields.integer("r", default=DEFAULT_RANK, low=1, high=MAX_RANK),
        alpha=alpha,
        use_rslora=use_rslora,
        rank_pattern=rank_pattern,
        alpha_pattern=alpha_pattern,
        lora_bias=lora_bias,
        init=init if init in ("orthogonal", "mica") else "",
        **_beside_low_rank(fields),
    )


def _adalora_config(fields: Fields) -> AdapterConfig:
    for key in NOT_OF_ADALORA:
        if is_live(fields.raw.get(key)):
            fields.refuse(key, "AdaLoRA does not have it")
    rank = fields.integer("init_r", default=DEFAULT_INIT_RANK, low=1, high=MAX_RANK)
    alpha = fields.number("lora_alpha", default=DEFAULT_ALPHA)
    if alpha <= 0:
        fields.refuse("lora_alpha", "AdaLoRA needs a positive value")
    check_adalora_schedule(fields)
    masks = {name.removesuffix(".default"): mask for name, mask in fields.mask_table("rank_pattern", rank)}
    if any(not name.endswith(".lora_E") for name in masks):
        fields.refuse("rank_pattern", "every AdaLoRA key must be a module name and .lora_E")
    return AdapterConfig(
        kind="adalora",
        base_model=fields.text("base_model_name_or_path"),
        targets=_targets(fields),
        rank=rank,
        alpha=alpha,
        masks={name.removesuffix(".lora_E"): mask for name, mask in masks.items()},
        **_beside_low_rank(fields),
    )


class _BesideLowRank(TypedDict):
    bias: Bias
    token_ids: tuple[tuple[str, tuple[int, ...]], ...]
    tie: bool


def _beside_low_rank(fields: Fields) -> _BesideLowRank:
    return {
        "bias": _bias(fields),
        "token_ids": _token_ids(fields),
        "tie": fields.flag("ensure_weight_tying"),
    }


def _bias(fields: Fields) -> Bias:
    match fields.raw.get("bias", "none"):
        case "none" | "all" | "lora_only" as bias:
            return bias
        case _:
            fields.refuse("bias", "must be none, all or lora_only")
            fields.valid = False
            return "none"


def _saved(fields: Fields) -> tuple[str, ...]:
    saved = fields.texts("modules_to_save")
    if isinstance(saved, str) or "" in saved:
        fields.refuse("modules_to_save", "must be a list of names")
        fields.valid = False
        return ()
    return saved


def _token_ids(fields: Fields) -> tuple[tuple[str, tuple[int, ...]], ...]:
    key = "trainable_token_indices"
    if isinstance(fields.raw.get(key), Mapping):
        tables = fields.integers_table(key)
    else:
        tables = (("", fields.integers(key)),) if fields.raw.get(key) is not None else ()
    for name, ids in tables:
        if not ids or len(set(ids)) != len(ids):
            fields.refuse(key, f"{name or 'the list'} needs ids, each of them once")
    return tables


def _targets(fields: Fields) -> Targets:
    include, exclude = fields.texts("target_modules"), fields.texts("exclude_modules")
    layers, pattern = fields.integers("layers_to_transform"), fields.texts("layers_pattern")
    if not include:
        fields.refuse("target_modules", "the file must say which modules it adapts")
    if isinstance(include, str) and fields.raw.get("layers_to_transform") is not None:
        fields.refuse("layers_to_transform", "it needs target_modules to be a list")
    if pattern and fields.raw.get("layers_to_transform") is None:
        fields.refuse("layers_pattern", "it needs layers_to_transform")
    parts: dict[str, dict[str, Any]] = {
        "target_modules": {"include": include},
        "exclude_modules": {"exclude": exclude},
        "layers_pattern": {
            "layers": layers,
            "layers_pattern": (pattern,) if isinstance(pattern, str) else pattern,
        },
        "modules_to_save": {"saved": _saved(fields)},
    }
    for key, part in parts.items():
        try:
            Targets(**{"include": ()} | part)
        except PatternError as error:
            fields.refuse(key, str(error))
            fields.valid = False
    whole = {name: value for part in parts.values() for name, value in part.items()}
    return Targets(**whole) if fields.valid else Targets(include=())


def _check_patterns(fields: Fields, key: str, table: Sequence[tuple[str, object]]) -> None:
    try:
        PatternTable(table)
    except PatternError as error:
        fields.refuse(key, str(error))
        fields.valid = False

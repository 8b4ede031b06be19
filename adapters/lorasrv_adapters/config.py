"""`adapter_config.json` read strictly: every key with a live value is honoured, known to change nothing, or refused.

Nothing named in the file is imported, evaluated or looked up. This module knows PEFT's keys, no tensors and no base.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from lorasrv_adapters.errors import AdapterCorruptError, AdapterIncompatibleError
from lorasrv_adapters.fields import Fields, is_live, parse_json
from lorasrv_adapters.patterns import PatternError, PatternTable, Targets

Kind = Literal["lora", "rslora", "dora", "adalora"]

CONFIG_NAME = "adapter_config.json"
MAX_KEYS = 512
MAX_RANK = 1 << 16
DEFAULT_RANK = 8
DEFAULT_ALPHA = 8.0
DEFAULT_INIT_RANK = 12

ADALORA_EPSILON = 1e-5
"""PEFT divides by `init_r + 1e-5`, for pruned modules too (peft/tuners/adalora/layer.py)."""

HONOURED = frozenset({
    "peft_type", "base_model_name_or_path", "r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern",
    "alpha_pattern", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern",
    "init_lora_weights", "init_r",
})  # fmt: skip
"""Keys whose values are read."""

INERT = frozenset({
    "auto_mapping", "eva_config", "fan_in_fan_out", "inference_mode", "lora_dropout", "megatron_core", "peft_version",
    "qalora_group_size", "revision", "task_type",
})  # fmt: skip
"""Keys that change nothing when a linear layer is served, whatever their value."""

INERT_ADALORA = frozenset({
    "beta1", "beta2", "deltaT", "orth_reg_weight", "target_r", "tfinal", "tinit", "total_step",
})  # fmt: skip
"""Keys of AdaLoRA's training schedule."""

INERT_INITS = frozenset({"eva", "gaussian", "orthogonal"})
"""Values of `init_lora_weights`, beside true and false, that leave the base's weights alone."""

UNSUPPORTED = {
    "alora_invocation_tokens": "activation by invocation tokens (aLoRA)",
    "arrow_config": "Arrow routing",
    "corda_config": "CorDA initialization, which changes the base",
    "ensure_weight_tying": "tied adapted embeddings",
    "kasa_config": "KaSA",
    "layer_replication": "replicated layers",
    "loftq_config": "LoftQ initialization, which changes the base",
    "lora_bias": "a bias on lora_B",
    "lora_ga_config": "LoRA-GA initialization, which changes the base",
    "megatron_config": "Megatron layers",
    "modules_to_save": "fully trained modules",
    "monteclora_config": "MonteCLoRA",
    "target_parameters": "adapted bare parameters",
    "trainable_token_indices": "trained embedding rows",
    "use_bdlora": "block-diagonal LoRA",
    "use_qalora": "QALoRA",
    "velora_config": "VeLoRA",
}
"""Keys that change an adapter's result and are refused when they have a live value."""


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
    _refuse_keys(fields, INERT | INERT_ADALORA | {"r"} if adalora else INERT)
    config = _adalora_config(fields) if adalora else _lora_config(fields)
    return config if fields.valid else None, fields.reasons


def _refuse_keys(fields: Fields, inert: frozenset[str]) -> None:
    for key, value in fields.raw.items():
        if not is_live(value) or key in HONOURED or key in inert:
            continue
        if key == "bias":
            if value != "none":
                fields.refuse(key, "not supported: trained biases")
        elif key in UNSUPPORTED:
            fields.refuse(key, f"not supported: {UNSUPPORTED[key]}")
        else:
            fields.refuse(key, "the key is unknown")
    init = fields.raw.get("init_lora_weights", True)
    if not (init is None or isinstance(init, bool) or (isinstance(init, str) and init in INERT_INITS)):
        fields.refuse(
            "init_lora_weights",
            "the adapter is only valid on a base changed by this initialization; save it converted to plain LoRA",
        )


def _lora_config(fields: Fields) -> AdapterConfig:
    use_dora, use_rslora = fields.flag("use_dora"), fields.flag("use_rslora")
    if is_live(fields.raw.get("init_r")):
        fields.refuse("init_r", "the key belongs to AdaLoRA")
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
    )


def _adalora_config(fields: Fields) -> AdapterConfig:
    for key in ("use_dora", "use_rslora", "alpha_pattern"):
        if is_live(fields.raw.get(key)):
            fields.refuse(key, "AdaLoRA does not have it")
    rank = fields.integer("init_r", default=DEFAULT_INIT_RANK, low=1, high=MAX_RANK)
    alpha = fields.number("lora_alpha", default=DEFAULT_ALPHA)
    if alpha <= 0:
        fields.refuse("lora_alpha", "AdaLoRA needs a positive value")
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
    )


def _targets(fields: Fields) -> Targets:
    include, exclude = fields.texts("target_modules"), fields.texts("exclude_modules")
    layers, pattern = fields.integers("layers_to_transform"), fields.texts("layers_pattern")
    if not include:
        fields.refuse("target_modules", "the file must say which modules it adapts")
    if isinstance(include, str) and fields.raw.get("layers_to_transform") is not None:
        fields.refuse("layers_to_transform", "it needs target_modules to be a list")
    if pattern and fields.raw.get("layers_to_transform") is None:
        fields.refuse("layers_pattern", "it needs layers_to_transform")
    try:
        return Targets(
            include=include,
            exclude=exclude,
            layers=layers,
            layers_pattern=(pattern,) if isinstance(pattern, str) else pattern,
        )
    except PatternError as error:
        fields.refuse("target_modules", str(error))
        fields.valid = False
        return Targets(include=())


def _check_patterns(fields: Fields, key: str, table: Sequence[tuple[str, object]]) -> None:
    try:
        PatternTable(table)
    except PatternError as error:
        fields.refuse(key, str(error))
        fields.valid = False

"""An adapter as its two files say it, with no base beside it: the material of conversions.

It knows how PEFT names the low-rank factors of a module, and which config keys mean the same whatever those factors
are; it knows no method's mathematics.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lorasrv_adapters.config import CONFIG_NAME, AdapterConfig, examine_adapter_config
from lorasrv_adapters.errors import AdapterConversionError
from lorasrv_adapters.fields import Fields, is_live
from lorasrv_adapters.naming import PREFIX
from lorasrv_adapters.patterns import PatternTable

INDEPENDENT = frozenset({
    "auto_mapping", "base_model_name_or_path", "bias", "ensure_weight_tying", "eva_config", "exclude_modules",
    "fan_in_fan_out", "inference_mode", "layers_pattern", "layers_to_transform", "lora_dropout", "megatron_core",
    "modules_to_save", "peft_type", "peft_version", "qalora_group_size", "revision", "target_modules", "task_type",
    "trainable_token_indices",
})  # fmt: skip
"""Keys that mean the same before and after a conversion of the factors."""

# PEFT's releases differ in the adapter's name and in the ending .weight
_FACTOR = re.compile(
    r"(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<role>[ABE])(\.(?!weight$|bias$)[^.]+)?(\.weight)?"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class RawAdapter:
    """The content of an adapter's files.

    Attributes:
        config: `adapter_config.json` as decoded.
        tensors: By name in the file.
    """

    config: Mapping[str, object]
    tensors: Mapping[str, Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Factors:
    """Where a module's low-rank factors are.

    Attributes:
        names: Tensor name by role: "A", "B" and for AdaLoRA "E".
        embedding: Whether the module is an embedding, whose factors are [R, V] and [D, R].
    """

    names: Mapping[str, str]
    embedding: bool


def find_factors(tensors: Mapping[str, Tensor], roles: str) -> tuple[dict[str, Factors], list[str]]:
    """Sort the low-rank factors among an adapter's tensors to modules.

    Args:
        tensors: By name in the file; those that are no factor are passed over.
        roles: The roles that each module must have: "AB" or "ABE".

    Returns:
        Factors by module name as in the Hugging Face model, and every reason not to use them.
    """
    reasons: list[str] = []
    names: dict[str, dict[str, str]] = {}
    embeddings: set[str] = set()
    for name in tensors:
        match = _FACTOR.fullmatch(name)
        if match is None:
            continue
        if not name.startswith(PREFIX):
            reasons.append(f"tensor {name[:200]!r}: its name does not start with {PREFIX!r}")
            continue
        module = match["module"][len(PREFIX) :]
        if names.setdefault(module, {}).setdefault(match["role"], name) != name:
            reasons.append(f"tensor {name[:200]!r}: the module has a second lora_{match['role']}")
        if match["embedding"]:
            embeddings.add(module)
    for module, found in names.items():
        if found.keys() != set(roles):
            expected, present = (", ".join(f"lora_{role}" for role in sorted(group)) for group in (roles, found))
            reasons.append(f"{module}: expected {expected}, found {present}")
    if not names:
        reasons.append("there is no tensor of a low-rank module")
    return {module: Factors(names=found, embedding=module in embeddings) for module, found in names.items()}, reasons


def check_ranks(config: AdapterConfig, tensors: Mapping[str, Tensor], factors: Mapping[str, Factors]) -> list[str]:
    """Return where the factors' shapes agree neither with each other nor with the configured ranks.

    Args:
        config: The config the tensors come with.
        tensors: By name.
        factors: Complete, as found by `find_factors`.
    """
    ranks, reasons = PatternTable(config.rank_pattern), []
    for module, found in factors.items():
        rank, mask = ranks.find(module, config.rank), config.masks.get(module)
        accepted = {rank} if mask is None else {rank, sum(mask)}
        shapes = {role: tuple(tensors[name].shape) for role, name in found.names.items()}
        a, b, e = shapes["A"], shapes["B"], shapes.get("E")
        if len(a) != 2 or len(b) != 2 or a[0] != b[1] or e not in (None, (a[0], 1)):
            listed = ", ".join(f"lora_{role} {list(shape)}" for role, shape in shapes.items())
            reasons.append(f"{module}: the shapes do not fit together: {listed}")
        elif a[0] not in accepted:
            expected = " or ".join(map(str, sorted(accepted)))
            reasons.append(f"{module}: lora_A has rank {a[0]}; the config says {expected}")
    return reasons


def parse_keys(config: Mapping[str, object], keys: frozenset[str]) -> tuple[AdapterConfig | None, list[str]]:
    """Parse these keys of a config, and those that say what it adapts; every other key is passed over.

    Args:
        config: `adapter_config.json` as decoded.
        keys: Those that say what the factors mean.

    Returns:
        The parsed config (None if it cannot be told), and every reason to refuse one of the keys.
    """
    keys |= {"peft_type", "target_modules"}
    return examine_adapter_config({key: value for key, value in config.items() if key in keys})


def refuse_keys_except(config: Mapping[str, object], known: frozenset[str]) -> list[str]:
    """Return a reason for each live key that is neither known to a conversion nor independent of it."""
    fields = Fields(config, CONFIG_NAME)
    for key, value in config.items():
        if is_live(value) and key not in known | INDEPENDENT:
            fields.refuse(key, "what it means would not survive the conversion")
    return fields.reasons


def require_finite(adapter: RawAdapter) -> RawAdapter:
    """Return the adapter.

    Raises:
        AdapterConversionError: A tensor holds NaN or infinity.
    """
    poisoned = [name for name, tensor in adapter.tensors.items() if not bool(torch.isfinite(tensor).all())]
    if poisoned:
        raise AdapterConversionError([f"{name[:200]!r} holds NaN or infinity" for name in poisoned])
    return adapter

"""PEFT's names of tensors: which module a tensor belongs to, and what it is there.

It knows spellings, old and new; it knows no base and no shape.
"""

from collections.abc import Iterable
from typing import Literal

from lorasrv_adapters.config import Kind

Role = Literal[
    "a",
    "b",
    "e",
    "magnitude",
    "b_bias",
    "embedding_a",
    "embedding_b",
    "rows",
    "weight",
    "bias",
    "base_weight",
    "base_bias",
]
"""What a tensor is: of the low-rank update, rows or a whole weight or bias in place of the module's, or the same of the
module that an adapted one wraps."""

PREFIX = "base_model.model."

MAGNITUDE_ENDINGS = (
    ".lora_magnitude_vector",
    ".lora_magnitude_vector.weight",
    ".lora_magnitude_vector.default.weight",
)
"""How PEFT's releases have spelled the name of DoRA's magnitude."""

ROLE_NAMES: dict[Role, str] = {
    "a": "lora_A",
    "b": "lora_B",
    "e": "lora_E",
    "magnitude": "lora_magnitude_vector",
    "b_bias": "lora_B.bias",
    "embedding_a": "lora_embedding_A",
    "embedding_b": "lora_embedding_B",
    "rows": "trainable_tokens_delta",
    "weight": "weight",
    "bias": "bias",
    "base_weight": "base_layer.weight",
    "base_bias": "base_layer.bias",
}
"""What messages call each role."""

_BESIDE: dict[str, Role] = {
    ".token_adapter.trainable_tokens_delta": "rows",
    ".base_layer.weight": "base_weight",
    ".base_layer.bias": "base_bias",
    ".weight": "weight",
    ".bias": "bias",
}
_LORA: dict[str, Role] = {
    ".lora_A.weight": "a",
    ".lora_A.default.weight": "a",
    ".lora_B.weight": "b",
    ".lora_B.default.weight": "b",
    ".lora_B.bias": "b_bias",
    ".lora_B.default.bias": "b_bias",
    ".lora_embedding_A": "embedding_a",
    ".lora_embedding_A.default": "embedding_a",
    ".lora_embedding_B": "embedding_b",
    ".lora_embedding_B.default": "embedding_b",
}
_DORA: dict[str, Role] = dict.fromkeys(MAGNITUDE_ENDINGS, "magnitude")
_ADALORA: dict[str, Role] = {
    ".lora_A": "a",
    ".lora_A.default": "a",
    ".lora_B": "b",
    ".lora_B.default": "b",
    ".lora_E": "e",
    ".lora_E.default": "e",
}
_ENDINGS: dict[Kind, dict[str, Role]] = {
    "lora": _LORA | _BESIDE,
    "rslora": _LORA | _BESIDE,
    "dora": _LORA | _DORA | _BESIDE,
    "adalora": _ADALORA | _BESIDE,
}

_FOREIGN = dict.fromkeys(MAGNITUDE_ENDINGS, "the tensor belongs to DoRA, and the config says otherwise") | {
    ".lora_E": "the tensor belongs to AdaLoRA, and the config says otherwise",
    ".lora_embedding_A": "AdaLoRA does not adapt embeddings",
    ".lora_embedding_B": "AdaLoRA does not adapt embeddings",
}


def sort_names(kind: Kind, names: Iterable[str]) -> tuple[dict[str, dict[Role, str]], list[str]]:
    """Tell each tensor's module and role from its name.

    Returns:
        Module -> role -> the tensor's name, and a reason for every name that cannot be used.
    """
    roles_of = _ENDINGS[kind]
    endings = sorted(roles_of, key=len, reverse=True)
    modules: dict[str, dict[Role, str]] = {}
    reasons: list[str] = []
    for name in names:
        ending = next((ending for ending in endings if name.endswith(ending)), "")
        if reason := _unusable(name, ending):
            reasons.append(f"tensor {name[:200]!r} is not used: {reason}")
            continue
        role, roles = roles_of[ending], modules.setdefault(name[len(PREFIX) : -len(ending)], {})
        if role in roles:
            reasons.append(f"tensor {name[:200]!r}: the module has a second {ROLE_NAMES[role]}")
        roles[role] = name
    return modules, reasons


def _unusable(name: str, ending: str) -> str:
    if not name.startswith(PREFIX):
        return f"its name does not start with {PREFIX!r}"
    foreign = next((text for other, text in _FOREIGN.items() if name.endswith(other)), "its name is unknown")
    # of an adapter's own parts every spelling is listed; what is left over would pass for a part of the base
    left_over = ending in _BESIDE and ".lora_" in name
    return foreign if not ending or left_over else ""

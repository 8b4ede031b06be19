"""An adapter's tensors sorted to modules by their PEFT names, and everything about them checked.

Each tensor must be used, each module must have exactly its tensors, in the shapes that config and base demand.
It knows PEFT's naming; it computes nothing with the values.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lorasrv_adapters.config import AdapterConfig
from lorasrv_adapters.patterns import PatternTable

PREFIX = "base_model.model."

MAGNITUDE_ENDINGS = (
    ".lora_magnitude_vector",
    ".lora_magnitude_vector.weight",
    ".lora_magnitude_vector.default.weight",
)
"""How PEFT's releases have spelled the name of DoRA's magnitude."""

_LORA_ENDINGS = {".lora_A.weight": "a", ".lora_B.weight": "b"}
_DORA_ENDINGS = _LORA_ENDINGS | dict.fromkeys(MAGNITUDE_ENDINGS, "magnitude")
_ADALORA_ENDINGS = {".lora_A": "a", ".lora_B": "b", ".lora_E": "e"}
_ENDINGS = {"lora": _LORA_ENDINGS, "rslora": _LORA_ENDINGS, "dora": _DORA_ENDINGS, "adalora": _ADALORA_ENDINGS}
_ROLE_NAMES = {"a": "lora_A", "b": "lora_B", "e": "lora_E", "magnitude": "lora_magnitude_vector"}

_FOREIGN_NAMES = {
    ".lora_embedding_A": "embedding LoRA is not supported",
    ".lora_embedding_B": "embedding LoRA is not supported",
    ".lora_B.bias": "a bias on lora_B is not supported",
    ".trainable_tokens_delta": "trained embedding rows are not supported",
    ".lora_E": "the tensor belongs to AdaLoRA, and the config says otherwise",
    ".bias": "trained biases are not supported",
} | dict.fromkeys(MAGNITUDE_ENDINGS, "the tensor belongs to DoRA, and the config says otherwise")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleTensors:
    """The checked tensors of one module, as in the file.

    Attributes:
        a: lora_A, [R, I].
        b: lora_B, [O, R].
        configured_rank: The rank that scales: r or its pattern's value; AdaLoRA: init_r.
        alpha: lora_alpha or its pattern's value.
        e: AdaLoRA's lora_E, [R, 1].
        magnitude: DoRA's lora_magnitude_vector, [O].
        mask: AdaLoRA: which rows survive, where the file still has all init_r of them.
    """

    a: Tensor
    b: Tensor
    configured_rank: int
    alpha: float
    e: Tensor | None = None
    magnitude: Tensor | None = None
    mask: tuple[bool, ...] | None = None

    def surviving_rows(self) -> Tensor:
        """Return the indices of AdaLoRA's rows that are neither masked out nor multiplied by zero."""
        if self.e is None:
            raise ValueError("only AdaLoRA has singular values")
        keep = self.e.reshape(-1) != 0
        if self.mask is not None:
            keep &= torch.tensor(self.mask)
        return keep.nonzero().reshape(-1)


def group_tensors(
    config: AdapterConfig, tensors: Mapping[str, Tensor], modules: Mapping[str, tuple[int, int]]
) -> tuple[dict[str, ModuleTensors], list[str]]:
    """Sort an adapter's tensors to the base's modules.

    Args:
        config: The adapter's config.
        tensors: Its tensors by name in the file.
        modules: The base's linear layers: name -> (O, I).

    Returns:
        The modules that are right, in the base's order, and every reason to refuse the adapter.
    """
    roles, reasons = _assign(config, tensors)
    reasons += [f"{name[:200]!r} holds NaN or infinity" for name in tensors if not _is_finite(tensors[name])]
    reasons += _compare_targets(config, roles, modules)
    ranks, alphas = PatternTable(config.rank_pattern), PatternTable(config.alpha_pattern)
    groups: dict[str, ModuleTensors] = {}
    for name, shape in modules.items():
        if name not in roles:
            continue
        wrong = _check_module(config, name, roles[name], shape, ranks.find(name, config.rank))
        reasons += wrong
        if not wrong:
            groups[name] = ModuleTensors(
                **roles[name],
                configured_rank=ranks.find(name, config.rank),
                alpha=alphas.find(name, config.alpha),
                mask=_mask(config, name, roles[name]),
            )
    return groups, reasons


def _assign(config: AdapterConfig, tensors: Mapping[str, Tensor]) -> tuple[dict[str, dict[str, Tensor]], list[str]]:
    """Tell each tensor's module and role from its name."""
    endings = sorted(_ENDINGS[config.kind].items(), key=lambda item: -len(item[0]))
    roles: dict[str, dict[str, Tensor]] = {}
    reasons: list[str] = []
    for name, tensor in tensors.items():
        ending, role = next(((ending, role) for ending, role in endings if name.endswith(ending)), ("", ""))
        if not ending or not name.startswith(PREFIX):
            reasons.append(f"tensor {name[:200]!r} is not used: {_foreign(name)}")
            continue
        module = roles.setdefault(name[len(PREFIX) : -len(ending)], {})
        if role in module:
            reasons.append(f"tensor {name[:200]!r}: the module has a second {_ROLE_NAMES[role]}")
        module[role] = tensor
    return roles, reasons


def _foreign(name: str) -> str:
    if not name.startswith(PREFIX):
        return f"its name does not start with {PREFIX!r}"
    return next((text for ending, text in _FOREIGN_NAMES.items() if name.endswith(ending)), "its name is unknown")


def _compare_targets(
    config: AdapterConfig, present: Iterable[str], modules: Mapping[str, tuple[int, int]]
) -> list[str]:
    """The modules the config names and those that have tensors must be the same."""
    targets, present = config.targets.select(modules), frozenset(present)
    unexpected, lacking = (present & modules.keys()) - targets, targets - present
    reasons = [f"{name[:200]!r} is no linear layer of the base" for name in sorted(present - modules.keys())]
    reasons += [f"{name} has tensors, but the config does not target it" for name in sorted(unexpected)]
    reasons += [f"{name} is targeted by the config, but has no tensors" for name in sorted(lacking)]
    reasons += [
        f"rank_pattern names {name[:200]!r}, which has no tensors" for name in sorted(config.masks.keys() - present)
    ]
    if not present & modules.keys():
        reasons.append("no module of the base is adapted")
    return reasons


def _check_module(
    config: AdapterConfig, name: str, roles: Mapping[str, Tensor], shape: tuple[int, int], rank: int
) -> list[str]:
    expected = set(_ENDINGS[config.kind].values())
    missing = [f"{name}: {_ROLE_NAMES[role]} is missing" for role in sorted(expected - roles.keys())]
    if missing:
        return missing
    rows = roles["a"].shape[0] if roles["a"].ndim == 2 else rank
    reasons = []
    if rows not in _accepted_ranks(config, name, rank):
        accepted = " or ".join(map(str, _accepted_ranks(config, name, rank)))
        reasons.append(f"{name}: lora_A has rank {rows}; the config says {accepted}")
    shapes = {"a": (rows, shape[1]), "b": (shape[0], rows), "e": (rows, 1), "magnitude": (shape[0],)}
    reasons += [
        f"{name}: {_ROLE_NAMES[role]} has shape {list(tensor.shape)}; the base needs {list(shapes[role])}"
        for role, tensor in roles.items()
        if tuple(tensor.shape) != shapes[role]
    ]
    return reasons


def _accepted_ranks(config: AdapterConfig, name: str, rank: int) -> tuple[int, ...]:
    # AdaLoRA writes pruned tensors compacted; before pruning is final they still have all rows
    mask = config.masks.get(name)
    return (rank,) if mask is None else tuple({sum(mask), rank})


def _mask(config: AdapterConfig, name: str, roles: Mapping[str, Tensor]) -> tuple[bool, ...] | None:
    mask = config.masks.get(name)
    return mask if mask is not None and roles["a"].shape[0] == len(mask) else None


def _is_finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(tensor).all())

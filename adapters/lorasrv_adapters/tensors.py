"""An adapter's tensors sorted to the modules of its base, and everything about them checked.

Each tensor must be used, each module must have exactly its tensors, in the shapes that config and base demand, and what
the file repeats of the base must be the base's. It computes nothing with the values.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lorasrv_adapters.base import BaseModel
from lorasrv_adapters.config import AdapterConfig
from lorasrv_adapters.naming import ROLE_NAMES, Role, sort_names
from lorasrv_adapters.plan import ModulePlan, expected_shapes, make_plan

COMPARE_ELEMENTS = 1 << 22
"""Elements of the base that are widened to float32 at a time while a tensor is compared with it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleTensors:
    """The checked tensors of one module, as in the file.

    Attributes:
        plan: What the config says of the module.
        tensors: By role. The rows of a head that follows the embedding are the embedding's.
    """

    plan: ModulePlan
    tensors: Mapping[Role, Tensor]

    @property
    def a(self) -> Tensor:
        """[R, I], of a module with a low-rank update."""
        return self.tensors["embedding_a" if self.plan.base.kind == "embedding" else "a"]

    @property
    def b(self) -> Tensor:
        """[O, R], of a module with a low-rank update."""
        return self.tensors["embedding_b" if self.plan.base.kind == "embedding" else "b"]

    def surviving_rows(self) -> Tensor:
        """Return the indices of AdaLoRA's rows that are not multiplied by zero."""
        return self.tensors["e"].reshape(-1).nonzero().reshape(-1)


def group_tensors(
    config: AdapterConfig, tensors: Mapping[str, Tensor], base: BaseModel
) -> tuple[dict[str, ModuleTensors], list[str]]:
    """Sort an adapter's tensors to the base's modules.

    Args:
        config: The adapter's config.
        tensors: Its tensors by name in the file.
        base: The base.

    Returns:
        The modules that the adapter touches, in the base's order, and every reason to refuse the adapter; the modules
        are complete only without a reason.
    """
    plans, reasons = make_plan(config, base)
    names, unusable = sort_names(config.kind, tensors)
    roles: dict[str, dict[Role, Tensor]] = {
        module: {role: tensors[name] for role, name in of_module.items()} for module, of_module in names.items()
    }
    reasons += unusable
    reasons += [f"{name[:200]!r} holds NaN or infinity" for name in tensors if not _is_finite(tensors[name])]
    reasons += [f"{name[:200]!r} is no module of the base" for name in sorted(roles.keys() - base.modules.keys())]
    reasons += [
        f"rank_pattern names {name[:200]!r}, which has no tensors"
        for name in sorted(config.masks.keys() - roles.keys())
    ]
    groups: dict[str, ModuleTensors] = {}
    for name, module in base.modules.items():
        plan = plans.get(name, ModulePlan(base=module))
        found = roles.get(name, {})
        wrong = _check_module(config, name, plan, found)
        if not wrong:
            wrong = _check_repeated(name, plan, found, roles.get(plan.follows, {}), base)
        reasons += wrong
        if name in plans and not wrong:
            groups[name] = ModuleTensors(plan=plan, tensors=_with_followed(plan, found, roles))
    return groups, reasons


def _with_followed(
    plan: ModulePlan, found: Mapping[Role, Tensor], roles: Mapping[str, Mapping[Role, Tensor]]
) -> dict[Role, Tensor]:
    """The module's tensors; those that stand in place of a tied head's weight are the embedding's own."""
    followed = roles.get(plan.follows, {})
    shared: dict[Role, bool] = {"weight": plan.replaced, "rows": bool(plan.row_ids)}
    return {**found, **{role: followed[role] for role, is_shared in shared.items() if is_shared and role in followed}}


def _check_module(config: AdapterConfig, name: str, plan: ModulePlan, found: Mapping[Role, Tensor]) -> list[str]:
    a = found.get("embedding_a" if plan.base.kind == "embedding" else "a")
    rank = plan.rank or 0
    rows = a.shape[0] if a is not None and a.ndim == 2 else rank
    shapes, optional = expected_shapes(config, plan, rows)
    if plan.targeted and not found:
        return [f"{name} is targeted by the config, but has no tensors"]
    if found and not shapes and not found.keys() <= optional:
        return [f"{name} has tensors ({_listed(found)}), but the config does not target it"]
    wrong = [f"{name}: {ROLE_NAMES[role]} is missing" for role in sorted(shapes.keys() - found.keys())]
    extra = found.keys() - shapes.keys() - optional
    wrong += [f"{name}: {ROLE_NAMES[role]} is there, but the config does not have it" for role in sorted(extra)]
    stored = _stored_rank(config, name, rank)
    if plan.targeted and a is not None and rows != stored:
        wrong.append(f"{name}: lora_A has rank {rows}; the config says {stored}")
    wrong += [
        f"{name}: {ROLE_NAMES[role]} has shape {list(found[role].shape)}; the base needs {list(shape)}"
        for role, shape in shapes.items()
        if role in found and tuple(found[role].shape) != shape
    ]
    return wrong


def _check_repeated(
    name: str, plan: ModulePlan, found: Mapping[Role, Tensor], followed: Mapping[Role, Tensor], base: BaseModel
) -> list[str]:
    """What the file repeats: a weight of the base, and the tensors of a head that is tied to the embedding."""
    wrong = [
        f"{name}: {ROLE_NAMES[role]} is not the weight of this base"
        for role in ("weight", "base_weight")
        if role in found and not plan.replaced and not _is_base_weight(found[role], name, plan, base)
    ]
    pairs = []
    if plan.follows and plan.replaced:
        pairs = [("weight", found["weight"], followed.get("weight"))]
    elif plan.follows and plan.targeted and "embedding_a" in followed:
        pairs = [
            ("lora_A", found["a"].T, followed.get("embedding_b")),
            ("lora_B", found["b"].T, followed["embedding_a"]),
        ]
    wrong += [
        f"{name}: {label} differs from that of {plan.follows}, to which the config ties it"
        for label, own, other in pairs
        if other is None or own.shape != other.shape or not torch.equal(own, other)
    ]
    return wrong


def _is_base_weight(tensor: Tensor, name: str, plan: ModulePlan, base: BaseModel) -> bool:
    num_rows, width = plan.base.weight_shape
    if tuple(tensor.shape) != (num_rows, width):
        return False
    step = max(1, COMPARE_ELEMENTS // width)
    return all(
        torch.equal(
            tensor[start : start + step].to(base.dtype).float(),
            base.weight_rows(name, start, min(start + step, num_rows)).cpu(),
        )
        for start in range(0, num_rows, step)
    )


def _stored_rank(config: AdapterConfig, name: str, rank: int) -> int:
    # AdaLoRA writes only the rows that its mask keeps; PEFT does not load others
    mask = config.masks.get(name)
    return rank if mask is None else sum(mask)


def _listed(found: Mapping[Role, Tensor]) -> str:
    return ", ".join(sorted(ROLE_NAMES[role] for role in found))


def _is_finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(tensor).all())

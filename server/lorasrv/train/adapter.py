"""One adapter while it is trained: which tensors it has, what they mean to the layers, and the folder they become.

Methods end here: the layers see `LowRank`, the formula of every method, and weights in place of the base's. Knows
PEFT's config and names through `lorasrv_adapters`; knows no data and no optimizer. Letters: R rank, I in-features, O
out-features.
"""

import math
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from lorasrv_adapters.base import BaseModel
from lorasrv_adapters.config import parse_adapter_config
from lorasrv_adapters.errors import AdapterIncompatibleError
from lorasrv_adapters.naming import PREFIX
from lorasrv_adapters.normalize import NormalizedAdapter
from lorasrv_adapters.plan import ModulePlan, make_plan
from lorasrv_kernels.lora.training import LowRank
from torch import Tensor

from lorasrv.train.budget import Triplets
from lorasrv.train.initial import Place, Tensors, check_tied, initial_tensors, whole_weight
from lorasrv.train.parameters import FlatParameters

_ENDINGS: Mapping[str, Mapping[str, str]] = {
    "lora": {"a": ".lora_A.weight", "b": ".lora_B.weight"},
    "dora": {"a": ".lora_A.weight", "b": ".lora_B.weight", "magnitude": ".lora_magnitude_vector"},
    "adalora": {"a": ".lora_A", "b": ".lora_B", "e": ".lora_E"},
}
_WHOLE = "weight"


class FrozenLinear(Protocol):
    """What DoRA asks of a base layer."""

    def project(self, rows: Tensor) -> Tensor:
        """rows: [R, I] float32. Returns rows W^T, [R, O] float32, without a gradient."""

    def squared_row_norms(self) -> Tensor:
        """[O] float32: |W|^2 of every row."""


class TrainableAdapter:
    """The tensors of one adapter.

    Attributes:
        config: the content of `adapter_config.json`.
        plans: what each module has that the adapter touches, by name.
        parameters: the tensors, by PEFT's names.
        dropout: how much of a low-rank branch's input is dropped.
    """

    def __init__(
        self,
        config: Mapping[str, object],
        base: BaseModel,
        *,
        seed: int,
        initialization: str = "default",
        start: NormalizedAdapter | None = None,
        dropout: float = 0.0,
        device: torch.device | str = "cpu",
    ) -> None:
        """Draws initial values on the CPU, from the seed alone, so that a device changes nothing.

        Args:
            config: the content of `adapter_config.json`.
            base: what is adapted.
            seed: of everything drawn.
            initialization: "default", "gaussian" or "pissa".
            start: an adapter to go on from; modules it does not have begin with an update of zero.
            dropout: how much of a low-rank branch's input is dropped.
            device: where the tensors are kept.

        Raises:
            AdapterIncompatibleError: the config does not fit the base, asks for what is not trained, or cannot do what
                `start` does.
        """
        self.config = config
        self.dropout = dropout
        self._parsed = parse_adapter_config(config)
        self.plans, reasons = make_plan(self._parsed, base)
        others = [name for name, plan in self.plans.items() if not _is_trained(plan)]
        reasons += [f"{name}: linear layers are trained, and what modules_to_save names as a whole" for name in others]
        if reasons:
            raise AdapterIncompatibleError(reasons)
        self._endings = _ENDINGS[self._parsed.kind if self._parsed.kind != "rslora" else "lora"]
        initial, whole = self._initial(base, torch.Generator().manual_seed(seed), initialization, start)
        named = {
            role: {self._name(module, role): tensors[role] for module, tensors in initial.items()}
            for role in self._endings
        }
        if whole:
            named[_WHOLE] = {_whole_name(module): weight for module, weight in whole.items()}
        self.parameters = FlatParameters(named, device=device)
        self._principal = initialization == "pissa" and start is None
        # PiSSA subtracts what it began with: the base itself stays as it is
        self._subtracted = (
            {module: (tensors["a"].to(device), -tensors["b"].to(device)) for module, tensors in initial.items()}
            if self._principal
            else {}
        )
        # detached, and the same for every micro-batch of a step
        self._norms: dict[str, Tensor] = {}

    def low_rank(self, module: str, linear: FrozenLinear) -> LowRank | None:
        """What the adapter does in a module; None where it does nothing."""
        plan = self.plans.get(module)
        if plan is None or plan.rank is None:
            return None
        scale = self._parsed.scale(plan.rank, plan.alpha)
        a, b = self._tensor(module, "a"), self._tensor(module, "b")
        if self._parsed.kind == "adalora":
            return LowRank(a=a, b=b * self._tensor(module, "e").T, scale=scale)
        if self._parsed.kind == "dora":
            if module not in self._norms:
                self._norms[module] = dora_norm(a.detach(), b.detach(), scale=scale, linear=linear)
            return LowRank(a=a, b=b, scale=scale, d=self._tensor(module, "magnitude") / self._norms[module])
        if self._principal:
            first_a, first_b = self._subtracted[module]
            return LowRank(a=torch.cat([a, first_a]), b=torch.cat([b, first_b], dim=1), scale=scale)
        return LowRank(a=a, b=b, scale=scale)

    def replacement(self, module: str) -> Tensor | None:
        """The weight that stands in place of a module's, in the base's shape; None where the base's serves."""
        plan = self.plans.get(module)
        if plan is None or not plan.replaced:
            return None
        return self.parameters.tensors[_whole_name(plan.follows or module)]

    def ranks(self) -> dict[str, int]:
        """By module, the rank training begins with."""
        return {module: plan.rank for module, plan in self.plans.items() if plan.rank is not None}

    def changed(self) -> None:
        """To be called after the tensors took other values: what was computed from them is forgotten."""
        self._norms.clear()

    def triplets(self) -> dict[str, Triplets]:
        """By module, AdaLoRA's factors; empty for other methods."""
        if self._parsed.kind != "adalora":
            return {}
        return {
            module: Triplets(p=self._tensor(module, "b"), e=self._tensor(module, "e"), q=self._tensor(module, "a"))
            for module in self.ranks()
        }

    def checkpoint(self, masks: Mapping[str, Tensor]) -> tuple[dict[str, object], dict[str, Tensor]]:
        """The content of a PEFT folder: config and tensors; `masks` are AdaLoRA's, by module."""
        tensors = {name: tensor.detach().clone() for name, tensor in self.parameters.tensors.items()}
        config = dict(self.config)
        if masks:
            config["rank_pattern"] = {f"{module}.lora_E": mask.tolist() for module, mask in masks.items()}
        for module, mask in masks.items():
            for role in ("a", "b", "e"):
                name = self._name(module, role)
                tensors[name] = tensors[name][:, mask] if role == "b" else tensors[name][mask]
        if self._principal:
            config |= _doubled(config)
        for module, (first_a, first_b) in self._subtracted.items():
            name_a, name_b = self._name(module, "a"), self._name(module, "b")
            tensors[name_a] = torch.cat([tensors[name_a], first_a])
            tensors[name_b] = torch.cat([tensors[name_b], first_b], dim=1)
        # PEFT writes what is tied twice
        for module, plan in self.plans.items():
            if plan.replaced and plan.follows:
                tensors[_whole_name(module)] = tensors[_whole_name(plan.follows)]
        return config, {PREFIX + name: tensor for name, tensor in tensors.items()}

    def _initial(
        self, base: BaseModel, generator: torch.Generator, initialization: str, start: NormalizedAdapter | None
    ) -> tuple[dict[str, Tensors], dict[str, Tensor]]:
        """By module, the tensors of low-rank updates, and whole weights."""
        modules = {} if start is None else start.modules
        reasons = [
            f"{name}: the adapter to go on from has it, the new one does not"
            for name in modules
            if name not in self.plans
        ]
        initial, whole = {}, {}
        for name, plan in self.plans.items():
            scale = 1.0 if plan.rank is None else self._parsed.scale(plan.rank, plan.alpha)
            place = Place(name=name, kind=self._parsed.kind, plan=plan, scale=scale, base=base)
            try:
                if plan.targeted:
                    initial[name] = initial_tensors(place, generator, initialization=initialization, start=modules)
                elif plan.follows:
                    check_tied(name, plan.follows, modules)
                else:
                    whole[name] = whole_weight(place, start=modules)
            except ValueError as error:
                reasons.append(f"{name}: {error}")
        if reasons:
            raise AdapterIncompatibleError(reasons)
        return initial, whole

    def _tensor(self, module: str, role: str) -> Tensor:
        return self.parameters.tensors[self._name(module, role)]

    def _name(self, module: str, role: str) -> str:
        return module + self._endings[role]


def dora_norm(a: Tensor, b: Tensor, *, scale: float, linear: FrozenLinear) -> Tensor:
    """Row norms of W + scale B A without forming it: [O] float32 (DoRA, https://arxiv.org/abs/2402.09353 section 4.3).

    |W|^2 + 2 s rowsum((W A^T) * B) + s^2 rowsum((B (A A^T)) * B), of which |W|^2 is known.
    """
    crossed = (linear.project(a).T * b).sum(1)
    updated = ((b @ (a @ a.T)) * b).sum(1)
    squared = linear.squared_row_norms() + 2 * scale * crossed + scale**2 * updated
    return squared.clamp_min_(0).sqrt_()


def _doubled(config: Mapping[str, Any]) -> dict[str, object]:
    """The keys that keep every scale when ranks are doubled."""
    factor = math.sqrt(2) if config.get("use_rslora") else 2
    return {
        "r": 2 * config["r"],
        "lora_alpha": factor * config["lora_alpha"],
        "rank_pattern": {pattern: 2 * rank for pattern, rank in config.get("rank_pattern", {}).items()},
        "alpha_pattern": {pattern: factor * alpha for pattern, alpha in config.get("alpha_pattern", {}).items()},
    }


def _whole_name(module: str) -> str:
    return f"{module}.{_WHOLE}"


def _is_trained(plan: ModulePlan) -> bool:
    if plan.row_ids or plan.bias:
        return False
    return plan.replaced != (plan.targeted and plan.base.kind == "linear")

"""One adapter while it is trained: which tensors it has, what they mean to the layers, and the folder they become.

Methods end here: the layers see `LowRank`, the formula of every method. Knows PEFT's config and names through
`lorasrv_adapters`; knows no data and no optimizer. Letters: R rank, I in-features, O out-features.
"""

import math
from collections.abc import Mapping
from typing import Protocol

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
from lorasrv.train.initial import Place, Tensors, initial_tensors
from lorasrv.train.parameters import FlatParameters

_ENDINGS: Mapping[str, Mapping[str, str]] = {
    "lora": {"a": ".lora_A.weight", "b": ".lora_B.weight"},
    "dora": {"a": ".lora_A.weight", "b": ".lora_B.weight", "magnitude": ".lora_magnitude_vector"},
    "adalora": {"a": ".lora_A", "b": ".lora_B", "e": ".lora_E"},
}


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
        plans: what each adapted module has, by name.
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
        others = [name for name, plan in self.plans.items() if not _is_low_rank(plan)]
        reasons += [f"{name}: only linear layers are trained" for name in others]
        if reasons:
            raise AdapterIncompatibleError(reasons)
        self._endings = _ENDINGS[self._parsed.kind if self._parsed.kind != "rslora" else "lora"]
        initial = self._initial(base, torch.Generator().manual_seed(seed), initialization, start)
        named = {
            role: {self._name(module, role): tensors[role] for module, tensors in initial.items()}
            for role in self._endings
        }
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

    def changed(self) -> None:
        """To be called after the tensors took other values: what was computed from them is forgotten."""
        self._norms.clear()

    def triplets(self) -> dict[str, Triplets]:
        """By module, AdaLoRA's factors; empty for other methods."""
        if self._parsed.kind != "adalora":
            return {}
        return {
            module: Triplets(p=self._tensor(module, "b"), e=self._tensor(module, "e"), q=self._tensor(module, "a"))
            for module in self.plans
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
        return config, {PREFIX + name: tensor for name, tensor in tensors.items()}

    def _initial(
        self, base: BaseModel, generator: torch.Generator, initialization: str, start: NormalizedAdapter | None
    ) -> dict[str, Tensors]:
        modules = {} if start is None else start.modules
        reasons = [
            f"{name}: the adapter to go on from has it, the new one does not"
            for name in modules
            if name not in self.plans
        ]
        initial = {}
        for name, plan in self.plans.items():
            scale = self._parsed.scale(plan.rank or 0, plan.alpha)
            place = Place(name=name, kind=self._parsed.kind, plan=plan, scale=scale, base=base)
            try:
                initial[name] = initial_tensors(place, generator, initialization=initialization, start=modules)
            except ValueError as error:
                reasons.append(f"{name}: {error}")
        if reasons:
            raise AdapterIncompatibleError(reasons)
        return initial

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


def _doubled(config: Mapping[str, object]) -> dict[str, object]:
    """The keys that keep every scale when ranks are doubled."""
    rank, alpha = config["r"], config["lora_alpha"]
    assert isinstance(rank, int)
    assert isinstance(alpha, int | float)
    return {"r": 2 * rank, "lora_alpha": alpha * (math.sqrt(2) if config.get("use_rslora") else 2)}


def _is_low_rank(plan: ModulePlan) -> bool:
    return plan.targeted and plan.base.kind == "linear" and not (plan.replaced or plan.row_ids or plan.bias)

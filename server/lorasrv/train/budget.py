"""AdaLoRA's allocation of ranks, https://arxiv.org/abs/2303.10512 section 3: which triplets of PΛQ stay.

Knows factors and their gradients by module name; knows no layer, no file and no optimizer. Steps are optimizer steps.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Triplets:
    """One module's W + P diag(e) Q.

    Attributes:
        p: [O, R], PEFT's lora_B.
        e: [R, 1], PEFT's lora_E.
        q: [R, I], PEFT's lora_A.
    """

    p: Tensor
    e: Tensor
    q: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class BudgetSchedule:
    """Equation 12: from `start` triplets to `target`, along a cubic between two steps.

    Attributes:
        start: triplets before `first_step`.
        target: triplets from `last_step` on.
        first_step: the last step with all triplets.
        last_step: the first step of the final phase, in which the choice stays.
        every: steps between choices.
    """

    start: int
    target: int
    first_step: int
    last_step: int
    every: int

    def budget(self, step: int) -> int:
        """Triplets that survive step `step`, counted from 1."""
        if step <= self.first_step:
            return self.start
        if step >= self.last_step:
            return self.target
        left = 1 - (step - self.first_step) / (self.last_step - self.first_step)
        return int(self.target + (self.start - self.target) * left**3)

    def chooses(self, step: int) -> bool:
        """Whether triplets are chosen anew at step `step`."""
        return (self.first_step < step < self.last_step and step % self.every == 0) or step == self.last_step


class RankAllocator:
    """Keeps every triplet's importance, and sets the least important ones to zero.

    Importance is sensitivity times uncertainty, both smoothed (equations 9 to 11); a triplet's is that of its e, plus
    the means over its column of P and its row of Q (equation 8).

    Attributes:
        masks: by module, [R] bool: the triplets kept; once the final phase began, for good.
    """

    def __init__(self, triplets: Mapping[str, Triplets], schedule: BudgetSchedule, *, beta: float) -> None:
        """Starts with no importance and all triplets; the tensors are those being trained, in a fixed order."""
        self._triplets = triplets
        self._schedule = schedule
        self._beta = beta
        self._sensitivity = {name: _zeros(triplet) for name, triplet in triplets.items()}
        self._uncertainty = {name: _zeros(triplet) for name, triplet in triplets.items()}
        self.masks = {
            name: torch.ones(len(triplet.e), dtype=torch.bool, device=triplet.e.device)
            for name, triplet in triplets.items()
        }

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Called after optimizer step `step`, counted from 1, while its gradients are still there.

        A step whose gradients are not finite leaves the importance as it was.
        """
        if step < self._schedule.last_step:
            self._observe()
        if self._schedule.chooses(step):
            self._choose(self._schedule.budget(step))
        if self._schedule.chooses(step) or step > self._schedule.last_step:
            for name, triplet in self._triplets.items():
                triplet.e[~self.masks[name]] = 0

    @property
    def is_final(self) -> bool:
        """Whether no more than the final budget is left."""
        return sum(self.ranks().values()) <= self._schedule.target

    def ranks(self) -> dict[str, int]:
        """By module, how many triplets are kept now."""
        return {name: int(mask.sum()) for name, mask in self.masks.items()}

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint must hold."""
        state = {f"mask/{name}": mask for name, mask in self.masks.items()}
        for kind, averages in (("sensitivity", self._sensitivity), ("uncertainty", self._uncertainty)):
            state |= {
                f"{kind}/{name}/{part}": tensor for name, parts in averages.items() for part, tensor in parts.items()
            }
        return state

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Takes what `state` gave; raises KeyError where something is missing."""
        for name, tensor in self.state().items():
            tensor.copy_(state[name])

    def _observe(self) -> None:
        gradients = [part.grad for triplet in self._triplets.values() for part in (triplet.p, triplet.e, triplet.q)]
        if not all(gradient is not None and bool(torch.isfinite(gradient).all()) for gradient in gradients):
            return
        for name, triplet in self._triplets.items():
            for part, weight in _parts(triplet).items():
                assert weight.grad is not None
                importance = (weight * weight.grad).abs_()
                sensitivity = self._sensitivity[name][part].lerp_(importance, 1 - self._beta)
                self._uncertainty[name][part].lerp_((importance - sensitivity).abs_(), 1 - self._beta)

    def _choose(self, budget: int) -> None:
        scores = torch.cat([self._scores(name) for name in self._triplets])
        # a stable order, so that ties go to the earlier module and exactly the budget survives
        kept = torch.zeros_like(scores, dtype=torch.bool)
        kept[scores.argsort(descending=True, stable=True)[:budget]] = True
        sizes = [len(triplet.e) for triplet in self._triplets.values()]
        for mask, chosen in zip(self.masks.values(), kept.split(sizes), strict=True):
            mask.copy_(chosen)

    def _scores(self, name: str) -> Tensor:
        parts = {part: self._sensitivity[name][part] * self._uncertainty[name][part] for part in ("p", "e", "q")}
        return parts["e"][:, 0] + parts["p"].mean(0) + parts["q"].mean(1)


def orthogonality(triplets: Mapping[str, Triplets]) -> Tensor:
    """How far all P and Q are from orthogonal: the mean of |P^T P - 1| and |Q Q^T - 1| over the modules, unsquared.

    The paper's equation 4 squares and sums; PEFT and the authors' own code do this.
    """
    distances = []
    for triplet in triplets.values():
        one = torch.eye(len(triplet.e), device=triplet.e.device)
        distances += [torch.dist(triplet.p.T @ triplet.p, one), torch.dist(triplet.q @ triplet.q.T, one)]
    return torch.stack(distances).mean()


def _parts(triplet: Triplets) -> dict[str, Tensor]:
    return {"p": triplet.p, "e": triplet.e, "q": triplet.q}


def _zeros(triplet: Triplets) -> dict[str, Tensor]:
    return {part: torch.zeros_like(tensor, requires_grad=False) for part, tensor in _parts(triplet).items()}

"""AdamW over an adapter's flat buffers: PyTorch's own, or bitsandbytes' with states that are paged or in 8 bits.

Paged states live in memory that the driver moves between device and host as needed (https://arxiv.org/abs/2305.14314
section 3); bitsandbytes pages tensors of 100 000 elements or more, which flat buffers are. Knows no adapter.
"""

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from lorasrv.train.config import OptimizerName

_log = logging.getLogger(__name__)
_PROBED_ELEMENTS = 1 << 17


class FlatOptimizer:
    """Decoupled weight decay Adam, https://arxiv.org/abs/1711.05101.

    Attributes:
        name: which optimizer it is, "auto" and fallbacks resolved.
    """

    def __init__(
        self,
        buffers: Mapping[str, Parameter],
        rates: Mapping[str, float],
        *,
        name: OptimizerName,
        betas: tuple[float, float],
        weight_decay: float,
    ) -> None:
        """Takes the buffers, their gradients in place, and the highest learning rate of each."""
        self._buffers = dict(buffers)
        self._rates = dict(rates)
        self.name = _resolve(name, next(iter(buffers.values())).device)
        groups = [{"params": [buffer], "lr": rates[role]} for role, buffer in buffers.items()]
        self._inner = _new(self.name, groups, betas=betas, weight_decay=weight_decay)

    def step(self, factor: float) -> float:
        """Takes the gradients into the buffers, at `factor` of the highest learning rates; returns the largest rate."""
        for group, rate in zip(self._inner.param_groups, self._rates.values(), strict=True):
            group["lr"] = rate * factor
        self._inner.step()
        return max(self._rates.values()) * factor

    def state(self) -> dict[str, Tensor]:
        """What steps have changed beside the buffers."""
        return {
            f"{role}/{key}": value if isinstance(value, Tensor) else torch.tensor(value)
            for role, buffer in self._buffers.items()
            for key, value in self._inner.state[buffer].items()
            # code tables, the same in every run
            if not key.startswith("qmap")
        }

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Takes what `state` gave."""
        for place, (role, buffer) in enumerate(self._buffers.items()):
            prefix = f"{role}/"
            found = {name.removeprefix(prefix): state[name] for name in state if name.startswith(prefix)}
            allocate = getattr(self._inner, "init_state", None)
            if allocate is None:
                self._inner.state[buffer] = found
                continue
            # paged memory must be bitsandbytes' own
            allocate(self._inner.param_groups[place], buffer, place, 0)
            own = self._inner.state[buffer]
            for key, value in found.items():
                if isinstance(own[key], Tensor):
                    own[key].copy_(value)
                else:
                    own[key] = int(value)


def can_page(device: torch.device) -> bool:
    """Whether memory of this device can be paged, which some drivers and virtual machines refuse."""
    if device.type != "cuda":
        return False
    from bitsandbytes.functional import get_paged

    try:
        get_paged(_PROBED_ELEMENTS, dtype=torch.float32, device=device)
    except RuntimeError:
        return False
    return True


def _resolve(name: OptimizerName, device: torch.device) -> OptimizerName:
    if name == "adamw" or (name == "auto" and device.type != "cuda"):
        return "adamw"
    if can_page(device):
        return "paged_adamw" if name == "auto" else name
    fallback: OptimizerName = "adamw_8bit" if name in ("paged_adamw_8bit", "adamw_8bit") else "adamw"
    if name not in ("auto", fallback):
        _log.warning("memory of %s cannot be paged: %s instead of %s", device, fallback, name)
    return fallback


def _new(
    name: OptimizerName, groups: list[dict[str, Any]], *, betas: tuple[float, float], weight_decay: float
) -> torch.optim.Optimizer:
    if name == "adamw":
        return torch.optim.AdamW(groups, betas=betas, weight_decay=weight_decay, fused=True)
    from bitsandbytes.optim import adamw

    kinds: dict[str, Any] = {"paged_adamw": adamw.PagedAdamW32bit, "paged_adamw_8bit": adamw.PagedAdamW8bit}
    made: torch.optim.Optimizer = kinds.get(name, adamw.AdamW8bit)(groups, betas=betas, weight_decay=weight_decay)
    return made

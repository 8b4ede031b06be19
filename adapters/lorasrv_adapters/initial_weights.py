r"""PiSSA, OLoRA, CorDA and LoRA-GA, which take their initial weights out of the base, as plain LoRA of twice the rank.

PEFT initializes them as W' = W - s B0 A0 and then trains W' + s B A. On the base as it was before, that is

    W + s (B A - B0 A0) = W + s [B, -B0] [A; A0]        A [R, I], B [O, R], so rank 2 R

exactly, with the scale s of each module kept. For DoRA the magnitude divides the norm of the same sum, and stays as it
is. (PiSSA: arXiv 2404.02948; OLoRA: 2406.01775; CorDA: 2406.05223; LoRA-GA: 2407.05000.) It knows configs and tensors,
no files.
"""

import math
import re
from collections.abc import Mapping, Set

import torch
from torch import Tensor

from lorasrv_adapters.config import AdapterConfig
from lorasrv_adapters.errors import AdapterConversionError
from lorasrv_adapters.fields import is_live
from lorasrv_adapters.raw import (
    Factors,
    RawAdapter,
    check_ranks,
    find_factors,
    parse_keys,
    refuse_keys_except,
    require_finite,
)

_READ = frozenset({"r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern"})
_REPLACED = frozenset({"init_lora_weights", "corda_config", "lora_ga_config"})
# lora_bias is times the same scale as before
_KEPT = frozenset({"lora_bias"})
_IN_LAYERS = re.compile(r"\.\d+\.")
_SCALING = {
    "r": "rank",
    "lora_alpha": "alpha",
    "use_rslora": "use_rslora",
    "rank_pattern": "rank_pattern",
    "alpha_pattern": "alpha_pattern",
}


def changes_base(init: object) -> bool:
    """Whether PEFT takes the initial factors of this `init_lora_weights` out of the base's weights."""
    if not isinstance(init, str):
        return False
    return init.startswith(("pissa", "corda")) or init.lower() == "olora" or init == "lora_ga"


def subtract_initial(trained: RawAdapter, initial: RawAdapter) -> RawAdapter:
    """Express an adapter on the base as it was before its initialization.

    Args:
        trained: The adapter after training.
        initial: The same adapter before training; only its low-rank factors are used.

    Returns:
        An adapter of twice the rank; tensors that are no low-rank factor are the trained ones.

    Raises:
        AdapterConversionError: They do not belong together, or a config key would lose its meaning; all is listed.
    """
    config, reasons = _examine(trained, initial)
    factors, wrong = find_factors(trained.tensors, "AB")
    first, wrong_first = find_factors(initial.tensors, "AB")
    reasons += wrong + [f"initial adapter: {reason}" for reason in wrong_first] + _shared(trained.config, factors)
    if config is None or reasons:
        raise AdapterConversionError(reasons)
    pairs = {
        (module, role): (trained.tensors[found.names[role]], initial.tensors[first[module].names[role]])
        for module, found in factors.items()
        if module in first
        for role in "AB"
    }
    reasons = check_ranks(config, trained.tensors, factors) + _compare(factors.keys(), first.keys(), pairs)
    if reasons:
        raise AdapterConversionError(reasons)
    tensors = dict(trained.tensors)
    for module, found in factors.items():
        (a, a0), (b, b0) = pairs[module, "A"], pairs[module, "B"]
        tensors[found.names["A"]] = _concatenate(a, a0, dim=0)
        tensors[found.names["B"]] = _concatenate(b, -b0, dim=1)
    return require_finite(RawAdapter(config=_doubled(trained.config, config), tensors=tensors))


def _examine(trained: RawAdapter, initial: RawAdapter) -> tuple[AdapterConfig | None, list[str]]:
    """Parse the trained config; the initial one must scale in the same way."""
    config, reasons = parse_keys(trained.config, _READ)
    first, wrong = parse_keys(initial.config, _READ)
    reasons += refuse_keys_except(trained.config, _READ | _REPLACED | _KEPT)
    reasons += [f"initial adapter: {reason}" for reason in wrong]
    if initial.config.get("init_lora_weights") == "loftq":
        reasons.append("initial adapter: LoftQ also quantizes the base, which no LoRA can express")
    if config is not None and first is not None:
        reasons += [
            f"initial adapter: its {key} is another than the trained adapter's"
            for key, attribute in _SCALING.items()
            if getattr(config, attribute) != getattr(first, attribute)
        ]
    return config, reasons


def _shared(config: Mapping[str, object], factors: Mapping[str, Factors]) -> list[str]:
    """What a base with tied embeddings shares between the embedding and the head, which only one sum would reach."""
    reasons = [
        f"{module} lies outside the layers: if the base ties it to its token embedding, the initialization changed "
        "that too, which no adapter can undo"
        for module, found in factors.items()
        if not found.embedding and not _IN_LAYERS.search(module)
    ]
    if is_live(config.get("ensure_weight_tying")) and any(found.embedding for found in factors.values()):
        # the head would need [A0, -A] of them where the embedding has [A; A0]
        reasons.append("ensure_weight_tying shares the factors of embedding and head, which the sum of two cannot")
    return reasons


def _compare(modules: Set[str], initial: Set[str], pairs: Mapping[tuple[str, str], tuple[Tensor, Tensor]]) -> list[str]:
    """Each module must have initial factors of its shapes, and some must differ from zero and from the trained ones."""
    reasons = [f"initial adapter: it has no {module}" for module in sorted(modules - initial)]
    reasons += [f"initial adapter: it has {module}, which was not trained" for module in sorted(initial - modules)]
    reasons += [
        f"initial adapter: {module}.lora_{role} has shape {list(before.shape)}, the trained one {list(after.shape)}"
        for (module, role), (after, before) in pairs.items()
        if before.shape != after.shape
    ]
    if all(torch.equal(*pair) for pair in pairs.values()):
        reasons.append("initial adapter: its weights are the trained ones")
    if not any(bool(pairs[module, "A"][1].any() and pairs[module, "B"][1].any()) for module in modules & initial):
        reasons.append("initial adapter: B A is zero, so nothing was taken out of the base: this is plain LoRA")
    return reasons


def _concatenate(first: Tensor, second: Tensor, *, dim: int) -> Tensor:
    dtype = torch.promote_types(first.dtype, second.dtype)
    return torch.cat([first.to(dtype), second.to(dtype)], dim=dim)


def _doubled(raw: Mapping[str, object], config: AdapterConfig) -> dict[str, object]:
    """The config of the sum: ranks doubled, and alphas so that each module keeps its scale."""
    factor = math.sqrt(2) if config.use_rslora else 2
    changed: dict[str, object] = {
        "r": 2 * config.rank,
        "lora_alpha": _whole(factor * config.alpha),
        "rank_pattern": {key: 2 * rank for key, rank in config.rank_pattern},
        "alpha_pattern": {key: _whole(factor * alpha) for key, alpha in config.alpha_pattern},
        "init_lora_weights": True,
    }
    return {**raw, **changed} | {key: None for key in ("corda_config", "lora_ga_config") if key in raw}


def _whole(value: float) -> float:
    """The value as an integer where it is one, as PEFT writes it."""
    return int(value) if value.is_integer() else value

r"""AdaLoRA as plain LoRA: each module with the rank that survived, in PEFT's own `rank_pattern` and `alpha_pattern`.

    W + alpha / (init_r + 1e-5) P diag(E) Q = W + B A      A = sqrt|sE| Q,  B = P sign(E) sqrt|sE|,  rows with E != 0

(arXiv 2303.10512, section 3.1.) Both factors take the root, so that neither is badly scaled; rank and alpha are equal,
so that LoRA's own scale is exactly 1. It knows configs and tensors, no files and no base.
"""

from collections import Counter
from collections.abc import Mapping

import torch
from torch import Tensor

from lorasrv_adapters.config import AdapterConfig
from lorasrv_adapters.errors import AdapterConversionError
from lorasrv_adapters.keys import INERT_ADALORA
from lorasrv_adapters.naming import PREFIX
from lorasrv_adapters.raw import (
    Factors,
    RawAdapter,
    check_ranks,
    find_factors,
    parse_keys,
    refuse_keys_except,
    require_finite,
)

_READ = frozenset({"init_r", "lora_alpha", "rank_pattern"}) | INERT_ADALORA.keys()
# AdaLoRA has a rank and an initialization of its own, whatever these say
_REPLACED = frozenset(INERT_ADALORA) | {"init_lora_weights"}
_WRITTEN = frozenset({"r", "lora_alpha", "rank_pattern", "alpha_pattern"})


def adalora_to_lora(adapter: RawAdapter) -> RawAdapter:
    """Write an AdaLoRA adapter as LoRA.

    A module without any rank left is excluded. It stays, with one row of zeros, where it has trained tensors beside its
    factors or where `exclude_modules` is a regular expression.

    Args:
        adapter: The adapter, with or without its pruned rows.

    Returns:
        The same function of the base's weights; factors in float32.

    Raises:
        AdapterConversionError: Tensors and config do not fit together, or a key would lose its meaning; all is listed.
    """
    config, reasons = parse_keys(adapter.config, _READ)
    reasons += refuse_keys_except(adapter.config, _READ | _REPLACED)
    factors, wrong = find_factors(adapter.tensors, "ABE")
    reasons += wrong
    if config is None or reasons:
        raise AdapterConversionError(reasons)
    reasons = check_ranks(config, adapter.tensors, factors)
    reasons += [f"rank_pattern names {name[:200]!r}, which has no tensors" for name in config.masks.keys() - factors]
    if reasons:
        raise AdapterConversionError(reasons)
    modules = {module: _fold(config, module, adapter.tensors, found) for module, found in factors.items()}
    return require_finite(_read_back(_assemble(adapter, factors, modules)))


def _fold(config: AdapterConfig, module: str, tensors: Mapping[str, Tensor], factors: Factors) -> tuple[Tensor, Tensor]:
    """A and B of one module, without the rows that do nothing; the rank may be 0."""
    a, b, e = (tensors[factors.names[role]].float() for role in "ABE")
    e, mask = e.reshape(-1), config.masks.get(module)
    keep = e != 0
    if mask is not None and len(mask) == len(e):
        keep &= torch.tensor(mask)
    a, b, e = a[keep], b[:, keep], e[keep]
    root = (e.abs() * config.scale(config.rank, config.alpha)).sqrt()
    return root[:, None] * a, b * (root * e.sign())


def _assemble(
    adapter: RawAdapter, factors: Mapping[str, Factors], modules: Mapping[str, tuple[Tensor, Tensor]]
) -> RawAdapter:
    moved = {name for found in factors.values() for name in found.names.values()}
    tensors = {name: tensor for name, tensor in adapter.tensors.items() if name not in moved}
    empty = {module for module, (a, _) in modules.items() if not len(a)}
    if len(empty) == len(modules):
        raise AdapterConversionError(["no module has any rank left: the adapter changes nothing"])
    excluded = adapter.config.get("exclude_modules") or []
    stay = {module for module in empty if any(name.startswith(f"{PREFIX}{module}.") for name in tensors)}
    left_out = sorted(empty - stay) if isinstance(excluded, list) else []
    ranks: dict[str, int] = {}
    for module, (a, b) in modules.items():
        if module in left_out:
            continue
        ranks[module] = max(len(a), 1)
        tensors[f"{PREFIX}{module}.lora_A.weight"] = a if len(a) else a.new_zeros(1, a.shape[1])
        tensors[f"{PREFIX}{module}.lora_B.weight"] = b if len(a) else b.new_zeros(b.shape[0], 1)
    config = _lora_config(adapter.config, ranks)
    if isinstance(excluded, list) and left_out:
        config["exclude_modules"] = [*excluded, *left_out]
    return RawAdapter(config=config, tensors=tensors)


def _lora_config(raw: Mapping[str, object], ranks: Mapping[str, int]) -> dict[str, object]:
    most_common = Counter(ranks.values()).most_common(1)[0][0]
    pattern = {module: rank for module, rank in ranks.items() if rank != most_common}
    kept = {key: value for key, value in raw.items() if key not in _REPLACED | {"init_r"}}
    return kept | {
        "peft_type": "LORA",
        "r": most_common,
        "lora_alpha": most_common,
        "use_rslora": False,
        "rank_pattern": pattern,
        "alpha_pattern": pattern,
        "init_lora_weights": True,
    }


def _read_back(adapter: RawAdapter) -> RawAdapter:
    """Check that the patterns, which are regular expressions, give each module the rank that was written."""
    config, reasons = parse_keys(adapter.config, _WRITTEN)
    if config is not None and not reasons:
        reasons = check_ranks(config, adapter.tensors, find_factors(adapter.tensors, "AB")[0])
    if reasons:
        raise AdapterConversionError(reasons)
    return adapter

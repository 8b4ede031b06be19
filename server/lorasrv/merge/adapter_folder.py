"""What adapters do, in the normal form, as a PEFT folder: LoRA, or DoRA where outputs are scaled.

    B A         lora_A = A, lora_B = B, rank and alpha equal in each module, so that PEFT's own scale is exactly 1
    d W + B A   lora_B = B / d, magnitude = d |W + (B / d) A|, norms of rows, W the base as it is served

It knows the normal form and PEFT's names; no file of a base and no method the update came from.
"""

from collections import Counter
from collections.abc import Mapping

from lorasrv_adapters.base import BaseModel
from lorasrv_adapters.errors import AdapterIncompatibleError
from lorasrv_adapters.naming import PREFIX
from lorasrv_adapters.normalize import NormalizedAdapter, NormalizedModule, adapted_norms
from torch import Tensor


def as_peft(adapter: NormalizedAdapter, base: BaseModel) -> tuple[dict[str, object], dict[str, Tensor]]:
    """Write an update as PEFT has it.

    Args:
        adapter: in the normal form.
        base: the base it is for.

    Returns:
        The content of `adapter_config.json`, and tensors in float32 by PEFT's names.

    Raises:
        AdapterIncompatibleError: it changes more than linear layers by an update; everything is listed.
    """
    reasons = [reason for name, module in adapter.modules.items() for reason in _reasons(name, module, base)]
    modules = {name: module for name, module in adapter.modules.items() if module.rank or module.d is not None}
    if not modules and not reasons:
        reasons = ["there is no module with an update: nothing is left to write"]
    if reasons:
        raise AdapterIncompatibleError(reasons)
    scaled = any(module.d is not None for module in modules.values())
    tensors = {}
    for name, module in modules.items():
        for ending, tensor in _tensors(name, module, base, scaled=scaled).items():
            tensors[f"{PREFIX}{name}.{ending}"] = tensor
    ranks = {name: max(1, module.rank) for name, module in modules.items()}
    return _config(adapter, ranks, scaled=scaled), tensors


def _reasons(name: str, module: NormalizedModule, base: BaseModel) -> list[str]:
    """What the folder could not say of a module."""
    kind = base.modules[name].kind
    found = [
        "a bias" if module.bias is not None else "",
        "rows in place of the base's" if module.rows is not None else "",
        f"an update of the {kind}" if module.rank and kind not in ("linear", "head") else "",
        "an output multiplied by zero" if module.d is not None and not bool(module.d.all()) else "",
    ]
    return [f"{name}: {what} cannot be written into an adapter; write a model instead" for what in found if what]


def _tensors(name: str, module: NormalizedModule, base: BaseModel, *, scaled: bool) -> dict[str, Tensor]:
    a, b, d = module.a, module.b, module.d
    if not module.rank:
        a, b = a.new_zeros(1, a.shape[1]), b.new_zeros(b.shape[0], 1)
    if not scaled:
        return {"lora_A.weight": a, "lora_B.weight": b}
    if d is None:
        return {"lora_A.weight": a, "lora_B.weight": b, "lora_magnitude_vector": adapted_norms(name, a, b, base)}
    update = b / d[:, None]
    magnitude = d * adapted_norms(name, a, update, base)
    return {"lora_A.weight": a, "lora_B.weight": update, "lora_magnitude_vector": magnitude}


def _config(adapter: NormalizedAdapter, ranks: Mapping[str, int], *, scaled: bool) -> dict[str, object]:
    most_common = Counter(ranks.values()).most_common(1)[0][0]
    pattern = {name: rank for name, rank in ranks.items() if rank != most_common}
    return {
        "base_model_name_or_path": adapter.base_model,
        "bias": "none",
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": most_common,
        "alpha_pattern": pattern,
        "peft_type": "LORA",
        "r": most_common,
        "rank_pattern": pattern,
        "target_modules": sorted(ranks),
        "task_type": "CAUSAL_LM",
        "use_dora": scaled,
        "use_rslora": False,
    }

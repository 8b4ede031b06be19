"""Combined adapters as one more adapter: read as a server would, compared with what it should do, and written.

Knows the folder of a result; what it holds is `adapter_folder`'s business.
"""

from collections.abc import Mapping
from typing import Any

import torch
from lorasrv_adapters.checkpoint import write_checkpoint
from lorasrv_adapters.config import parse_adapter_config
from lorasrv_adapters.normalize import NormalizedAdapter, normalize
from lorasrv_adapters.provenance import BASE_DIGEST_KEY, BASE_QUANTIZATION_KEY

from lorasrv.merge.adapter_folder import as_peft
from lorasrv.merge.base import StreamedBase
from lorasrv.merge.combine import factored
from lorasrv.merge.config import MergeConfig
from lorasrv.merge.inputs import Inputs
from lorasrv.merge.update import AdapterUpdates


def write_adapter(inputs: Inputs, config: MergeConfig, *, provenance: Mapping[str, object]) -> dict[str, Any]:
    """Write what adapters do together as a PEFT folder.

    Args:
        inputs: base and adapters.
        config: where to, and in which type; float32 unless it says otherwise.
        provenance: where the adapter comes from.

    Returns:
        The record of it: provenance, rank, size, energy and error of every module.

    Raises:
        AdapterIncompatibleError: it does more than an adapter can say; lists everything.
        FileExistsError: the folder has content already.
    """
    base, combined = inputs.base, inputs.combined
    if combined.adapter is None:
        assert config.rank is not None
        combined = factored(combined, base, rank=config.rank, like=inputs.parts[0].adapter)
    assert combined.adapter is not None
    content, tensors = as_peft(combined.adapter, base)
    if config.dtype != "auto":
        dtype = getattr(torch, config.dtype)
        # PEFT keeps magnitudes as they are trained
        tensors = {name: tensor.to(dtype) if tensor.ndim > 1 else tensor for name, tensor in tensors.items()}
    recorded = {
        BASE_DIGEST_KEY: base.digest,
        BASE_QUANTIZATION_KEY: "none" if inputs.weights == "original" else "nf4",
        "merge": {key: value for key, value in provenance.items() if key != BASE_DIGEST_KEY},
    }
    errors = _errors(combined.adapter, normalize(parse_adapter_config(content), tensors, base), base)
    write_checkpoint(config.out, content, tensors, provenance=recorded)
    modules = [
        {
            "module": name,
            "rank": combined.adapter.modules[name].rank,
            "energy": combined.energy.get(name, 1.0),
            "error": error,
        }
        for name, error in errors.items()
    ]
    num_bytes = sum(tensor.nbytes for tensor in tensors.values())
    return {**provenance, "kind": "dora" if content["use_dora"] else "lora", "num_bytes": num_bytes, "modules": modules}


def _errors(wanted: NormalizedAdapter, found: NormalizedAdapter, base: StreamedBase) -> dict[str, float]:
    """By module, the norm of what was lost in the writing over that of the update."""
    wanted_updates, found_updates = AdapterUpdates(wanted, base), AdapterUpdates(found, base)
    errors = {}
    for name in wanted_updates.modules:
        weight = base.weight(name)
        one, other = (updates.update(name, weight).delta for updates in (wanted_updates, found_updates))
        assert one is not None
        assert other is not None
        errors[name] = float((one - other).norm() / one.norm().clamp_min(torch.finfo(torch.float32).tiny))
    return errors

"""An adapter folder rewritten in its plainest form: safetensors instead of a pickle, LoRA instead of what becomes LoRA.

It knows which conversion an adapter needs, and the folders; the mathematics is in `adalora` and `initial_weights`.
A server has no need of this module.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lorasrv_adapters.adalora import adalora_to_lora
from lorasrv_adapters.checkpoint import write_checkpoint
from lorasrv_adapters.config import CONFIG_NAME, Kind, examine_adapter_config, parse_adapter_config
from lorasrv_adapters.errors import AdapterConversionError, AdapterCorruptError, AdapterIncompatibleError
from lorasrv_adapters.fields import MAX_JSON_BYTES, parse_json
from lorasrv_adapters.initial_weights import changes_base, subtract_initial
from lorasrv_adapters.pickles import find_pickle, read_pickle
from lorasrv_adapters.provenance import read_provenance
from lorasrv_adapters.raw import RawAdapter, find_factors
from lorasrv_adapters.weights import DEFAULT_LIMITS, WEIGHTS_NAME, WeightLimits, open_regular, read_weights

PICKLE_STEP = "pickle -> safetensors"
ADALORA_STEP = "AdaLoRA -> LoRA"

_NEUTRAL: Mapping[str, object] = {"init_lora_weights": True, "corda_config": None, "lora_ga_config": None}
_MISSING_INITIAL = (
    "init_lora_weights={init!r} changed the base before training, so that the weights alone do not say what was "
    "learned. Give the adapter as it was before training with --initial: the folder that model.save_pretrained(DIR) "
    "writes right after get_peft_model(base, config). For 'pissa' and 'olora' that can be done again on the same base; "
    "for other initializations only the folder of that very run will do"
)
_LOFTQ = (
    "init_lora_weights='loftq' put a quantized base in the place of the original one; what was learned holds on that "
    "base alone and is no LoRA on another"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversion:
    """What was done to an adapter.

    Attributes:
        steps: Each change, as "from -> to".
        kind: The method it has now.
        ranks: By module, the rank before and after; 0 after: the module is left out.
        num_bytes: Bytes of all tensors that were written.
    """

    steps: tuple[str, ...]
    kind: Kind
    ranks: Mapping[str, tuple[int, int]]
    num_bytes: int


def convert_checkpoint(
    source: Path, out: Path, *, initial: Path | None = None, limits: WeightLimits = DEFAULT_LIMITS
) -> Conversion:
    """Write an adapter's plainest form into a new folder; blocks on files, and for a pickle on another process.

    Args:
        source: A PEFT folder.
        out: Where to write; it must not exist yet, or be empty.
        initial: The folder of the adapter as it was before training, where its initialization changed the base.
        limits: What each weights file may hold.

    Raises:
        SourceNotFoundError: A file is missing.
        AdapterCorruptError: A file is damaged.
        AdapterConversionError: It cannot be converted, or there is nothing to convert.
        AdapterIncompatibleError: The result would not be served.
        FileExistsError: `out` has content already.
    """
    adapter, steps = read_raw(source, limits)
    before = _ranks(adapter)
    try:
        adapter, step = _to_lora(adapter, initial, limits)
    except AdapterConversionError as error:
        raise AdapterConversionError(_with_other_reasons(adapter, error.reasons)) from error
    steps += step
    if not steps:
        raise AdapterConversionError(
            ["there is nothing to convert: the weights are in safetensors, and the method is served as it is"]
        )
    # what was trained on a changed base is now for another
    provenance = read_provenance(source) if initial is None else {}
    write_checkpoint(out, adapter.config, adapter.tensors, provenance=provenance)
    after = _ranks(adapter)
    return Conversion(
        steps=steps,
        kind=parse_adapter_config(adapter.config).kind,
        ranks={module: (rank, after.get(module, 0)) for module, rank in before.items()},
        num_bytes=sum(tensor.nbytes for tensor in adapter.tensors.values()),
    )


def read_raw(folder: Path, limits: WeightLimits = DEFAULT_LIMITS) -> tuple[RawAdapter, tuple[str, ...]]:
    """Read an adapter's two files, the weights pickled or not; safetensors win where both are there, as in PEFT.

    Returns:
        The adapter, and the step that reading it was.

    Raises:
        SourceNotFoundError: A file is missing.
        AdapterCorruptError: A file is damaged.
        AdapterConversionError: The pickle is refused.
        AdapterIncompatibleError: The weights are beyond a limit, or hold other element types.
    """
    with open_regular(folder / CONFIG_NAME) as file:
        config = parse_json(file.read(MAX_JSON_BYTES + 1), CONFIG_NAME)
    if not isinstance(config, dict):
        raise AdapterCorruptError([f"{CONFIG_NAME} is not a JSON object"])
    pickled = None if os.path.lexists(folder / WEIGHTS_NAME) else find_pickle(folder)
    tensors = read_weights(folder, limits) if pickled is None else read_pickle(pickled, limits)
    return RawAdapter(config=config, tensors=tensors), () if pickled is None else (PICKLE_STEP,)


def _to_lora(adapter: RawAdapter, initial: Path | None, limits: WeightLimits) -> tuple[RawAdapter, tuple[str, ...]]:
    """Turn an adapter into LoRA if its method becomes LoRA; also returns the step that this was."""
    method, init = adapter.config.get("peft_type"), adapter.config.get("init_lora_weights", True)
    if method == "LORA" and init == "loftq":
        raise AdapterConversionError([_LOFTQ])
    if method == "LORA" and (changes_base(init) or (initial is not None and init is True)):
        if initial is None:
            raise AdapterConversionError([_MISSING_INITIAL.format(init=init)])
        name = "LoRA on a changed base" if init is True else f"LoRA initialized with {init}"
        return subtract_initial(adapter, _read_initial(initial, limits)), (f"{name} -> LoRA",)
    if initial is not None:
        raise AdapterConversionError(
            [f"initial weights do not belong to it: {method} with init_lora_weights={init!r} leaves the base alone"]
        )
    return (adalora_to_lora(adapter), (ADALORA_STEP,)) if method == "ADALORA" else (adapter, ())


def _read_initial(folder: Path, limits: WeightLimits) -> RawAdapter:
    try:
        return read_raw(folder, limits)[0]
    except (AdapterConversionError, AdapterCorruptError, AdapterIncompatibleError) as error:
        raise AdapterConversionError([f"initial adapter: {reason}" for reason in error.reasons]) from error


def _with_other_reasons(adapter: RawAdapter, reasons: Sequence[str]) -> list[str]:
    """Add what would be refused of the result, for keys that have no reason yet."""
    _, others = examine_adapter_config({**adapter.config, **_NEUTRAL})
    keys = {reason.partition("=")[0] for reason in reasons}
    return [*reasons, *(other for other in others if other.partition("=")[0] not in keys)]


def _ranks(adapter: RawAdapter) -> dict[str, int]:
    factors, _ = find_factors(adapter.tensors, "AB")
    return {
        module: adapter.tensors[found.names["A"]].shape[0] for module, found in factors.items() if "A" in found.names
    }

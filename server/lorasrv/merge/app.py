"""A whole merge from its configuration: base and adapters in, one folder out, complete or not at all.

Knows no terminal.
"""

import json
import platform
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from lorasrv import __version__
from lorasrv.errors import MergeRefusedError
from lorasrv.merge.config import MergeConfig
from lorasrv.merge.files import MergedWeights, Progress, new_files
from lorasrv.merge.inputs import Inputs, open_inputs
from lorasrv.merge.new_adapter import write_adapter
from lorasrv.merge.report import REPORT_NAME, render_report
from lorasrv.merge.result import ResultPlan, plan_result
from lorasrv.merge.verify import Tolerance, verify
from lorasrv.model.merged import MERGE_NAME
from lorasrv.model.new_folder import check_absent, new_folder
from lorasrv.model.quantized_writer import COPIED_FILES, dtype_name

# more than the record takes beside the weights
_RECORD_BYTES = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What was written.

    Attributes:
        folder: the new model.
        record: what `merge.json` in it says.
    """

    folder: Path
    record: Mapping[str, Any]

    def summary(self) -> dict[str, Any]:
        """For a report in JSON."""
        return {"folder": self.folder, **self.record}


def merge(config: MergeConfig, *, progress: Progress | None = None) -> Outcome:
    """Merges adapters into a base, or into one adapter, and writes the result; blocks, for large models for minutes.

    Args:
        config: what to do.
        progress: told how far it is.

    Raises:
        FileExistsError: the folder exists, or is being written.
        FileNotFoundError: there is no folder to put it into.
        ModelLoadError: the base cannot be used.
        AdapterError: the adapter cannot be found, read or served on this base.
        MergeError: it cannot be merged; lists every reason.
        MergeRefusedError: 4 bits would take out again what was merged.
        MergeVerificationError: merged, it would answer otherwise; nothing is left.
        DiskFullError: there is no room for the result.
    """
    check_absent(config.out)
    if not config.out.parent.is_dir():
        raise FileNotFoundError(f"{config.out.parent} is no folder; make it first")
    with open_inputs(config) as inputs:
        provenance = _provenance(inputs, config)
        if config.output == "adapter":
            return Outcome(folder=config.out, record=write_adapter(inputs, config, provenance=provenance))
        plan = plan_result(inputs.raw, inputs.base, inputs.combined.source)
        weights = MergedWeights(
            inputs.base,
            inputs.combined.source,
            plan,
            dtype=None if config.dtype == "auto" else getattr(torch, config.dtype),
            in_nf4=config.quantize == "nf4",
            progress=progress,
        )
        if config.quantize == "nf4" and inputs.weights == "dequantized" and not config.force:
            raise _refusal(weights)
        return Outcome(folder=config.out, record=_write(config, inputs, plan, weights, provenance=provenance))


def _write(
    config: MergeConfig,
    inputs: Inputs,
    plan: ResultPlan,
    weights: MergedWeights,
    *,
    provenance: Mapping[str, object],
) -> dict[str, object]:
    """Writes the folder, and gives the record that is in it."""
    files = new_files(weights, plan, shard_bytes=config.shard_bytes)
    copied = [path for name in COPIED_FILES if (path := inputs.folder / name).exists()]
    needed_bytes = files.num_bytes + sum(path.stat().st_size for path in copied) + _RECORD_BYTES
    in_nf4 = config.quantize == "nf4"
    tolerance = Tolerance.of(weights.dtype, in_nf4=in_nf4, limit=config.tolerance)
    with new_folder(config.out, needed_bytes=needed_bytes) as partial:
        num_bytes = files.write(partial, weights)
        for path in copied:
            shutil.copyfile(path, partial / path.name)
        agreement = verify(inputs, plan, partial, prompts=config.prompts)
        if not (in_nf4 and config.force):
            tolerance.check(agreement)
        record = {
            **provenance,
            "dtype": dtype_name(weights.dtype),
            "quantize": config.quantize,
            "untied": plan.untied,
            "num_bytes": num_bytes,
            "modules": [asdict(figures) for figures in weights.figures],
            "verification": tolerance.record(agreement),
        }
        (partial / MERGE_NAME).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        (partial / REPORT_NAME).write_text(render_report(record), encoding="utf-8")
    return record


def _refusal(weights: MergedWeights) -> MergeRefusedError:
    """Says what NF4 of dequantized weights would keep of the update, measured."""
    for _, weight in weights:
        # before the next one is computed
        del weight
    changed = [one for one in weights.figures if one.size] or weights.figures
    worst = min(changed, key=lambda one: one.kept)
    mean, error = (sum(getattr(one, name) for one in changed) / len(changed) for name in ("kept", "error"))
    return MergeRefusedError(
        "NF4 of dequantized weights rounds small updates back to where they began: of this one "
        f"{100 * mean:.1f} % would be kept, at an error of {100 * error:.0f} % of its size; {100 * worst.kept:.1f} % "
        f"at {100 * worst.error:.0f} % in {worst.module}, where it is {100 * worst.size:.2g} % of the weight. Give "
        "--weights original, or serve the NF4 base with the adapter unmerged, which loses nothing; --force writes it "
        "all the same",
        [(one.module, one.size, one.kept, one.error) for one in weights.figures],
    )


def _provenance(inputs: Inputs, config: MergeConfig) -> dict[str, object]:
    """Where a result comes from, without a path of the machine it was made on."""
    settings: Mapping[str, Mapping[str, object]] = {
        "linear": {},
        "svd": {"rank": config.rank},
        "ties": {"density": config.density},
        "dare": {"density": config.density, "seed": config.seed},
    }
    return {
        "base": inputs.parts[0].adapter.base_model,
        "base_digest": inputs.base.digest,
        "weights": inputs.weights,
        "adapters": [
            {"digest": part.adapter.digest, "kind": part.adapter.kind, "weight": part.weight} for part in inputs.parts
        ],
        "combine": {"method": config.combine, **settings[config.combine]},
        "versions": {
            "lorasrv": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    }

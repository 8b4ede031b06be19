"""What is merged: the base as it is streamed, and adapters in the normal form for the weights they are added to.

Knows folders and the Hub; knows nothing of the result.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub.constants
from lorasrv_adapters.checkpoint import read_checkpoint
from lorasrv_adapters.hub import HubSource
from lorasrv_adapters.provenance import BASE_QUANTIZATION_KEY, read_provenance
from lorasrv_adapters.source import HUB_PREFIX, resolve

from lorasrv.embedded import embedded_base
from lorasrv.errors import MergeError
from lorasrv.merge.base import StreamedBase, Weights
from lorasrv.merge.combine import Combined, combine
from lorasrv.merge.config import MergeConfig
from lorasrv.merge.linear import Weighted
from lorasrv.model.checkpoint import Checkpoint
from lorasrv.model.config import read_json
from lorasrv.model.folder import open_model_folder
from lorasrv.model.hub import model_folder


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """An open base, and what is merged into it.

    Attributes:
        folder: of the base.
        raw: the content of its `config.json`.
        checkpoint: its weights, as they are stored.
        base: with the weights that are merged into.
        weights: which these are.
        parts: the adapters, with their weights.
        combined: what they are together.
    """

    folder: Path
    raw: Mapping[str, Any]
    checkpoint: Checkpoint
    base: StreamedBase
    weights: Weights
    parts: tuple[Weighted, ...]
    combined: Combined


@contextmanager
def open_inputs(config: MergeConfig) -> Iterator[Inputs]:
    """Opens base and adapter, and closes the base's files in the end.

    Raises:
        ModelLoadError: the base cannot be used, or not with these weights.
        AdapterError: an adapter cannot be found, read or served on this base.
        MergeError: the adapters do not go together.
    """
    folder = embedded_base() if config.base is None else model_folder(config.base)
    sources = [(_adapter_folder(source), weight) for source, weight in config.adapters]
    trained_on = _trained_on([source for source, _ in sources])
    weights = trained_on if config.weights == "auto" else config.weights
    model_config, checkpoint = open_model_folder(folder)
    with checkpoint:
        base = StreamedBase(model_config, checkpoint, weights=weights, trained_on=trained_on)
        parts = tuple(Weighted(adapter=read_checkpoint(source, base), weight=weight) for source, weight in sources)
        yield Inputs(
            folder=folder,
            raw=read_json(folder / "config.json"),
            checkpoint=checkpoint,
            base=base,
            weights=weights,
            parts=parts,
            combined=combine(
                parts, base, method=config.combine, rank=config.rank, density=config.density, seed=config.seed
            ),
        )


def _trained_on(folders: Sequence[Path]) -> Weights:
    """Which weights adapters record that they were trained on; dequantized ones where they record nothing."""
    original = [read_provenance(folder).get(BASE_QUANTIZATION_KEY) == "none" for folder in folders]
    if any(original) and not all(original):
        names = [folder.name for folder, is_original in zip(folders, original, strict=True) if is_original]
        raise MergeError(
            [
                f"{', '.join(names)}: trained on the original weights, the other adapters on their NF4 form, which is "
                "another base"
            ]
        )
    return "original" if any(original) else "dequantized"


def _adapter_folder(source: str) -> Path:
    if not source.startswith(HUB_PREFIX):
        folder = Path(source).expanduser().absolute()
        return resolve(str(folder), roots=[folder], hub=None)
    repository = source.removeprefix(HUB_PREFIX).partition("@")[0]
    downloads = Path(huggingface_hub.constants.HF_HOME) / "lorasrv-adapters"
    return resolve(source, roots=[], hub=HubSource(allowed=(repository,), folder=downloads))

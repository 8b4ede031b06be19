"""What is merged: the base as it is streamed, and the adapter in its normal form for the weights it is added to.

Knows folders and the Hub; knows nothing of the result.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub.constants
from lorasrv_adapters.checkpoint import read_checkpoint
from lorasrv_adapters.hub import HubSource
from lorasrv_adapters.normalize import NormalizedAdapter
from lorasrv_adapters.provenance import read_provenance
from lorasrv_adapters.source import HUB_PREFIX, resolve

from lorasrv.embedded import embedded_base
from lorasrv.merge.base import StreamedBase, Weights
from lorasrv.merge.config import MergeConfig
from lorasrv.merge.update import AdapterUpdates, UpdateSource
from lorasrv.model.config import read_json
from lorasrv.model.folder import open_model_folder
from lorasrv.model.hub import model_folder

_QUANTIZATION_KEY = "base_quantization"


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """An open base, and what is merged into it.

    Attributes:
        folder: of the base.
        raw: the content of its `config.json`.
        base: with the weights that are merged into.
        weights: which these are.
        adapter: what the update was made of.
        source: the update.
    """

    folder: Path
    raw: Mapping[str, Any]
    base: StreamedBase
    weights: Weights
    adapter: NormalizedAdapter
    source: UpdateSource


@contextmanager
def open_inputs(config: MergeConfig) -> Iterator[Inputs]:
    """Opens base and adapter, and closes the base's files in the end.

    Raises:
        ModelLoadError: the base cannot be used, or not with these weights.
        AdapterError: the adapter cannot be found, read or served on this base.
    """
    folder = embedded_base() if config.base is None else model_folder(config.base)
    ((source, _),) = config.adapters
    adapter_folder = _adapter_folder(source)
    trained_on: Weights = (
        "original" if read_provenance(adapter_folder).get(_QUANTIZATION_KEY) == "none" else "dequantized"
    )
    weights = trained_on if config.weights == "auto" else config.weights
    model_config, checkpoint = open_model_folder(folder)
    with checkpoint:
        base = StreamedBase(model_config, checkpoint, weights=weights, trained_on=trained_on)
        adapter = read_checkpoint(adapter_folder, base)
        yield Inputs(
            folder=folder,
            raw=read_json(folder / "config.json"),
            base=base,
            weights=weights,
            adapter=adapter,
            source=AdapterUpdates(adapter, base),
        )


def _adapter_folder(source: str) -> Path:
    if not source.startswith(HUB_PREFIX):
        folder = Path(source).expanduser().absolute()
        return resolve(str(folder), roots=[folder], hub=None)
    repository = source.removeprefix(HUB_PREFIX).partition("@")[0]
    downloads = Path(huggingface_hub.constants.HF_HOME) / "lorasrv-adapters"
    return resolve(source, roots=[], hub=HubSource(allowed=(repository,), folder=downloads))

"""An adapter folder in PEFT's format, read strictly and written atomically.

It knows the two files of the format; what they mean is `config`'s and `normalize`'s business.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save
from torch import Tensor

from lorasrv_adapters.base import BaseModel
from lorasrv_adapters.config import CONFIG_NAME, examine_adapter_config, parse_adapter_config
from lorasrv_adapters.errors import AdapterIncompatibleError
from lorasrv_adapters.fields import MAX_JSON_BYTES
from lorasrv_adapters.normalize import NormalizedAdapter, normalize
from lorasrv_adapters.provenance import PROVENANCE_NAME, check_base, read_provenance
from lorasrv_adapters.weights import DEFAULT_LIMITS, WEIGHTS_NAME, WeightLimits, open_regular, read_weights


def read_checkpoint(folder: Path, base: BaseModel, *, limits: WeightLimits = DEFAULT_LIMITS) -> NormalizedAdapter:
    """Read a PEFT adapter folder completely, or refuse it with everything that is wrong.

    Blocks on files; for DoRA it also reads the base's rows.

    Args:
        folder: The folder; only the two files of the format and `provenance.json` are opened.
        base: The base the adapter will be served on.
        limits: What the weights file may ask for.

    Raises:
        SourceNotFoundError: A file is missing.
        AdapterCorruptError: A file is damaged.
        AdapterIncompatibleError: It cannot be served on this base; every reason is listed.
    """
    with open_regular(folder / CONFIG_NAME) as file:
        config, reasons = examine_adapter_config(file.read(MAX_JSON_BYTES + 1))
    if config is None:
        # nothing tells what the tensors should be, so gigabytes of them need not be read
        raise AdapterIncompatibleError(reasons)
    try:
        reasons += check_base(read_provenance(folder), base)
        adapter = normalize(config, read_weights(folder, limits), base)
    except AdapterIncompatibleError as error:
        raise AdapterIncompatibleError([*reasons, *error.reasons]) from error
    if reasons:
        raise AdapterIncompatibleError(reasons)
    return adapter


def write_checkpoint(
    folder: Path,
    config: Mapping[str, object],
    tensors: Mapping[str, Tensor],
    *,
    provenance: Mapping[str, object] | None = None,
    beside: Mapping[str, bytes] | None = None,
) -> None:
    """Write a PEFT adapter folder; after a crash it is there completely or not at all.

    Args:
        folder: Where; it must not exist yet, or be empty.
        config: The content of `adapter_config.json`, as PEFT spells it.
        tensors: Tensors by PEFT's names, in the dtypes to write.
        provenance: The content of `provenance.json`, if there is to be one.
        beside: Other files, by name; nobody who reads the adapter opens them.

    Raises:
        AdapterIncompatibleError: The config could not be read back.
        FileExistsError: The folder has content already.
    """
    parse_adapter_config(config)
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} exists and is not empty")
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        # copies, because the library refuses tensors that share memory
        copies = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
        _write(draft / WEIGHTS_NAME, save(copies, {"format": "pt"}))
        _write(draft / CONFIG_NAME, json.dumps(config, indent=2).encode() + b"\n")
        if provenance:
            _write(draft / PROVENANCE_NAME, json.dumps(provenance, indent=2).encode() + b"\n")
        for name, content in (beside or {}).items():
            _write(draft / name, content)
        draft.chmod(0o755)
        _sync_folder(draft)
        draft.rename(folder)
        _sync_folder(folder.parent)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise


def _write(path: Path, content: bytes) -> None:
    with path.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

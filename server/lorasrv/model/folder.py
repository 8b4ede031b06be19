"""A model folder as a whole, judged before a weight is read: config, tensors and tokenizer, all reasons in one error.

Knows which tensors a model must have and what they may be stored as; reads none of them into a model.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import torch

from lorasrv.errors import ModelLoadError
from lorasrv.model import prequantized
from lorasrv.model.checkpoint import Checkpoint
from lorasrv.model.config import ModelConfig, inspect_model_config, read_json
from lorasrv.model.tensors import EMBEDDING, HEAD, linear_shapes, wide_shapes
from lorasrv.model.tokenizer import Tokenizer

_FLOATS = ("F32", "F16", "BF16")
# old checkpoints store what is computed from the config
_COMPUTED = ".rotary_emb.inv_freq"

_Read = TypeVar("_Read")


def open_model_folder(source: Path) -> tuple[ModelConfig, Checkpoint]:
    """Opens a folder of which config and tensors can be served; the caller closes the checkpoint.

    Raises:
        ModelLoadError: lists everything in the config and every missing, extra, misshapen or mistyped tensor.
    """
    reasons: list[str] = []
    config, checkpoint = _inspect(source, reasons)
    if config is None or checkpoint is None or reasons:
        if checkpoint is not None:
            checkpoint.close()
        raise ModelLoadError(reasons)
    return config, checkpoint


def check_model_folder(source: Path) -> Tokenizer:
    """Reads all of a folder but its weights.

    Returns:
        Its tokenizer.

    Raises:
        ModelLoadError: lists everything in config, tensors and tokenizer that keeps the folder from being served.
    """
    reasons: list[str] = []
    config, checkpoint = _inspect(source, reasons)
    if checkpoint is not None:
        checkpoint.close()
    tokenizer = None
    if config is not None:
        tokenizer = _attempt(lambda: Tokenizer(source, config=config), reasons)
    if tokenizer is None or reasons:
        raise ModelLoadError(reasons)
    return tokenizer


def check_tensors(checkpoint: Checkpoint, config: ModelConfig) -> list[str]:
    """Compares the tensors that are there with those the config asks for.

    Returns:
        Names of every missing, extra, misshapen or mistyped tensor, with what is wrong with it.
    """
    reasons: list[str] = []
    used: set[str] = set()
    for name, shape in linear_shapes(config).items():
        if prequantized.is_quantized(checkpoint, name):
            used |= prequantized.check(checkpoint, name, shape, reasons)
        else:
            used |= _check_wide(checkpoint, name, shape, reasons)
    for name, wide_shape in wide_shapes(config).items():
        used |= _check_wide(checkpoint, name, wide_shape, reasons)
    extra = [name for name in checkpoint.shapes if name not in used and not name.endswith(_COMPUTED)]
    if config.tie_word_embeddings and HEAD in extra and EMBEDDING in checkpoint.shapes:
        extra.remove(HEAD)
        if not _same(checkpoint, HEAD, EMBEDDING):
            reasons.append(f"tie_word_embeddings is true, but {HEAD} differs from {EMBEDDING}")
    return [*reasons, *(f"tensor {name} is not part of the model config.json describes" for name in sorted(extra))]


def _inspect(source: Path, reasons: list[str]) -> tuple[ModelConfig | None, Checkpoint | None]:
    raw = _attempt(lambda: read_json(source / "config.json"), reasons)
    config, wrong = (None, []) if raw is None else inspect_model_config(raw)
    reasons.extend(wrong)
    checkpoint = _attempt(lambda: Checkpoint(source), reasons)
    if config is not None and checkpoint is not None:
        reasons.extend(check_tensors(checkpoint, config))
    return config, checkpoint


def _attempt(read: Callable[[], _Read], reasons: list[str]) -> _Read | None:
    try:
        return read()
    except ModelLoadError as error:
        reasons.extend(error.reasons)
        return None


def _check_wide(checkpoint: Checkpoint, name: str, shape: Sequence[int], reasons: list[str]) -> set[str]:
    found = checkpoint.shapes.get(name)
    if found is None:
        reasons.append(f"tensor {name} {list(shape)} is missing")
    elif name in (EMBEDDING, HEAD) and len(found) == 2 and found[0] != shape[0]:
        reasons.append(
            f"tensor {name} has {found[0]} rows, but config.json says vocab_size {shape[0]}; "
            "save a model of which the vocabulary was resized together with its config"
        )
    elif found != tuple(shape):
        reasons.append(f"tensor {name} must be {list(shape)}, got {list(found)}")
    elif checkpoint.dtypes[name] not in _FLOATS:
        reasons.append(f"tensor {name} must be one of {', '.join(_FLOATS)}, got {checkpoint.dtypes[name]}")
    return {name}


def _same(checkpoint: Checkpoint, name: str, other: str) -> bool:
    kinds = [(checkpoint.shapes[each], checkpoint.dtypes[each]) for each in (name, other)]
    return kinds[0] == kinds[1] and torch.equal(checkpoint.tensor(name), checkpoint.tensor(other))

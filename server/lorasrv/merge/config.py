"""What a merge may be told. It knows no command line and no file (see `lorasrv.cli.layers`), no tensor and no model."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lorasrv.errors import ConfigError
from lorasrv.settings import choice, folder, number, setting, size, switch, text

_WEIGHTED = re.compile(r"(?P<source>.+)=(?P<weight>[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?)")


def weighted(value: object) -> tuple[str, float]:
    """`SOURCE` or `SOURCE=WEIGHT`; the weight is 1 where none is given."""
    source = text(value)
    match = _WEIGHTED.fullmatch(source)
    return (match["source"], float(match["weight"])) if match else (source, 1.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeConfig:
    """Everything `lorasrv merge` can be told.

    Raises:
        ConfigError: values that cannot work, all of them listed.
    """

    base: str | None = setting(
        None,
        text,
        "The base model: a folder or a Hub id, org/name@revision. Default: the embedded tiny model.",
        metavar="BASE",
    )
    adapters: tuple[tuple[str, float], ...] = setting(
        (),
        weighted,
        "The adapter: its folder, or hf:org/name@revision.",
        key="adapter",
        metavar="SOURCE[=WEIGHT]",
        repeated=True,
    )
    out: Path = setting(None, folder, "The new model folder.", metavar="DIR")
    weights: Literal["auto", "dequantized", "original"] = setting(
        "auto",
        choice("auto", "dequantized", "original"),
        "What the update is added to: the NF4 weights that a server computes with, or the folder's own; auto: those "
        "the adapter records to be trained on, dequantized where it records nothing.",
        metavar="auto|dequantized|original",
    )
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = setting(
        "auto",
        choice("auto", "bfloat16", "float16", "float32"),
        "The type of the result; auto: as the base's tensors are.",
        metavar="auto|bfloat16|float16|float32",
    )
    quantize: Literal["none", "nf4"] = setting(
        "none", choice("none", "nf4"), "nf4: write the linear layers in NF4, double quantized.", metavar="none|nf4"
    )
    force: bool = setting(False, switch, "Write NF4 of dequantized weights, too, though it erases small updates.")
    prompts: Path | None = setting(
        None, folder, "Prompts to verify with, one a line. Default: built-in ones.", metavar="FILE"
    )
    tolerance: float | None = setting(
        None,
        number,
        "The largest difference between logits, merged against unmerged, in standard deviations of the logits. "
        "Default: by the type of the result.",
        metavar="X",
    )
    shard_bytes: int = setting(5 * 1000**3, size, "The largest file of weights, in bytes.", metavar="SIZE")

    def __post_init__(self) -> None:
        reasons = tuple(_reasons(self))
        if reasons:
            raise ConfigError(reasons)


def _reasons(config: MergeConfig) -> Iterator[str]:
    if config.out is None:
        yield "out is missing: name the new model folder"
    if not config.adapters:
        yield "adapter is missing: name the adapter's folder"
    if len(config.adapters) > 1 or any(weight != 1 for _, weight in config.adapters):
        yield "one adapter of weight 1 is merged"
    if config.tolerance is not None and config.tolerance < 0:
        yield f"tolerance is {config.tolerance}: it must be at least 0"
    if config.shard_bytes < 1:
        yield f"shard_bytes is {config.shard_bytes}: it must be at least 1"

"""What a merge may be told. It knows no command line and no file (see `lorasrv.cli.layers`), no tensor and no model."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lorasrv.errors import ConfigError
from lorasrv.settings import choice, folder, integer, number, setting, size, switch, text

Combine = Literal["linear", "ties", "dare", "svd"]

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
        "The adapter: its folder, or hf:org/name@revision. Repeatable: several are combined, each with its weight.",
        key="adapter",
        metavar="SOURCE[=WEIGHT]",
        repeated=True,
    )
    out: Path = setting(None, folder, "The new folder.", metavar="DIR")
    output: Literal["model", "adapter"] = setting(
        "model",
        choice("model", "adapter"),
        "model: the base with the update in it; adapter: the update alone, as a PEFT folder.",
        key="as",
        metavar="model|adapter",
    )
    combine: Combine = setting(
        "linear",
        choice("linear", "ties", "dare", "svd"),
        "How adapters are combined, by their updates: linear adds them up, ties and dare make them sparse before, svd "
        "brings the sum down to --rank.",
        metavar="linear|ties|dare|svd",
    )
    rank: int | None = setting(
        None, integer, "The highest rank of svd, and of an adapter made of ties or dare.", metavar="R"
    )
    density: float = setting(0.2, number, "The part of an update's elements that ties and dare keep.", metavar="F")
    seed: int = setting(0, integer, "Of what dare drops.", metavar="N")
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
        "The largest difference between logits, merged against unmerged, in standard deviations of the logits; with "
        "nf4 the largest divergence, as a share of what the adapter does. Default: by the type of the result.",
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
    yield from _combine_reasons(config)
    if config.tolerance is not None and config.tolerance < 0:
        yield f"tolerance is {config.tolerance}: it must be at least 0"
    if config.shard_bytes < 1:
        yield f"shard_bytes is {config.shard_bytes}: it must be at least 1"


def _combine_reasons(config: MergeConfig) -> Iterator[str]:
    yield from (f"adapter {source}: its weight is 0" for source, weight in config.adapters if weight == 0)
    sparse = config.combine in ("ties", "dare")
    if not 0 < config.density <= 1:
        yield f"density is {config.density}: it must be above 0 and at most 1"
    if config.rank is not None and config.rank < 1:
        yield f"rank is {config.rank}: it must be at least 1"
    ranked = config.combine == "svd" or (sparse and config.output == "adapter")
    if ranked and config.rank is None:
        what = "an adapter made of" if sparse else "combine"
        yield f"rank is missing: {what} {config.combine} needs the rank to come down to"
    if config.rank is not None and not ranked:
        yield f"rank is for svd and for adapters of ties or dare; combine {config.combine} keeps the ranks there are"
    if config.output == "adapter" and config.quantize == "nf4":
        yield "quantize nf4 is for a model; an adapter has no weights of the base"
    if config.output == "adapter" and config.weights != "auto":
        yield f"weights {config.weights} is for a model; an adapter is for the weights that its parts were trained on"

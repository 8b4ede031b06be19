"""How much memory a run will take, by part, from the model's sizes alone. Knows no tensor and loads nothing.

Letters: T tokens at a time, I hidden size, and F the inner width of the feed-forward part.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from lorasrv_adapters.config import AdapterConfig, parse_adapter_config
from lorasrv_adapters.patterns import PatternTable

from lorasrv.model.config import ModelConfig
from lorasrv.model.tensors import EMBEDDING, HEAD, linear_shapes, norm_shapes, wide_shapes
from lorasrv.train.config import JobConfig, RunConfig
from lorasrv.train.job import adapter_config
from lorasrv.train.loss import CHUNK_ELEMENTS

_WEIGHT = ".weight"
# two float32 each, or two bytes and two absmax of 256
_MOMENT_BYTES: Mapping[str, float] = {
    **dict.fromkeys(("adamw", "paged_adamw"), 8),
    **dict.fromkeys(("adamw_8bit", "paged_adamw_8bit"), 2 + 8 / 256),
}
_FLOAT = 4
# logits as multiplied and in float32, and log-probabilities
_LOGIT_COPIES = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPart:
    """One use of memory.

    Attributes:
        name: what for.
        num_bytes: how much.
        paged: whether the driver moves it to the host where the device is full.
    """

    name: str
    num_bytes: int
    paged: bool = False


def estimate_memory(
    model: ModelConfig,
    run: RunConfig,
    jobs: Mapping[str, JobConfig],
    *,
    dtype_bytes: int,
    optimizer: str,
    max_tokens: int,
) -> list[MemoryPart]:
    """What a run holds at its fullest moment, on the way back through one layer.

    Args:
        model: the base.
        run, jobs: what is trained; layers keep everything where the run does not say.
        dtype_bytes: of an activation.
        optimizer: which one it will be, "auto" resolved.
        max_tokens: of the longest example.
    """
    shapes = {name.removesuffix(_WEIGHT): shape for name, shape in linear_shapes(model).items()}
    configs = [
        parse_adapter_config(adapter_config(job, base_name="", max_steps=run.max_steps)) for job in jobs.values()
    ]
    whole = [_whole_elements(config, model) for config in configs]
    parameters = sum(map(sum, whole)) + sum(_low_rank_elements(config, shapes) for config in configs)
    tokens = max(run.micro_batch_tokens, max_tokens)
    doras = any(job.method == "dora" for job in jobs.values())
    layer = tokens * _layer_bytes(model, dtype_bytes, dora=doras, again=bool(run.checkpoint_layers))
    kept = tokens * model.hidden_size * dtype_bytes * model.num_layers
    return [
        MemoryPart(name="base, linear layers", num_bytes=_linear_bytes(shapes, run, dtype_bytes)),
        MemoryPart(name="base, everything else", num_bytes=_wide_bytes(model, dtype_bytes)),
        MemoryPart(name="adapters", num_bytes=_FLOAT * parameters),
        MemoryPart(name="gradients", num_bytes=_FLOAT * parameters),
        MemoryPart(
            name="optimizer states",
            num_bytes=round(_MOMENT_BYTES[optimizer] * parameters),
            paged=optimizer.startswith("paged"),
        ),
        MemoryPart(name="activations, kept", num_bytes=kept if run.checkpoint_layers else layer * model.num_layers),
        MemoryPart(name="activations, of the layer at hand", num_bytes=layer if run.checkpoint_layers else 0),
        MemoryPart(
            name="logits, a chunk of them",
            num_bytes=_LOGIT_COPIES * _FLOAT * min(CHUNK_ELEMENTS, tokens * model.vocab_size),
        ),
        # the gradient before and after it is scaled, and the weight rounded
        MemoryPart(
            name="a weight trained as a whole, at hand",
            num_bytes=(2 * _FLOAT + dtype_bytes) * max((size for sizes in whole for size in sizes), default=0),
        ),
    ]


def _low_rank_elements(config: AdapterConfig, shapes: Mapping[str, tuple[int, int]]) -> int:
    """Trained elements of all A and B, DoRA's magnitudes and AdaLoRA's lambdas."""
    ranks = PatternTable(config.rank_pattern)
    elements = 0
    for name in config.targets.select(shapes, all_linear=shapes):
        rank, (rows, columns) = ranks.find(name, config.rank), shapes[name]
        elements += rank * (rows + columns) + {"dora": rows, "adalora": rank}.get(config.kind, 0)
    return elements


def _whole_elements(config: AdapterConfig, model: ModelConfig) -> list[int]:
    """The sizes of the weights trained as a whole."""
    table = (model.vocab_size, model.hidden_size)
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: table, HEAD: table, **norm_shapes(model)}
    sizes = {name.removesuffix(_WEIGHT): prod(shape) for name, shape in shapes.items()}
    named = set(config.targets.replaced(sizes))
    ends = {EMBEDDING.removesuffix(_WEIGHT), HEAD.removesuffix(_WEIGHT)}
    if config.tie and named & ends:
        named = (named - ends) | {EMBEDDING.removesuffix(_WEIGHT)}
    return [sizes[name] for name in named]


def _linear_bytes(shapes: Mapping[str, tuple[int, int]], run: RunConfig, dtype_bytes: int) -> int:
    sizes = [rows * columns for rows, columns in shapes.values()]
    if not run.quantize:
        return dtype_bytes * sum(sizes)
    return sum(-(-size // 2) - (-size // 64) - 4 * (-size // 16384) + 4 for size in sizes)


def _wide_bytes(model: ModelConfig, dtype_bytes: int) -> int:
    sizes = [shape[0] * (shape[1] if len(shape) > 1 else 1) for shape in wide_shapes(model).values()]
    return dtype_bytes * sum(sizes)


def _layer_bytes(model: ModelConfig, dtype_bytes: int, *, dora: bool, again: bool) -> int:
    """Bytes a token that autograd keeps of one layer: see `lorasrv.train.network`.

    `again`: of one whose activations are computed again, where norms and the gated product are kept too.
    """
    hidden, inner = model.hidden_size, model.intermediate_size
    heads, kv_heads = model.num_heads * model.head_size, model.num_kv_heads * model.head_size
    # what norms and adapters take; queries, keys and values repeated for every head, and what attention gives
    elements = 2 * hidden + 4 * heads + 2 * inner
    if again:
        elements += 2 * hidden + inner
    if dora:
        # the base's own outputs
        elements += heads + 2 * kv_heads + 2 * hidden + 2 * inner
    return dtype_bytes * elements

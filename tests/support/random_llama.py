"""A Llama of random NF4 weights and random adapters for it, made in place: no file, no library but PyTorch."""

from collections.abc import Collection
from dataclasses import dataclass

import torch
from lorasrv.model.config import ModelConfig, parse_model_config
from lorasrv.model.decoder import DecoderLayer, DecoderModel
from lorasrv.model.tensors import MODULES, NORMS, bias_shapes, layer_prefix, linear_shapes
from lorasrv_adapters.base import table_order
from lorasrv_adapters.image import ALIGN_ELEMENTS, AdapterImage
from lorasrv_kernels.nf4 import NF4Weight
from lorasrv_kernels.table import ABSENT_ROW, Column

TINY = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def random_llama(
    keys: dict[str, object], *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> DecoderModel:
    """The model of a `config.json` of these keys; the linear layers are never held in anything but 4 bits."""
    config = parse_model_config(keys)

    def random(*shape: int, mean: float = 0.0) -> torch.Tensor:
        return torch.randn(shape, dtype=dtype, device=device).mul_(0.02).add_(mean)

    return DecoderModel(
        config,
        embedding=random(config.vocab_size, config.hidden_size),
        layers=[_random_layer(config, layer, random, torch.device(device)) for layer in range(config.num_layers)],
        final_norm=random(config.hidden_size, mean=1.0),
        head=random(config.vocab_size, config.hidden_size),
        max_positions=config.max_position_embeddings,
    )


def _random_layer(config: ModelConfig, layer: int, random: object, device: torch.device) -> DecoderLayer:
    prefix = f"{layer_prefix(layer)}."
    shapes = {name: shape for name, shape in linear_shapes(config).items() if name.startswith(prefix)}
    biases = {name: shape for name, shape in bias_shapes(config).items() if name.startswith(prefix)}
    return DecoderLayer(
        config,
        norms={name: random(config.hidden_size, mean=1.0) for name in NORMS},
        weights=[random_weight(*shapes[f"{prefix}{module}.weight"], device) for module in MODULES],
        biases={name.removeprefix(prefix).removesuffix(".bias"): random(*shape) for name, shape in biases.items()},
        layer=layer,
    )


def random_weight(rows: int, columns: int, device: torch.device) -> NF4Weight:
    """Any bytes are a weight; these have a mean of 0 and keep activations near their size."""
    blocks = -(-rows * columns // 64)
    return NF4Weight(
        packed=torch.randint(0, 256, (-(-rows * columns // 2),), dtype=torch.uint8, device=device),
        absmax=torch.randint(0, 256, (blocks,), dtype=torch.uint8, device=device),
        nested_absmax=torch.rand(-(-blocks // 256), device=device) * columns**-0.5 / 4,
        offset=torch.full((1,), columns**-0.5, device=device),
        out_features=(rows,),
        in_features=columns,
    )


@dataclass(slots=True)
class HeldAdapter:
    """A lease of an adapter that never ends."""

    digest: str
    image: AdapterImage
    adapter_id: str = "random"

    def release(self) -> None:
        """Nothing to give back."""


def random_adapter(
    model: DecoderModel, rank: int, *, seed: int, with_scale: bool = False, also: Collection[str] = ()
) -> HeldAdapter:
    """Low-rank rows on every linear layer, with a scale and a bias where asked for.

    Args:
        also: modules that the adapter replaces, norms by their full names.
    """
    generator = torch.Generator().manual_seed(seed)
    names = table_order(model.base)
    table = torch.tensor(ABSENT_ROW).repeat(len(names), 1)
    pieces: list[torch.Tensor] = []

    def put(values: torch.Tensor) -> int:
        start = sum(len(piece) for piece in pieces)
        flat = values.flatten().view(model.dtype)
        pieces.append(torch.cat([flat, flat.new_zeros(-len(flat) % ALIGN_ELEMENTS)]))
        return start

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    for row, name in zip(table, names, strict=True):
        module = model.base.modules[name]
        rows, columns = module.out_features, module.in_features
        if module.kind == "linear":
            row[Column.A] = put((random(rank, columns) * columns**-0.5).to(model.dtype))
            row[Column.B_T] = put((random(rank, rows) * rank**-0.5).to(model.dtype))
            row[Column.RANK] = rank
            if with_scale:
                row[Column.D] = put(1 + 0.1 * random(rows))
                row[Column.BIAS] = put(0.1 * random(rows))
        elif name in also:
            shape = module.weight_shape
            row[Column.ROWS] = put((1 + 0.2 * random(*shape)).to(model.dtype))
            row[Column.NUM_ROWS] = shape[0] if len(shape) > 1 else 1
    return HeldAdapter(f"random {rank} {seed}", AdapterImage(flat=torch.cat(pieces), table=table))

"""Names and shapes of the tensors of a checkpoint, for every family. Knows no files."""

from collections.abc import Iterator

from lorasrv.model.config import ModelConfig

MODULES = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)
"""The linear layers of a decoder layer: quantized, and open to adapters."""

FUSED = (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj"))
"""Modules that share their input and are computed as one product."""

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
FINAL_NORM = "model.norm.weight"
NORMS = ("input_layernorm", "post_attention_layernorm")
"""The norms of a decoder layer over the hidden size."""
QK_NORMS = ("self_attn.q_norm", "self_attn.k_norm")
"""The norms over the head size, in the families that have them."""


def layer_prefix(layer: int) -> str:
    """Name of a decoder layer, without a trailing dot."""
    return f"model.layers.{layer}"


def layer_norms(config: ModelConfig) -> tuple[str, ...]:
    """The norms of every decoder layer, named within it."""
    return (*NORMS, *QK_NORMS) if config.qk_norm else NORMS


def linear_shapes(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """Weight name -> (O, I) of every linear in decoder layers, in module order."""
    return {
        f"{layer_prefix(layer)}.{module}.weight": shape
        for layer in range(config.num_layers)
        for module, shape in _module_shapes(config).items()
    }


def bias_shapes(config: ModelConfig) -> dict[str, tuple[int]]:
    """Bias name -> (O,) of every linear in decoder layers that has one, in module order."""
    return {
        f"{layer_prefix(layer)}.{module}.bias": (shape[0],)
        for layer in range(config.num_layers)
        for module, shape in _module_shapes(config).items()
        if module in config.biased_modules
    }


def norm_shapes(config: ModelConfig) -> dict[str, tuple[int]]:
    """Weight name -> (I,), or (D,) for a norm of heads, of every norm: those of the layers, then the final one."""
    sizes = {norm: config.head_size if norm in QK_NORMS else config.hidden_size for norm in layer_norms(config)}
    shapes: dict[str, tuple[int]] = {
        f"{layer_prefix(layer)}.{norm}.weight": (size,)
        for layer in range(config.num_layers)
        for norm, size in sizes.items()
    }
    return {**shapes, FINAL_NORM: (config.hidden_size,)}


def module_order(config: ModelConfig) -> tuple[str, ...]:
    """Names of the modules that an adapter can change, in the order of the adapters' table."""
    names = (*linear_shapes(config), HEAD, EMBEDDING, *norm_shapes(config))
    return tuple(name.removesuffix(".weight") for name in names)


def other_modules(config: ModelConfig) -> tuple[str, ...]:
    """Names that the Hugging Face model has beside those of `module_order`."""
    parts = ("", ".self_attn", ".mlp", ".mlp.act_fn")
    layers = (f"{layer_prefix(layer)}{part}" for layer in range(config.num_layers) for part in parts)
    return ("model", "model.layers", "model.rotary_emb", *layers)


def wide_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of what is never quantized: embedding, norms, biases and an untied head."""
    table = (config.vocab_size, config.hidden_size)
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: table, **norm_shapes(config), **bias_shapes(config)}
    return shapes if config.tie_word_embeddings else {**shapes, HEAD: table}


def stored_names(config: ModelConfig) -> Iterator[str]:
    """Names of all tensors of a model in the order that its digest takes them; a tied head is not repeated."""
    yield EMBEDDING
    for layer in range(config.num_layers):
        prefix = layer_prefix(layer)
        yield from (f"{prefix}.{norm}.weight" for norm in layer_norms(config))
        yield from (f"{prefix}.{module}.weight" for module in MODULES)
        yield from (f"{prefix}.{module}.bias" for module in MODULES if module in config.biased_modules)
    yield FINAL_NORM
    if not config.tie_word_embeddings:
        yield HEAD


def _module_shapes(config: ModelConfig) -> dict[str, tuple[int, int]]:
    hidden, inner = config.hidden_size, config.intermediate_size
    query, key = config.num_heads * config.head_size, config.num_kv_heads * config.head_size
    shapes = [(query, hidden), (key, hidden), (key, hidden), (hidden, query), (inner, hidden), (inner, hidden)]
    return dict(zip(MODULES, [*shapes, (hidden, inner)], strict=True))

"""Names and shapes of the tensors of a Llama checkpoint. Knows no files."""

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

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
FINAL_NORM = "model.norm.weight"
NORMS = ("input_layernorm", "post_attention_layernorm")


def layer_prefix(layer: int) -> str:
    """Name of a decoder layer, without a trailing dot."""
    return f"model.layers.{layer}"


def linear_shapes(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """Weight name -> (O, I) of every linear in decoder layers, in module order."""
    hidden, inner = config.hidden_size, config.intermediate_size
    query, key = config.num_heads * config.head_size, config.num_kv_heads * config.head_size
    shapes = [(query, hidden), (key, hidden), (key, hidden), (hidden, query), (inner, hidden), (inner, hidden)]
    shapes.append((hidden, inner))
    return {
        f"{layer_prefix(layer)}.{module}.weight": shape
        for layer in range(config.num_layers)
        for module, shape in zip(MODULES, shapes, strict=True)
    }


def wide_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of what is never quantized: embedding, norms and an untied head."""
    hidden = config.hidden_size
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (config.vocab_size, hidden), FINAL_NORM: (hidden,)}
    for layer in range(config.num_layers):
        shapes |= {f"{layer_prefix(layer)}.{norm}.weight": (hidden,) for norm in NORMS}
    if not config.tie_word_embeddings:
        shapes[HEAD] = (config.vocab_size, hidden)
    return shapes

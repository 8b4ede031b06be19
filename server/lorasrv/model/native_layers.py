"""Describes the layers of a model to the native call that runs all of them at once.

Knows the layers' parts and the names of their norms; knows no C interface.
"""

from collections.abc import Mapping, Sequence

from lorasrv_kernels.cpu.decoder import Layer, NativeDecoder, Norm, Shape

from lorasrv.model.adapted_linear import AdaptedLinear
from lorasrv.model.config import ModelConfig
from lorasrv.model.layers import RMSNorm
from lorasrv.model.tensors import NORMS, QK_NORMS

Parts = tuple[Sequence[AdaptedLinear], Mapping[str, RMSNorm]]
"""Of one layer: its products in module order, and its norms by their names within it."""


def native_layers(config: ModelConfig, layers: Sequence[Parts], final_norm: RMSNorm) -> NativeDecoder | None:
    """The layers as one call, or None where one of them has products of mixed weights."""
    described = [_layer(groups, norms, window) for (groups, norms), window in zip(layers, config.windows, strict=True)]
    known = [layer for layer in described if layer is not None]
    if len(known) < len(described):
        return None
    shape = Shape(
        hidden=config.hidden_size,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_size=config.head_size,
        epsilon=config.rms_norm_eps,
        scale=config.head_size**-0.5,
    )
    return NativeDecoder(shape, known, _norm(final_norm))


def _layer(groups: Sequence[AdaptedLinear], norms: Mapping[str, RMSNorm], window: int) -> Layer | None:
    qkv, output, gate_up, down = (group.projection() for group in groups)
    if qkv is None or output is None or gate_up is None or down is None:
        return None
    query_norm, key_norm = (_norm(norms[name]) if name in norms else None for name in QK_NORMS)
    input_norm, post_attention_norm = (_norm(norms[name]) for name in NORMS)
    return Layer(
        qkv=qkv,
        output=output,
        gate_up=gate_up,
        down=down,
        input_norm=input_norm,
        post_attention_norm=post_attention_norm,
        query_norm=query_norm,
        key_norm=key_norm,
        window=window,
    )


def _norm(norm: RMSNorm) -> Norm:
    return Norm(weight=norm.weight, module=norm.module)

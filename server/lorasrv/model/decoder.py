"""A decoder-only model over a flat batch of token rows from any number of sequences, each row with its own adapter.

Knows the model; does not know requests, scheduling or sampling, nor which method an adapter used.
"""

from collections.abc import Iterator, Mapping, Sequence

import torch
from lorasrv_kernels.nf4 import NF4Weight
from lorasrv_kernels.rowwise import silu_mul
from torch import Tensor

from lorasrv.model.adapted_linear import AdaptedLinear, Weight
from lorasrv.model.attention import Attention
from lorasrv.model.base import ServedBase
from lorasrv.model.batch import AdapterBatch, StepBatch
from lorasrv.model.config import ModelConfig
from lorasrv.model.layers import RMSNorm, RotaryTable
from lorasrv.model.native_layers import native_layers
from lorasrv.model.tensors import EMBEDDING, FINAL_NORM, HEAD, MODULES, NORMS, QK_NORMS, layer_prefix, module_order
from lorasrv.model.vocabulary import OutputHead, TokenEmbedding


class DecoderLayer:
    """One decoder layer: attention, then the gated feed-forward part, each behind its norm."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        norms: Mapping[str, Tensor],
        weights: Sequence[Weight],
        biases: Mapping[str, Tensor],
        layer: int,
    ) -> None:
        """Takes the weights in the order of `MODULES`, norms and biases by their names within the layer."""
        order = module_order(config)
        self.norms = {
            name: RMSNorm(norm, epsilon=config.rms_norm_eps, module=order.index(f"{layer_prefix(layer)}.{name}"))
            for name, norm in norms.items()
        }
        self.input_norm, self.post_attention_norm = (self.norms[name] for name in NORMS)
        found = [biases.get(module) for module in MODULES]

        def group(start: int, stop: int) -> AdaptedLinear:
            first = layer * len(MODULES) + start
            return AdaptedLinear(weights[start:stop], first_module=first, biases=found[start:stop])

        qk_norms = [self.norms[name] for name in QK_NORMS if name in self.norms]
        self.attention = Attention(config, qkv=group(0, 3), output=group(3, 4), qk_norms=qk_norms, layer=layer)
        self.gate_up = group(4, 6)
        self.down = group(6, 7)

    def forward(self, x: Tensor, angles: Tensor, batch: StepBatch) -> Tensor:
        """x: [T, I], changed in place; angles: [T, 1, D]. Returns x."""
        adapters = batch.adapters
        x += self.attention.forward(self.input_norm.forward(x, adapters), angles, batch)
        gate, up = self.gate_up.forward(self.post_attention_norm.forward(x, adapters), adapters).chunk(2, dim=1)
        x += self.down.forward(silu_mul(gate, up), adapters)
        return x

    def groups(self) -> tuple[AdaptedLinear, ...]:
        """The products of this layer, in module order."""
        return (self.attention.qkv, self.attention.output, self.gate_up, self.down)


class DecoderModel:
    """The base model; read-only after loading.

    Attributes:
        config: what its `config.json` says.
        dtype: of embeddings, norms, head, activations and cache.
        base: what adapters need to know of it.
        module_order: names of the modules adapters can change; row m of an adapter's table is the m-th.
        max_positions: positions it can serve.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        embedding: Tensor,
        layers: Sequence[DecoderLayer],
        final_norm: Tensor,
        head: Tensor | None,
        max_positions: int,
    ) -> None:
        """Takes embedding [V, I], final norm [I] and output head [V, I] (None: the embedding) in the model's dtype."""
        self.config = config
        self.dtype = embedding.dtype
        self.device = embedding.device
        self.max_positions = max_positions
        self.module_order = module_order(config)
        embedding_place, head_place, norm_place = (
            self.module_order.index(name.removesuffix(".weight")) for name in (EMBEDDING, HEAD, FINAL_NORM)
        )
        self._embedding = TokenEmbedding(embedding, module=embedding_place)
        self._layers = tuple(layers)
        self._final_norm = RMSNorm(final_norm, epsilon=config.rms_norm_eps, module=norm_place)
        self._native = native_layers(
            config, [(layer.groups(), layer.norms) for layer in self._layers], self._final_norm
        )
        self._head = OutputHead(embedding if head is None else head, module=head_place)
        self._rotary = RotaryTable(
            config.rope, head_size=config.head_size, num_positions=max_positions, device=embedding.device
        )
        self.base = ServedBase(config, self.stored, dtype=self.dtype)

    @torch.inference_mode()
    def forward(self, tokens: Tensor, batch: StepBatch) -> Tensor:
        """Runs one step and writes its keys and values into the cache.

        Args:
            tokens: [T] int64, on the model's device.
            batch: describes the same T rows.

        Returns:
            [T, I] after the final norm, in the dtype of the model; every row independent of the others, bit for bit.
        """
        x = self._embedding.forward(tokens, batch.adapters)
        angles = self._rotary.lookup(batch.positions)
        hidden = (
            None
            if self._native is None
            else self._native.forward(
                x,
                angles,
                cache=batch.kv_cache,
                attention=batch.attention,
                arena=batch.adapters.arena,
                table=batch.adapters.table,
                slots=batch.adapters.slots,
            )
        )
        return self._forward_by_ops(x, angles, batch) if hidden is None else hidden

    def _forward_by_ops(self, x: Tensor, angles: Tensor, batch: StepBatch) -> Tensor:
        for layer in self._layers:
            x = layer.forward(x, angles, batch)
        return self._final_norm.forward(x, batch.adapters)

    @torch.inference_mode()
    def logits(self, hidden: Tensor, adapters: AdapterBatch) -> Tensor:
        """Returns [N, V] float32, row by row independent.

        Args:
            hidden: [N, I], rows of `forward`'s result.
            adapters: describes the same N rows.
        """
        return self._head.forward(hidden, adapters)

    def stored(self) -> Iterator[tuple[str, Weight]]:
        """Every stored tensor under its name in a checkpoint, in a fixed order; a tied head is not repeated."""
        yield EMBEDDING, self._embedding.weight
        for index, layer in enumerate(self._layers):
            prefix = layer_prefix(index)
            for name, norm in layer.norms.items():
                yield f"{prefix}.{name}.weight", norm.weight
            places = [(group, place) for group in layer.groups() for place in range(len(group.out_features))]
            for module, (group, place) in zip(MODULES, places, strict=True):
                yield f"{prefix}.{module}.weight", group.weight(place)
            for module, (group, place) in zip(MODULES, places, strict=True):
                bias = group.bias(place)
                if bias is not None:
                    yield f"{prefix}.{module}.bias", bias
        yield FINAL_NORM, self._final_norm.weight
        if self._head.weight is not self._embedding.weight:
            yield HEAD, self._head.weight

    @property
    def num_bytes(self) -> int:
        """Bytes of all stored tensors."""
        return sum(weight.num_bytes if isinstance(weight, NF4Weight) else weight.nbytes for _, weight in self.stored())

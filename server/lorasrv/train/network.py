"""The base with adapters over it, differentiable: a flat batch of token rows, in which every adapter has a run of rows.

Holds no weight of its own: it computes with the loaded model's. Every sequence attends to itself alone, whatever it is
packed with. Knows what an adapter does to a layer; knows no method, data or optimizer.
"""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property, partial

import torch
import torch.nn.functional as F
from lorasrv_kernels.lora.training import LowRank, lora_update
from lorasrv_kernels.nf4 import NF4Weight, nf4_linear
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lorasrv.model.adapted_linear import AdaptedLinear, Weight, weight_rows
from lorasrv.model.config import ModelConfig
from lorasrv.model.decoder import DecoderModel
from lorasrv.model.layers import RotaryTable
from lorasrv.model.tensors import EMBEDDING, FINAL_NORM, HEAD, MODULES, layer_norms, layer_prefix
from lorasrv.train.adapter import TrainableAdapter
from lorasrv.train.attention import attend_blockwise
from lorasrv.train.replaceable import TrainableEmbedding, TrainableHead, TrainableNorm
from lorasrv.train.rowwise import gated_activation, recomputed

_NORM_ROWS = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenBatch:
    """T token rows: the sequences of the first adapter one after the other, then those of the second, and so on.

    Attributes:
        token_ids: [T] int64.
        targets: [T] int64: the token that follows, anything where there is none to learn.
        weights: [T] float32: of each row's loss; 0 where there is nothing to learn.
        lengths: of every sequence, in rows.
        segments: for each adapter, the number of its rows.
        places: of every sequence, where it came from; for messages.
    """

    token_ids: Tensor
    targets: Tensor
    weights: Tensor
    lengths: tuple[int, ...]
    segments: tuple[int, ...]
    places: tuple[str, ...] = ()


class FrozenModule:
    """One linear layer of the base, as an adapter's method may ask about it."""

    def __init__(self, name: str, weight: Weight, *, dtype: torch.dtype) -> None:
        self.name = name
        self._weight = weight
        self._dtype = dtype

    @torch.no_grad()
    def project(self, rows: Tensor) -> Tensor:
        """rows: [R, I] float32. Returns rows W^T, [R, O] float32."""
        return _product(rows, self._weight)

    def squared_row_norms(self) -> Tensor:
        """[O] float32: |W|^2 of every row, W as it is served."""
        return self._squared_row_norms

    @cached_property
    def _squared_row_norms(self) -> Tensor:
        num_rows = self._weight.shape[0]
        bounds = [(start, min(start + _NORM_ROWS, num_rows)) for start in range(0, num_rows, _NORM_ROWS)]
        pieces = (weight_rows(self._weight, start, stop, dtype=self._dtype) for start, stop in bounds)
        return torch.cat([piece.square().sum(1) for piece in pieces])


class TrainableGroup:
    """Modules that share their input: one product with the frozen weights where these are alike, then the adapters."""

    def __init__(self, names: Sequence[str], stored: Mapping[str, Weight], *, dtype: torch.dtype) -> None:
        weights = [stored[f"{name}.weight"] for name in names]
        biases = [_optional(stored, f"{name}.bias") for name in names]
        group = AdaptedLinear(weights, first_module=0, biases=biases)
        fused = group.projection()
        self._parts = weights if fused is None else [fused.weight]
        self._bias = group.fused_bias
        self._out_features = group.out_features
        self._modules = [FrozenModule(name, group.weight(place), dtype=dtype) for place, name in enumerate(names)]

    def forward(self, x: Tensor, batch: TokenBatch, adapters: Sequence[TrainableAdapter]) -> Tensor:
        """x: [T, I]. Returns [T, O], O over all modules, each adapter applied to its rows."""
        updates = [[adapter.low_rank(module.name, module) for module in self._modules] for adapter in adapters]
        y = self._adapt(x, batch, adapters, updates)
        return y if self._bias is None else y + self._bias

    def _adapt(
        self,
        x: Tensor,
        batch: TokenBatch,
        adapters: Sequence[TrainableAdapter],
        updates: Sequence[Sequence[LowRank | None]],
    ) -> Tensor:
        def update(y: Tensor, inputs: Tensor) -> Tensor:
            return lora_update(
                y, inputs, segment_tokens=batch.segments, adapters=updates, out_features=self._out_features
            )

        y = self._product(x)
        # evaluations, which take no gradient, drop nothing
        if not (torch.is_grad_enabled() and any(adapter.dropout for adapter in adapters)):
            return update(y, x)
        segments = zip(x.split(batch.segments), adapters, strict=True)
        dropped = torch.cat([F.dropout(rows, adapter.dropout) for rows, adapter in segments])
        # as in PEFT, what DoRA adds to the base's output sees the dropped input, the base's output itself does not
        scaled = [any(one is not None and one.d is not None for one in own) for own in updates]
        if not any(scaled):
            return update(y, dropped)
        counts = torch.tensor(batch.segments, device=x.device)
        chosen = torch.tensor(scaled, device=x.device).repeat_interleave(counts)[:, None]
        again = torch.where(chosen, self._product(dropped), y)
        return y - again + update(again, dropped)

    def _product(self, x: Tensor) -> Tensor:
        products = [_product(x, weight) for weight in self._parts]
        return products[0] if len(products) == 1 else torch.cat(products, dim=1)


class TrainableLayer:
    """One decoder layer.

    Attributes:
        keep: whether autograd keeps norms and activations too.
    """

    def __init__(
        self, config: ModelConfig, stored: Mapping[str, Weight], *, layer: int, dtype: torch.dtype, keep: bool
    ) -> None:
        """Takes its weights out of `stored`."""
        prefix = layer_prefix(layer)
        names = [f"{prefix}.{module}" for module in MODULES]
        self._qkv, self._output, self._gate_up, self._down = (
            TrainableGroup(part, stored, dtype=dtype) for part in (names[:3], names[3:4], names[4:6], names[6:])
        )
        self._input_norm, self._inner_norm, *self._qk_norms = (
            TrainableNorm(f"{prefix}.{name}", _wide(stored[f"{prefix}.{name}.weight"]), epsilon=config.rms_norm_eps)
            for name in layer_norms(config)
        )
        self._config = config
        self._heads = [config.num_heads, config.num_kv_heads, config.num_kv_heads]
        self._window = config.windows[layer]
        self.keep = keep

    def forward(self, x: Tensor, angles: Tensor, batch: TokenBatch, adapters: Sequence[TrainableAdapter]) -> Tensor:
        """x: [T, I]; angles: [T, 1, D] float32. Returns [T, I]."""
        heads = self._normed(self._qkv, self._input_norm, x, batch, adapters)
        attended = self._attend(heads.unflatten(1, (-1, self._config.head_size)), angles, batch, adapters)
        x = x + self._output.forward(attended.flatten(1), batch, adapters)
        gate_up = self._normed(self._gate_up, self._inner_norm, x, batch, adapters)
        inner = gated_activation(gate_up)
        with nullcontext() if self.keep else recomputed(inner, partial(gated_activation, gate_up.detach())):
            return x + self._down.forward(inner, batch, adapters)

    def _normed(
        self,
        group: TrainableGroup,
        norm: TrainableNorm,
        x: Tensor,
        batch: TokenBatch,
        adapters: Sequence[TrainableAdapter],
    ) -> Tensor:
        normed = norm.forward(x, batch.segments, adapters)
        again = partial(norm.forward, x.detach(), batch.segments, adapters)
        with nullcontext() if self.keep else recomputed(normed, again):
            return group.forward(normed, batch, adapters)

    def _attend(self, heads: Tensor, angles: Tensor, batch: TokenBatch, adapters: Sequence[TrainableAdapter]) -> Tensor:
        """heads: [T, H + 2 Hkv, D]. Returns [T, H, D]."""
        lengths = batch.lengths
        query, key, value = heads.split(self._heads, dim=1)
        if self._qk_norms:
            query, key = (
                norm.forward(part, batch.segments, adapters)
                for norm, part in zip(self._qk_norms, (query, key), strict=True)
            )
        if heads.device.type == "cpu":
            return attend_blockwise(query, key, value, angles, lengths, window=self._window)
        return attend(rotate(query, angles), rotate(key, angles), value, lengths, window=self._window)


class TrainableModel:
    """A loaded base, to be trained through."""

    def __init__(self, model: DecoderModel, *, checkpoint_layers: bool) -> None:
        """Keeps the model; with `checkpoint_layers` a layer's activations are computed again on the way back."""
        stored = dict(model.stored())
        embedding, head, norm = (name.removesuffix(".weight") for name in (EMBEDDING, HEAD, FINAL_NORM))
        self._embedding = TrainableEmbedding(embedding, _wide(stored[EMBEDDING]))
        self._final_norm = TrainableNorm(norm, _wide(stored[FINAL_NORM]), epsilon=model.config.rms_norm_eps)
        self._head = TrainableHead(head, _wide(stored.get(HEAD, stored[EMBEDDING])))
        self._rotary = RotaryTable(
            model.config.rope,
            head_size=model.config.head_size,
            num_positions=model.max_positions,
            device=model.device,
        )
        self._layers = [
            TrainableLayer(model.config, stored, layer=layer, dtype=model.dtype, keep=checkpoint_layers)
            for layer in range(model.config.num_layers)
        ]
        self._checkpoint_layers = checkpoint_layers

    def checkpoint_layers(self) -> bool:
        """Computes layers' activations again on the way back from now on; False if it did so before."""
        if self._checkpoint_layers:
            return False
        self._checkpoint_layers = True
        for layer in self._layers:
            layer.keep = True
        return True

    def losses(self, batch: TokenBatch, adapters: Sequence[TrainableAdapter]) -> Tensor:
        """The weighted cross-entropy of every row: [T] float32, differentiable in the adapters' tensors."""
        x = self._embedding.forward(batch.token_ids, batch.segments, adapters)
        positions = torch.cat([torch.arange(length) for length in batch.lengths]).to(x.device)
        angles = self._rotary.lookup(positions)
        for layer in self._layers:
            if self._checkpoint_layers and torch.is_grad_enabled():
                x = checkpoint(layer.forward, x, angles, batch, adapters, use_reentrant=False)
            else:
                x = layer.forward(x, angles, batch, adapters)
        hidden = self._final_norm.forward(x, batch.segments, adapters)
        return self._head.losses(hidden, batch.targets, batch.weights, batch.segments, adapters)


def rotate(heads: Tensor, angles: Tensor) -> Tensor:
    """Rotary positions: heads [T, H, D], angles [T, 1, D] with cosines, then sines. Returns a new [T, H, D]."""
    cosine, sine = angles.chunk(2, dim=-1)
    first, second = heads.float().chunk(2, dim=-1)
    return torch.cat([first * cosine - second * sine, second * cosine + first * sine], dim=-1).to(heads.dtype)


def attend(query: Tensor, key: Tensor, value: Tensor, lengths: Sequence[int], *, window: int) -> Tensor:
    """Causal grouped-query attention, every sequence for itself: query [T, H, D], key and value [T, Hkv, D].

    Args:
        query, key, value: all sequences one after the other.
        lengths: of the sequences.
        window: how many positions a token sees, its own included; 0: all before it.

    Returns:
        [T, H, D].
    """
    groups = query.shape[1] // key.shape[1]
    parts = []
    for q, k, v in zip(*(tensor.split(list(lengths)) for tensor in (query, key, value)), strict=True):
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        mask = _window_mask(len(q), window, q.device) if 0 < window < len(q) else None
        heads = [tensor.transpose(0, 1)[None] for tensor in (q, k, v)]
        attended = F.scaled_dot_product_attention(heads[0], heads[1], heads[2], mask, is_causal=mask is None)
        parts.append(attended[0].transpose(0, 1))
    return torch.cat(parts)


def _window_mask(length: int, window: int, device: torch.device) -> Tensor:
    distance = torch.arange(length, device=device)[:, None] - torch.arange(length, device=device)
    return (distance >= 0) & (distance < window)


def _product(x: Tensor, weight: Weight) -> Tensor:
    if isinstance(weight, NF4Weight):
        # the library multiplies many rows faster
        return nf4_linear(x, weight, exact=False)
    return F.linear(x, weight.to(x.dtype))


def _wide(weight: Weight) -> Tensor:
    assert isinstance(weight, Tensor)
    return weight


def _optional(stored: Mapping[str, Weight], name: str) -> Tensor | None:
    weight = stored.get(name)
    return None if weight is None else _wide(weight)

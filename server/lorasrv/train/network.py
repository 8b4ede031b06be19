"""The base with adapters over it, differentiable: a flat batch of token rows, in which every adapter has a run of rows.

Holds no weight of its own: it computes with the loaded model's. Every sequence attends to itself alone, whatever it is
packed with. Knows what an adapter does to a layer; knows no method, data or optimizer.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from lorasrv_kernels.nf4 import NF4Weight, nf4_linear
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lorasrv.model.adapted_linear import Weight, weight_rows
from lorasrv.model.config import ModelConfig
from lorasrv.model.decoder import DecoderModel
from lorasrv.model.layers import RotaryTable
from lorasrv.model.tensors import EMBEDDING, FINAL_NORM, HEAD, MODULES, NORMS, QK_NORMS, layer_prefix
from lorasrv.train.adapter import Factors, TrainableAdapter
from lorasrv.train.loss import token_losses

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


class TrainableLinear:
    """One frozen linear layer, y = W x + bias, and its place for adapters."""

    def __init__(self, name: str, weight: Weight, bias: Tensor | None, *, dtype: torch.dtype) -> None:
        self.name = name
        self._weight = weight
        self._bias = bias
        self._dtype = dtype

    def forward(self, x: Tensor, batch: TokenBatch, adapters: Sequence[TrainableAdapter]) -> Tensor:
        """x: [T, I]. Returns [T, O], each adapter applied to its rows."""
        y = self._product(x)
        # evaluations, which take no gradient, drop nothing
        drops = torch.is_grad_enabled()
        found = [adapter.factors(self.name, self) for adapter in adapters]
        if any(factors is not None for factors in found):
            parts = []
            for rows, inputs, factors, adapter in zip(
                y.split(batch.segments), x.split(batch.segments), found, adapters, strict=True
            ):
                if factors is None:
                    parts.append(rows)
                    continue
                dropped = F.dropout(inputs, adapter.dropout) if drops and adapter.dropout else inputs
                update = F.linear(F.linear(dropped.float(), factors.a), factors.b) * factors.scale
                parts.append(self._adapt(rows, dropped, update, factors, is_whole=dropped is inputs).to(y.dtype))
            y = parts[0] if len(parts) == 1 else torch.cat(parts)
        return y if self._bias is None else y + self._bias

    def _adapt(self, y: Tensor, dropped: Tensor, update: Tensor, factors: Factors, *, is_whole: bool) -> Tensor:
        """d * (y + update); as in PEFT, what d adds to the base's output sees the dropped input. float32."""
        if factors.d is None:
            return y.float() + update
        if is_whole:
            return (y.float() + update) * factors.d
        return y.float() + (factors.d - 1) * self._product(dropped).float() + factors.d * update

    @torch.no_grad()
    def project(self, rows: Tensor) -> Tensor:
        """rows: [R, I] float32. Returns rows W^T, [R, O] float32."""
        return self._product(rows)

    def squared_row_norms(self) -> Tensor:
        """[O] float32: |W|^2 of every row, W as it is served."""
        return self._squared_row_norms

    @cached_property
    def _squared_row_norms(self) -> Tensor:
        num_rows = self._weight.shape[0]
        bounds = [(start, min(start + _NORM_ROWS, num_rows)) for start in range(0, num_rows, _NORM_ROWS)]
        pieces = (weight_rows(self._weight, start, stop, dtype=self._dtype) for start, stop in bounds)
        return torch.cat([piece.square().sum(1) for piece in pieces])

    def _product(self, x: Tensor) -> Tensor:
        if isinstance(self._weight, NF4Weight):
            return nf4_linear(x, self._weight)
        return F.linear(x, self._weight.to(x.dtype))


class TrainableLayer:
    """One decoder layer."""

    def __init__(self, config: ModelConfig, stored: Mapping[str, Weight], *, layer: int, dtype: torch.dtype) -> None:
        prefix = layer_prefix(layer)
        linears = [
            TrainableLinear(
                f"{prefix}.{module}",
                stored[f"{prefix}.{module}.weight"],
                _optional(stored, f"{prefix}.{module}.bias"),
                dtype=dtype,
            )
            for module in MODULES
        ]
        self.linears = tuple(linears)
        self._query, self._key, self._value, self._output, self._gate, self._up, self._down = linears
        self._norms = [_wide(stored[f"{prefix}.{name}.weight"]) for name in NORMS]
        self._qk_norms = [_wide(stored[f"{prefix}.{name}.weight"]) for name in QK_NORMS] if config.qk_norm else None
        self._config = config
        self._window = config.windows[layer]

    def forward(self, x: Tensor, angles: Tensor, batch: TokenBatch, adapters: Sequence[TrainableAdapter]) -> Tensor:
        """x: [T, I]; angles: [T, 1, D] float32. Returns [T, I]."""
        epsilon = self._config.rms_norm_eps
        normed = rms_norm(x, self._norms[0], epsilon)
        query, key, value = (
            linear.forward(normed, batch, adapters).unflatten(1, (-1, self._config.head_size))
            for linear in (self._query, self._key, self._value)
        )
        if self._qk_norms is not None:
            query, key = rms_norm(query, self._qk_norms[0], epsilon), rms_norm(key, self._qk_norms[1], epsilon)
        attended = attend(rotate(query, angles), rotate(key, angles), value, batch.lengths, window=self._window)
        x = x + self._output.forward(attended.flatten(1), batch, adapters)
        normed = rms_norm(x, self._norms[1], epsilon)
        gate, up = self._gate.forward(normed, batch, adapters), self._up.forward(normed, batch, adapters)
        return x + self._down.forward(F.silu(gate) * up, batch, adapters)


class TrainableModel:
    """A loaded base, to be trained through.

    Attributes:
        linears: every adapted layer by its name.
    """

    def __init__(self, model: DecoderModel, *, checkpoint_layers: bool) -> None:
        """Keeps the model; with `checkpoint_layers` a layer's activations are computed again on the way back."""
        stored = dict(model.stored())
        self._embedding = _wide(stored[EMBEDDING])
        self._final_norm = _wide(stored[FINAL_NORM])
        self._head = _wide(stored.get(HEAD, stored[EMBEDDING]))
        self._epsilon = model.config.rms_norm_eps
        self._rotary = RotaryTable(
            model.config.rope,
            head_size=model.config.head_size,
            num_positions=model.max_positions,
            device=model.device,
        )
        self._layers = [
            TrainableLayer(model.config, stored, layer=layer, dtype=model.dtype)
            for layer in range(model.config.num_layers)
        ]
        self._checkpoint_layers = checkpoint_layers

    def losses(self, batch: TokenBatch, adapters: Sequence[TrainableAdapter]) -> Tensor:
        """The weighted cross-entropy of every row: [T] float32, differentiable in the adapters' tensors."""
        x = self._embedding[batch.token_ids]
        positions = torch.cat([torch.arange(length) for length in batch.lengths]).to(x.device)
        angles = self._rotary.lookup(positions)
        for layer in self._layers:
            if self._checkpoint_layers and torch.is_grad_enabled():
                x = checkpoint(layer.forward, x, angles, batch, adapters, use_reentrant=False)
            else:
                x = layer.forward(x, angles, batch, adapters)
        return token_losses(rms_norm(x, self._final_norm, self._epsilon), self._head, batch.targets, batch.weights)


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Root mean square norm over the last dimension, in float32 inside, as the model serves it."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)).to(x.dtype) * weight


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


def _wide(weight: Weight) -> Tensor:
    assert isinstance(weight, Tensor)
    return weight


def _optional(stored: Mapping[str, Weight], name: str) -> Tensor | None:
    weight = stored.get(name)
    return None if weight is None else _wide(weight)

"""Chooses the next token of each sequence from its logits.

A row's result depends on its logits, its parameters and its position in the output alone: neither on the other rows
nor on how often the sequence was preempted. Rows are therefore worked on one by one, in float64 on the CPU whatever
the logits' device, and the random number is a function of (seed, position), so there is no generator state.

The order: temperature, then top_k, then top_p over what top_k kept, then the inverse of the cumulative distribution
over the kept tokens by ascending id. Log probabilities are of the model's own distribution, before all of that.
This module knows no sequence and no model.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from lorasrv.engine.request import SampledToken, SamplingParams

__all__ = ["SampledToken", "most_probable", "philox_4x32_10", "philox_uniform", "sample"]

_WORD = 0xFFFFFFFF


def most_probable(logits: Tensor) -> Tensor:
    """The id of the largest entry of every row, ties to the lower id; -1 for a row with NaN or infinity.

    Args:
        logits: [N, V], float32.

    Returns:
        [N] int64, on the device of the logits, for which this does not wait.
    """
    # extrema and their places are exact, whatever the batch
    lowest, highest = torch.aminmax(logits, dim=-1)
    is_finite = lowest.isfinite() & highest.isfinite()
    return logits.argmax(dim=-1).masked_fill_(~is_finite, -1)


def sample(
    logits: Tensor, params: Sequence[SamplingParams], positions: Sequence[int], *, greedy: Tensor | None = None
) -> list[SampledToken]:
    """Chooses one token per row.

    Args:
        logits: [N, V], float32, any device.
        params: one per row.
        positions: one per row: how many tokens of the output come before this one.
        greedy: what `most_probable` says of the logits, where it is known already.

    Returns:
        One per row; a row with NaN or infinity gets `is_finite=False` and harms no other.
    """
    # one transfer for all rows
    greedy_ids = (most_probable(logits) if greedy is None else greedy).tolist()
    sampled = []
    for index, (row_params, position) in enumerate(zip(params, positions, strict=True)):
        token_id = greedy_ids[index]
        if token_id < 0:
            sampled.append(SampledToken(token_id=-1, is_finite=False))
            continue
        needs_row = row_params.temperature > 0 or row_params.logprobs is not None
        row = logits[index].cpu() if needs_row else logits[index]
        token_id = _pick(row, row_params, position) if row_params.temperature > 0 else token_id
        sampled.append(_with_logprobs(row, token_id, row_params.logprobs))
    return sampled


def philox_uniform(seed: int, position: int) -> float:
    """A number in [0, 1): the first word of Philox4x32-10 with key `seed` and counter `position`, over 2^32."""
    counter = (position & _WORD, position >> 32 & _WORD, 0, 0)
    return philox_4x32_10(counter, (seed & _WORD, seed >> 32 & _WORD))[0] / 2**32


def philox_4x32_10(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Philox with four 32-bit words and ten rounds (Salmon et al., "Parallel Random Numbers", SC11, section 3.3)."""
    x0, x1, x2, x3 = counter
    k0, k1 = key
    for _ in range(10):
        product0, product1 = 0xD2511F53 * x0, 0xCD9E8D57 * x2
        x0, x1, x2, x3 = product1 >> 32 ^ x1 ^ k0, product1 & _WORD, product0 >> 32 ^ x3 ^ k1, product0 & _WORD
        k0, k1 = k0 + 0x9E3779B9 & _WORD, k1 + 0xBB67AE85 & _WORD
    return x0, x1, x2, x3


def _pick(row: Tensor, params: SamplingParams, position: int) -> int:
    token_ids = _kept(row, params)
    values = row if token_ids is None else row[token_ids]
    cumulative = _probabilities(values, params.temperature).cumsum(0)
    target = philox_uniform(params.seed, position) * cumulative[-1]
    # the first whose cumulative probability passes the target; a token of probability zero never does
    index = int(torch.searchsorted(cumulative, target, right=True))
    return index if token_ids is None else int(token_ids[index])


def _kept(row: Tensor, params: SamplingParams) -> Tensor | None:
    """The ids that top_k and top_p leave, ascending; None if they leave all."""
    num_kept = min(params.top_k or row.numel(), row.numel())
    if num_kept == row.numel() and params.top_p == 1.0:
        return None
    token_ids = _most_probable(row, num_kept)
    if params.top_p < 1.0:
        cumulative = _probabilities(row[token_ids], params.temperature).cumsum(0)
        token_ids = token_ids[: int((cumulative < params.top_p).sum()) + 1]
    return token_ids.sort().values


def _most_probable(row: Tensor, count: int) -> Tensor:
    """Ids of the `count` largest entries, largest first, ties to the lower id."""
    # `topk` promises no order among equals, so it only finds the threshold
    candidates = (row >= row.topk(count).values[-1]).nonzero().flatten()
    return candidates[row[candidates].sort(descending=True, stable=True).indices[:count]]


def _probabilities(values: Tensor, temperature: float) -> Tensor:
    # the maximum goes first: divided by a tiny temperature the others go to -inf, never to inf - inf
    return ((values.double() - values.max()) / temperature).softmax(0)


def _with_logprobs(row: Tensor, token_id: int, num_top: int | None) -> SampledToken:
    if num_top is None:
        return SampledToken(token_id=token_id)
    logprobs = row.double().log_softmax(0)
    top_ids = _most_probable(row, min(num_top, row.numel())).tolist() if num_top else []
    top = tuple((top_id, float(logprobs[top_id])) for top_id in top_ids)
    return SampledToken(token_id=token_id, logprob=float(logprobs[token_id]), top=top)

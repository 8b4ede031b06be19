"""From the examples of a step to the tensors that go through the model. Knows examples, no adapter."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lorasrv.train.data.examples import Example
from lorasrv.train.data.order import micro_batches
from lorasrv.train.network import TokenBatch


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """What one adapter learns in a step.

    Attributes:
        place: of the adapter among those of the run.
        example: a sequence.
        weight: of every token in the loss: one over the adapter's supervised tokens of the whole step, so that the
            loss is that of one batch, however it is cut.
    """

    place: int
    example: Example
    weight: float


def share_out(examples: Sequence[Sequence[Example]]) -> list[Share]:
    """Takes the examples of a step, for each adapter."""
    return [
        Share(place=place, example=example, weight=1 / sum(other.num_supervised for other in own))
        for place, own in enumerate(examples)
        for example in own
    ]


def token_batches(
    shares: Sequence[Share], *, num_adapters: int, max_tokens: int, device: torch.device | str = "cpu"
) -> list[TokenBatch]:
    """Packs a step into as few batches of at most `max_tokens` rows as it can.

    Raises:
        TrainingDataError: an example alone is longer.
    """
    lengths = [len(share.example.token_ids) for share in shares]
    packed = micro_batches(shares, lengths, max_tokens=max_tokens)
    return [_token_batch(batch, num_adapters, device) for batch in packed]


def _token_batch(shares: Sequence[Share], num_adapters: int, device: torch.device | str) -> TokenBatch:
    """`shares` are in the order of their adapters."""
    ids: list[int] = []
    targets: list[int] = []
    weights: list[float] = []
    segments = [0] * num_adapters
    for share in shares:
        tokens = share.example.token_ids
        ids += tokens
        targets += [*tokens[1:], 0]
        # a row learns the token that follows it
        weights += [share.weight * on for on in (*share.example.supervised[1:], 0)]
        segments[share.place] += len(tokens)
    return TokenBatch(
        token_ids=torch.tensor(ids, device=device),
        targets=torch.tensor(targets, device=device),
        weights=torch.tensor(weights, dtype=torch.float32, device=device),
        lengths=tuple(len(share.example.token_ids) for share in shares),
        segments=tuple(segments),
        places=tuple(share.example.place for share in shares),
    )

"""What a run would learn from its data, before it does: counts, and samples with the learned part marked.

Knows examples and the tokenizer; knows no model and no terminal.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from lorasrv.model.tokenizer import Tokenizer
from lorasrv.train.data.examples import Example, Tally


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditedExample:
    """An example as text.

    Attributes:
        place: of its record.
        num_tokens: all of them.
        pieces: its text in order, each piece with whether it is learned; special tokens by their names.
    """

    place: str
    num_tokens: int
    pieces: tuple[tuple[str, bool], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Audit:
    """What a job's data come to.

    Attributes:
        tally: the counts.
        held_out: examples kept for evaluation.
        longest: tokens of the longest example.
        steps_per_epoch: steps until every example was learned once.
        samples: some examples.
    """

    tally: Tally
    held_out: int
    longest: int
    steps_per_epoch: float
    samples: tuple[AuditedExample, ...]


def audit(
    examples: Sequence[Example],
    held_out: Sequence[Example],
    tally: Tally,
    tokenizer: Tokenizer,
    *,
    batch_size: int,
    num_samples: int,
) -> Audit:
    """Takes the samples from all over the data, evenly."""
    count = min(num_samples, len(examples))
    chosen = [examples[place * len(examples) // count] for place in range(count)]
    return Audit(
        tally=tally,
        held_out=len(held_out),
        longest=max(len(example.token_ids) for example in examples),
        steps_per_epoch=len(examples) / batch_size,
        samples=tuple(_as_text(example, tokenizer) for example in chosen),
    )


def _as_text(example: Example, tokenizer: Tokenizer) -> AuditedExample:
    marked = zip(example.token_ids, example.supervised, strict=True)
    pieces = []
    for learned, tokens in groupby(marked, key=lambda token: bool(token[1])):
        content = b"".join(tokenizer.token_bytes(token_id) or tokenizer.token_name(token_id) for token_id, _ in tokens)
        pieces.append((content.decode(errors="replace"), learned))
    return AuditedExample(place=example.place, num_tokens=len(example.token_ids), pieces=tuple(pieces))

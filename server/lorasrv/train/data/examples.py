"""Samples as tokens: which ids, and which of them are learned. Over-long samples are dropped, cut or refused, counted.

Knows the tokenizer; knows no batch.
"""

from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from lorasrv.errors import TrainingDataError
from lorasrv.model.tokenizer import Tokenizer
from lorasrv.train.config import OverLong
from lorasrv.train.data.samples import Sample

MAX_REASONS = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """A sequence to learn from.

    Attributes:
        token_ids: what the model reads, BOS included where the model has one.
        supervised: one byte a token: 1 where the token is to be predicted from those before it. Never the first.
        place: of its record, for messages.
    """

    token_ids: "array[int]"
    supervised: bytes
    place: str

    @property
    def num_supervised(self) -> int:
        """Tokens to be predicted."""
        return self.supervised.count(1)


@dataclass(slots=True, kw_only=True)
class Tally:
    """What became of the samples."""

    samples: int = 0
    examples: int = 0
    tokens: int = 0
    supervised_tokens: int = 0
    dropped: int = 0
    truncated: int = 0
    unsupervised: int = 0
    """Samples left out because nothing in them is to be learned."""


def encode_samples(
    samples: Iterable[Sample], tokenizer: Tokenizer, *, max_tokens: int, over_long: OverLong
) -> tuple[list[Example], Tally]:
    """Turns samples into examples of at most `max_tokens` tokens; running text is cut into windows.

    Raises:
        TrainingDataError: a sample is too long and `over_long` refuses, or nothing at all is to be learned.
    """
    examples: list[Example] = []
    tally = Tally()
    too_long = []
    for sample in samples:
        tally.samples += 1
        encoded = _encode(sample, tokenizer)
        if sample.whole and len(encoded.token_ids) > max_tokens:
            if over_long == "refuse":
                too_long.append(f"{sample.place}: {len(encoded.token_ids)} tokens, more than {max_tokens}")
                continue
            tally.dropped += over_long == "drop"
            tally.truncated += over_long == "truncate"
            if over_long == "drop":
                continue
        pieces = list(_cut(encoded, tokenizer, sample=sample, max_tokens=max_tokens))
        learned = [piece for piece in pieces if piece.num_supervised]
        tally.unsupervised += not learned
        examples += learned
    if too_long:
        more = [f"and {len(too_long) - MAX_REASONS} more"] if len(too_long) > MAX_REASONS else []
        raise TrainingDataError([*too_long[:MAX_REASONS], *more])
    if not examples:
        raise TrainingDataError([f"none of the {tally.samples} samples has a token to be learned"])
    tally.examples = len(examples)
    tally.tokens = sum(len(example.token_ids) for example in examples)
    tally.supervised_tokens = sum(example.num_supervised for example in examples)
    return examples, tally


def _encode(sample: Sample, tokenizer: Tokenizer) -> Example:
    token_ids, spans = tokenizer.encode_with_spans(sample.text)
    supervised = bytearray(len(token_ids))
    regions = iter(sample.supervised)
    region = next(regions, None)
    for index, (start, stop) in enumerate(spans):
        while region is not None and start >= region[1]:
            region = next(regions, None)
        # a token belongs to a region that it begins in; one that begins before a region could not be its first
        supervised[index] = region is not None and region[0] <= start and stop > start
    if sample.ends and tokenizer.eos_ids and not _ends(token_ids, supervised, tokenizer):
        token_ids = [*token_ids, tokenizer.eos_ids[0]]
        supervised.append(1)
    if supervised:
        supervised[0] = 0
    return Example(token_ids=array("i", token_ids), supervised=bytes(supervised), place=sample.place)


def _ends(token_ids: list[int], supervised: bytearray, tokenizer: Tokenizer) -> bool:
    """Whether what is learned ends with an end token already, as after the last turn of most chat templates."""
    last = supervised.rfind(1)
    return last >= 0 and any(token_id in tokenizer.eos_ids for token_id in token_ids[max(0, last - 1) : last + 1])


def _cut(example: Example, tokenizer: Tokenizer, *, sample: Sample, max_tokens: int) -> Iterator[Example]:
    """The first `max_tokens` tokens of a whole sample; of running text, windows that all begin as a text does."""
    ids, supervised = example.token_ids, example.supervised
    if sample.whole or len(ids) <= max_tokens:
        yield Example(token_ids=ids[:max_tokens], supervised=supervised[:max_tokens], place=sample.place)
        return
    has_bos = tokenizer.bos_id is not None and ids[0] == tokenizer.bos_id
    head, start = ids[:has_bos], int(has_bos)
    step = max_tokens - len(head)
    for first in range(start, len(ids), step):
        window = head + ids[first : first + step]
        marks = bytes(len(head)) + supervised[first : first + step]
        yield Example(token_ids=window, supervised=b"\0" + marks[1:], place=sample.place)

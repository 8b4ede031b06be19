"""Turns tokens into text as they come: whole characters only, nothing that may turn out to be a stop string.

The text of a sequence is defined as the UTF-8 decoding of its tokens' bytes, one after the other, with U+FFFD for what
is not UTF-8. The pieces given out add up to exactly that, up to the first stop string. Each token costs its own length.
This module knows no vocabulary; special tokens are expected to have no bytes.
"""

import codecs
from collections.abc import Sequence
from typing import Protocol


class TokenBytes(Protocol):
    """The part of a tokenizer that is needed here."""

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes a token stands for; none for special tokens."""


class Detokenizer:
    """The text of one sequence.

    Args:
        tokenizer: knows the tokens' bytes.
        stop: strings that end the text; of those that match, the one that is complete first, the longest if several.
    """

    def __init__(self, tokenizer: TokenBytes, stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._prefixes = [_StopPrefix(text) for text in stop]
        self._held = ""
        self.stop_string: str | None = None

    def push(self, token_id: int) -> str:
        """Adds a token and returns the text that is decided now, which may be empty; sets `stop_string` on a match.

        After a match there is nothing more to push.
        """
        return self._decide(self._decoder.decode(self._tokenizer.token_bytes(token_id)))

    def flush(self) -> str:
        """Returns what is still held back, at the end of a sequence that met no stop string."""
        text = self._decide(self._decoder.decode(b"", final=True))
        held, self._held = self._held, ""
        return text + held

    def _decide(self, text: str) -> str:
        if not self._prefixes:
            return text
        num_held = len(self._held)
        self._held += text
        for index, character in enumerate(text):
            # no generator: every stop string has to see the character
            matches = [prefix.text for prefix in self._prefixes if prefix.push(character)]
            if matches:
                self.stop_string = max(matches, key=len)
                decided = self._held[: num_held + index + 1 - len(self.stop_string)]
                self._held = ""
                return decided
        num_undecided = max(prefix.num_matched for prefix in self._prefixes)
        num_decided = len(self._held) - num_undecided
        decided, self._held = self._held[:num_decided], self._held[num_decided:]
        return decided


class _StopPrefix:
    """How much of one stop string the text so far ends with (Knuth, Morris and Pratt 1977)."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.num_matched = 0
        # borders[n]: the longest proper prefix of text[:n + 1] that also ends it
        self._borders = [0]
        length = 0
        for character in text[1:]:
            length = self._extend(length, character)
            self._borders.append(length)

    def push(self, character: str) -> bool:
        """Adds a character; true if the text now ends with the whole string."""
        self.num_matched = self._extend(self.num_matched, character)
        return self.num_matched == len(self.text)

    def _extend(self, length: int, character: str) -> int:
        while length and self.text[length] != character:
            length = self._borders[length - 1]
        return length + (self.text[length] == character)

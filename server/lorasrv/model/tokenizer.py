"""Text to token ids and back, from the `tokenizer.json` of a model folder.

Adds the BOS token exactly once, knows which tokens end a text, and tells the bytes each token stands for. Knows nothing
of chat templates or streaming.
"""

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

from lorasrv.errors import ModelLoadError
from lorasrv.model.config import ModelConfig, read_json, read_model_config
from lorasrv.model.generation import read_generation_defaults

# these two of transformers add BOS unless told not to, whatever tokenizer.json says
_BOS_BY_DEFAULT = ("LlamaTokenizer", "LlamaTokenizerFast")


class Tokenizer:
    """One model's tokenizer; read-only and safe to use from any thread.

    Attributes:
        bos_id: the token put in front of every text, None where the model has none.
        eos_ids: the tokens that end a text.
        vocab_size: one more than the largest id.
    """

    def __init__(self, folder: Path, *, config: ModelConfig | None = None) -> None:
        """Reads `tokenizer.json`, `tokenizer_config.json` and `generation_config.json` of `folder`.

        Args:
            folder: of the model.
            config: what its `config.json` says, where that was read already.

        Raises:
            ModelLoadError: a file is unreadable, the kind of tokenizer is unknown, or ids pass the vocabulary.
        """
        config = config or read_model_config(folder)
        settings = _optional_json(folder / "tokenizer_config.json")
        self._tokenizer = _load(folder / "tokenizer.json")
        self._added = self._tokenizer.get_added_tokens_decoder()
        self._byte_level = _is_byte_level(read_json(folder / "tokenizer.json"))
        self.bos_id = self._find(settings, "bos_token", config.bos_id)
        self._adds_bos = self.bos_id is not None and self._wants_bos(settings)
        eos_id = self._find(settings, "eos_token", None)
        fallback = config.eos_ids or (() if eos_id is None else (eos_id,))
        self.eos_ids = read_generation_defaults(folder).eos_ids or fallback
        self.vocab_size = 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values())
        self._check_ids(config)

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, with BOS in front exactly once, even where the text begins with it."""
        return self.encode_with_spans(text)[0]

    def encode_with_spans(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Token ids as of `encode`, and for each the characters of `text` it stands for, [start, stop).

        The tokens of one character all have its span; a BOS token that was put in front has an empty one.
        """
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        token_ids, spans = list(encoding.ids), list(encoding.offsets)
        if self._adds_bos and self.bos_id is not None and token_ids[:1] != [self.bos_id]:
            return [self.bos_id, *token_ids], [(0, 0), *spans]
        return token_ids, spans

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of `token_ids`: their bytes one after the other, invalid UTF-8 replaced, special tokens left out."""
        return b"".join(map(self.token_bytes, token_ids)).decode("utf-8", errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        """What one token adds to a text: maybe part of a character; empty for special tokens and unknown ids."""
        added = self._added.get(token_id)
        if added is not None:
            return b"" if added.special else added.content.encode()
        piece = self._tokenizer.id_to_token(token_id)
        if piece is None:
            return b""
        return self._byte_level_bytes(piece) if self._byte_level else _sentencepiece_bytes(piece)

    def token_name(self, token_id: int) -> bytes:
        """How the vocabulary spells a token, special ones too, in UTF-8; empty for unknown ids."""
        return (self._tokenizer.id_to_token(token_id) or "").encode()

    def _byte_level_bytes(self, piece: str) -> bytes:
        values = [self._byte_of_character.get(character) for character in piece]
        return piece.encode() if None in values else bytes(value for value in values if value is not None)

    @cached_property
    def _byte_of_character(self) -> dict[str, int]:
        """The printable stand-ins of GPT-2's byte-level alphabet."""
        printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
        others = [value for value in range(256) if value not in set(printable)]
        return {chr(value): value for value in printable} | {chr(256 + i): value for i, value in enumerate(others)}

    def _find(self, settings: Mapping[str, Any], key: str, fallback: int | None) -> int | None:
        value = settings.get(key)
        content = value.get("content") if isinstance(value, Mapping) else value
        token_id = self._tokenizer.token_to_id(content) if isinstance(content, str) else None
        return fallback if token_id is None else token_id

    def _wants_bos(self, settings: Mapping[str, Any]) -> bool:
        stated = settings.get("add_bos_token")
        if stated is not None:
            return bool(stated)
        by_itself = self._tokenizer.encode("").ids[:1] == [self.bos_id]
        return by_itself or settings.get("tokenizer_class") in _BOS_BY_DEFAULT

    def _check_ids(self, config: ModelConfig) -> None:
        reasons = []
        if self.vocab_size > config.vocab_size:
            reasons.append(
                f"tokenizer.json has ids up to {self.vocab_size - 1}, the model only {config.vocab_size} tokens; "
                "use the tokenizer that belongs to this model"
            )
        for name, token_id in [("bos", self.bos_id), *(("eos", token_id) for token_id in self.eos_ids)]:
            if token_id is not None and token_id >= config.vocab_size:
                reasons.append(f"the {name} token {token_id} is not below the vocabulary size {config.vocab_size}")
        if reasons:
            raise ModelLoadError(reasons)


def _load(path: Path) -> tokenizers.Tokenizer:
    if not path.exists():
        raise ModelLoadError([f"{path} is missing; save the tokenizer in the tokenizers format"])
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception
        raise ModelLoadError([f"{path} cannot be read: {error}"]) from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _optional_json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.exists() else {}


def _is_byte_level(raw: Mapping[str, Any]) -> bool:
    """Whether pieces are written in GPT-2's byte-level alphabet; False for SentencePiece's.

    Raises:
        ModelLoadError: neither.
    """
    decoder = raw.get("decoder") or {}
    kinds = {step.get("type") for step in [decoder, *(decoder.get("decoders") or [])]}
    if "ByteLevel" in kinds:
        return True
    if kinds & {"ByteFallback", "Metaspace"} or (raw.get("model") or {}).get("byte_fallback"):
        return False
    raise ModelLoadError(
        [f"tokenizer.json has decoder {sorted(map(str, kinds))}; byte-level and SentencePiece are served"]
    )


def _sentencepiece_bytes(piece: str) -> bytes:
    if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
        return bytes([int(piece[3:5], 16)])
    return piece.replace("\u2581", " ").encode()

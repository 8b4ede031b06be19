"""Tokenizers of both families: BOS once, end tokens, bytes, vocabulary checks."""

import json
from pathlib import Path

import pytest
import tokenizers
from lorasrv.errors import ModelLoadError
from lorasrv.model.tokenizer import Tokenizer
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors, trainers

TEXT = "The café cost 5 € and the naïve 日本 smiled 🙂.\n"


def byte_level(*, template: str | None = "<s> $A") -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([TEXT] * 4, trainer)
    if template:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=[("<s>", 0), ("</s>", 1)]
        )
    return tokenizer


def sentencepiece() -> tokenizers.Tokenizer:
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{value:02X}>" for value in range(256)), "\u2581", *"Thecafost5", "\u2581T"]
    model = models.BPE(
        vocab={piece: i for i, piece in enumerate(pieces)},
        merges=[("\u2581", "T")],
        unk_token="<unk>",
        fuse_unk=True,
        byte_fallback=True,
    )
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer


@pytest.fixture
def folder(tmp_path):
    def write(
        tokenizer: tokenizers.Tokenizer, *, settings: dict | None = None, generation: dict | None = None, **config
    ) -> Path:
        tokenizer.save(str(tmp_path / "tokenizer.json"))
        sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
        raw = {
            "architectures": ["LlamaForCausalLM"],
            "vocab_size": 400,
            "bos_token_id": 0,
            "eos_token_id": 1,
            **sizes,
            **config,
        }
        (tmp_path / "config.json").write_text(json.dumps(raw))
        if settings is not None:
            (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
        if generation is not None:
            (tmp_path / "generation_config.json").write_text(json.dumps(generation))
        return tmp_path

    return write


@pytest.mark.parametrize("template", ["<s> $A", "<s> $A </s>", "<s> <s> $A", None])
@pytest.mark.parametrize("settings", [{"add_bos_token": True}, {"tokenizer_class": "LlamaTokenizerFast"}])
def test_bos_exactly_once_whatever_the_post_processor_does(folder, template, settings):
    tokenizer = Tokenizer(folder(byte_level(template=template), settings=settings))
    for text in (TEXT, "", "<s>" + TEXT, "<s>"):
        ids = tokenizer.encode(text)
        assert ids[0] == 0
        assert ids.count(0) == 1
        assert 1 not in ids


def test_without_a_word_on_bos_the_post_processor_decides(folder):
    assert Tokenizer(folder(byte_level())).encode("cost")[0] == 0
    assert 0 not in Tokenizer(folder(byte_level(template=None))).encode("cost")


def test_no_bos_where_the_model_says_so(folder):
    assert 0 not in Tokenizer(folder(byte_level(), settings={"add_bos_token": False})).encode("cost")


def test_tokenizer_config_names_bos(folder):
    settings = {"bos_token": {"content": "</s>"}, "add_bos_token": True}
    assert Tokenizer(folder(byte_level(template=None), settings=settings)).encode("cost")[0] == 1


def test_end_tokens(folder):
    assert Tokenizer(folder(byte_level())).eos_ids == (1,)
    assert Tokenizer(folder(byte_level(), generation={"eos_token_id": 5})).eos_ids == (5,)
    assert Tokenizer(folder(byte_level(), generation={"eos_token_id": [5, 6]})).eos_ids == (5, 6)
    assert Tokenizer(folder(byte_level(), generation={}, eos_token_id=[7, 8])).eos_ids == (7, 8)
    assert Tokenizer(
        folder(byte_level(), generation={}, settings={"eos_token": "</s>"}, eos_token_id=None)
    ).eos_ids == (1,)


@pytest.mark.parametrize("make", [byte_level, sentencepiece])
def test_bytes_of_all_tokens_are_the_text(folder, make):
    library = make()
    tokenizer = Tokenizer(folder(library))
    ids = library.encode(TEXT, add_special_tokens=False).ids
    assert tokenizer.decode(ids).removeprefix(" ") == library.decode(ids) == TEXT
    assert b"".join(map(tokenizer.token_bytes, ids)).decode().removeprefix(" ") == TEXT


def test_a_character_may_span_tokens(folder):
    tokenizer = Tokenizer(folder(sentencepiece()))
    pieces = [tokenizer.token_bytes(token_id) for token_id in tokenizer.encode("€")]
    assert [piece for piece in pieces if piece.strip()] == [b"\xe2", b"\x82", b"\xac"]


def test_special_tokens_have_no_bytes_and_other_added_ones_do(folder):
    library = byte_level()
    library.add_tokens([AddedToken("<tool é>", special=False)])
    tokenizer = Tokenizer(folder(library))
    assert tokenizer.token_bytes(0) == tokenizer.token_bytes(399) == b""
    assert tokenizer.token_bytes(library.token_to_id("<tool é>")) == "<tool é>".encode()


def test_ids_beyond_the_vocabulary_are_refused(folder):
    with pytest.raises(ModelLoadError) as caught:
        Tokenizer(folder(byte_level(), vocab_size=200, eos_token_id=[1, 250]))
    assert len(caught.value.reasons) == 2


def test_unreadable_tokenizers_are_refused(folder):
    where = folder(byte_level())
    raw = json.loads((where / "tokenizer.json").read_text())
    (where / "tokenizer.json").write_text(
        json.dumps({**raw, "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True}})
    )
    with pytest.raises(ModelLoadError, match="WordPiece"):
        Tokenizer(where)
    (where / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelLoadError, match="cannot be read"):
        Tokenizer(where)
    (where / "tokenizer.json").unlink()
    with pytest.raises(ModelLoadError, match="missing"):
        Tokenizer(where)

"""Samples as tokens: what is supervised, where running text is cut, what happens to samples that are too long."""

from collections.abc import Mapping

import pytest
from lorasrv.embedded import embedded_base
from lorasrv.errors import TrainingDataError
from lorasrv.model.tokenizer import Tokenizer
from lorasrv.train.data.conversation import ChatTemplate
from lorasrv.train.data.examples import Example, encode_samples
from lorasrv.train.data.records import Record
from lorasrv.train.data.samples import to_sample

TEMPLATE = ChatTemplate(
    "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(embedded_base())


def encode(tokenizer: Tokenizer, *records: Mapping[str, object], max_tokens: int = 512, **options: object):
    samples = [to_sample(Record(fields=fields, place=f"d:{n}"), TEMPLATE) for n, fields in enumerate(records)]
    return encode_samples(samples, tokenizer, max_tokens=max_tokens, **{"over_long": "refuse", **options})


def learned(tokenizer: Tokenizer, example: Example) -> str:
    ids = [i for i, on in zip(example.token_ids, example.supervised, strict=True) if on]
    return "".join("<end>" if i in tokenizer.eos_ids else tokenizer.token_bytes(i).decode() for i in ids)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"text": "To be, or not."}, "To be, or not.<end>"),
        ({"prompt": "To be,", "completion": " or not."}, " or not.<end>"),
        ({"prompt": "", "completion": "To be."}, "To be.<end>"),
        ({"instruction": "Speak.", "input": "Now", "output": "I do."}, " I do.\n<end>"),
        (
            {"messages": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Me, my lord."}]},
            " Me, my lord.\n<end>",
        ),
        (
            {"conversations": [{"from": "human", "value": "Who?"}, {"from": "gpt", "value": "Me."}]},
            " Me.\n<end>",
        ),
        (
            {
                "prompt": [{"role": "user", "content": "Who?"}],
                "completion": [{"role": "assistant", "content": "Me."}],
            },
            " Me.\n<end>",
        ),
    ],
)
def test_what_is_learned(tokenizer: Tokenizer, fields: Mapping[str, object], expected: str) -> None:
    (example,), tally = encode(tokenizer, fields)
    assert learned(tokenizer, example) == expected
    assert example.token_ids[0] == tokenizer.bos_id
    assert tally.supervised_tokens == example.num_supervised
    assert tally.tokens == len(example.token_ids)


def test_every_turn_of_the_assistant_is_learned_and_no_other(tokenizer: Tokenizer) -> None:
    turns = [("user", "One?"), ("assistant", "Two."), ("user", "Three?"), ("assistant", "Four.")]
    (example,), _ = encode(tokenizer, {"messages": [{"role": role, "content": text} for role, text in turns]})
    assert learned(tokenizer, example) == " Two.\n Four.\n<end>"


def test_an_end_token_of_the_template_is_not_repeated(tokenizer: Tokenizer) -> None:
    ending = ChatTemplate(
        "{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}</s>{% endif %}\n{% endfor %}"
    )
    fields = {"messages": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": " Me."}]}
    (example,), _ = encode_samples(
        [to_sample(Record(fields=fields, place="d"), ending)], tokenizer, max_tokens=99, over_long="refuse"
    )
    assert list(example.token_ids).count(tokenizer.eos_ids[0]) == 1


def test_running_text_is_cut_into_windows_that_miss_and_repeat_nothing(tokenizer: Tokenizer) -> None:
    text = " ".join(f"word{n}" for n in range(200))
    examples, tally = encode(tokenizer, {"text": text}, max_tokens=33)
    assert all(len(example.token_ids) <= 33 for example in examples)
    assert {example.token_ids[0] for example in examples} == {tokenizer.bos_id}
    assert "".join(learned(tokenizer, example) for example in examples) == text + "<end>"
    assert tally.examples == len(examples) > 10


@pytest.mark.parametrize(("over_long", "kept"), [("drop", 1), ("truncate", 2)])
def test_too_long_samples(tokenizer: Tokenizer, over_long: str, kept: int) -> None:
    long = {"prompt": "Say it:", "completion": " again and" * 50}
    examples, tally = encode(tokenizer, long, {"text": "short"}, max_tokens=20, over_long=over_long)
    assert len(examples) == kept
    assert (tally.dropped, tally.truncated) == (2 - kept, kept - 1)
    assert all(len(example.token_ids) <= 20 for example in examples)
    with pytest.raises(TrainingDataError, match=r"d:0: \d+ tokens, more than 20; d:1: "):
        encode(tokenizer, long, long, max_tokens=20)


def test_a_sample_cut_before_its_completion_is_left_out(tokenizer: Tokenizer) -> None:
    fields = {"prompt": "so " * 100, "completion": "what"}
    _, tally = encode(tokenizer, fields, {"text": "short"}, max_tokens=20, over_long="truncate")
    assert (tally.truncated, tally.unsupervised, tally.examples) == (1, 1, 1)
    with pytest.raises(TrainingDataError, match="none of the 1 samples has a token to be learned"):
        encode(tokenizer, fields, max_tokens=20, over_long="truncate")


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"question": "x"}, "d:0: has question; known are: messages; conversations"),
        ({"text": 7}, "d:0: text must be text, got int"),
        ({"messages": []}, "d:0: messages must be a list that is not empty"),
        ({"messages": [{"role": "user"}]}, r"messages\[0\] needs role and content"),
        ({"conversations": [{"from": "cat", "value": "x"}]}, r"conversations\[0\] needs from, one of"),
    ],
)
def test_bad_records_are_named(tokenizer: Tokenizer, fields: Mapping[str, object], expected: str) -> None:
    with pytest.raises(TrainingDataError, match=expected):
        encode(tokenizer, fields)


def test_messages_need_a_template() -> None:
    record = Record(fields={"messages": [{"role": "user", "content": "x"}]}, place="d:3")
    with pytest.raises(TrainingDataError, match="d:3: messages need a chat template"):
        to_sample(record, None)

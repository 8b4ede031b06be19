"""What the assistant wrote is found in any template; the whole text is transformers' own rendering."""

import json
from pathlib import Path

import pytest
from lorasrv.errors import TrainingDataError
from lorasrv.train.data.conversation import ChatTemplate
from transformers.utils.chat_template_utils import render_jinja_template

MARKED = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] | trim }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
BARE = (
    "{%- for m in messages %}\n    {%- if m.role == 'user' %}[INST] {{ m.content }} [/INST]\n"
    "    {%- else %} {{ m.content }}</s>\n    {%- endif %}\n{%- endfor %}"
)
FORGETFUL = (
    "{% for m in messages %}{% if m.role == 'assistant' and not loop.last %}A:{{ m.content.split('</think>')[-1] }}"
    "{% else %}{{ m.role }}:{{ m.content }}{% endif %};{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)
CHAT = [
    {"role": "user", "content": "Who's there?"},
    {"role": "assistant", "content": "Nay, answer me"},
    {"role": "user", "content": "Long live the king"},
    {"role": "assistant", "content": "Bernardo? {{ bos_token }}"},
]


@pytest.mark.parametrize(
    ("source", "learned"),
    [
        (MARKED, ["Nay, answer me<|end|>\n", "Bernardo? {{ bos_token }}<|end|>\n"]),
        (BARE, [" Nay, answer me</s>", " Bernardo? {{ bos_token }}</s>"]),
    ],
)
def test_the_assistants_turns_with_their_ends_are_supervised(source: str, learned: list[str]) -> None:
    rendered = ChatTemplate(source, special_tokens={"bos_token": "<s>"}).render(CHAT)
    assert [rendered.text[start:stop] for start, stop in rendered.supervised] == learned
    (expected,), _ = render_jinja_template([CHAT], chat_template=source, bos_token="<s>")
    assert rendered.text == expected


def test_a_template_that_rewrites_earlier_turns_is_refused() -> None:
    with pytest.raises(TrainingDataError, match="message 1 in another way when others follow"):
        ChatTemplate(FORGETFUL).render(CHAT)
    assert len(ChatTemplate(FORGETFUL).render(CHAT[:2]).supervised) == 1


def test_the_template_runs_in_a_sandbox() -> None:
    hostile = "{{ messages.__class__.__mro__[1].__subclasses__() }}"
    with pytest.raises(TrainingDataError, match="refuses it"):
        ChatTemplate(hostile).render(CHAT)
    with pytest.raises(TrainingDataError, match="cannot be compiled"):
        ChatTemplate("{% for %}")
    with pytest.raises(TrainingDataError, match="only text"):
        ChatTemplate("{{ raise_exception('only text') }}").render(CHAT)


def test_where_a_folder_keeps_its_template(tmp_path: Path) -> None:
    assert ChatTemplate.from_folder(tmp_path) is None
    settings = {
        "eos_token": {"content": "</s>"},
        "chat_template": [{"name": "default", "template": "x{{ eos_token }}"}],
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    found = ChatTemplate.from_folder(tmp_path)
    assert found is not None
    assert found.render(CHAT[:1]).text == "x</s>"
    (tmp_path / "chat_template.jinja").write_text("y{{ eos_token }}")
    found = ChatTemplate.from_folder(tmp_path)
    assert found is not None
    assert found.render(CHAT[:1]).text == "y</s>"

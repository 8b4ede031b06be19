"""Messages as the base's chat template writes them, and which characters of that the assistant wrote.

The template is untrusted: it runs in jinja2's immutable sandbox. What is supervised is found by rendering the
conversation up to every turn and comparing, never by a keyword inside the template, which most templates lack.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from lorasrv.errors import TrainingDataError
from lorasrv.model.config import read_json

Message = Mapping[str, str]
"""At least `role` and `content`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RenderedConversation:
    """A conversation as text.

    Attributes:
        text: all of it.
        supervised: [start, stop) of the characters of `text` that the assistant wrote, its end-of-turn mark included.
    """

    text: str
    supervised: tuple[tuple[int, int], ...]


class ChatTemplate:
    """A model's chat template."""

    def __init__(self, source: str, *, special_tokens: Mapping[str, str] | None = None) -> None:
        """Compiles a template; `special_tokens` are what it may name, such as `bos_token`.

        Raises:
            TrainingDataError: it is no jinja2 template.
        """
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        self._special_tokens = dict(special_tokens or {})
        try:
            self._template = environment.from_string(source)
        except TemplateError as error:
            raise TrainingDataError([f"the chat template cannot be compiled: {error}"]) from error

    @classmethod
    def from_folder(cls, folder: Path) -> "ChatTemplate | None":
        """The template of a model folder: `chat_template.jinja`, or in `tokenizer_config.json`; None without one.

        Raises:
            TrainingDataError: it is no jinja2 template, or one of several without a default.
        """
        path = folder / "tokenizer_config.json"
        settings = read_json(path) if path.exists() else {}
        file = folder / "chat_template.jinja"
        source = file.read_text(encoding="utf-8") if file.exists() else settings.get("chat_template")
        if isinstance(source, list):
            named = {entry.get("name"): entry.get("template") for entry in source if isinstance(entry, Mapping)}
            if "default" not in named:
                raise TrainingDataError([f"{path}: several chat templates, none of them called default"])
            source = named["default"]
        if not isinstance(source, str):
            return None
        return cls(source, special_tokens=_special_tokens(settings))

    def render(self, messages: Sequence[Message]) -> RenderedConversation:
        """Renders a conversation with everything the assistant wrote marked.

        Raises:
            TrainingDataError: the template refuses the conversation, or writes earlier turns differently once later
                ones follow, so that no text of theirs could be supervised.
        """
        text = self._render(messages, prompting=False)
        spans = []
        for index, message in enumerate(messages):
            if message["role"] == "assistant":
                before = self._render(messages[:index], prompting=True)
                through = self._render(messages[: index + 1], prompting=False)
                if not (through.startswith(before) and text.startswith(through)):
                    raise TrainingDataError(
                        [f"the chat template writes message {index} in another way when others follow; "
                         "end the conversation there"]
                    )  # fmt: skip
                spans.append((len(before), len(through)))
        return RenderedConversation(text=text, supervised=tuple(spans))

    def _render(self, messages: Sequence[Message], *, prompting: bool) -> str:
        try:
            return self._template.render(
                messages=[dict(message) for message in messages],
                add_generation_prompt=prompting,
                **self._special_tokens,
            )
        except TemplateError as error:
            raise TrainingDataError([f"the chat template refuses it: {error}"]) from error


def _special_tokens(settings: Mapping[str, Any]) -> dict[str, str]:
    values = {key: value for key, value in settings.items() if key.endswith("_token")}
    contents = {key: value.get("content") if isinstance(value, Mapping) else value for key, value in values.items()}
    return {key: content for key, content in contents.items() if isinstance(content, str)}


def _to_json(value: object, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _raise_exception(message: str) -> None:
    raise TemplateError(message)

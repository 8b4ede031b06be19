"""What a record says: pieces of text, each to be learned or only read.

Knows the shapes of records that are in use: text, prompt and completion, messages, Alpaca, ShareGPT. Knows no token.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from lorasrv.errors import TrainingDataError
from lorasrv.train.data.conversation import ChatTemplate, Message
from lorasrv.train.data.records import Record

_SHAREGPT_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One text to learn from.

    Attributes:
        text: all of it.
        supervised: [start, stop) of the characters to be learned, ascending.
        ends: whether the text ends here, so that the end is learned too.
        whole: whether it must stay in one piece; running text is cut into windows instead.
        place: of its record.
    """

    text: str
    supervised: tuple[tuple[int, int], ...]
    ends: bool
    whole: bool
    place: str


def to_sample(record: Record, template: ChatTemplate | None) -> Sample:
    """Recognizes the shape of a record by its fields.

    Args:
        record: as read.
        template: the base's chat template, None where it has none.

    Raises:
        TrainingDataError: the shape is unknown, a field is of the wrong type, or a chat template is needed.
    """
    read = next((read for fields, read in _SHAPES if fields <= record.fields.keys()), None)
    if read is None:
        known = "; ".join(" and ".join(sorted(fields)) for fields, _ in _SHAPES)
        raise TrainingDataError([f"{record.place}: has {', '.join(sorted(record.fields))}; known are: {known}"])
    try:
        return read(record, template)
    except TrainingDataError as error:
        prefixed = [
            reason if reason.startswith(record.place) else f"{record.place}: {reason}" for reason in error.reasons
        ]
        raise TrainingDataError(prefixed) from error


def _text(record: Record, template: ChatTemplate | None) -> Sample:
    del template
    text = _string(record, "text")
    return Sample(text=text, supervised=((0, len(text)),), ends=True, whole=False, place=record.place)


def _prompt_and_completion(record: Record, template: ChatTemplate | None) -> Sample:
    prompt, completion = record.fields["prompt"], record.fields["completion"]
    if isinstance(prompt, list) and isinstance(completion, list):
        return _conversation(record, [*_messages(prompt), *_messages(completion)], template)
    return _answered(record, _string(record, "prompt"), _string(record, "completion"))


def _chat(record: Record, template: ChatTemplate | None) -> Sample:
    return _conversation(record, _messages(record.fields["messages"]), template)


def _sharegpt(record: Record, template: ChatTemplate | None) -> Sample:
    turns = _list(record.fields["conversations"], "conversations")
    messages = []
    for index, turn in enumerate(turns):
        speaker, said = (turn.get("from"), turn.get("value")) if isinstance(turn, Mapping) else (None, None)
        if speaker not in _SHAREGPT_ROLES or not isinstance(said, str):
            raise TrainingDataError(
                [f"conversations[{index}] needs from, one of human, gpt, system, and value, a text"]
            )
        messages.append({"role": _SHAREGPT_ROLES[speaker], "content": said})
    return _conversation(record, messages, template)


def _alpaca(record: Record, template: ChatTemplate | None) -> Sample:
    instruction, output = _string(record, "instruction"), _string(record, "output")
    given = _string(record, "input") if record.fields.get("input") else ""
    if template is not None:
        asked = f"{instruction}\n\n{given}" if given else instruction
        messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": output}]
        return _conversation(record, messages, template)
    parts = {"Instruction": instruction, "Input": given, "Response": ""}
    prompt = "\n\n".join(f"### {name}:\n{part}" for name, part in parts.items() if part or name == "Response")
    return _answered(record, prompt, output)


def _answered(record: Record, prompt: str, completion: str) -> Sample:
    text = prompt + completion
    return Sample(text=text, supervised=((len(prompt), len(text)),), ends=True, whole=True, place=record.place)


def _conversation(record: Record, messages: Sequence[Message], template: ChatTemplate | None) -> Sample:
    if template is None:
        raise TrainingDataError(["messages need a chat template, and the base has none; give it with --chat-template"])
    rendered = template.render(messages)
    return Sample(text=rendered.text, supervised=rendered.supervised, ends=True, whole=True, place=record.place)


def _messages(value: object) -> list[Message]:
    messages: list[Message] = []
    for index, entry in enumerate(_list(value, "messages")):
        role, content = (entry.get("role"), entry.get("content")) if isinstance(entry, Mapping) else (None, None)
        if not isinstance(role, str) or not isinstance(content, str):
            raise TrainingDataError([f"messages[{index}] needs role and content, both texts"])
        messages.append({"role": role, "content": content})
    return messages


def _list(value: object, name: str) -> Sequence[object]:
    if not isinstance(value, list) or not value:
        raise TrainingDataError([f"{name} must be a list that is not empty, got {type(value).__name__}"])
    return value


def _string(record: Record, name: str) -> str:
    value = record.fields.get(name)
    if not isinstance(value, str):
        raise TrainingDataError([f"{name} must be text, got {type(value).__name__}"])
    return value


_SHAPES: Sequence[tuple[frozenset[str], Callable[[Record, ChatTemplate | None], Sample]]] = (
    (frozenset({"messages"}), _chat),
    (frozenset({"conversations"}), _sharegpt),
    (frozenset({"prompt", "completion"}), _prompt_and_completion),
    (frozenset({"instruction", "output"}), _alpaca),
    (frozenset({"text"}), _text),
)

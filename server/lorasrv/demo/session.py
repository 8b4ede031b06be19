"""The demo's conversation with the server: load adapters while it runs, ask everything at once, collect the answers.

It knows a server's address and folders of adapters; not who started the server, nor how answers are shown.
"""

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from lorasrv_client import AsyncClient
from lorasrv_client.types import Adapter, SamplingOptions

PROMPTS = (
    "The night",
    "Love is",
    "A friend of mine",
    "The people of this city",
)
"""Openings that leave the voice to whoever answers; each is asked of the base and of every adapter."""

SAMPLING: SamplingOptions = {"max_new_tokens": 48, "temperature": 0.6, "top_p": 0.95}
"""With the fixed seeds of the questions, the same answers on every run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Voice:
    """Who may answer.

    Attributes:
        adapter_id: Empty for the base.
        kind: `base`, or the adapter's method.
        ranks: Its smallest and largest rank; empty for the base.
    """

    adapter_id: str
    kind: str
    ranks: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """One request of the batch."""

    voice: Voice
    prompt: str
    seed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What one request brought; `ttft_seconds` is the time to the first token, measured here."""

    adapter_id: str
    kind: str
    ranks: tuple[int, ...]
    prompt: str
    text: str
    token_ids: tuple[int, ...]
    ttft_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """All answers, and the most adapters that the engine had in one step, by its own count."""

    answers: tuple[Answer, ...]
    max_adapters_in_one_step: int

    def as_json(self) -> dict[str, Any]:
        """The report as JSON's kinds of values."""
        return asdict(self)


class Display(Protocol):
    """Shows what happens while it happens; called on the event loop, so it must not block."""

    def adapter_loaded(self, voice: Voice, *, took_seconds: float) -> None:
        """An adapter can be asked from now on."""

    def asked(self, questions: Sequence[Question]) -> None:
        """These requests are sent, all together."""

    def text_came(self, index: int, text: str) -> None:
        """More text of the answer to question `index`."""

    def answered(self, index: int, answer: Answer) -> None:
        """Question `index` has its whole answer."""


async def converse(target: str, adapters: Mapping[str, Path], display: Display) -> Report:
    """Load the adapters, ask every prompt of the base and of each adapter in one batch, and report.

    Args:
        target: The server's `HOST:PORT`.
        adapters: The adapters' folders by id.
        display: Is told of everything.

    Raises:
        ClientError: A call failed.
    """
    async with AsyncClient(target) as client:
        voices = [Voice(adapter_id="", kind="base", ranks=())]
        for adapter_id, source in adapters.items():
            began = time.perf_counter()
            voices.append(_voice(await client.load_adapter(adapter_id, str(source))))
            display.adapter_loaded(voices[-1], took_seconds=time.perf_counter() - began)
        questions = [
            Question(voice=voice, prompt=prompt, seed=seed) for seed, prompt in enumerate(PROMPTS) for voice in voices
        ]
        display.asked(questions)
        answers = await asyncio.gather(
            *(_ask(client, index, question, display) for index, question in enumerate(questions))
        )
        server = await client.server_info()
    return Report(answers=tuple(answers), max_adapters_in_one_step=server.max_adapters_in_one_step)


def _voice(adapter: Adapter) -> Voice:
    return Voice(adapter_id=adapter.adapter_id, kind=adapter.kind, ranks=(adapter.min_rank, adapter.max_rank))


async def _ask(client: AsyncClient, index: int, question: Question, display: Display) -> Answer:
    began = time.perf_counter()
    ttft_seconds = 0.0
    voice = question.voice
    sampling: SamplingOptions = {**SAMPLING, "seed": question.seed}
    async with client.stream(question.prompt, adapter_id=voice.adapter_id, **sampling) as stream:
        async for chunk in stream:
            ttft_seconds = ttft_seconds or time.perf_counter() - began
            display.text_came(index, chunk.text)
        generation = await stream.result()
    answer = Answer(
        adapter_id=voice.adapter_id,
        kind=voice.kind,
        ranks=voice.ranks,
        prompt=question.prompt,
        text=generation.text,
        token_ids=generation.token_ids,
        ttft_seconds=ttft_seconds,
    )
    display.answered(index, answer)
    return answer

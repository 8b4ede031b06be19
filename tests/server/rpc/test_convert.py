"""Messages into values: defaults, limits, and the grammar of ids."""

import pytest
from lorasrv.engine.request import SamplingParams
from lorasrv.errors import InvalidRequestError, PromptTooLongError
from lorasrv.rpc.convert.adapter_ids import id_violations, reference_violations
from lorasrv.rpc.convert.generation import GenerationCall, RequestLimits, generation_call
from lorasrv_proto.v1.generation_pb2 import GenerateRequest

LIMITS = RequestLimits(max_model_len=16, vocab_size=32)
DEFAULTS = SamplingParams(max_new_tokens=8, temperature=0.7, top_k=40, top_p=0.9, ignore_eos=True)


def _call(**fields: object) -> GenerationCall:
    return generation_call(GenerateRequest(**fields), limits=LIMITS, defaults=DEFAULTS, seed=5)  # type: ignore[arg-type]


def test_what_is_not_set_takes_the_servers_default() -> None:
    assert _call(prompt="a").sampling == SamplingParams(
        max_new_tokens=8, temperature=0.7, top_k=40, top_p=0.9, ignore_eos=True, seed=5
    )


def test_a_zero_that_is_set_is_a_zero() -> None:
    sampling = _call(prompt="a", temperature=0, top_k=0, seed=0, ignore_eos=False, logprobs=0).sampling
    assert (sampling.temperature, sampling.top_k, sampling.seed, sampling.ignore_eos) == (0, 0, 0, False)
    assert sampling.logprobs == 0


def test_everything_set_arrives() -> None:
    call = _call(
        adapter_id="a@" + "0" * 12,
        token_ids=[0, 31],
        max_new_tokens=3,
        temperature=1.5,
        top_k=2,
        top_p=0.5,
        seed=2**64 - 1,
        stop=["x", "y"],
        stop_token_ids=[31],
        logprobs=4,
    )
    assert (call.adapter, call.prompt, call.caps_to_context) == ("a@" + "0" * 12, (0, 31), False)
    assert call.sampling == SamplingParams(
        max_new_tokens=3,
        temperature=1.5,
        top_k=2,
        top_p=0.5,
        seed=2**64 - 1,
        stop=("x", "y"),
        stop_token_ids=(31,),
        ignore_eos=True,
        logprobs=4,
    )


def test_an_empty_prompt_that_is_set_is_a_prompt() -> None:
    assert _call(prompt="").prompt == ""
    with pytest.raises(InvalidRequestError, match="neither"):
        _call()


def test_nan_is_no_temperature() -> None:
    with pytest.raises(InvalidRequestError, match="temperature"):
        _call(prompt="a", temperature=float("nan"))


@pytest.mark.parametrize(("num_prompt_tokens", "max_new_tokens"), [(1, 8), (8, 8), (9, 7), (15, 1)])
def test_the_default_length_gives_way_to_the_context(num_prompt_tokens: int, max_new_tokens: int) -> None:
    assert _call(prompt="a").fit(num_prompt_tokens, limits=LIMITS).max_new_tokens == max_new_tokens


def test_a_length_that_is_asked_for_must_fit() -> None:
    assert _call(prompt="a", max_new_tokens=6).fit(10, limits=LIMITS).max_new_tokens == 6
    with pytest.raises(PromptTooLongError) as caught:
        _call(prompt="a", max_new_tokens=7).fit(10, limits=LIMITS)
    assert (caught.value.num_prompt_tokens, caught.value.max_new_tokens, caught.value.limit_tokens) == (10, 7, 16)
    with pytest.raises(PromptTooLongError):
        _call(prompt="a").fit(16, limits=LIMITS)
    with pytest.raises(InvalidRequestError, match="at least one token"):
        _call(prompt="").fit(0, limits=LIMITS)


@pytest.mark.parametrize("good", ["a", "A.b_c-1", "org/team/poet/v2", "a" * 63, "1"])
def test_ids_that_are_fine(good: str) -> None:
    assert not list(id_violations(good))
    assert not list(reference_violations(f"{good}@{'0f' * 6}"))


@pytest.mark.parametrize(
    "bad",
    [
        "/a",
        "a/",
        "a//b",
        "../a",
        ".a",
        "a,b",
        "a b",
        "a\n",
        "é",
        "a/b/c/d/e",
        "a" * 64,
        "a@b",
        "-a",
        "a..b",
        "a/" * 3 + "/x",
    ],
)
def test_ids_that_are_not(bad: str) -> None:
    assert list(id_violations(bad))
    assert list(reference_violations(bad + "@" + "0f" * 6))


def test_an_id_has_at_most_128_bytes() -> None:
    assert not list(id_violations("/".join(["a" * 42] * 3)[:128]))
    assert list(id_violations("/".join(["a" * 43] * 3)))


@pytest.mark.parametrize("digest", ["", "0" * 11, "0" * 65, "A" * 12, "g" * 12])
def test_a_version_is_12_to_64_hex_digits(digest: str) -> None:
    assert list(reference_violations(f"a@{digest}"))


def test_the_base_has_no_name() -> None:
    assert not list(reference_violations(""))
    assert list(id_violations(""))
    assert list(reference_violations("@" + "0" * 12))

"""The sampler: the generator's known answers, exact picks, and rows that know nothing of each other."""

import math

import pytest
import torch
from lorasrv.engine.request import SampledToken, SamplingParams
from lorasrv.engine.sampler import philox_4x32_10, philox_uniform, sample
from torch import Tensor

GREEDY = SamplingParams(temperature=0.0)
ALL = 0xFFFFFFFF


def logits_of(*probabilities: float) -> Tensor:
    return torch.tensor([probabilities]).log()


def uniforms(count: int, seed: int = 5) -> list[float]:
    return [philox_uniform(seed, position) for position in range(count)]


def pick(logits: Tensor, params: SamplingParams, count: int) -> list[int]:
    return [sample(logits, [params], [position])[0].token_id for position in range(count)]


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((ALL, ALL, ALL, ALL), (ALL, ALL), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_known_answers_of_random123(
    counter: tuple[int, int, int, int], key: tuple[int, int], expected: tuple[int, int, int, int]
) -> None:
    assert philox_4x32_10(counter, key) == expected


def test_the_uniform_uses_all_64_bits_of_the_seed_and_the_position() -> None:
    assert philox_uniform(0, 0) == 0x6627E8D5 / 2**32
    assert len({philox_uniform(1 << bit, 0) for bit in range(64)}) == 64
    assert len({philox_uniform(0, position) for position in range(1000)}) == 1000


def test_greedy_takes_the_highest_and_on_ties_the_lower_id() -> None:
    logits = torch.tensor([[0.0, 2.0, 2.0, 1.0], [3.0, 3.0, 3.0, 3.0], [-1.0, -2.0, -3.0, -0.5]])
    assert [token.token_id for token in sample(logits, [GREEDY] * 3, [0, 0, 0])] == [1, 0, 3]


def test_the_pick_is_the_inverse_of_the_cumulative_distribution() -> None:
    picked = pick(logits_of(0.2, 0.5, 0.3), SamplingParams(seed=5), 200)
    assert picked == [0 if u < 0.2 else 1 if u < 0.7 else 2 for u in uniforms(200)]
    assert set(picked) == {0, 1, 2}


def test_temperature_sharpens_before_the_pick() -> None:
    # at temperature 1/2 the probabilities are squared: 1, 4, 4 over 9
    picked = pick(logits_of(0.2, 0.4, 0.4), SamplingParams(seed=5, temperature=0.5), 200)
    assert picked == [0 if u < 1 / 9 else 1 if u < 5 / 9 else 2 for u in uniforms(200)]


def test_a_tiny_temperature_is_greedy() -> None:
    assert set(pick(torch.tensor([[1e4, -1e4, 1.0001e4]]), SamplingParams(seed=5, temperature=1e-310), 20)) == {2}


def test_top_k_keeps_the_k_most_probable_and_on_ties_the_lower_ids() -> None:
    picked = pick(logits_of(0.1, 0.2, 0.1, 0.2, 0.4), SamplingParams(seed=5, top_k=2), 200)
    assert picked == [1 if u < 1 / 3 else 4 for u in uniforms(200)]


def test_top_p_keeps_the_smallest_set_that_reaches_it_and_on_ties_the_lower_ids() -> None:
    picked = pick(logits_of(0.05, 0.25, 0.25, 0.45), SamplingParams(seed=5, top_p=0.6), 200)
    assert picked == [1 if u < 0.25 / 0.7 else 3 for u in uniforms(200)]


def test_top_p_counts_among_what_top_k_kept() -> None:
    # of 0.4, 0.3 top_k leaves 4/7 and 3/7, and the first alone reaches 0.5
    picked = pick(logits_of(0.4, 0.3, 0.2, 0.1), SamplingParams(seed=5, top_k=2, top_p=0.5), 50)
    assert set(picked) == {0}


def test_a_tiny_top_p_leaves_the_most_probable() -> None:
    assert set(pick(logits_of(0.2, 0.5, 0.3), SamplingParams(seed=5, top_p=1e-9), 20)) == {1}


def test_truncation_that_removes_nothing_changes_nothing() -> None:
    logits = torch.randn(1, 300, generator=torch.Generator().manual_seed(1))
    plain = pick(logits, SamplingParams(seed=9), 60)
    assert pick(logits, SamplingParams(seed=9, top_k=300), 60) == plain
    assert pick(logits, SamplingParams(seed=9, top_k=1000), 60) == plain


def test_logprobs_are_of_the_unmodified_distribution() -> None:
    params = SamplingParams(seed=5, temperature=0.1, top_k=1, logprobs=3)
    [token] = sample(logits_of(0.1, 0.2, 0.3, 0.2, 0.2), [params], [0])
    assert token.token_id == 2
    assert token.logprob == pytest.approx(math.log(0.3), abs=1e-6)
    assert [token_id for token_id, _ in token.top] == [2, 1, 3]
    assert [value for _, value in token.top] == pytest.approx([math.log(p) for p in (0.3, 0.2, 0.2)], abs=1e-6)


def test_logprobs_only_where_asked_and_zero_means_the_chosen_alone() -> None:
    logits = logits_of(0.5, 0.5).repeat(3, 1)
    none, zero, many = sample(
        logits,
        [GREEDY, SamplingParams(temperature=0.0, logprobs=0), SamplingParams(temperature=0.0, logprobs=9)],
        [0] * 3,
    )
    assert (none.logprob, none.top) == (None, ())
    assert zero.logprob == pytest.approx(math.log(0.5))
    assert zero.top == ()
    assert [token_id for token_id, _ in many.top] == [0, 1]


@pytest.mark.parametrize("vocabulary", [1, 63, 4096])
def test_a_row_is_the_same_alone_and_among_others(vocabulary: int) -> None:
    logits = torch.randn(17, vocabulary, generator=torch.Generator().manual_seed(3)) * 4
    params = [
        SamplingParams(
            temperature=(0.0, 0.7, 1.3)[i % 3],
            top_k=(0, 5)[i % 2],
            top_p=(1.0, 0.8, 0.3)[i // 2 % 3],
            seed=i,
            logprobs=(None, 4)[i % 2],
        )
        for i in range(17)
    ]
    together = sample(logits, params, list(range(17)))
    for i in range(17):
        assert sample(logits[i : i + 1], params[i : i + 1], [i]) == [together[i]]


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_non_finite_logits_are_the_affair_of_their_row(wrong: float, temperature: float) -> None:
    logits = torch.zeros(3, 8)
    logits[1, 4] = wrong
    params = SamplingParams(temperature=temperature, seed=2, logprobs=2)
    tokens = sample(logits, [params] * 3, [0, 0, 0])
    assert [token.is_finite for token in tokens] == [True, False, True]
    assert tokens[0] == tokens[2] == sample(torch.zeros(1, 8), [params], [0])[0]


def test_no_rows_no_tokens() -> None:
    assert sample(torch.empty(0, 8), [], []) == []


def test_a_token_that_was_chosen_has_a_probability() -> None:
    # the mass of what cannot be represented is zero: it must never be picked, whatever the uniform
    logits = torch.full((1, 1000), -500.0)
    logits[0, 500] = 500.0
    assert set(pick(logits, SamplingParams(seed=1), 50)) == {500}
    assert SampledToken(token_id=500) == sample(logits, [SamplingParams(seed=1)], [0])[0]

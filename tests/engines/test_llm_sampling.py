"""What bends the choice of a token, against the definitions, and the fast paths against the slow."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from enginesmith.triton.models.llm_onnxruntime.llm_sampling import (
    Generation,
    Sampling,
    choose_token,
    log_probability,
)


def chosen(logits: list[float], *, prompt: list[int], tokens: list[int], sampling: Sampling) -> int:
    sequence = Generation(prompt, sampling, tokens=tokens)
    return choose_token(np.array(logits, np.float32), sequence)


def test_presence_penalty_is_taken_once_and_frequency_penalty_each_time() -> None:
    logits = [5.0, 4.5, 3.0]
    for tokens, presence, frequency, expected in (
        ([0], 0.4, 0.0, 0),
        ([0], 0.6, 0.0, 1),
        ([0, 0, 0], 0.4, 0.0, 0),
        ([0], 0.0, 0.4, 0),
        ([0, 0], 0.0, 0.4, 1),
        ([0, 0, 1, 1, 1], 0.0, 0.8, 0),
    ):
        sampling = Sampling(presence_penalty=presence, frequency_penalty=frequency)
        assert chosen(logits, prompt=[2], tokens=tokens, sampling=sampling) == expected


def test_prompt_has_no_part_in_presence_and_frequency_penalties() -> None:
    sampling = Sampling(presence_penalty=9.0, frequency_penalty=9.0)
    assert chosen([5.0, 4.5], prompt=[0, 0, 0], tokens=[], sampling=sampling) == 0


def test_penalties_follow_a_sequence_as_it_grows() -> None:
    sequence = Generation([2], Sampling(frequency_penalty=0.3))
    logits = np.array([1.0, 0.5, 0.0], np.float32)
    for _ in range(7):
        sequence.tokens.append(choose_token(logits, sequence))
    assert sequence.tokens == [0, 0, 1, 0, 1, 0, 2]


def test_end_tokens_wait_for_min_tokens() -> None:
    sampling = Sampling(min_tokens=2, end_ids=frozenset({0, 1}))
    logits = [9.0, 8.0, 1.0]
    assert chosen(logits, prompt=[2], tokens=[], sampling=sampling) == 2
    assert chosen(logits, prompt=[2], tokens=[2], sampling=sampling) == 2
    assert chosen(logits, prompt=[2], tokens=[2, 2], sampling=sampling) == 0


def test_bad_word_is_kept_from_its_last_token() -> None:
    sampling = Sampling(bad_words=((0, 1), (2,)))
    logits = [1.0, 5.0, 9.0, 0.0]
    assert chosen(logits, prompt=[3], tokens=[3], sampling=sampling) == 1
    assert chosen(logits, prompt=[3], tokens=[0], sampling=sampling) == 0
    assert chosen(logits, prompt=[0], tokens=[], sampling=sampling) == 0


def test_longer_bad_word_than_the_text_bans_nothing() -> None:
    assert chosen([1.0, 5.0], prompt=[0], tokens=[], sampling=Sampling(bad_words=((0, 0, 0, 1),))) == 1


def test_log_probability_is_that_of_the_softmax() -> None:
    logits = np.array([1.0, 2.0, 500.0, 499.0], np.float32)
    exact = np.log(np.exp(logits.astype(np.float64) - 500) / np.exp(logits.astype(np.float64) - 500).sum())
    for token in (2, 3):
        assert log_probability(logits, token) == pytest.approx(exact[token], abs=1e-6)


@given(st.integers(0, 2**31), st.integers(1, 300), st.integers(65, 5000))
def test_top_k_draws_from_the_k_largest(seed: int, top_k: int, vocabulary: int) -> None:
    logits = np.random.default_rng(seed).standard_normal(vocabulary).astype(np.float32)
    sequence = Generation([0], Sampling(temperature=50.0, top_k=top_k, seed=seed))
    allowed = set(np.argsort(-logits)[:top_k].tolist())
    assert {choose_token(logits, sequence) for _ in range(20)} <= allowed


@given(st.integers(0, 2**31), st.floats(0.01, 0.99))
def test_top_p_draws_from_the_smallest_nucleus(seed: int, top_p: float) -> None:
    logits = np.random.default_rng(seed).standard_normal(2000).astype(np.float32)
    sequence = Generation([0], Sampling(temperature=1.0, top_p=top_p, seed=seed))
    order = np.argsort(-logits)
    shares = np.exp(logits[order].astype(np.float64))
    size = int(np.searchsorted(np.cumsum(shares) / shares.sum(), top_p + 1e-5)) + 1
    assert {choose_token(logits, sequence) for _ in range(20)} <= set(order[:size].tolist())


def test_whole_vocabulary_is_drawn_by_its_probabilities() -> None:
    logits = np.full(200, -np.inf, np.float32)
    for token, share in ((0, 0.2), (63, 0.1), (64, 0.3), (190, 0.25), (199, 0.15)):
        logits[token] = np.log(share)
    sequence = Generation([0], Sampling(temperature=1.0, seed=2))
    counts = Counter(choose_token(logits, sequence) for _ in range(8000))
    expected = {0: 0.2, 63: 0.1, 64: 0.3, 190: 0.25, 199: 0.15}
    assert counts.keys() == expected.keys()
    assert max(abs(counts[token] / 8000 - share) for token, share in expected.items()) < 0.02


@pytest.mark.parametrize("temperature", [1e-30, 1e-9, 1e-3])
def test_lowest_temperatures_are_greedy(temperature: float) -> None:
    logits = np.array([0.0, 80.0, 79.0, -90.0], np.float32)
    sequence = Generation([0], Sampling(temperature=temperature))
    assert {choose_token(logits, sequence) for _ in range(50)} == {1}

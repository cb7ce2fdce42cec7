"""Agreement: what each figure says, and that no NaN hides."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from enginesmith.graphs.agreement import agreement, spearman

RANDOM = np.random.default_rng(0)
ROWS = RANDOM.normal(size=(8, 5)).astype(np.float32)


def test_equal_outputs_agree_fully() -> None:
    assert agreement({"embedding": ROWS}, {"embedding": ROWS}, task="embedding") == {
        "mean_cosine": pytest.approx(1),
        "min_cosine": pytest.approx(1),
        "max_abs_delta": 0,
        "relative_error": 0,
    }


def test_the_worst_sample_is_seen_beside_the_mean() -> None:
    seen = ROWS.copy()
    seen[3] = -seen[3]
    figures = agreement({"embedding": ROWS}, {"embedding": seen}, task="embedding")
    assert figures["min_cosine"] == pytest.approx(-1)
    assert figures["mean_cosine"] == pytest.approx((7 - 1) / 8)


def test_cosine_ignores_scale_and_relative_error_does_not() -> None:
    figures = agreement({"embedding": ROWS}, {"embedding": 2 * ROWS}, task="embedding")
    assert figures["min_cosine"] == pytest.approx(1)
    assert figures["relative_error"] == pytest.approx(1)


def test_differences_are_over_all_outputs_and_cosine_over_the_first() -> None:
    reference = {"embedding": ROWS, "extra": np.ones((8, 1), np.float32)}
    seen = {"extra": np.full((8, 1), 3, np.float32), "embedding": ROWS}
    figures = agreement(reference, seen, task="embedding")
    assert figures["mean_cosine"] == pytest.approx(1)
    assert figures["max_abs_delta"] == 2


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_one_value_that_is_not_finite_shows_in_every_figure(bad: float) -> None:
    seen = ROWS.copy()
    seen[6, 2] = bad
    figures = agreement({"logits": ROWS}, {"logits": seen}, task="classification")
    assert [name for name, value in figures.items() if math.isfinite(value)] == []


def test_a_vector_of_zeros_agrees_with_zeros_only() -> None:
    zeros = np.zeros((2, 3), np.float32)
    assert agreement({"e": zeros}, {"e": zeros}, task="embedding")["min_cosine"] == 1
    half = zeros.copy()
    half[1] = 1
    assert agreement({"e": zeros}, {"e": half}, task="embedding")["min_cosine"] == 0


def test_batches_of_different_lengths_count_each_sample() -> None:
    long, short = RANDOM.normal(size=(2, 4, 3)), RANDOM.normal(size=(1, 2, 3))
    figures = agreement({"states": [long, short]}, {"states": [long, -short]}, task="tensors")
    assert figures["mean_cosine"] == pytest.approx(1 / 3)


def test_classes_agree_where_the_highest_is_the_same() -> None:
    reference = np.array([[0.1, 0.9], [0.8, 0.2], [0.3, 0.7], [0.6, 0.4]])
    seen = np.array([[0.4, 0.6], [0.1, 0.9], [0.2, 0.8], [0.9, 0.1]])
    figures = agreement({"logits": reference}, {"logits": seen}, task="classification")
    assert figures["top1_agreement"] == 0.75


@pytest.mark.parametrize(("output", "expected"), [("logits", 0.5), ("probabilities", 0.75)])
def test_one_class_agrees_where_the_decision_is_the_same(output: str, expected: float) -> None:
    reference, seen = np.array([[0.9], [0.4], [0.6], [-0.1]]), np.array([[0.8], [-0.2], [-0.4], [-0.3]])
    reference, seen = (np.abs(side) if output == "probabilities" else side for side in (reference, seen))
    figures = agreement({output: reference}, {output: seen}, task="classification")
    assert figures["top1_agreement"] == expected


def test_scores_of_one_number_are_compared_over_all_samples() -> None:
    reference = np.array([[1.0], [2.0], [3.0]])
    figures = agreement({"score": reference}, {"score": reference[::-1]}, task="reranking")
    assert figures["mean_cosine"] == pytest.approx(10 / 14)
    assert figures["rank_correlation"] == pytest.approx(-1)


def test_equal_scores_share_their_rank() -> None:
    assert spearman(np.array([1, 2, 2, 3]), np.array([10, 20, 20, 30])) == pytest.approx(1)
    assert spearman(np.array([1, 2, 2, 3]), np.array([1, 3, 2, 4])) == pytest.approx(np.sqrt(0.9))
    assert math.isnan(spearman(np.ones(3), np.arange(3)))


@given(st.lists(st.integers(-50, 50), min_size=2, max_size=20, unique=True))
def test_rank_correlation_sees_order_only(values: list[int]) -> None:
    scores = np.array(values, np.float64)
    assert spearman(scores, np.exp(scores / 20)) == pytest.approx(1)
    assert spearman(scores, -scores) == pytest.approx(-1)

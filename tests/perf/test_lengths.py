"""Lengths drawn from the distributions of a profile."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from enginesmith_client.perf._profile import (
    EmpiricalLength,
    FixedLength,
    Length,
    LognormalLength,
    NormalLength,
    UniformLength,
)
from enginesmith_client.perf.workload._lengths import capped, longest, sample

_TOKENS = st.integers(1, 5000)
_BOUNDS = st.tuples(_TOKENS, _TOKENS).map(sorted)
LENGTHS = st.one_of(
    st.builds(FixedLength, tokens=_TOKENS),
    _BOUNDS.map(lambda both: UniformLength(kind="uniform", low=both[0], high=both[1])),
    st.builds(
        lambda both, mean, stdev: NormalLength(
            kind="normal", mean=mean, stdev=stdev, low=both[0], high=both[1]
        ),
        _BOUNDS,
        st.floats(0.1, 1e4),
        st.floats(0, 1e4),
    ),
    st.builds(
        lambda low, median, sigma: LognormalLength(kind="lognormal", median=median, sigma=sigma, low=low),
        _TOKENS,
        st.floats(0.1, 1e4),
        st.floats(0.01, 200),
    ),
    st.lists(_TOKENS, min_size=1, max_size=9).map(
        lambda all_: EmpiricalLength(kind="empirical", tokens=all_)
    ),
)


def drawn(length: Length, count: int = 64, seed: int = 0) -> list[int]:
    return sample(length, np.random.default_rng(seed), count)


@settings(max_examples=40)
@given(LENGTHS)
def test_lengths_are_whole_numbers_within_their_bounds(length: Length) -> None:
    lengths = drawn(length)
    assert len(lengths) == 64
    assert all(
        type(one) is int and getattr(length, "low", 1) <= one <= (longest(length) or 2**31) for one in lengths
    )


@settings(max_examples=40)
@given(LENGTHS, st.integers(0, 2**32))
def test_a_seed_always_draws_the_same(length: Length, seed: int) -> None:
    assert drawn(length, seed=seed) == drawn(length, seed=seed)


@settings(max_examples=40)
@given(LENGTHS, _TOKENS)
def test_a_capped_distribution_is_the_same_up_to_the_cap(length: Length, most: int) -> None:
    lower = capped(length, most)
    bound = longest(lower)
    assert bound is not None
    assert bound <= most
    assert all(one <= most for one in drawn(lower))
    if max(drawn(length)) <= most and not isinstance(length, UniformLength):
        assert drawn(lower) == drawn(length)


def test_distributions_have_the_middle_and_the_width_that_they_name() -> None:
    normal = drawn(NormalLength(kind="normal", mean=500, stdev=50), 20_000)
    assert np.mean(normal) == pytest.approx(500, abs=2)
    assert np.std(normal) == pytest.approx(50, abs=2)
    lognormal = np.log(drawn(LognormalLength(kind="lognormal", median=1000, sigma=0.5), 20_000))
    assert np.median(lognormal) == pytest.approx(np.log(1000), abs=0.02)
    assert np.std(lognormal) == pytest.approx(0.5, abs=0.02)
    uniform = drawn(UniformLength(kind="uniform", low=3, high=6), 4_000)
    assert sorted(set(uniform)) == [3, 4, 5, 6]
    assert set(drawn(EmpiricalLength(kind="empirical", tokens=(7, 9)))) == {7, 9}
    assert set(drawn(FixedLength(tokens=5))) == {5}


def test_bounds_in_the_wrong_order_are_refused() -> None:
    with pytest.raises(ValidationError, match="low must not be above high; seen: low 9, high 8"):
        NormalLength(kind="normal", mean=8, stdev=1, low=9, high=8)

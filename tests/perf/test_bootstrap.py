"""Intervals against cases whose answer is known without any resampling."""

import math

import numpy as np
import pytest

from enginesmith_client.perf.compare._bootstrap import (
    SLICES,
    BlockRatio,
    PairedRatio,
    Series,
    TwoSampleRatio,
    _weighted_quantiles,
)

T_975_WITH_29 = 2.0452
"""Student's t: 97.5% quantile at 29 degrees of freedom, from tables."""
Z_975 = 1.95996


def rounds(count: int, *, spread: float, shift: float = 0.0, seed: int = 0) -> np.ndarray:
    return np.exp(np.random.default_rng(seed).normal(shift, spread, count))


def test_paired_interval_of_normal_rounds_is_students_interval() -> None:
    logs = np.log(rounds(30, spread=0.03, shift=0.05, seed=3))
    found = PairedRatio(np.ones(30), np.exp(logs), seed=1, resamples=20_000).interval(0.95)
    half = T_975_WITH_29 * logs.std(ddof=1) / math.sqrt(30)
    assert found.estimate == pytest.approx(logs.mean())
    assert found.high - found.estimate == pytest.approx(half, rel=0.06)
    assert found.estimate - found.low == pytest.approx(found.high - found.estimate)


def test_paired_interval_ignores_what_both_sides_of_a_round_share() -> None:
    drift = np.exp(np.linspace(0, 1, 12))
    noise = rounds(12, spread=0.01)
    alone = PairedRatio(np.ones(12), noise, seed=1, resamples=2000).interval(0.95)
    drifting = PairedRatio(drift, drift * noise, seed=1, resamples=2000).interval(0.95)
    assert drifting.low == pytest.approx(alone.low)
    assert drifting.high == pytest.approx(alone.high)


@pytest.mark.parametrize("heavy", [False, True])
def test_paired_interval_of_twelve_rounds_misses_the_truth_no_more_often_than_it_says(heavy: bool) -> None:
    rng = np.random.default_rng(11)
    trials, missed = 1200, 0
    for trial in range(trials):
        noise = rng.normal(0, 0.02, 12)
        if heavy:
            noise = np.where(rng.random(12) < 0.15, rng.normal(0, 0.1, 12), noise)
        found = PairedRatio(np.ones(12), np.exp(noise), seed=trial, resamples=1000).interval(0.95)
        missed += not found.low <= 0 <= found.high
    # Three standard deviations of a binomial count of 5%; a percentile interval misses 8% and fails here.
    assert missed / trials < 0.05 + 3 * math.sqrt(0.05 * 0.95 / trials)


def test_a_percentile_interval_of_twelve_rounds_would_miss_more_often_than_it_says() -> None:
    rng = np.random.default_rng(11)
    trials, missed = 1200, 0
    for _ in range(trials):
        noise = rng.normal(0, 0.02, 12)
        low, high = np.quantile(noise[rng.integers(0, 12, (1000, 12))].mean(axis=1), [0.025, 0.975])
        missed += not low <= 0 <= high
    assert missed / trials > 0.05 + 3 * math.sqrt(0.05 * 0.95 / trials)


def test_two_sample_interval_of_large_samples_is_the_normal_one() -> None:
    a, b = rounds(60, spread=0.02, seed=1), rounds(40, spread=0.05, shift=0.1, seed=2)
    found = TwoSampleRatio(a, b, seed=1, resamples=20_000).interval(0.95)
    error = math.sqrt(np.log(a).var(ddof=1) / 60 + np.log(b).var(ddof=1) / 40)
    assert found.estimate == pytest.approx(np.log(b).mean() - np.log(a).mean())
    assert found.high - found.estimate == pytest.approx(Z_975 * error, rel=0.08)


def test_the_same_seed_gives_the_same_interval_and_another_seed_nearly_the_same() -> None:
    b = rounds(12, spread=0.02)
    first, again, other = (
        PairedRatio(np.ones(12), b, seed=seed, resamples=10_000).interval(0.95) for seed in (1, 1, 2)
    )
    assert first == again
    assert other.low != first.low
    assert other.high - other.low == pytest.approx(first.high - first.low, rel=0.05)


def test_exchanged_sides_give_the_mirrored_interval() -> None:
    a, b = rounds(12, spread=0.02, seed=1), rounds(12, spread=0.02, shift=0.04, seed=2)
    one = PairedRatio(a, b, seed=1, resamples=2000).interval(0.95)
    other = PairedRatio(b, a, seed=1, resamples=2000).interval(0.95)
    assert (one.low, one.high) == pytest.approx((-other.high, -other.low))


def test_rounds_without_any_noise_have_an_interval_without_width() -> None:
    found = PairedRatio([10.0] * 8, [11.0] * 8, seed=1, resamples=2000).interval(0.99)
    assert (found.low, found.high) == pytest.approx((math.log(1.1), math.log(1.1)))


def test_rounds_that_are_the_same_but_for_one_have_a_finite_interval_that_holds_no_difference() -> None:
    found = PairedRatio(np.ones(12), [1.0] * 11 + [1.1], seed=1, resamples=2000).interval(0.95)
    assert math.isfinite(found.high)
    assert found.low < 0 < found.high


def test_more_confidence_is_a_wider_interval() -> None:
    paired = PairedRatio(np.ones(12), rounds(12, spread=0.02), seed=1, resamples=5000)
    widths = [found.high - found.low for found in map(paired.interval, (0.9, 0.95, 0.99))]
    assert widths == sorted(widths)
    assert widths[0] < widths[2]


def test_one_pair_has_no_interval() -> None:
    with pytest.raises(ValueError, match="at least 2 pairs; seen: 1"):
        PairedRatio([1.0], [1.0], seed=1, resamples=1000)


def independent(count: int, *, seed: int) -> Series:
    """Exponential values at random times, each independent of the others."""
    rng = np.random.default_rng(seed)
    return Series(rng.random(count), rng.exponential(1.0, count))


def test_block_interval_of_a_median_of_independent_values_is_the_textbook_one() -> None:
    # The median of n exponential values: log(median) has the standard error 1 / (sqrt(n) log 2).
    a, b = independent(4000, seed=1), independent(4000, seed=2)
    found = BlockRatio(a, b, quantile=0.5, seed=1, resamples=2000).interval(0.95)
    half = Z_975 * math.sqrt(2 / 4000) / math.log(2)
    assert found.high - found.estimate == pytest.approx(half, rel=0.25)
    assert found.estimate == pytest.approx(math.log(np.median(b.values) / np.median(a.values)), abs=1e-3)


def test_block_interval_of_a_poisson_count_is_the_textbook_one() -> None:
    # log(count) of a Poisson process has the standard error 1 / sqrt(n).
    halves = []
    for seed in range(10):
        rng = np.random.default_rng(seed)
        a, b = (Series(rng.random(3000), np.ones(3000)) for _ in range(2))
        found = BlockRatio(a, b, quantile=None, seed=seed, resamples=1000).interval(0.95)
        halves.append(found.high - found.estimate)
    assert np.mean(halves) == pytest.approx(Z_975 * math.sqrt(2 / 3000), rel=0.15)


def test_block_interval_knows_that_neighbours_in_time_are_slow_together() -> None:
    rng = np.random.default_rng(5)
    noise = rng.normal(0, 0.1, (2, 4000))
    level = np.zeros((2, 4000))
    for step in range(1, 4000):
        level[:, step] = 0.95 * level[:, step - 1] + noise[:, step]
    at = np.linspace(0, 1, 4000, endpoint=False)
    together = [Series(at, np.exp(values)) for values in level]
    apart = [Series(at, rng.permutation(np.exp(values))) for values in level]
    widths = [
        found.high - found.low
        for found in (
            BlockRatio(*pair, quantile=0.5, seed=1, resamples=1000).interval(0.95)
            for pair in (together, apart)
        )
    ]
    # Theory for a mean: sqrt((1 + 0.95) / (1 - 0.95)) = 6.2 times as wide; blocks of a finite length see most of it.
    assert widths[0] > 3 * widths[1]


@pytest.mark.parametrize("count", [1, 7, 999, 1000, 1001, 5003])
@pytest.mark.parametrize("quantile", [0.01, 0.5, 0.99, 1.0])
def test_weighted_quantiles_are_those_of_values_that_are_written_out(count: int, quantile: float) -> None:
    rng = np.random.default_rng(count)
    ordered, slices = np.sort(rng.random(count)), rng.integers(0, SLICES, count)
    weights = rng.integers(1, 4, (5, SLICES)).astype(float)
    found = _weighted_quantiles(ordered, slices, weights, quantile)
    for row, value in zip(weights, found, strict=True):
        written_out = np.repeat(ordered, row[slices].astype(int))
        assert value == written_out[math.ceil(quantile * len(written_out)) - 1]


def test_a_run_of_a_few_bursts_has_a_wide_interval_and_not_an_endless_one() -> None:
    bursts = Series(np.repeat([0.1, 0.5, 0.9], 16), np.full(48, 1.0))
    found = BlockRatio(bursts, bursts, quantile=None, seed=1, resamples=2000).interval(0.95)
    assert 0.5 < math.exp(found.low) * math.exp(found.high) < 2
    assert 2 < math.exp(found.high) < 1e4


def test_runs_without_values_are_refused() -> None:
    nothing = Series(np.array([]), np.array([]))
    with pytest.raises(ValueError, match="nothing to compare"):
        BlockRatio(nothing, nothing, quantile=0.5, seed=1, resamples=1000)

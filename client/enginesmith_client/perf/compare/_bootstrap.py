"""Confidence intervals by resampling, from numbers alone. All of them are of the logarithm of a ratio, B over A.

Knows nothing of runs or metrics. Three situations, three estimators with the same two members (``Estimator``):

- ``PairedRatio``: values of rounds in which A and B were measured side by side.
- ``TwoSampleRatio``: values of several runs of A and several runs of B, not paired.
- ``BlockRatio``: the records of one run of each, which depend on their neighbours in time.

The first two are studentized (bootstrap-t) and symmetric: with the 8 to 20 values that a comparison has, percentile and
BCa intervals are too narrow, because they know nothing of the doubt about the spread itself. Sources: Efron and
Tibshirani, An Introduction to the Bootstrap (1993), chapters 12 and 14; Hall, On symmetric bootstrap confidence
intervals (1988); Kunsch (1989) for moving blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

Floats: TypeAlias = NDArray[np.float64]

SLICES = 200
"""Parts of equal length into which the window of a saved run is cut."""
BLOCK_SLICES = 10
"""Consecutive slices that are drawn together: 20 blocks make a window."""
_LEAST_SPREAD = 0.1
_LEAST_DRAWN = 1e-3
_STRETCHES = 1000


@dataclass(frozen=True)
class Interval:
    """Of the logarithm of a ratio."""

    estimate: float
    low: float
    high: float
    confidence: float


class Estimator(Protocol):
    """A logarithm of a ratio that was resampled once; intervals of any confidence come from the same resamples."""

    @property
    def estimate(self) -> float:
        """The logarithm of B / A."""

    def interval(self, confidence: float) -> Interval:
        """Two-sided and equally doubtful on both sides."""


class PairedRatio:
    """The mean of ``log(b / a)`` over rounds.

    Args:
        a, b: positive, of the same length of at least 2.
        seed, resamples: of the bootstrap; the same seed gives the same interval.
    """

    def __init__(self, a: Sequence[float], b: Sequence[float], *, seed: int, resamples: int) -> None:
        logs = np.log(np.asarray(b, float)) - np.log(np.asarray(a, float))
        if len(logs) < 2:
            raise ValueError(f"an interval needs at least 2 pairs; seen: {len(logs)}")
        drawn = _drawn(logs, np.random.default_rng(seed), resamples)
        self.estimate = float(logs.mean())
        self._error = float(np.sqrt(_variance_of_mean(logs)))
        self._pivots = _pivots(
            drawn.mean(axis=1) - self.estimate, _variance_of_mean(drawn), error=self._error
        )

    def interval(self, confidence: float) -> Interval:
        """Symmetric around the estimate."""
        return _symmetric(self.estimate, self._error, self._pivots, confidence)


class TwoSampleRatio:
    """The difference of the means of ``log(b)`` and ``log(a)``; the two samples may differ in length and spread.

    Args:
        a, b: positive, at least 2 each.
        seed, resamples: of the bootstrap.
    """

    def __init__(self, a: Sequence[float], b: Sequence[float], *, seed: int, resamples: int) -> None:
        logs = [np.log(np.asarray(values, float)) for values in (a, b)]
        if min(len(values) for values in logs) < 2:
            raise ValueError("an interval needs at least 2 values of each")
        rng = np.random.default_rng(seed)
        drawn = [_drawn(values, rng, resamples) for values in logs]
        self.estimate = float(logs[1].mean() - logs[0].mean())
        self._error = float(np.sqrt(sum(_variance_of_mean(values) for values in logs)))
        moved = drawn[1].mean(axis=1) - drawn[0].mean(axis=1) - self.estimate
        variances = _variance_of_mean(drawn[0]) + _variance_of_mean(drawn[1])
        self._pivots = _pivots(moved, variances, error=self._error)

    def interval(self, confidence: float) -> Interval:
        """Symmetric around the estimate."""
        return _symmetric(self.estimate, self._error, self._pivots, confidence)


@dataclass(frozen=True)
class Series:
    """What one run observed within its window: a value each, and when.

    ``at`` is in [0, 1): the fraction of the window that had passed.
    """

    at: Floats
    values: Floats


class BlockRatio:
    """The ratio of a sum or of a quantile of two runs, by the moving-block bootstrap over time.

    Requests that are near in time are slow together (a batch, a queue, a neighbour on the machine), so single requests
    must not be drawn: whole stretches of the window are. What differs from one run to the next, and not within a
    run, no resampling of one run can show; the caller says so.

    Args:
        a, b: the two runs.
        quantile: of the values, the nearest rank; None: the sum of the values in a window.
        seed, resamples: of the bootstrap.

    Raises:
        ValueError: a statistic is not positive: a run without values, or whose sum is 0.
    """

    def __init__(self, a: Series, b: Series, *, quantile: float | None, seed: int, resamples: int) -> None:
        rng = np.random.default_rng(seed)
        logs = []
        estimates = []
        for series in (a, b):
            whole = float(_statistics(series, np.ones((1, SLICES)), quantile)[0])
            if not whole > 0:
                raise ValueError("there is nothing to compare: a run has no positive value")
            drawn = _statistics(series, _block_weights(rng, resamples), quantile)
            estimates.append(np.log(whole))
            # The drawn blocks of a run of a few bursts may hold no answer at all, which has no logarithm.
            logs.append(np.log(np.maximum(drawn, _LEAST_DRAWN * whole)))
        self.estimate = float(estimates[1] - estimates[0])
        self._moved = logs[1] - logs[0] - self.estimate

    def interval(self, confidence: float) -> Interval:
        """Symmetric: the distance from the estimate that so many resamples kept, a little widened for few blocks."""
        blocks = SLICES // BLOCK_SLICES
        # The spread of blocks around their own mean is short by one degree of freedom.
        reach = float(np.quantile(np.abs(self._moved), confidence)) * np.sqrt(blocks / (blocks - 1))
        return Interval(self.estimate, self.estimate - reach, self.estimate + reach, confidence)


def _drawn(values: Floats, rng: np.random.Generator, resamples: int) -> Floats:
    """[resamples, n]: drawn with replacement."""
    drawn: Floats = values[rng.integers(0, len(values), size=(resamples, len(values)))]
    return drawn


def _variance_of_mean(values: Floats) -> Floats:
    return np.asarray(values.var(axis=-1, ddof=1) / values.shape[-1])


def _pivots(moved: Floats, variances: Floats, *, error: float) -> Floats:
    """|t| of every resample.

    Values that are nearly all the same (memory, say) give resamples without any spread, whose t would be infinite; no
    resample counts as more than ten times as certain as the sample itself.
    """
    least = max(_LEAST_SPREAD * error, float(np.finfo(float).tiny))
    return np.asarray(np.abs(moved) / np.maximum(np.sqrt(variances), least))


def _symmetric(estimate: float, error: float, pivots: Floats, confidence: float) -> Interval:
    reach = float(np.quantile(pivots, confidence)) * error
    return Interval(estimate, estimate - reach, estimate + reach, confidence)


def _block_weights(rng: np.random.Generator, resamples: int) -> Floats:
    """[resamples, SLICES]: how often each slice was drawn. Blocks wrap around, so every slice is as likely."""
    blocks = SLICES // BLOCK_SLICES
    starts = rng.integers(0, SLICES, size=(resamples, blocks, 1))
    chosen = (starts + np.arange(BLOCK_SLICES)) % SLICES
    rows = np.repeat(np.arange(resamples), SLICES)
    flat = np.bincount(rows * SLICES + chosen.reshape(-1), minlength=resamples * SLICES)
    return flat.reshape(resamples, SLICES).astype(float)


def _statistics(series: Series, weights: Floats, quantile: float | None) -> Floats:
    """[resamples]: the sum or the quantile of each row of weights."""
    slices = np.minimum((series.at * SLICES).astype(int), SLICES - 1)
    if quantile is None:
        return np.asarray(weights @ np.bincount(slices, weights=series.values, minlength=SLICES))
    if not len(series.values):
        return np.zeros(len(weights))
    order = np.argsort(series.values, kind="stable")
    return _weighted_quantiles(series.values[order], slices[order], weights, quantile)


def _weighted_quantiles(
    ordered: Floats, slices: NDArray[np.int_], weights: Floats, quantile: float
) -> Floats:
    """[resamples]: the nearest rank among values that are there as often as their slice was drawn.

    In two steps, so that a hundred thousand values and thousands of resamples take a second: first the stretch of the
    sorted values in which the rank is reached, from the counts of each slice in each stretch; then the place in it.
    """
    count = len(ordered)
    length = -(-count // _STRETCHES)
    stretches = -(-count // length)
    cells = (np.arange(count) // length) * SLICES + slices
    counts = np.bincount(cells, minlength=stretches * SLICES).reshape(stretches, SLICES)
    reached = weights @ counts.cumsum(axis=0).T
    wanted = np.maximum(np.ceil(quantile * reached[:, -1]), 1)
    stretch = (reached >= wanted[:, None]).argmax(axis=1)
    rows = np.arange(len(weights))
    before = np.where(stretch > 0, reached[rows, stretch - 1], 0.0)
    places = np.minimum(stretch[:, None] * length + np.arange(length), count - 1)
    within = before[:, None] + weights[rows[:, None], slices[places]].cumsum(axis=1)
    place = (within >= wanted[:, None]).argmax(axis=1)
    return np.asarray(ordered[places[rows, place]])

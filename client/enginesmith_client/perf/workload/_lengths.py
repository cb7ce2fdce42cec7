"""Lengths in tokens, drawn from the distributions of a profile. Pure.

The same seed gives the same lengths with the same version of numpy.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from enginesmith_client.perf._profile import (
    EmpiricalLength,
    FixedLength,
    Length,
    LognormalLength,
    NormalLength,
    UniformLength,
)

_LONGEST = 2**31 - 1
"""What an INT32 ``max_tokens`` holds; no distribution gives more."""
_Drawn: TypeAlias = "NDArray[Any]"


def sample(length: Length, rng: np.random.Generator, count: int) -> list[int]:
    """``count`` lengths in tokens, each at least 1."""
    drawn = _DRAWS[type(length)](length, rng, count)
    low, high = getattr(length, "low", 1), getattr(length, "high", None)
    return [int(one) for one in np.clip(np.rint(drawn), low, _LONGEST if high is None else high)]


def longest(length: Length) -> int | None:
    """The most tokens that it can give; None: there is no limit."""
    if isinstance(length, FixedLength):
        return length.tokens
    return max(length.tokens) if isinstance(length, EmpiricalLength) else length.high


def capped(length: Length, most: int) -> Length:
    """The same distribution with everything above ``most`` cut to it; a uniform one ends there."""
    if isinstance(length, FixedLength):
        return FixedLength(tokens=min(length.tokens, most))
    if isinstance(length, EmpiricalLength):
        return EmpiricalLength(kind="empirical", tokens=tuple(min(one, most) for one in length.tokens))
    high = most if length.high is None else min(length.high, most)
    return length.model_copy(update={"low": min(length.low, most), "high": high})


def _uniform(length: UniformLength, rng: np.random.Generator, count: int) -> _Drawn:
    return rng.integers(length.low, length.high, size=count, endpoint=True)


def _normal(length: NormalLength, rng: np.random.Generator, count: int) -> _Drawn:
    return rng.normal(length.mean, length.stdev, size=count)


def _lognormal(length: LognormalLength, rng: np.random.Generator, count: int) -> _Drawn:
    with np.errstate(over="ignore"):  # Infinite is cut like everything else that is too long.
        return rng.lognormal(np.log(length.median), length.sigma, size=count)


def _empirical(length: EmpiricalLength, rng: np.random.Generator, count: int) -> _Drawn:
    return rng.choice(length.tokens, size=count)


def _fixed(length: FixedLength, rng: np.random.Generator, count: int) -> _Drawn:  # noqa: ARG001 - as the others
    return np.full(count, length.tokens)


_DRAWS: dict[type, Callable[[Any, np.random.Generator, int], _Drawn]] = {
    FixedLength: _fixed,
    UniformLength: _uniform,
    NormalLength: _normal,
    LognormalLength: _lognormal,
    EmpiricalLength: _empirical,
}

"""From values to places on a page, and the values at which an axis has its ticks. Knows nothing of SVG."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

_STEPS = (1.0, 2.0, 5.0, 10.0)


@dataclass(frozen=True)
class Scale:
    """Values from ``low`` to ``high`` on pixels from ``first`` to ``last`` (upside down is allowed)."""

    low: float
    high: float
    first: float
    last: float
    log: bool = False
    base: float = 1.0
    """Ticks of linear scales are round multiples of it: a power of 1024 for bytes."""

    def __call__(self, value: float) -> float:
        """The pixel of ``value``; values beyond the ends are put on them."""
        inside = min(max(value, self.low), self.high)
        if self.log:
            share = math.log(inside / self.low) / math.log(self.high / self.low)
        else:
            share = (inside - self.low) / (self.high - self.low)
        return self.first + share * (self.last - self.first)

    def ticks(self, about: int = 6) -> tuple[float, ...]:
        """Round values within the scale."""
        if not self.log:
            ticks = _linear_ticks(self.low / self.base, self.high / self.base, about)
            return tuple(value * self.base for value in ticks)
        ticks = _log_ticks(self.low, self.high, about)
        return ticks if len(ticks) >= 3 else _linear_ticks(self.low, self.high, about)


def linear_scale(
    values: Iterable[float], *, first: float, last: float, from_zero: bool = True, binary: bool = False
) -> Scale:
    """A scale that holds all of ``values``, with round ends; ``binary``: round in powers of 1024."""
    seen = [value for value in values if math.isfinite(value)]
    base = 1024.0 ** int(math.log(max(map(abs, seen), default=1.0) or 1.0, 1024)) if binary else 1.0
    low, high = (min(seen), max(seen)) if seen else (0.0, 1.0)
    if from_zero:
        low, high = min(low, 0.0), max(high, 0.0)
    if high - low <= abs(high) * 1e-9:
        low, high = (0.0, 1.0) if high == 0 else (min(low, 0.0) if from_zero else low * 0.99, high * 1.01)
    step = _step(low / base, high / base, 6) * base
    ends = math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step
    return Scale(*ends, first, last, base=base)


def log_scale(values: Iterable[float], *, first: float, last: float) -> Scale:
    """A logarithmic scale that holds the positive ones of ``values``, with a little room at both ends."""
    seen = [value for value in values if math.isfinite(value) and value > 0]
    low, high = (min(seen), max(seen)) if seen else (1.0, 10.0)
    room = max((high / low) ** 0.03, 1.05)
    return Scale(low / room, high * room, first, last, log=True)


def _step(low: float, high: float, about: int) -> float:
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    return next(factor * power for factor in _STEPS if factor * power >= rough * (1 - 1e-9))


def _linear_ticks(low: float, high: float, about: int) -> tuple[float, ...]:
    step = _step(low, high, about)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return tuple(round(number * step, 12) for number in range(first, last + 1))


def _log_ticks(low: float, high: float, about: int) -> tuple[float, ...]:
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    best: tuple[float, ...] = ()
    for factors in ((1.0,), (1.0, 3.0), (1.0, 2.0, 5.0)):
        ticks = tuple(
            value for power in decades for factor in factors if low <= (value := factor * 10.0**power) <= high
        )
        if len(ticks) <= about + 2:
            best = ticks
    return best or tuple(
        10.0**power for power in decades[:: len(decades) // about + 1] if low <= 10.0**power <= high
    )

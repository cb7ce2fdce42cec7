"""The search for a small set of layers to leave in float, given a way to measure any set.

Greedy from the most sensitive on, then pruned: no member of the result can be quantized with the limits still holding.
That is the smallest set of its kind, not proven to be the smallest of all, of which there are 2^n.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

_LIMITED: Mapping[str, tuple[str, bool]] = {
    "min_mean_cosine": ("mean_cosine", True),
    "min_cosine": ("min_cosine", True),
    "max_abs_delta": ("max_abs_delta", False),
    "max_relative_error": ("relative_error", False),
    "min_top1_agreement": ("top1_agreement", True),
    "min_rank_correlation": ("rank_correlation", True),
}
"""By limit: its figure, and whether the limit is a lower bound."""


@dataclass(frozen=True)
class Exclusion:
    """What was found. Members are numbers of the ranking, 0 the most sensitive."""

    excluded: frozenset[int]
    met: bool
    before: Mapping[str, float]
    """The figures with nothing excluded."""
    after: Mapping[str, float]
    """Those of ``excluded``, measured with exactly this set; where nothing meets the limits, those of the largest set."""


def broken_limits(figures: Mapping[str, float], limits: Mapping[str, float | None]) -> list[str]:
    """One sentence per limit that ``figures`` break; a figure that is missing where a limit is set breaks it too."""
    broken = []
    for limit, (name, lower) in _LIMITED.items():
        bound = limits.get(limit)
        if bound is None:
            continue
        seen = figures.get(name)
        # Written so that NaN holds no limit.
        holds = seen is not None and (seen >= bound if lower else seen <= bound)
        if not holds:
            shown = "not measured for this task" if seen is None else f"{seen:.6g}"
            broken.append(f"{name} is {shown}, allowed is {'at least' if lower else 'at most'} {bound:g}")
    return broken


def smallest_exclusion(
    count: int, measure: Callable[[frozenset[int]], Mapping[str, float]], limits: Mapping[str, float | None]
) -> Exclusion:
    """A set of the ``count`` ranked layers that has to stay in float, at least one layer being quantized.

    Doubles and bisects over the most sensitive ones, then tries to drop each member, the least sensitive first:
    about 2 log2(k) + k measurements for a set of k.
    """
    seen: dict[frozenset[int], Mapping[str, float]] = {}

    def holds(excluded: frozenset[int]) -> bool:
        if excluded not in seen:
            seen[excluded] = measure(excluded)
        return not broken_limits(seen[excluded], limits)

    def most_sensitive(size: int) -> frozenset[int]:
        return frozenset(range(size))

    nothing = most_sensitive(0)
    size = 0
    while not holds(most_sensitive(size)):
        if size == count - 1:
            return Exclusion(nothing, False, seen[nothing], seen[most_sensitive(size)])
        size = min(max(1, 2 * size), count - 1)
    too_small = size // 2 if size > 1 else size - 1
    while size - too_small > 1:
        middle = (size + too_small) // 2
        size, too_small = (middle, too_small) if holds(most_sensitive(middle)) else (size, middle)
    excluded = most_sensitive(max(size, 0))
    for member in sorted(excluded, reverse=True):
        if holds(excluded - {member}):
            excluded = excluded - {member}
    return Exclusion(excluded, True, seen[nothing], seen[excluded])

"""What came out of comparing B with A, as values and on disk: ``comparison.json``.

Everything that is needed to draw or to doubt a comparison is in it: the value of every round, the order of the rounds,
the intervals with their confidence, the seed and the number of resamples. docs/bench-compare.md explains the method.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

from enginesmith_client.perf._errors import ProfileError
from enginesmith_client.perf._saved_files import Format, from_plain, read_document, write_document

FORMAT = Format("enginesmith-bench-comparison")
COMPARISON_FILE = "comparison.json"

Verdict: TypeAlias = Literal["better", "same", "worse", "inconclusive"]
"""Of B, in the eyes of somebody who has A."""
Role: TypeAlias = Literal["primary", "guard", "informational"]
"""``primary``: decides. ``guard``: can only make the comparison ``worse``. ``informational``: shown, decides nothing."""

EXIT_CODES: Mapping[Verdict, int] = {"better": 0, "same": 0, "worse": 1, "inconclusive": 5}
"""For CI. 2 stays a wrong command line, 3 a failure of ours."""


@dataclass(frozen=True)
class CompareOptions:
    """How strict a comparison is."""

    min_effect_percent: float = 2.0
    """Smaller differences do not matter: the band of ``same`` is from 1 / (1 + this) to 1 + this."""
    guard_effect_percent: float = 10.0
    """The same for guards: tails are noisy."""
    confidence: float = 0.95
    """Of all statements of primaries and guards together."""
    seed: int = 0
    resamples: int = 10_000

    def __post_init__(self) -> None:
        if not 0 < self.min_effect_percent < 100 or not 0 < self.guard_effect_percent < 100:
            raise ProfileError(
                f"a minimum effect is a percentage between 0 and 100; seen: {self.min_effect_percent:g} "
                f"(guards: {self.guard_effect_percent:g})"
            )
        if not 0.5 <= self.confidence < 1:
            raise ProfileError(f"the confidence is at least 0.5 and below 1; seen: {self.confidence:g}")
        if self.resamples < 1000:
            raise ProfileError(f"at least 1000 resamples are needed; seen: {self.resamples}")


@dataclass(frozen=True)
class Side:
    """A or B."""

    title: str
    model: str
    model_version: str
    url: str
    requests: int
    """Within the windows of all runs, answered or failed; also of runs whose times are not used."""
    errors: Mapping[str, int]
    """Of these, failures by kind."""
    runs: tuple[str, ...]
    """Directories, of a live comparison relative to that of the comparison."""

    @property
    def failed(self) -> int:
        """Failures of all kinds."""
        return sum(self.errors.values())


@dataclass(frozen=True)
class MetricComparison:
    """One figure of B against that of A."""

    name: str
    """As in ``Figures``: ``requests_per_s``, ``latency_ms.p50``."""
    title: str
    unit: str
    better: Literal["higher", "lower"]
    role: Role
    a: float
    """The geometric mean over the rounds; of two saved runs, the figure itself. So is ``b``."""
    b: float
    ratio: float
    """b / a."""
    low: float
    """Of the confidence interval of the ratio, as ``high``."""
    high: float
    confidence: float
    """Of this interval: higher than that of the whole where several metrics share it (Holm)."""
    min_effect_percent: float
    verdict: Verdict
    words: str
    """For people: ``3.1% lower (95% interval 2.4% to 3.8% lower)``."""
    values_a: tuple[float, ...]
    """Of every round that was used, in their order; of two saved runs the one figure each."""
    values_b: tuple[float, ...]

    @property
    def band(self) -> tuple[float, float]:
        """Ratios from which to which the difference does not matter."""
        factor = 1 + self.min_effect_percent / 100
        return 1 / factor, factor

    @property
    def could_be_worse(self) -> bool:
        """Whether the interval allows that B is worse by more than the minimum effect."""
        low, high = self.band
        return self.low < low if self.better == "higher" else self.high > high


@dataclass(frozen=True)
class Comparison:
    """What ``comparison.json`` holds."""

    title: str
    kind: Literal["live", "saved"]
    a: Side
    b: Side
    verdict: Verdict
    words: str
    """The verdict in a sentence or two: what decided."""
    hint: str
    """What would decide an inconclusive comparison; empty for the others."""
    metrics: tuple[MetricComparison, ...]
    warnings: tuple[str, ...]
    void: tuple[str, ...]
    """Why the numbers say nothing; empty for a comparison that holds."""
    method: str
    """Of the intervals, in words."""
    options: CompareOptions
    profile: Mapping[str, Any]
    """That of every round of a live comparison, or of A."""
    started: str
    """UTC, ISO 8601."""
    rounds: int = 0
    """Pairs of runs of a live comparison, as planned."""
    order: tuple[Literal["ab", "ba"], ...] = ()
    """Which came first in each."""
    left_out: Mapping[int, str] = field(default_factory=dict)
    """Pairs that were not used, counted from 1, and why."""

    @property
    def exit_code(self) -> int:
        """For CI: 0 better or same, 1 worse, 5 inconclusive."""
        return EXIT_CODES[self.verdict]

    @property
    def not_worse(self) -> bool:
        """Whether B is certainly not worse by more than the minimum effect; so may be some inconclusive ones."""
        deciding = [metric for metric in self.metrics if metric.role == "primary"]
        return (
            self.verdict != "worse"
            and not self.void
            and bool(deciding)
            and not any(metric.could_be_worse for metric in deciding)
        )


def percent_words(log_ratio: float) -> str:
    """A ratio given as its logarithm, as a person says it: ``3.1% higher``."""
    percent = 100 * math.expm1(log_ratio)
    shown = f"{abs(percent):.1f}%"
    return "no difference" if shown == "0.0%" else f"{shown} {'higher' if percent > 0 else 'lower'}"


def save_comparison(directory: Path, comparison: Comparison) -> None:
    """Write ``comparison.json``; it appears at once or not at all."""
    write_document(directory / COMPARISON_FILE, FORMAT, dataclasses.asdict(comparison))


def load_comparison(directory: Path) -> Comparison:
    """The comparison in ``directory``.

    Raises:
        ResultsError: there is none, it is damaged, or of another version.
    """
    return from_plain(Comparison, read_document(directory / COMPARISON_FILE, FORMAT))

"""What a run tells about itself while it goes on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

Phase: TypeAlias = Literal["preparing", "warming up", "measuring", "draining", "done"]


@dataclass(frozen=True)
class Progress:
    """A run at one moment. The figures are those of about the last second; None where there is nothing yet."""

    phase: Phase
    title: str
    """What is measured, for people: ``chat-short, 8 at a time``."""
    elapsed_s: float
    planned_s: float | None
    """When the phase ends at the latest; None: unknown."""
    answered: int
    """Since the run began, as the next two."""
    failed: int
    in_flight: int
    requests_per_s: float | None = None
    tokens_per_s: float | None = None
    p50_ms: float | None = None
    p99_ms: float | None = None
    part: tuple[int, int] = (1, 1)
    """Which of how many: a point of a sweep, a scenario of a suite, a round of a comparison."""


OnProgress: TypeAlias = Callable[[Progress], None]


def ignore_progress(_: Progress) -> None:
    """For callers that want none."""

"""What sweeps and comparisons share: how they ask for a run, and how a run of many tells its progress."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Protocol

from enginesmith_client.perf._profile import Profile
from enginesmith_client.perf._progress import OnProgress, Progress
from enginesmith_client.perf._run_files import RUN_FILE, SavedRun, load_run
from enginesmith_client.perf._target import Target


class RunProfile(Protocol):
    """One run, whole; ``_run.run_profile`` is the real one."""

    def __call__(
        self,
        target: Target,
        profile: Profile,
        *,
        directory: Path,
        title: str = "",
        on_progress: OnProgress,
        reuse: bool = False,
    ) -> SavedRun:
        """The run in ``directory``; with ``reuse`` a complete one that is there already."""


def part_of(on_progress: OnProgress, number: int, count: int) -> OnProgress:
    """Tells the same, and that this is part ``number`` of ``count``."""

    def tell(progress: Progress) -> None:
        on_progress(replace(progress, part=(number, max(number, count))))

    return tell


def not_interrupted(saved: SavedRun) -> SavedRun:
    """The run itself. One that a person interrupted ends what it is part of; its records are kept.

    Raises:
        KeyboardInterrupt: it was interrupted.
    """
    if saved.run.interrupted:
        raise KeyboardInterrupt
    return saved


def complete_run_in(directory: Path) -> bool:
    """Whether a run that was not cut short is there."""
    return (directory / RUN_FILE).exists() and load_run(directory).run.status == "complete"


def unusable(saved: SavedRun) -> str:
    """Why the numbers of a run say nothing; empty for one that can be used."""
    run = saved.run
    words = [check.words for check in run.checks if check.severity == "void"]
    if run.status == "partial":
        words.append(f"it ended early: {run.ended_because}")
    if not words and run.figures.latency_ms is None:
        words.append("no request was answered")
    return "; ".join(words)


def default_run() -> RunProfile:
    """``run_profile``; imported only here, because it brings all parts of a run."""
    from enginesmith_client.perf._run import run_profile

    return run_profile

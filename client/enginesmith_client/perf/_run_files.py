"""A run on disk: a directory with ``run.json``, the records, and the samples of the machine.

``run.json`` says what was measured, on what, and what came out; every figure in it can be computed again from the
records, the samples and the server's statistics that it keeps. A directory is complete when ``run.json`` is there; it
is written last and at once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from enginesmith_client.perf._figures import Figures
from enginesmith_client.perf._records import Record, read_records
from enginesmith_client.perf._saved_files import Format, from_plain, read_document, write_document

FORMAT = Format("enginesmith-bench-run")
RUN_FILE = "run.json"
RECORDS_FILE = "records.jsonl"
SAMPLES_FILE = "samples.jsonl"


@dataclass(frozen=True)
class Window:
    """What of a run is measured: nanoseconds since the run's origin."""

    start_ns: int
    end_ns: int
    steady: bool
    """Whether its parts agreed."""
    note: str = ""
    """In words: why it begins and ends where it does."""


@dataclass(frozen=True)
class Check:
    """What the harness found about its own numbers."""

    rule: str
    """``generator-lag``, ``client-cpu``, ``clock``, ``samples``, ``unstable``, ``server-restarted``, ``swapping``, ..."""
    severity: Literal["void", "warning"]
    """``void``: the numbers say nothing about the server."""
    words: str
    """What was seen, what it means, and what to do."""


@dataclass(frozen=True)
class SloVerdict:
    """One promise of the SLO."""

    name: str
    """As the profile's key."""
    limit: float
    measured: float | None
    met: bool | None
    """None: it could not be measured."""


@dataclass(frozen=True)
class Run:
    """What ``run.json`` holds."""

    title: str
    model: str
    model_version: str
    url: str
    profile: Mapping[str, Any]
    """Every key, as ``Profile.as_kept`` gives it."""
    profile_digest: str
    """SHA-256 of the profile, the model and its version: what can take another run's place."""
    started: str
    """UTC, ISO 8601."""
    generator: str
    """``enginesmith`` or ``perf_analyzer``."""
    status: Literal["complete", "partial"]
    """``partial``: it was ended before it had what it needs; ``ended_because`` says why."""
    ended_because: str
    window: Window
    figures: Figures
    checks: tuple[Check, ...]
    slo: tuple[SloVerdict, ...]
    machine: Mapping[str, Any]
    versions: Mapping[str, str]
    server: Mapping[str, Any] = field(default_factory=dict)
    """Name, version and, before and after the window, the statistics of the model and what its metrics said."""
    workload: Mapping[str, Any] = field(default_factory=dict)
    """What was sent, as it turned out: kind, tokens per word of the made prompts, and so on."""
    command: str = ""
    """perf_analyzer's command line."""

    @property
    def void(self) -> bool:
        """Whether a check says that the numbers are worthless."""
        return any(check.severity == "void" for check in self.checks)

    @property
    def interrupted(self) -> bool:
        """Whether a person ended it."""
        return self.status == "partial" and self.ended_because.startswith("interrupted")

    @property
    def slo_met(self) -> bool | None:
        """Whether all of the SLO was kept; None without one, or where it could not be judged."""
        if self.void or not self.slo or any(verdict.met is None for verdict in self.slo):
            return None
        return all(verdict.met for verdict in self.slo)


@dataclass(frozen=True)
class SavedRun:
    """A run and where it is."""

    directory: Path
    run: Run

    def records(self) -> list[Record]:
        """Of the whole run, warm-up included.

        Raises:
            ResultsError: they cannot be read.
        """
        return read_records(self.directory / RECORDS_FILE)


def save_run(directory: Path, run: Run) -> SavedRun:
    """Write ``run.json`` beside the records; it appears at once or not at all."""
    write_document(directory / RUN_FILE, FORMAT, dataclasses.asdict(run))
    return SavedRun(directory, run)


def load_run(directory: Path) -> SavedRun:
    """The run in ``directory``.

    Raises:
        ResultsError: there is none, it is damaged, or of another version.
    """
    return SavedRun(directory, from_plain(Run, read_document(directory / RUN_FILE, FORMAT)))

"""A run on disk: a directory with ``run.json``, the records, and the samples of the machine.

``run.json`` says what was measured, on what, and what came out; every figure in it can be computed again from the
records, the samples and the server's statistics that it keeps. A directory is complete when ``run.json`` is there; it
is written last and at once.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import TypeAdapter, ValidationError

from enginesmith_client.perf._errors import ResultsError
from enginesmith_client.perf._figures import Figures
from enginesmith_client.perf._records import Record, read_records

FORMAT = "enginesmith-bench-run"
VERSION = 1
RUN_FILE = "run.json"
RECORDS_FILE = "records.jsonl"
SAMPLES_FILE = "samples.jsonl"

Dataclass = TypeVar("Dataclass")
# Making one costs more than reading a run with it.
_ADAPTERS: dict[type, TypeAdapter[Any]] = {}


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
    """Every key, as ``Profile.as_json`` gives it."""
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
    write_document(directory / RUN_FILE, FORMAT, VERSION, dataclasses.asdict(run))
    return SavedRun(directory, run)


def load_run(directory: Path) -> SavedRun:
    """The run in ``directory``.

    Raises:
        ResultsError: there is none, it is damaged, or of another version.
    """
    return SavedRun(directory, from_plain(Run, read_document(directory / RUN_FILE, FORMAT, VERSION)))


def write_document(path: Path, name: str, version: int, content: Mapping[str, Any]) -> None:
    """Write JSON that says what it is; the file appears at once or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        staging.write_text(
            json.dumps({"format": name, "version": version} | dict(content), indent=1, allow_nan=False)
            + "\n",
            encoding="utf-8",
        )
        os.replace(staging, path)
    finally:
        staging.unlink(missing_ok=True)


def read_document(path: Path, name: str, version: int) -> dict[str, Any]:
    """What ``write_document`` wrote.

    Raises:
        ResultsError: it is missing, damaged, something else, or of another version.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        found = (document.pop("format"), document.pop("version"))
    except FileNotFoundError as error:
        raise ResultsError(f"{path} is not there", hint="give the directory of a finished run") from error
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise ResultsError(f"{path} cannot be read as benchmark results: {error!r}") from error
    if found != (name, version):
        raise ResultsError(
            f"{path} holds {found[0]} of version {found[1]}; this program reads {name} of version {version}",
            hint="measure again with this version, or read it with the version that wrote it",
        )
    return dict(document)


def from_plain(kind: type[Dataclass], plain: Mapping[str, Any]) -> Dataclass:
    """A dataclass from its plain JSON values.

    Raises:
        ResultsError: a field is missing or of another type.
    """
    try:
        if kind not in _ADAPTERS:
            _ADAPTERS[kind] = TypeAdapter(kind)
        read: Dataclass = _ADAPTERS[kind].validate_json(json.dumps(plain))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ResultsError(
            f"saved results cannot be read as {kind.__name__}: {where}: {first['msg']}"
        ) from error
    return read

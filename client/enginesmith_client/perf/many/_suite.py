"""Suites: scenarios as data, each a profile with a reason, run one after the other on a model.

A suite is a directory of YAML files, or one such file; ``standard`` comes with the package. What makes no sense for a
model is skipped with a reason, and what is too long for it is cut with a note, so that a suite runs for any model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from enginesmith_client._client import Client
from enginesmith_client._errors import ConnectError, TritonClientError
from enginesmith_client.perf._errors import ProfileError, ResultsError
from enginesmith_client.perf._profile import Part, Profile, RequestsPart
from enginesmith_client.perf._profile_file import document_from_file, name_of, profile_from_mapping, validated
from enginesmith_client.perf._progress import OnProgress, ignore_progress
from enginesmith_client.perf._saved_files import (
    Format,
    from_plain,
    only_writer,
    read_document,
    timestamp,
    write_document,
)
from enginesmith_client.perf._target import Target
from enginesmith_client.perf.many._fitting import Fitted, Fitting
from enginesmith_client.perf.many._many_runs import RunProfile, default_run, not_interrupted, part_of
from enginesmith_client.perf.workload._payload import Kind
from enginesmith_client.perf.workload._workload import kind_of, subject_of

FORMAT = Format("enginesmith-bench-suite")
SUITE_FILE = "suite.json"
BUILT_IN = Path(__file__).parent / "scenarios"
_KIND_WORDS: dict[Kind, str] = {
    "text": "models that generate text",
    "embed": "models that take texts and give vectors, classes or scores",
    "tensors": "models of tensors",
}


class ScenarioFile(Part):
    """What a file of a suite says."""

    title: str = Field(min_length=1)
    why: str = ""
    kinds: tuple[Kind, ...] = Field(
        default=("text", "embed", "tensors"), min_length=1, description="Of model that it makes sense for."
    )
    needs_streaming: bool = Field(default=False, description="Only for models that answer in pieces.")
    order: int = Field(default=100, description="Lower ones run first; equal ones by name.")
    profile: dict[str, Any]


@dataclass(frozen=True)
class Scenario:
    """One thing that a suite measures."""

    name: str
    """Of its file."""
    title: str
    why: str
    profile: Profile
    for_kinds: tuple[Kind, ...]
    needs_streaming: bool = False
    order: int = 100


@dataclass(frozen=True)
class Suite:
    """Scenarios in the order in which they run."""

    name: str
    scenarios: tuple[Scenario, ...]


@dataclass(frozen=True)
class SuiteEntry:
    """What became of a scenario."""

    name: str
    title: str
    why: str
    status: Literal["measured", "skipped", "failed"]
    directory: str | None = None
    """Of its run, beside ``suite.json``; None: there is no run."""
    reason: str = ""
    """Why it was skipped or failed, in words."""
    notes: tuple[str, ...] = ()
    """What was changed in its profile to fit the model."""


@dataclass(frozen=True)
class SuiteResult:
    """What ``suite.json`` holds."""

    name: str
    model: str
    model_version: str
    url: str
    kind: Kind
    status: Literal["complete", "partial"]
    """``partial``: not all scenarios had their turn yet."""
    started: str
    """UTC, ISO 8601; of the last time that it was gone on with."""
    scenarios: tuple[SuiteEntry, ...]


def load_suite(name_or_path: str | Path) -> Suite:
    """The suite of that name, or in that directory, or the single scenario in that file.

    Raises:
        ProfileError: there is none, or a file of it is not valid.
    """
    built_in = BUILT_IN / name_or_path if str(name_or_path) in built_in_suites() else None
    path = built_in or Path(name_or_path)
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix in (".yaml", ".yml"))
    elif path.is_file():
        files = [path]
    else:
        raise ProfileError(
            f"there is no suite {str(name_or_path)!r}",
            hint=f"built in: {', '.join(built_in_suites())}; else the path of a directory of scenarios or of one scenario",
        )
    if not files:
        raise ProfileError(
            f"suite {path} holds no scenarios: there is no .yaml file in it",
            hint="docs/bench-scenarios.md shows one",
        )
    scenarios = sorted(map(_scenario, files), key=lambda one: (one.order, one.name))
    twice = {one.name for one in scenarios if sum(one.name == other.name for other in scenarios) > 1}
    if twice:
        raise ProfileError(f"suite {path} has two scenarios of one name: {', '.join(sorted(twice))}")
    return Suite(path.stem if path.is_file() else path.resolve().name, tuple(scenarios))


def built_in_suites() -> list[str]:
    """The suites that come with the package."""
    return sorted(path.name for path in BUILT_IN.iterdir() if path.is_dir())


def run_suite(
    target: Target,
    suite: Suite,
    *,
    directory: Path,
    on_progress: OnProgress = ignore_progress,
    only: Collection[str] = (),
    adjust: Callable[[Profile], Profile] = lambda profile: profile,
    run: RunProfile | None = None,
) -> SuiteResult:
    """Measure every scenario of ``suite`` that makes sense for the model, each in a directory of its own.

    ``suite.json`` is written after each. What is there already is not measured again, so a suite that was interrupted
    goes on. A scenario that fails does not keep the others from being measured.

    Args:
        only: names of scenarios; of the others the result has what an earlier run found. Empty: all.
        adjust: changes the profile of every scenario, before it is made to fit the model.
        run: measures one profile; default: ``run_profile``.

    Raises:
        ProfileError: ``only`` names a scenario that the suite does not have.
        ResultsError: ``directory`` holds another suite, or something else is measuring into it.
        ConnectError: the server is not there, or went away.
        KeyboardInterrupt: a scenario was interrupted. What was measured before is kept.
    """
    chosen, started = _chosen(suite, only), timestamp()
    with Client(target.url) as client:
        subject = subject_of(client, target, RequestsPart())
        kind = kind_of(subject.metadata)
        fitting = Fitting(subject, kind, client.config(target.model, version=target.version))
        measuring = _Measuring(target, directory, on_progress, run or default_run(), fitting, adjust)
        with only_writer(directory, results_file=SUITE_FILE):
            entries = _entries_there(directory, target, suite)
            for number, scenario in enumerate(chosen, 1):
                reason = _reason_to_skip(scenario, kind, streams=subject.metadata.decoupled)
                progress = part_of(on_progress, number, len(chosen))
                entries[scenario.name] = (
                    _entry(scenario, "skipped", reason=reason)
                    if reason
                    else measuring.entry(scenario, progress)
                )
                result = SuiteResult(
                    name=suite.name,
                    model=target.model,
                    model_version=target.version_of(subject.metadata.versions),
                    url=target.url,
                    kind=kind,
                    status="complete" if number == len(chosen) else "partial",
                    started=started,
                    scenarios=tuple(entries[one.name] for one in suite.scenarios if one.name in entries),
                )
                write_document(directory / SUITE_FILE, FORMAT, dataclasses.asdict(result))
    return result


def load_suite_result(directory: Path) -> SuiteResult:
    """What ``run_suite`` left in ``directory``.

    Raises:
        ResultsError: there is nothing, it is damaged, or of another version.
    """
    return from_plain(SuiteResult, read_document(directory / SUITE_FILE, FORMAT))


@dataclass(frozen=True)
class _Measuring:
    target: Target
    directory: Path
    on_progress: OnProgress
    run: RunProfile
    fitting: Fitting
    adjust: Callable[[Profile], Profile]

    def entry(self, scenario: Scenario, on_progress: OnProgress) -> SuiteEntry:
        """What became of a scenario that makes sense for the model."""
        fitted = Fitted(scenario.profile)
        try:
            fitted = self.fitting.fitted(self.adjust(scenario.profile))
            saved = self.run(
                self.target,
                fitted.profile,
                directory=self.directory / scenario.name,
                title=scenario.title,
                on_progress=on_progress,
                reuse=True,
            )
        except ConnectError:
            raise  # Nothing can be said of the scenarios that would come.
        except TritonClientError as error:
            return _entry(scenario, "failed", reason=str(error), notes=fitted.notes)
        not_interrupted(saved)
        return _entry(scenario, "measured", directory=scenario.name, notes=fitted.notes)


def _entries_there(directory: Path, target: Target, suite: Suite) -> dict[str, SuiteEntry]:
    """What an earlier run of the same suite of the same model found, by name of scenario.

    Raises:
        ResultsError: another suite or another model was measured there.
    """
    if not (directory / SUITE_FILE).exists():
        return {}
    there = load_suite_result(directory)
    if (there.name, there.model) != (suite.name, target.model):
        raise ResultsError(
            f"{directory} holds suite {there.name} of model {there.model}",
            hint="give another directory; the same command goes on with the suite that is there",
        )
    return {entry.name: entry for entry in there.scenarios}


def _entry(
    scenario: Scenario,
    status: Literal["measured", "skipped", "failed"],
    *,
    directory: str | None = None,
    reason: str = "",
    notes: tuple[str, ...] = (),
) -> SuiteEntry:
    return SuiteEntry(scenario.name, scenario.title, scenario.why, status, directory, reason, notes)


def _reason_to_skip(scenario: Scenario, kind: Kind, *, streams: bool) -> str:
    if kind not in scenario.for_kinds:
        wanted = " and ".join(_KIND_WORDS[one] for one in scenario.for_kinds)
        return f"it is for {wanted}; this is one of the {_KIND_WORDS[kind]}"
    if scenario.needs_streaming and not streams:
        return "it is for models that answer in pieces; this one answers once"
    return ""


def _chosen(suite: Suite, only: Collection[str]) -> Sequence[Scenario]:
    names = [scenario.name for scenario in suite.scenarios]
    unknown = [name for name in only if name not in names]
    if unknown:
        raise ProfileError(
            f"suite {suite.name} has no scenario {unknown[0]!r}", hint=f"it has: {', '.join(names)}"
        )
    return [scenario for scenario in suite.scenarios if not only or scenario.name in only]


def _scenario(path: Path) -> Scenario:
    data = document_from_file(path, what="scenario")
    written = validated(
        ScenarioFile,
        data,
        source=f"scenario {path} is not valid",
        hint="docs/bench-scenarios.md explains every key",
    )
    name = name_of(path)
    profile = profile_from_mapping(
        {"name": name} | written.profile, source=f"scenario {path}", directory=path.resolve().parent
    )
    return Scenario(
        name, written.title, written.why, profile, written.kinds, written.needs_streaming, written.order
    )

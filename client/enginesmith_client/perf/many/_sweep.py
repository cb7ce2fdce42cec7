"""One profile at many loads: the curve of throughput and latency, its knee, and the most that the SLO allows.

Every point is a run in a directory of its own; ``sweep.json`` is written anew after each, so a sweep that was
interrupted goes on where it was. docs/bench-sweep.md says what is searched for and how.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from enginesmith_client.perf._errors import MeasurementError, ProfileError, ResultsError
from enginesmith_client.perf._figures import Quantiles
from enginesmith_client.perf._profile import ClosedLoad, OpenLoad, Profile, TraceArrivals
from enginesmith_client.perf._progress import OnProgress, ignore_progress
from enginesmith_client.perf._run_files import SavedRun, SloVerdict
from enginesmith_client.perf._saved_files import (
    Format,
    from_plain,
    only_writer,
    read_document,
    timestamp,
    write_document,
)
from enginesmith_client.perf._target import Target
from enginesmith_client.perf.many._knee import Knee, LoadPoint, knee_of
from enginesmith_client.perf.many._ladder import Axis, Ladder, next_load
from enginesmith_client.perf.many._many_runs import (
    RunProfile,
    default_run,
    not_interrupted,
    part_of,
    unusable,
)
from enginesmith_client.perf.many._sweep_words import words_of

FORMAT = Format("enginesmith-bench-sweep")
SWEEP_FILE = "sweep.json"
SUSTAINED = 0.95
"""Of the offered rate: a server that answers less does not keep up."""
_USUAL_POINTS = 8
"""What progress says of an automatic ladder until it knows better."""


@dataclass(frozen=True)
class Point:
    """One load."""

    load: float
    name: str
    """``4 at a time``, ``12.5 requests/s``."""
    directory: str
    """Of the run, relative to that of the sweep."""
    void: str
    """Why its numbers are not used; empty for those that are."""
    slo_met: bool | None = None
    """None: no SLO, or it could not be judged."""
    slo: tuple[SloVerdict, ...] = ()
    offered_per_s: float | None = None
    throughput_per_s: float = 0.0
    """Answered requests."""
    output_tokens_per_s: float | None = None
    mean_ms: float | None = None
    p50_ms: float | None = None
    p90_ms: float | None = None
    p99_ms: float | None = None
    ttft_p50_ms: float | None = None
    ttft_p99_ms: float | None = None
    good_per_s: float | None = None
    errors: Mapping[str, int] = field(default_factory=dict)

    @property
    def usable(self) -> bool:
        """Whether its numbers say anything."""
        return not self.void

    @property
    def sustained(self) -> bool:
        """Whether the server kept up with what was offered; in a closed loop it always does."""
        return self.offered_per_s is None or self.throughput_per_s >= SUSTAINED * self.offered_per_s

    @property
    def fits(self) -> bool | None:
        """Whether the server carried the load within the SLO, as far as there is one; None: it cannot be said."""
        if self.void:
            return None
        if not self.sustained:
            return False
        return self.slo_met if self.slo else True


@dataclass(frozen=True)
class Sweep:
    """What ``sweep.json`` holds."""

    title: str
    model: str
    model_version: str
    url: str
    axis: Axis
    points: tuple[Point, ...]
    """In the order of their loads."""
    knee: Knee | None
    best_goodput: Point | None
    """The point with the most requests per second within the SLO."""
    highest_within_slo: Point | None
    """The highest load below the lowest that broke the SLO or that the server could not keep up with."""
    words: tuple[str, ...]
    """What was found and what was not."""
    status: Literal["complete", "partial"]
    profile: Mapping[str, Any]
    started: str
    """UTC, ISO 8601."""


def sweep(
    target: Target,
    profile: Profile,
    ladder: Ladder,
    *,
    directory: Path,
    on_progress: OnProgress = ignore_progress,
    run: RunProfile | None = None,
) -> Sweep:
    """Measure ``profile`` at every load of ``ladder``; points that are in ``directory`` already are taken from there.

    Args:
        run: what makes a run. Default: ``run_profile``.

    Raises:
        ProfileError: the profile has a trace, whose load is its own.
        ResultsError: ``directory`` holds another sweep, or something else is measuring into it.
        TritonClientError: the server or the model is not there, or stopped answering. The points so far are kept.
        KeyboardInterrupt: a point was interrupted. The points so far are kept.
    """
    _check_arrivals(profile, ladder)
    measuring = _Measuring(target, profile, directory, on_progress, run or default_run())
    started = timestamp()
    points: list[Point] = []
    with only_writer(directory, results_file=SWEEP_FILE):
        _check_directory(directory, target, profile, ladder)
        ladder = measuring.with_start(ladder)
        while (load := next_load(ladder, points, slo=_has_slo(profile))) is not None:
            count = len(ladder.values) or max(_USUAL_POINTS, len(points) + 1)
            points.append(measuring.point(ladder.axis, load, part=(len(points) + 1, count)))
            _save(directory, measuring.sweep(ladder, points, started=started, status="partial"))
        done = measuring.sweep(ladder, points, started=started, status="complete")
        _save(directory, done)
    return done


def load_sweep(directory: Path) -> Sweep:
    """The sweep in ``directory``.

    Raises:
        ResultsError: there is none, it is damaged, or of another version.
    """
    return from_plain(Sweep, read_document(directory / SWEEP_FILE, FORMAT))


@dataclass
class _Measuring:
    """The runs of one sweep."""

    target: Target
    profile: Profile
    directory: Path
    on_progress: OnProgress
    run: RunProfile
    version: str = ""

    def with_start(self, ladder: Ladder) -> Ladder:
        """An automatic ladder of rates begins at half of what one request at a time reaches, which is measured."""
        if not ladder.automatic or ladder.axis == "concurrency" or ladder.start is not None:
            return ladder
        saved = self._one("concurrency", 1, "probe", part=(1, _USUAL_POINTS))
        rate_per_s = saved.run.figures.requests_per_s / 2
        if not rate_per_s:
            raise MeasurementError(
                f"model {self.target.model!r} answered no request, so no rate is known to begin with",
                hint=f"the errors are in the records of {saved.directory}",
            )
        return dataclasses.replace(ladder, start=min(float(f"{rate_per_s:.3g}"), ladder.top))

    def point(self, axis: Axis, load: float, *, part: tuple[int, int]) -> Point:
        """The point at one load; one at which nothing was answered is a point that is not used."""
        name = f"{axis}-{load:g}"
        try:
            saved = self._one(axis, load, name, part=part)
        except MeasurementError as error:
            return Point(load, load_words(axis, load), name, void=str(error))
        return _point(saved, load, axis, name)

    def sweep(
        self, ladder: Ladder, points: Sequence[Point], *, started: str, status: Literal["complete", "partial"]
    ) -> Sweep:
        """What is known from the points so far."""
        ordered = tuple(sorted(points, key=lambda point: point.load))
        usable = [point for point in ordered if point.usable]
        knee = knee_of(
            [LoadPoint(point.load, point.throughput_per_s, point.mean_ms or 0.0) for point in usable]
        )
        limited = (
            _has_slo(self.profile) or ladder.axis == "rate" or any(point.fits is False for point in usable)
        )
        highest = _highest_within(usable) if limited else None
        good = [point for point in usable if point.good_per_s]
        return Sweep(
            title=f"{self.profile.name}: {self.target.model} over {ladder.axis}",
            model=self.target.model,
            model_version=self.version,
            url=self.target.url,
            axis=ladder.axis,
            points=ordered,
            knee=knee,
            best_goodput=max(good, key=lambda point: point.good_per_s or 0.0, default=None),
            highest_within_slo=highest,
            words=words_of(
                ordered, highest=highest, knee=knee, has_slo=_has_slo(self.profile), axis=ladder.axis
            ),
            status=status,
            profile=self.profile.as_kept(),
            started=started,
        )

    def _one(self, axis: Axis, load: float, name: str, *, part: tuple[int, int]) -> SavedRun:
        saved = self.run(
            self.target,
            _at_load(self.profile, axis, load),
            directory=self.directory / name,
            title=f"{self.profile.name}, {load_words(axis, load)}",
            on_progress=part_of(self.on_progress, *part),
            reuse=True,
        )
        self.version = saved.run.model_version
        return not_interrupted(saved)


def _check_arrivals(profile: Profile, ladder: Ladder) -> None:
    load = profile.load
    if ladder.axis == "rate" and isinstance(load, OpenLoad) and isinstance(load.arrivals, TraceArrivals):
        raise ProfileError(
            "a trace has its own rate and cannot be swept over others",
            hint="give the profile other arrivals, or measure the trace at several `speed`s",
        )


def _check_directory(directory: Path, target: Target, profile: Profile, ladder: Ladder) -> None:
    """Return when what is there may be gone on with: nothing, or points of the same model and profile over the same axis."""
    if not (directory / SWEEP_FILE).exists():
        return
    there = load_sweep(directory)
    before = {"model": there.model, "profile": dict(there.profile), "axis": there.axis}
    wanted = {"model": target.model, "profile": profile.as_kept(), "axis": ladder.axis}
    changed = [key for key in wanted if before[key] != wanted[key]]
    if changed:
        raise ResultsError(
            f"{directory} holds a sweep with another {' and another '.join(changed)}",
            hint="give another directory; the same command goes on with the sweep that is there",
        )


def load_words(axis: Axis, load: float) -> str:
    """A load as people say it."""
    return f"{load:g} at a time" if axis == "concurrency" else f"{load:g} requests/s"


def _at_load(profile: Profile, axis: Axis, load: float) -> Profile:
    """The profile with another load; what it says of arrivals or of the generator stays, where it applies."""
    there = profile.load
    new: ClosedLoad | OpenLoad
    if axis == "concurrency":
        generator = there.generator if isinstance(there, ClosedLoad) else "enginesmith"
        new = ClosedLoad(concurrency=int(load), generator=generator)
    else:
        kept = there.model_dump() if isinstance(there, OpenLoad) else {"loop": "open"}
        new = OpenLoad.model_validate(kept | {"rate_per_s": load, "capacity_factor": None})
    return profile.model_copy(update={"load": new})


def _point(saved: SavedRun, load: float, axis: Axis, name: str) -> Point:
    figures = saved.run.figures
    return Point(
        load=load,
        name=load_words(axis, load),
        directory=name,
        void=unusable(saved),
        slo_met=saved.run.slo_met,
        slo=saved.run.slo,
        offered_per_s=figures.offered_per_s,
        throughput_per_s=figures.requests_per_s,
        output_tokens_per_s=figures.output_tokens_per_s,
        mean_ms=_quantile(figures.latency_ms, "mean"),
        p50_ms=_quantile(figures.latency_ms, "p50"),
        p90_ms=_quantile(figures.latency_ms, "p90"),
        p99_ms=_quantile(figures.latency_ms, "p99"),
        ttft_p50_ms=_quantile(figures.ttft_ms, "p50"),
        ttft_p99_ms=_quantile(figures.ttft_ms, "p99"),
        good_per_s=figures.good_per_s,
        errors=figures.errors,
    )


def _quantile(times: Quantiles | None, name: str) -> float | None:
    found: float | None = getattr(times, name, None)
    return found


def _has_slo(profile: Profile) -> bool:
    slo = profile.slo
    return any(
        limit is not None for limit in (slo.p99_latency_ms, slo.ttft_ms, slo.itl_ms, slo.min_tokens_per_s)
    )


def _highest_within(points: Sequence[Point]) -> Point | None:
    """The highest load that fits below the lowest that does not."""
    broken = min((point.load for point in points if point.fits is False), default=float("inf"))
    within = [point for point in points if point.fits and point.load < broken]
    return max(within, key=lambda point: point.load, default=None)


def _save(directory: Path, found: Sweep) -> None:
    write_document(directory / SWEEP_FILE, FORMAT, dataclasses.asdict(found))

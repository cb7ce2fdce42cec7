"""Compares saved runs: one of each, or several of each.

One run of each is judged by resampling stretches of its own time; several are judged by how they differ among
themselves. ``_live`` makes the runs itself, side by side, which is the better question to ask.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from enginesmith_client.perf._errors import ResultsError
from enginesmith_client.perf._run_files import Run, SavedRun
from enginesmith_client.perf._saved_files import timestamp
from enginesmith_client.perf.compare._bootstrap import BlockRatio, Estimator, TwoSampleRatio
from enginesmith_client.perf.compare._comparison import CompareOptions, Comparison, Side, Verdict
from enginesmith_client.perf.compare._series import quantile_of, series_of
from enginesmith_client.perf.compare._verdicts import (
    GUARD_SAMPLES,
    Values,
    error_totals,
    errors_verdict,
    judged,
    metrics_of,
    overall,
    rounds_hint,
)
from enginesmith_client.perf.many._many_runs import unusable

MIN_RUNS = 4
"""Of each side, for several runs: fewer say nothing about how runs differ."""
BLOCK_RESAMPLES = 2000
_BLOCKS = "moving-block bootstrap over time (20 blocks of 1/20 of the window, 2000 resamples), symmetric"
_RUNS = "studentized bootstrap over runs, not paired, symmetric"
_SAME_PROFILE = ("requests", "load", "start", "seed")
_ONE_RUN = (
    "one run of each cannot show how runs differ from one another: a restart or another hour may explain what is seen; "
    "compare the two live, or give several runs of each"
)


def compare_saved(
    a: SavedRun | Sequence[SavedRun],
    b: SavedRun | Sequence[SavedRun],
    *,
    options: CompareOptions | None = None,
    force: bool = False,
) -> Comparison:
    """B against A, from what is on disk: one run of each, or at least four of each.

    Args:
        force: compare also what was measured in different ways; every difference is a warning then.

    Raises:
        ResultsError: the runs cannot be compared, or their records cannot be read.
    """
    options = options or CompareOptions()
    runs_a, runs_b = _as_runs(a), _as_runs(b)
    _check_counts(len(runs_a), len(runs_b))
    differences = _differences([*runs_a, *runs_b])
    if differences and not force:
        raise ResultsError(
            f"the runs were not measured in the same way: {'; '.join(differences)}",
            hint="measure them with the same profile on the same machine; --force compares them all the same",
        )
    single = len(runs_a) == 1
    return conclude(
        runs_a,
        runs_b,
        sides=(side_of(runs_a), side_of(runs_b)),
        estimator=_block_estimator(runs_a[0], runs_b[0], options) if single else _run_estimator(options),
        options=options,
        kind="saved",
        method=_BLOCKS if single else _RUNS,
        warnings=[*differences, *([_ONE_RUN] if single else [])],
        void=[*_void("A", runs_a), *_void("B", runs_b)],
        repeats=(_whole_s(runs_a[0]), "seconds of measuring") if single else (len(runs_a), "runs of each"),
    )


def conclude(
    runs_a: Sequence[SavedRun],
    runs_b: Sequence[SavedRun],
    *,
    sides: tuple[Side, Side],
    estimator: Callable[[Values], Estimator | None],
    options: CompareOptions,
    kind: Literal["live", "saved"],
    method: str,
    warnings: Sequence[str],
    void: Sequence[str],
    repeats: tuple[int, str],
) -> Comparison:
    """The comparison of runs that may be compared. ``repeats``: what more of would narrow the intervals, and its unit."""
    side_a, side_b = sides
    values, unmeasured = _values(runs_a, runs_b)
    metrics = () if void else judged(values, estimator, options=options)
    errors = errors_verdict(side_a, side_b, confidence=options.confidence)
    verdict: Verdict = "inconclusive"
    hint = ""
    if side_b.requests and side_b.failed == side_b.requests and side_a.failed < side_a.requests:
        verdict, words = "worse", f"B is worse: {errors[1]}"
    elif void:
        words = f"Void: {void[0]}"
        hint = (
            "measure again what is void"
            if kind == "saved"
            else "measure again into another directory; longer rounds (--round-s) have more answers"
        )
    else:
        verdict, words = overall(metrics, errors)
        if verdict == "inconclusive":
            hint = rounds_hint(metrics, rounds=repeats[0], unit=repeats[1])
    return Comparison(
        title=f"{side_b.title} against {side_a.title}",
        kind=kind,
        a=side_a,
        b=side_b,
        verdict=verdict,
        words=words,
        hint=hint,
        metrics=metrics,
        warnings=(*warnings, *_check_warnings(runs_a, runs_b), *unmeasured),
        void=tuple(void),
        method=method,
        options=options,
        profile=runs_a[0].run.profile,
        started=timestamp(),
    )


def _void(name: str, runs: Sequence[SavedRun]) -> list[str]:
    return [
        f"{name} ({saved.directory.name}) cannot be used: {reason}"
        for saved in runs
        if (reason := unusable(saved))
    ]


def _as_runs(given: SavedRun | Sequence[SavedRun]) -> list[SavedRun]:
    return [given] if isinstance(given, SavedRun) else list(given)


def _check_counts(count_a: int, count_b: int) -> None:
    if (count_a, count_b) != (1, 1) and min(count_a, count_b) < MIN_RUNS:
        raise ResultsError(
            f"{count_a} runs of A and {count_b} of B cannot be compared: give one of each, or at least {MIN_RUNS} of each"
        )


def _differences(saved: Sequence[SavedRun]) -> list[str]:
    """What was not the same in all runs and would be taken for a difference of the models."""
    first = saved[0].run
    found: dict[str, None] = {}
    for other in saved[1:]:
        run = other.run
        for key in _SAME_PROFILE:
            words = _changed(f"profile {key}", first.profile.get(key), run.profile.get(key))
            found |= dict.fromkeys(words)
        found |= dict.fromkeys(_changed("machine", first.machine, run.machine))
        found |= dict.fromkeys(_changed("generator", first.generator, run.generator))
        kinds = first.workload.get("kind"), run.workload.get("kind")
        found |= dict.fromkeys(_changed("requests of kind", *kinds))
        found |= dict.fromkeys(_rates_differ(first, run))
    return list(found)


def _changed(name: str, a: Any, b: Any) -> list[str]:
    """One line for each value that differs, by its path."""
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return [
            line
            for key in dict.fromkeys([*a, *b])
            for line in _changed(f"{name}.{key}", a.get(key), b.get(key))
        ]
    return [] if a == b else [f"{name}: {a!r} and {b!r}"]


def _rates_differ(a: Run, b: Run) -> list[str]:
    """An open loop whose rate is a multiple of what each model can do loads the two differently."""
    offered = a.figures.offered_per_s, b.figures.offered_per_s
    load = a.profile.get("load")
    if not isinstance(load, Mapping) or load.get("capacity_factor") is None:
        return []
    if offered[0] and offered[1] and abs(offered[1] / offered[0] - 1) > 0.02:
        return [f"offered requests per second: {offered[0]:.4g} and {offered[1]:.4g}"]
    return []


def _check_warnings(runs_a: Sequence[SavedRun], runs_b: Sequence[SavedRun]) -> list[str]:
    """What the runs said of themselves short of being void; each rule once for each side."""
    lines: dict[tuple[str, str], str] = {}
    for side, runs in (("A", runs_a), ("B", runs_b)):
        for saved in runs:
            for check in saved.run.checks:
                if check.severity == "warning":
                    lines.setdefault((side, check.rule), f"{side}, {check.rule}: {check.words}")
    return list(lines.values())


def side_of(runs: Sequence[SavedRun]) -> Side:
    """What all runs of one side were and how many of their requests failed, also in runs whose times are not used."""
    run = runs[0].run
    figures = [saved.run.figures for saved in runs]
    return Side(
        title=f"{run.model} version {run.model_version}" if run.model_version else run.model,
        model=run.model,
        model_version=run.model_version,
        url=run.url,
        requests=sum(one.requests for one in figures),
        errors=error_totals(figures),
        runs=tuple(saved.directory.name for saved in runs),
    )


def _values(runs_a: Sequence[SavedRun], runs_b: Sequence[SavedRun]) -> tuple[list[Values], list[str]]:
    """Every metric that all runs have, and a line for each deciding one that some lack."""
    figures_a, figures_b = ([saved.run.figures for saved in runs] for runs in (runs_a, runs_b))
    everyone = [*figures_a, *figures_b]
    streaming = all(figures.ttft_ms and figures.output_tokens_per_s for figures in everyone)
    guarded = all(
        sum(one.latency_ms.count for one in side if one.latency_ms) >= GUARD_SAMPLES
        for side in (figures_a, figures_b)
    )
    closed = everyone[0].offered_per_s is None
    found, lines = [], []
    for metric in metrics_of(closed=closed, streaming=streaming, guarded=guarded):
        a, b = (tuple(metric.value(one) or 0.0 for one in side) for side in (figures_a, figures_b))
        if all(value > 0 for value in (*a, *b)):
            found.append(Values(metric, a, b))
        elif metric.role != "informational":
            lines.append(f"{metric.title} was not measured in every run and does not decide")
    return found, lines


def _run_estimator(options: CompareOptions) -> Callable[[Values], Estimator | None]:
    return lambda item: TwoSampleRatio(item.a, item.b, seed=options.seed, resamples=options.resamples)


def _whole_s(saved: SavedRun) -> int:
    return max(round(saved.run.figures.duration_s), 1)


def _block_estimator(
    a: SavedRun, b: SavedRun, options: CompareOptions
) -> Callable[[Values], Estimator | None]:
    """From the records. What single requests do not have (memory, goodput) has no interval and is not compared."""
    records = [(saved.run, saved.records()) for saved in (a, b)]

    def estimator(item: Values) -> Estimator | None:
        name = item.metric.name
        series = [series_of(name, run, of_run) for run, of_run in records]
        if series[0] is None or series[1] is None:
            return None
        return BlockRatio(
            series[0],
            series[1],
            quantile=quantile_of(name),
            seed=options.seed,
            resamples=BLOCK_RESAMPLES,
        )

    return estimator

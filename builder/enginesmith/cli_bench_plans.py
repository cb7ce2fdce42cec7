"""The three things that ``bench`` can do with a target: one run, a sweep of loads, a suite of scenarios."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from enginesmith.cli_bench_output import Outcome, run_tables, status_of, status_words
from enginesmith.cli_bench_profile import LoadFlags, overridden

if TYPE_CHECKING:
    from enginesmith_client.perf._profile import Profile
    from enginesmith_client.perf._progress import OnProgress
    from enginesmith_client.perf._run_files import SavedRun
    from enginesmith_client.perf._target import Target

Plan: TypeAlias = "Callable[[Target, OnProgress], Outcome]"
"""Measures, and says what came out."""


def with_parquet(plan: Plan, directory: Path) -> Plan:
    """``plan``, and then the records of every run in ``directory`` as Parquet too.

    Raises:
        ToolError: there is no pyarrow.
    """
    from enginesmith_client.perf._parquet import require_pyarrow, write_parquet
    from enginesmith_client.perf._run_files import RUN_FILE, load_run

    require_pyarrow()

    def measure(target: Target, on_progress: OnProgress) -> Outcome:
        outcome = plan(target, on_progress)
        for path in sorted(directory.rglob(RUN_FILE)):
            write_parquet(load_run(path.parent))
        return outcome

    return measure


def plan_run(profile: Profile, *, directory: Path, compare_to: Path | None) -> Plan:
    """One run; compared with the one in ``compare_to``, if that is given.

    Raises:
        ResultsError: there is no run in ``compare_to``.
    """
    from enginesmith_client.perf._run import run_profile
    from enginesmith_client.perf._run_files import load_run

    before = load_run(compare_to) if compare_to else None

    def measure(target: Target, on_progress: OnProgress) -> Outcome:
        saved = run_profile(target, profile, directory=directory, on_progress=on_progress)
        outcome = Outcome(status_of(saved.run), tuple(status_words(saved.run)), tuple(run_tables(saved.run)))
        return outcome if before is None else _compared(outcome, before, saved)

    return measure


def _compared(outcome: Outcome, before: SavedRun, after: SavedRun) -> Outcome:
    """``outcome`` joined by what a comparison with an earlier run says."""
    from enginesmith.cli_compare import comparison_tables, comparison_words
    from enginesmith_client.perf._errors import ResultsError
    from enginesmith_client.perf.compare._comparison import EXIT_CODES
    from enginesmith_client.perf.compare._saved import compare_saved

    try:
        comparison = compare_saved(before, after)
    except ResultsError as error:
        # The run itself is good, and its figures must be seen.
        return replace(outcome, status=1, reasons=(*outcome.reasons, f"not compared: {error}"))
    return replace(
        outcome,
        status=outcome.status or EXIT_CODES[comparison.verdict],
        reasons=(*outcome.reasons, *comparison_words(comparison)),
        shown=(*outcome.shown, *comparison_tables(comparison)),
    )


def plan_sweep(text: str, profile: Profile, *, directory: Path) -> Plan:
    """One profile at several loads.

    Raises:
        ProfileError: ``text`` names no loads.
    """
    from enginesmith.cli_bench_many import sweep_status, sweep_tables
    from enginesmith_client.perf.many._ladder import ladder_from_text
    from enginesmith_client.perf.many._sweep import sweep

    ladder = ladder_from_text(text)

    def measure(target: Target, on_progress: OnProgress) -> Outcome:
        found = sweep(target, profile, ladder, directory=directory, on_progress=on_progress)
        return Outcome(sweep_status(found), found.words, tuple(sweep_tables(found)))

    return measure


def plan_suite(name: str, flags: LoadFlags, *, only: tuple[str, ...], directory: Path) -> Plan:
    """All scenarios of a suite that fit the model, or those in ``only``, each with what ``flags`` override.

    Raises:
        ProfileError: there is no such suite or scenario.
    """
    from enginesmith.cli_bench_many import suite_runs, suite_tables
    from enginesmith_client.perf.many._suite import load_suite, run_suite

    suite = load_suite(name)

    def measure(target: Target, on_progress: OnProgress) -> Outcome:
        found = run_suite(
            target,
            suite,
            directory=directory,
            on_progress=on_progress,
            only=only,
            adjust=lambda profile: overridden(profile, flags),
        )
        runs = suite_runs(found, directory)
        failed = [
            f"{entry.title}: failed: {entry.reason}" for entry in found.scenarios if entry.status == "failed"
        ]
        reasons = [*failed, *(words for run in runs.values() for words in status_words(run))]
        if not runs:
            reasons.append("nothing was measured: no scenario was both fit for the model and able to run")
        return Outcome(1 if reasons else 0, tuple(reasons), tuple(suite_tables(found, runs)))

    return measure

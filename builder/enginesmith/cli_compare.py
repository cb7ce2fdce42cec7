"""The verbs ``compare``, which of two is better, and ``bench-report``, results again as a page. stdout is data, stderr is progress."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from enginesmith.cli_bench_output import INTERRUPTED, Outcome, differing_figures, tell
from enginesmith.cli_bench_profile import LoadFlags, profile_from_flags
from enginesmith.cli_bench_target import (
    ServerFlags,
    client_errors,
    model_and_version,
    require_served,
    served,
    server_options,
)
from enginesmith.cli_options import JSON_OPTION, POSITIVE, FiniteRange
from enginesmith.errors import OperatorError

if TYPE_CHECKING:
    from rich.table import Table

    from enginesmith_client.perf._run_files import SavedRun
    from enginesmith_client.perf.compare._comparison import Comparison, MetricComparison

_RUN_FILE = "run.json"
_SHOWN_REASONS = 4


@dataclass(frozen=True)
class CompareRequest:
    """What the user asked for."""

    a: str
    b: str
    load: LoadFlags
    rounds: int | None
    round_s: float | None
    min_effect_percent: float
    force: bool
    directory: Path


@click.command()
@click.argument("a", metavar="A")
@click.argument("b", metavar="B")
@click.option(
    "--profile", metavar="FILE|standard", help="What both are measured with. [default: closed, 1 at a time]"
)
@click.option("--closed", type=click.IntRange(min=1), metavar="N", help="Closed loop: N requests at a time.")
@click.option(
    "--open",
    "open_per_s",
    type=POSITIVE,
    metavar="RATE",
    help="Open loop: so many requests a second.",
)
@click.option("--rounds", type=int, metavar="N", help="Pairs of runs, 6 or more. [default: 12]")
@click.option(
    "--round-s",
    type=POSITIVE,
    help="Measured time of one run. [default: window_s of the profile]",
)
@click.option(
    "--min-effect-percent",
    type=FiniteRange(min=0, max=100, min_open=True, max_open=True),
    default=2.0,
    show_default=True,
    help="Smaller differences do not matter.",
)
@click.option(
    "--force", is_flag=True, help="Compare saved runs also when they were measured in different ways."
)
@server_options
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="DIR",
    help="Where results are kept; an interrupted comparison continues there. [default: bench/compare-TIME]",
)
@JSON_OPTION
def compare(
    a: str,
    b: str,
    *,
    profile: str | None,
    closed: int | None,
    open_per_s: float | None,
    rounds: int | None,
    round_s: float | None,
    min_effect_percent: float,
    force: bool,
    url: str | None,
    metrics_url: str | None,
    repository: Path | None,
    server: str,
    out: Path | None,
    as_json: bool,
) -> int:
    """Say whether B is better than A, the same, worse, or whether nobody can tell.

    A and B are directories of saved runs, or models: NAME or NAME:VERSION of one server, measured in turns.
    Exit status: 0 better or same, 1 worse, 5 inconclusive.

    \b
    Examples:
      enginesmith compare smollm2-135m-int8-wo smollm2-135m-int4-awq --repository model_repository --closed 4
      enginesmith compare smollm2-135m-int4-awq:3 smollm2-135m-int4-awq:4 --profile standard --rounds 16
      enginesmith compare bench/released bench/candidate --min-effect-percent 5 --json
    """
    load = LoadFlags(profile=profile, closed=closed, open_per_s=open_per_s)
    directory = out or Path("bench") / f"compare-{datetime.now(UTC):%Y%m%dT%H%M%SZ}"
    request = CompareRequest(a, b, load, rounds, round_s, min_effect_percent, force, directory)
    flags = ServerFlags(url, metrics_url, repository, server)
    with client_errors():
        saved = [Path(side) for side in (a, b) if Path(side).is_dir()]
        try:
            comparison = (
                _compare_saved(request, *saved, flags=flags)
                if len(saved) == 2
                else _compare_live(request, flags)
            )
        except KeyboardInterrupt:
            click.echo(
                f"interrupted; finished rounds are kept, the same command with --out {directory} continues",
                err=True,
            )
            return INTERRUPTED
        outcome = Outcome(
            comparison.exit_code,
            tuple(comparison_words(comparison)),
            tuple(comparison_tables(comparison)),
        )
        return tell(outcome, directory, as_json=as_json)


def comparison_words(comparison: Comparison) -> Iterator[str]:
    """The verdict and what goes with it, a line each."""
    yield f"{comparison.verdict}: {comparison.words}"
    if comparison.hint:
        yield f"  hint: {comparison.hint}"
    yield from (f"void: {reason}" for reason in comparison.void[1:_SHOWN_REASONS])
    if comparison.void[_SHOWN_REASONS:]:
        yield f"void: {len(comparison.void) - _SHOWN_REASONS} more; all of them are in its report"
    yield from (f"warning: {warning}" for warning in comparison.warnings)


def comparison_tables(comparison: Comparison) -> Iterator[Table | str]:
    """Every figure of B against that of A, with its interval."""
    from rich.table import Table

    yield f"B: {comparison.b.title}, against A: {comparison.a.title}"
    if not comparison.metrics:
        return
    table = Table()
    for heading in ("figure", "A", "B", "B / A", "interval", "verdict", ""):
        table.add_column(heading, justify="right" if heading in ("A", "B", "B / A") else "left")
    for metric in comparison.metrics:
        table.add_row(*_cells(metric))
    yield table


def _cells(metric: MetricComparison) -> tuple[str, ...]:
    from enginesmith_client.perf._quantities import quantity
    from enginesmith_client.perf.report._comparison import UNITS

    role = {"primary": "decides", "guard": "can only say worse", "informational": "for information"}
    return (
        metric.title,
        quantity(metric.a, UNITS.get(metric.unit, "plain")),
        quantity(metric.b, UNITS.get(metric.unit, "plain")),
        f"{metric.ratio:.3f}",
        f"{metric.low:.3f} to {metric.high:.3f} ({metric.confidence:.1%})",
        metric.verdict,
        role[metric.role],
    )


def _compare_saved(request: CompareRequest, a: Path, b: Path, *, flags: ServerFlags) -> Comparison:
    from enginesmith_client.perf._saved_files import only_writer
    from enginesmith_client.perf.compare._comparison import COMPARISON_FILE, CompareOptions, save_comparison
    from enginesmith_client.perf.compare._saved import compare_saved

    live_only = {
        "--rounds": request.rounds,
        "--round-s": request.round_s,
        "--profile": request.load.profile,
        "--url": flags.url,
        "--repository": flags.repository,
    }
    given = [*(flag for flag, value in live_only.items() if value is not None), *request.load.load_named()]
    if given:
        raise click.UsageError(f"{given[0]} is about measuring; {a} and {b} are saved runs")
    comparison = compare_saved(
        _saved_runs(a),
        _saved_runs(b),
        options=CompareOptions(min_effect_percent=request.min_effect_percent),
        force=request.force,
    )
    with only_writer(request.directory, results_file=COMPARISON_FILE):
        save_comparison(request.directory, comparison)
    return comparison


def _saved_runs(directory: Path) -> SavedRun | Sequence[SavedRun]:
    """The run in ``directory``, else all runs in its directories."""
    from enginesmith_client.perf._run_files import load_run

    below = sorted(path.parent for path in directory.glob(f"*/{_RUN_FILE}"))
    if (directory / _RUN_FILE).exists() or not below:
        return load_run(directory)
    return [load_run(path) for path in below]


def _compare_live(request: CompareRequest, flags: ServerFlags) -> Comparison:
    from enginesmith_client.perf._terminal import live_display
    from enginesmith_client.perf.compare._comparison import CompareOptions
    from enginesmith_client.perf.compare._live import DEFAULT_ROUNDS, compare_live, require_rounds

    if request.force:
        raise click.UsageError("--force is about saved runs; A and B are models here")
    # The side that is not there first: it is more often the mistake than the directory beside it.
    for side in sorted((request.a, request.b), key=lambda side: Path(side).is_dir()):
        other_is_saved = Path(request.b if side == request.a else request.a).is_dir()
        if "/" in side or other_is_saved or Path(side).is_dir():
            raise click.UsageError(
                f"{side} is {'a directory' if Path(side).is_dir() else 'no directory'}: "
                "give two directories of saved runs, or two models"
            )
    rounds = request.rounds or DEFAULT_ROUNDS
    require_rounds(rounds)
    profile = profile_from_flags(request.load)
    options = CompareOptions(min_effect_percent=request.min_effect_percent)
    sides = [model_and_version(side) for side in (request.a, request.b)]
    with served(flags, sides) as target_of, live_display(sys.stderr) as on_progress:
        a, b = (target_of(*side) for side in sides)
        require_served(a, b)
        return compare_live(
            a,
            b,
            profile,
            directory=request.directory,
            rounds=rounds,
            round_s=request.round_s,
            options=options,
            on_progress=on_progress,
        )


@click.command("bench-report")
@click.argument("directory", type=click.Path(path_type=Path, file_okay=False))
@click.option(
    "--format",
    "form",
    type=click.Choice(["html", "md", "json"]),
    help="Print this on stdout. [default: write report.html and report.md into DIRECTORY]",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Write there instead of stdout.",
)
@JSON_OPTION
def bench_report(
    directory: Path, *, form: Literal["html", "md", "json"] | None, out: Path | None, as_json: bool
) -> None:
    """Render the results in DIRECTORY again, after computing every figure anew from its records.

    \b
    Examples:
      enginesmith bench-report bench/candidate
      enginesmith bench-report bench/candidate --format md > summary.md
      enginesmith bench-report bench/candidate --format html --out candidate.html
    """
    from enginesmith.cli_bench_output import page, write_pages
    from enginesmith_client.perf._saved_files import appearing

    if as_json and form not in (None, "json"):
        raise click.UsageError(f"--json and --format {form} contradict each other")
    form = "json" if as_json else form
    if out and form is None:
        raise click.UsageError("--out needs --format: html, md or json")
    with client_errors():
        _require_same_figures(directory)
        if form is None:
            click.echo(f"written: {', '.join(str(path) for path in write_pages(directory))}", err=True)
        elif out:
            text = page(directory, form)
            with appearing(out) as staging:
                staging.write_text(text, encoding="utf-8")
        else:
            click.echo(page(directory, form), nl=False)


def _require_same_figures(directory: Path) -> None:
    """Return when every saved figure is what its records and samples give.

    Raises:
        ResultsError: records or samples cannot be read.
        OperatorError: a figure is another; names it.
    """
    from enginesmith_client.perf._run import recompute
    from enginesmith_client.perf._run_files import load_run

    for path in sorted(directory.rglob(_RUN_FILE)):
        saved = load_run(path.parent)
        for name, written, computed in differing_figures(saved.run.figures, recompute(saved)):
            raise OperatorError(
                f"{path}: {name} is {written}, but its records give {computed}",
                hint="run.json or the records were changed after the run, or another version wrote them: measure again",
            )


VERBS = (compare, bench_report)

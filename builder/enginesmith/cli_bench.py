"""The verb ``bench``: load against a served model, its figures, and whether they may be believed.

Each measures through the harness of the client distribution and prints. stdout is data, stderr is progress.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

import click

from enginesmith.cli_bench_output import INTERRUPTED, tell
from enginesmith.cli_bench_plans import Plan, plan_run, plan_suite, plan_sweep, with_parquet
from enginesmith.cli_bench_profile import LoadFlags, profile_from_flags
from enginesmith.cli_bench_target import (
    ServerFlags,
    client_errors,
    model_and_version,
    require_served,
    served,
    server_options,
)
from enginesmith.cli_options import JSON_OPTION, POSITIVE


@dataclass(frozen=True)
class BenchRequest:
    """What the user asked for."""

    model: str
    load: LoadFlags
    sweep: str | None
    suite: str | None
    only: tuple[str, ...]
    directory: Path
    parquet: bool
    compare_to: Path | None
    as_json: bool


def load_options(command: Callable[..., int]) -> Callable[..., int]:
    """The options that make ``LoadFlags``."""
    for option in (
        click.option("--output-tokens", type=click.IntRange(min=1), help="Of every answer."),
        click.option("--prompt-tokens", type=click.IntRange(min=1), help="Of every prompt."),
        click.option("--duration-s", type=POSITIVE, help="Longest measurement, without warm-up."),
        click.option("--price", "price_per_hour", type=POSITIVE, metavar="PER_HOUR", help="Of the machine."),
        click.option(
            "--slo",
            multiple=True,
            metavar="KEY=VALUE|SPEC",
            help="A promise to keep, e.g. ttft_ms=500, or those of a spec (.yaml). May be repeated.",
        ),
        click.option(
            "--generator",
            type=click.Choice(["enginesmith", "perf_analyzer"]),
            help="Who sends the requests of a closed loop. [default: enginesmith]",
        ),
        click.option(
            "--arrivals",
            type=click.Choice(["poisson", "constant", "burst"]),
            help="How the requests of an open loop come. [default: poisson]",
        ),
        click.option(
            "--open",
            "open_per_s",
            type=POSITIVE,
            metavar="RATE",
            help="Open loop: so many requests a second.",
        ),
        click.option(
            "--closed", type=click.IntRange(min=1), metavar="N", help="Closed loop: N requests at a time."
        ),
        click.option(
            "--profile", metavar="FILE|standard", help="What to measure; other options override its keys."
        ),
    ):
        command = option(command)
    return command


@click.command()
@click.argument("model", metavar="MODEL[:VERSION]")
@load_options
@click.option(
    "--sweep",
    metavar="concurrency|rate=VALUES|auto",
    help="Measure at several loads: concurrency=1,2,4 or rate=10,20,40; auto looks for the limit by itself.",
)
@click.option("--suite", metavar="standard|DIR", help="Measure all scenarios of a suite that fit the model.")
@click.option("--only", multiple=True, metavar="SCENARIO", help="Of the suite only this. May be repeated.")
@server_options
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="DIR",
    help="Where results are kept; a sweep or suite continues there. [default: bench/MODEL-TIME]",
)
@click.option(
    "--compare-to",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="DIR",
    help="Compare with an earlier run; its exit status joins in.",
)
@click.option("--parquet", is_flag=True, help="Write the records as Parquet too; needs pyarrow.")
@JSON_OPTION
def bench(
    model: str,
    *,
    profile: str | None,
    closed: int | None,
    open_per_s: float | None,
    arrivals: Literal["poisson", "constant", "burst"] | None,
    generator: Literal["enginesmith", "perf_analyzer"] | None,
    slo: tuple[str, ...],
    price_per_hour: float | None,
    duration_s: float | None,
    prompt_tokens: int | None,
    output_tokens: int | None,
    sweep: str | None,
    suite: str | None,
    only: tuple[str, ...],
    url: str | None,
    metrics_url: str | None,
    repository: Path | None,
    server: str,
    out: Path | None,
    compare_to: Path | None,
    parquet: bool,
    as_json: bool,
) -> int:
    """Measure MODEL under load: throughput, latencies, tokens, goodput, and whether the numbers may be believed.

    Exit status: 0 measured and the SLO kept, 1 SLO missed, void or nothing measured, 5 inconclusive (with
    --compare-to), 130 interrupted (results are kept).

    \b
    Examples:
      enginesmith bench smollm2-135m-int4-awq --profile standard --slo ttft_ms=2000
      enginesmith bench smollm2-135m-int4-awq --open 4 --duration-s 60 --repository model_repository
      enginesmith bench minilm-l6-int8-text --sweep concurrency=auto --slo p99_latency_ms=50
      enginesmith bench smollm2-135m-int4-awq --suite standard --only chat-short --only overload-2x
    """
    flags = LoadFlags(
        profile=profile,
        closed=closed,
        open_per_s=open_per_s,
        arrivals=arrivals,
        generator=generator,
        slo=slo,
        price_per_hour=price_per_hour,
        duration_s=duration_s,
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
    )
    directory = out or Path("bench") / f"{_file_name(model)}-{datetime.now(UTC):%Y%m%dT%H%M%SZ}"
    request = BenchRequest(model, flags, sweep, suite, only, directory, parquet, compare_to, as_json)
    _require_one_kind(request)
    with client_errors():
        return _measure(request, ServerFlags(url, metrics_url, repository, server))


def _file_name(model: str) -> str:
    """``MODEL:VERSION`` as a part of a file's name: nobody can know what a server calls its models."""
    return re.sub(r"[^\w.-]", "-", model).lstrip(".")


def _require_one_kind(request: BenchRequest) -> None:
    if request.sweep and request.suite:
        raise click.UsageError("--sweep and --suite are two kinds of measurement: give one of them")
    if request.only and not request.suite:
        raise click.UsageError("--only chooses scenarios of a suite: give --suite too")
    if request.suite and request.load.profile:
        raise click.UsageError("every scenario of a suite has its own profile: leave out --profile")
    if request.suite and request.load.load_named():
        raise click.UsageError(
            f"every scenario of a suite has its own load: leave out {' and '.join(request.load.load_named())}"
        )
    if request.compare_to and (request.sweep or request.suite):
        raise click.UsageError("--compare-to compares one run: leave out --sweep and --suite")


def _measure(request: BenchRequest, server: ServerFlags) -> int:
    """The exit status. What can be known to be wrong is found before a server is started."""
    from enginesmith_client.perf._terminal import live_display

    plan = _planned(request)
    if request.parquet:
        plan = with_parquet(plan, request.directory)
    target = model_and_version(request.model)
    try:
        with served(server, [target]) as target_of:
            measured = target_of(*target)
            require_served(measured)
            with live_display(sys.stderr) as on_progress:
                outcome = plan(measured, on_progress)
            return tell(outcome, request.directory, as_json=request.as_json)
    except KeyboardInterrupt:
        kept = request.directory.exists()
        click.echo(
            f"interrupted; {f'what is finished is kept in {request.directory}' if kept else 'nothing was measured'}",
            err=True,
        )
        if kept and (request.sweep or request.suite):
            finished = any((request.directory / name).exists() for name in ("sweep.json", "suite.json"))
            shown = (
                f"; enginesmith bench-report {request.directory} shows what is finished" if finished else ""
            )
            click.echo(f"  hint: the same command with --out {request.directory} continues{shown}", err=True)
        return INTERRUPTED


def _planned(request: BenchRequest) -> Plan:
    if request.suite:
        return plan_suite(request.suite, request.load, only=request.only, directory=request.directory)
    if request.sweep:
        flags = request.load.of_sweep(request.sweep.partition("=")[0])
        return plan_sweep(request.sweep, profile_from_flags(flags), directory=request.directory)
    profile = profile_from_flags(request.load)
    return plan_run(profile, directory=request.directory, compare_to=request.compare_to)


VERBS = (bench,)

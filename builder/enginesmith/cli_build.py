"""Verbs that make engines: ``plan``, ``build``, ``publish``, and their store's ``gc``; and ``schema``.

Each loads what it needs when it runs. stdout is data, stderr is progress.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from enginesmith.cli_options import (
    ENGINE_DIR_OPTION,
    JSON_OPTION,
    SERVER_OPTION,
    SPEC_ARGUMENT,
    TARGETS_OPTION,
    VARIANTS_OPTION,
    plain,
    print_json,
)
from enginesmith.errors import EnginesmithError, GateError, OperatorError, SpecError
from enginesmith.steps import PACKAGES, StepName

if TYPE_CHECKING:
    from rich.table import Table

    from enginesmith.build import BuildResult
    from enginesmith.plan import Plan
    from enginesmith.publish.local import Publication
    from enginesmith.report import BuildReport
    from enginesmith.store import Artifact, ArtifactStore


@click.command()
@SPEC_ARGUMENT
@VARIANTS_OPTION
@TARGETS_OPTION
@click.option("--explain", is_flag=True, help="Say why each step would run.")
@JSON_OPTION
@click.pass_obj
def plan(
    store_root: Path,
    spec: Path,
    variants: tuple[str, ...],
    targets: tuple[str, ...],
    *,
    explain: bool,
    as_json: bool,
) -> None:
    """Show the steps of SPEC: which are cached, which would run. Runs nothing.

    \b
    Examples:
      enginesmith plan models/smollm2-135m.yaml
      enginesmith plan models/smollm2-135m.yaml --explain
      enginesmith plan models/smollm2-135m.yaml --json | jq '.steps[] | select(.cached | not)'
    """
    from dataclasses import asdict

    store = open_store(store_root)
    made = make_plan_of(spec, store, Choice(variants, targets))
    _show_advice([made])
    explanations = made.explain(store)
    if as_json:
        print_json({"name": made.spec.name, "steps": [asdict(step) for step in explanations]})
        return
    kinds, places = (max(len(getattr(step, what)) for step in explanations) for what in ("kind", "place"))
    for step in explanations:
        click.echo(
            f"{step.kind:<{kinds}}  {step.place or '-':<{places}}  {step.key[:12]}  {'cached' if step.cached else 'will run'}"
        )
        for reason in step.reasons if explain else ():
            click.echo(f"{'':<{kinds + places + 4}}{reason}")
    waiting = sum(not step.cached for step in explanations)
    click.echo(f"{len(explanations)} steps, {waiting} will run", err=True)


@click.command()
@click.argument("specs", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="SPEC...")
@VARIANTS_OPTION
@TARGETS_OPTION
@click.option(
    "--publish",
    "repository",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Publish into this model repository.",
)
@click.option(
    "--jobs",
    type=click.IntRange(1, 64),
    default=1,
    show_default=True,
    help="Steps that run at the same time.",
)
@click.option(
    "--keep-going",
    is_flag=True,
    help="After a failure, go on with the steps that do not need the failed one.",
)
@ENGINE_DIR_OPTION
@SERVER_OPTION
@JSON_OPTION
@click.pass_obj
def build(
    store_root: Path,
    specs: tuple[Path, ...],
    variants: tuple[str, ...],
    targets: tuple[str, ...],
    repository: Path | None,
    jobs: int,
    *,
    keep_going: bool,
    engine_dir: Path | None,
    server: str,
    as_json: bool,
) -> None:
    """Build and verify every variant of each SPEC on every target; steps that are in the store already do not run.

    A build that was killed is resumed by the same command.

    \b
    Examples:
      enginesmith build models/smollm2-135m.yaml
      enginesmith build models/smollm2-135m.yaml --variant int4-awq --publish model_repository
      enginesmith build models/llama-3-8b.yaml --variant fp8 --target tensorrt-llm --engine-dir engines
      enginesmith build models/*.yaml --keep-going --jobs 2 --json > report.json
    """
    from enginesmith.report import build_report

    store = open_store(store_root)
    choice = Choice(variants, targets, server=server, engine_dir=engine_dir)
    plans = [make_plan_of(spec, store, choice) for spec in specs]
    _show_advice(plans)
    if repository is not None:
        refuse_collisions(plans)
    result = build_shown(plans, store, jobs=jobs, keep_going=keep_going)
    reports = [build_report(made, result.artifacts) for made in plans]
    publications = [
        publication
        for made in plans
        if repository is not None
        for publication in _publish(made, result.artifacts, repository, skip_incomplete=keep_going)
    ]
    if as_json:
        print_json(
            {
                "reports": [report.as_json() for report in reports],
                "published": [plain(publication) for publication in publications],
                "errors": [str(error) for error in result.errors],
            }
        )
    else:
        print_tables([report.as_table() for report in reports])
    for publication in publications:
        click.echo(_publication_line(publication), err=True)
    if result.errors:
        listed = "\n".join(f"- {error}" for error in result.errors)
        raise _SeveralFailedError(
            f"{len(result.errors)} steps failed:\n{listed}", exit_code=result.errors[0].exit_code
        )


@click.command()
@SPEC_ARGUMENT
@VARIANTS_OPTION
@TARGETS_OPTION
@click.option(
    "--to",
    "repository",
    required=True,
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="The model repository.",
)
@ENGINE_DIR_OPTION
@SERVER_OPTION
@JSON_OPTION
@click.pass_obj
def publish(
    store_root: Path,
    spec: Path,
    variants: tuple[str, ...],
    targets: tuple[str, ...],
    repository: Path,
    *,
    engine_dir: Path | None,
    server: str,
    as_json: bool,
) -> None:
    """Publish the variants of SPEC that are built, verified and rehearsed into a model repository. Builds nothing.

    \b
    Examples:
      enginesmith publish models/smollm2-135m.yaml --to model_repository
      enginesmith publish models/smollm2-135m.yaml --variant fp8 --to /srv/models
    """
    store = open_store(store_root)
    made = make_plan_of(spec, store, Choice(variants, targets, server=server, engine_dir=engine_dir))
    refuse_collisions([made])
    found = {step.key: store.get(step.key) for step in made.steps}
    artifacts = {key: artifact for key, artifact in found.items() if artifact is not None}
    publications = _publish(made, artifacts, repository, skip_incomplete=False)
    if as_json:
        print_json({"published": [plain(publication) for publication in publications]})
        return
    for publication in publications:
        click.echo(_publication_line(publication))


@click.command()
@click.option(
    "--older-than-days",
    type=click.FloatRange(min=0),
    default=0.0,
    show_default=True,
    help="Keep what is newer.",
)
@click.option(
    "--forget", multiple=True, metavar="NAME", help="Stop keeping what the spec NAME needs. May be repeated."
)
@click.option("--dry-run", is_flag=True, help="Only say what would be removed.")
@JSON_OPTION
@click.pass_obj
def gc(
    store_root: Path, *, older_than_days: float, forget: tuple[str, ...], dry_run: bool, as_json: bool
) -> None:
    """Remove from the store what the last plan of no spec needs. Never what a running build works on.

    \b
    Examples:
      enginesmith gc --dry-run
      enginesmith gc --older-than-days 14
      enginesmith gc --forget old-model
    """
    from dataclasses import asdict

    from enginesmith.collect import collect_garbage
    from enginesmith.report_parts import bytes_text

    report = collect_garbage(
        open_store(store_root), older_than_days=older_than_days, forget=forget, dry_run=dry_run
    )
    if as_json:
        print_json(asdict(report))
        return
    verb = "would remove" if dry_run else "removed"
    click.echo(
        f"{verb} {len(report.removed)} artifacts, {bytes_text(report.freed_bytes)}; kept {report.kept}"
    )
    for key in report.busy:
        click.echo(f"left {key[:12]}: a build is working on it", err=True)


@click.command()
@click.option(
    "--check",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Compare with FILE instead of printing.",
)
def schema(check: Path | None) -> None:
    """Print the JSON Schema of specs, for editors.

    \b
    Examples:
      enginesmith schema > docs/spec.schema.json
      enginesmith schema --check docs/spec.schema.json
    """
    from enginesmith.spec_file import json_schema

    current = json_schema()
    if check is None:
        click.echo(current, nl=False)
        return
    try:
        same = check.read_text(encoding="utf-8") == current
    except (OSError, UnicodeDecodeError) as error:
        raise OperatorError(f"cannot read {check}: {error}", hint=f"enginesmith schema > {check}") from error
    if not same:
        raise OperatorError(
            f"{check} is not the schema of this version", hint=f"enginesmith schema > {check}"
        )


@dataclass(frozen=True)
class Published:
    """A spec that was built and published whole."""

    plan: Plan
    artifacts: Mapping[str, Artifact]
    report: BuildReport
    publications: Mapping[tuple[str, str | None], Publication]
    """By variant and target."""


def build_and_publish(store_root: Path, spec: Path, repository: Path, *, jobs: int, server: str) -> Published:
    """Build every variant of a spec and publish them all, shown on stderr as the verb ``build`` does.

    Raises:
        EnginesmithError: something failed; what was finished is kept.
    """
    from enginesmith.report import build_report

    store = open_store(store_root)
    made = make_plan_of(spec, store, Choice(server=server))
    refuse_collisions([made])
    artifacts = build_shown([made], store, jobs=jobs, keep_going=False).artifacts
    publications = _publish(made, artifacts, repository, skip_incomplete=False)
    for publication in publications:
        click.echo(_publication_line(publication), err=True)
    by_place = dict(zip(made.deployments, publications, strict=True))
    return Published(made, artifacts, build_report(made, artifacts), by_place)


def build_shown(plans: Sequence[Plan], store: ArtifactStore, *, jobs: int, keep_going: bool) -> BuildResult:
    from enginesmith.build import build as run_build
    from enginesmith.console import build_display

    with build_display(sys.stderr) as on_event:
        return run_build(plans, store, jobs=jobs, keep_going=keep_going, on_event=on_event)


class _SeveralFailedError(EnginesmithError):
    """Several steps failed; the status is that of the first."""

    def __init__(self, message: str, *, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def open_store(root: Path) -> ArtifactStore:
    from enginesmith.store import ArtifactStore

    return ArtifactStore(root, warn=lambda message: click.echo(f"warning: {message}", err=True))


@dataclass(frozen=True)
class Choice:
    """What of a spec a command line is about; empty: everything."""

    variants: tuple[str, ...] = ()
    targets: tuple[str, ...] = ()
    server: str = "auto"
    engine_dir: Path | None = None
    goals: frozenset[StepName] | None = None


def make_plan_of(path: Path, store: ArtifactStore, choice: Choice) -> Plan:
    """The plan for the chosen part of the spec at ``path``.

    Raises:
        SpecError: the spec is wrong, or engines from elsewhere are given for more than one deployment.
    """
    from enginesmith.plan import make_plan
    from enginesmith.spec_file import load_spec

    made = make_plan(
        load_spec(path),
        store,
        variants=choice.variants or None,
        targets=choice.targets or None,
        goals=choice.goals,
        server=None if choice.server == "auto" else str(Path(choice.server).absolute()),
        engine_dir=None if choice.engine_dir is None else str(choice.engine_dir.absolute()),
    )
    compiled = [step.place for step in made.steps if step.kind == "compile"]
    if choice.engine_dir is not None and len(compiled) != 1:
        raise SpecError(
            f"--engine-dir holds the engines of one deployment, but {len(compiled)} are chosen: {', '.join(compiled) or 'none'}",
            hint="choose one with --variant and --target; only targets of runtime tensorrt_llm have engines",
        )
    return made


def _show_advice(plans: Sequence[Plan]) -> None:
    from enginesmith.advice import advice

    for made in plans:
        for sentence in advice(made.spec):
            click.echo(f"warning: {made.spec.name}: {sentence}", err=True)


def refuse_collisions(plans: Sequence[Plan]) -> None:
    """Return if no two deployments would be published under the same Triton model name.

    Raises:
        SpecError: two would; the later would silently become a new version of the earlier.
    """
    owners: dict[str, str] = {}
    for plan in plans:
        for step in plan.steps:
            if step.kind not in PACKAGES:
                continue
            name = (step.params.get("target") or {}).get("model_prefix")
            name = step.params["model_name"] if name is None else f"{name}tensorrt_llm"
            owner = f"{plan.spec.name} {step.place}"
            if name in owners:
                raise SpecError(
                    f"{owners[name]} and {owner} would both be published as the Triton model {name}",
                    hint="publish one deployment into each repository with --variant and --target; a TensorRT-LLM target can "
                    "have names of its own with model_prefix: '{variant}-'",
                )
            owners[name] = owner


def _publish(
    plan: Plan, artifacts: Mapping[str, Artifact], repository: Path, *, skip_incomplete: bool
) -> list[Publication]:
    """Publish every deployment whose steps are all there."""
    from enginesmith.evidence import evidence_of
    from enginesmith.explain import place_of
    from enginesmith.publish.local import publish as publish_package

    publications: list[Publication] = []
    for variant, target in plan.deployments:
        place = place_of(variant, target)
        own = [step for step in plan.steps_of(variant, target) if step.variant is not None]
        if missing := [step.kind for step in own if step.key not in artifacts]:
            if skip_incomplete:
                continue
            raise GateError(
                f"variant {place} of {plan.spec.name} is not built: {', '.join(missing)} missing; nothing more was published",
                hint="enginesmith build SPEC --publish DIR builds and publishes",
            )
        package = next(step for step in own if step.kind in PACKAGES and step.target == target)
        evidence = evidence_of(plan, variant, target, artifacts=artifacts)
        publications.append(publish_package(artifacts[package.key].path, repository, evidence=evidence))
    return publications


def _publication_line(publication: Publication) -> str:
    state = "published" if publication.changed else "already published"
    return f"{state} {publication.model} version {publication.version} in {publication.path.parent.parent}"


def print_tables(tables: Sequence[Table]) -> None:
    """Print tables on stdout: as wide as the terminal, and uncut where there is none."""
    from rich.console import Console

    # A pipe has no width of its own; the table must not be cut there.
    console = Console(width=None if sys.stdout.isatty() else 200)
    for table in tables:
        console.print(table)


VERBS = (plan, build, publish, gc, schema)

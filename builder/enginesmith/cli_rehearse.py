"""The verbs ``rehearse`` and ``trtllm-command``: what can be known of a deployment before a GPU is paid for."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from enginesmith.cli_options import (
    JSON_OPTION,
    SERVER_OPTION,
    SPEC_ARGUMENT,
    TARGETS_OPTION,
    VARIANTS_OPTION,
    plain,
    print_json,
)
from enginesmith.errors import StoreError
from enginesmith.steps import REHEARSALS

if TYPE_CHECKING:
    from rich.table import Table

    from enginesmith.store import Artifact

_SHOWN = 100
"""Characters of an answer in the table; ``--json`` has all of it."""


@dataclass(frozen=True)
class Rehearsal:
    """What one rehearsal found, as its step recorded it."""

    place: str
    model: str
    played_by: str
    """What answered in the place of an engine that needs a GPU; the engine itself where none does."""
    ready_s: float | None
    requests: int
    checks: tuple[dict[str, Any], ...]


@click.command()
@SPEC_ARGUMENT
@VARIANTS_OPTION
@TARGETS_OPTION
@click.option(
    "--jobs", type=click.IntRange(1, 64), default=1, show_default=True, help="Steps at the same time."
)
@SERVER_OPTION
@JSON_OPTION
@click.pass_obj
def rehearse(
    store_root: Path,
    spec: Path,
    variants: tuple[str, ...],
    targets: tuple[str, ...],
    *,
    jobs: int,
    server: str,
    as_json: bool,
) -> None:
    """Run the very repository that would be published in a real tritonserver, on this machine's CPU.

    For TensorRT-LLM targets the ONNX Runtime twin of the same integers plays the engine, behind the same inputs and
    outputs; everything else is what will be served. Nothing is compiled and nothing is published.

    \b
    Examples:
      enginesmith rehearse models/smollm2-135m-trtllm.yaml --variant int4-awq
      enginesmith rehearse models/smollm2-135m-trtllm.yaml --target llmapi --json | jq '.[].checks[] | select(.passed | not)'
    """
    from enginesmith.cli_build import Choice, build_shown, make_plan_of, open_store, print_tables

    store = open_store(store_root)
    made = make_plan_of(spec, store, Choice(variants, targets, server=server, goals=frozenset(REHEARSALS)))
    artifacts = build_shown([made], store, jobs=jobs, keep_going=False).artifacts
    rehearsals = [_read(step.place, artifacts[step.key]) for step in made.steps if step.kind in REHEARSALS]
    if as_json:
        print_json([plain(rehearsal) for rehearsal in rehearsals])
        return
    print_tables([_table(rehearsal) for rehearsal in rehearsals])


def _read(place: str, artifact: Artifact) -> Rehearsal:
    path = artifact.path / "rehearsal.json"
    try:
        document = json.loads(path.read_bytes())
        return Rehearsal(
            place=place,
            model=str(document["model"]),
            played_by=str(document.get("played_by", "the engine itself")),
            ready_s=document.get("ready_s"),
            requests=int(document["requests"]),
            checks=tuple(document["checks"]),
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StoreError(f"cannot read {path}: {error}", hint="build again") from error


def _table(rehearsal: Rehearsal) -> Table:
    from rich.table import Table

    ready = "" if rehearsal.ready_s is None else f", ready after {rehearsal.ready_s:.1f} s"
    table = Table(
        title=f"{rehearsal.place}: {len(rehearsal.checks)} checks, {rehearsal.requests} requests{ready}; engine played by: {rehearsal.played_by}",
        title_justify="left",
    )
    for heading in ("check", "seen", ""):
        table.add_column(heading, overflow="ellipsis", no_wrap=True)
    for check in rehearsal.checks:
        seen = str(check["seen"]).replace("\n", "⏎")
        table.add_row(str(check["name"]), seen[:_SHOWN], "passed" if check["passed"] else "FAILED")
    return table


@click.command("trtllm-command")
@SPEC_ARGUMENT
@VARIANTS_OPTION
@TARGETS_OPTION
@click.option(
    "--engine-dir",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="DIR",
    required=True,
    help="Where the engines will be written.",
)
@JSON_OPTION
@click.pass_obj
def trtllm_command(
    store_root: Path,
    spec: Path,
    variants: tuple[str, ...],
    targets: tuple[str, ...],
    *,
    engine_dir: Path,
    as_json: bool,
) -> None:
    """Print the shell script that compiles one deployment's engines in NVIDIA's container.

    The sharded checkpoint is made first, here, if the store has none. Run the script where the GPU is and both
    directories are; then give DIR to `enginesmith build --engine-dir`.

    \b
    Examples:
      enginesmith trtllm-command models/smollm2-135m-trtllm.yaml --target tp3 --engine-dir /srv/engines > compile.sh
      enginesmith build models/smollm2-135m-trtllm.yaml --target tp3 --engine-dir /srv/engines --publish /srv/models
    """
    from enginesmith.cli_build import Choice, build_shown, make_plan_of, open_store
    from enginesmith.engines.tensorrt_llm.compile import plain_arguments, script_for_another_machine
    from enginesmith.platforms import TOOLCHAINS

    store, engine_dir = open_store(store_root), engine_dir.absolute()
    choice = Choice(variants, targets, engine_dir=engine_dir)
    whole = make_plan_of(spec, store, choice)
    compile_ = next(step for step in whole.steps if step.kind == "compile")
    made = make_plan_of(spec, store, replace(choice, engine_dir=None, goals=frozenset({"convert"})))
    artifacts = build_shown([made], store, jobs=1, keep_going=False).artifacts
    converted = artifacts[compile_.inputs["converted"]].path.absolute()
    if as_json:
        image = TOOLCHAINS[compile_.params["target"]["toolchain"]].image
        command = ["trtllm-build", *plain_arguments(compile_.params, converted, engine_dir)]
        print_json({"image": image, "command": command, "checkpoint_dir": converted})
        return
    click.echo(script_for_another_machine(compile_.params, converted, engine_dir), nl=False)


VERBS = (rehearse, trtllm_command)

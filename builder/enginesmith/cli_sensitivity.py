"""The verb ``sensitivity``: which layers of a graph lose most when they are quantized, and the fewest to leave in float."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from enginesmith.cli_options import JSON_OPTION, SPEC_ARGUMENT, VARIANTS_OPTION, print_json
from enginesmith.errors import GateError, StoreError

if TYPE_CHECKING:
    from rich.table import Table

    from enginesmith.store import Artifact


@click.command()
@SPEC_ARGUMENT
@VARIANTS_OPTION
@JSON_OPTION
@click.pass_obj
def sensitivity(store_root: Path, spec: Path, variants: tuple[str, ...], *, as_json: bool) -> None:
    """Rank the layers of SPEC's int8 and fp8 variants by what quantizing each alone costs, and propose an `exclude`.

    The proposal is the fewest layers, found greedily and then pruned, with which the variant's limits (its quality,
    else verify.quality) hold on the evaluation samples. `exclude: auto` in the spec applies it. The status is 1 where
    no proposal meets the limits.

    \b
    Examples:
      enginesmith sensitivity models/minilm-l6.yaml --variant int8
      enginesmith sensitivity models/minilm-l6.yaml --variant int8 --json | jq '.[0].ranking[:3]'
    """
    from enginesmith.cli_build import Choice, build_shown, make_plan_of, open_store, print_tables

    store = open_store(store_root)
    made = make_plan_of(spec, store, Choice(variants, goals=frozenset({"sensitivity"})))
    # Targets share a variant's ranking: its step is there once for each variant.
    steps = {step.variant: step for step in made.steps if step.kind == "sensitivity"}
    artifacts = build_shown([made], store, jobs=1, keep_going=False).artifacts
    found = [{"variant": variant, **_read(artifacts[step.key])} for variant, step in steps.items()]
    if as_json:
        print_json(found)
    else:
        for entry in found:
            print_tables([_table(entry)])
            click.echo(_proposal(entry))
    if unmet := [entry for entry in found if not entry["met"]]:
        raise GateError(
            f"variant {unmet[0]['variant']}: {unmet[0]['verdict']}",
            hint="change method, smoothing or calibration of the variant, or loosen its quality",
        )


def _read(artifact: Artifact) -> dict[str, Any]:
    path = artifact.path / "sensitivity.json"
    try:
        document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StoreError(f"cannot read {path}: {error}", hint="build again") from error
    return document


def _table(entry: Mapping[str, Any]) -> Table:
    from rich.table import Table

    table = Table(title=f"{entry['variant']}: only this quantized, the rest in float", title_justify="left")
    for column in ("nodes", "operator"):
        table.add_column(column, overflow="fold")
    for column in ("relative error", "mean cosine", "worst cosine", "excluded"):
        table.add_column(column, justify="right")
    proposed = set(entry["proposal"])
    for row in entry["ranking"]:
        figures = row["figures"]
        table.add_row(
            "\n".join(row["nodes"]),
            row["op"],
            f"{row['loss']:.4f}",
            f"{figures['mean_cosine']:.5f}",
            f"{figures['min_cosine']:.5f}",
            "yes" if proposed & set(row["nodes"]) else "",
        )
    return table


def _proposal(entry: Mapping[str, Any]) -> str:
    """The verdict, and the line for the spec."""
    before, after = (entry[key]["mean_cosine"] for key in ("before", "after"))
    lines = [entry["verdict"], f"mean cosine: {before:.5f} with all quantized, {after:.5f} with the proposal"]
    if entry["met"] and entry["proposal"]:
        # A JSON list is a YAML list, and quotes what YAML would read as something else.
        lines.append(f"exclude: {json.dumps(entry['exclude'])}")
    return "\n".join(lines)


VERBS = (sensitivity,)

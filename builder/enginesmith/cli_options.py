"""What the verbs of the command line share: options with one meaning, and JSON on stdout."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

import click


class FiniteRange(click.FloatRange):
    """A range of numbers without nan and infinity, which ``FloatRange`` lets through where a bound is open."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number = float(super().convert(value, param, ctx))
        if not math.isfinite(number):
            self.fail(f"{value} is no finite number.", param, ctx)
        return number


POSITIVE = FiniteRange(min=0, min_open=True)
JSON_OPTION = click.option("--json", "as_json", is_flag=True, help="Print JSON on stdout.")
SERVER_OPTION = click.option(
    "--server",
    default="auto",
    metavar="auto|PATH",
    help="The tritonserver to run. [default: the one that is found]",
)

SPEC_ARGUMENT = click.argument("spec", type=click.Path(path_type=Path))
VARIANTS_OPTION = click.option(
    "--variant", "variants", multiple=True, metavar="NAME", help="Only this variant. May be repeated."
)
TARGETS_OPTION = click.option(
    "--target", "targets", multiple=True, metavar="NAME", help="Only this target. May be repeated."
)
ENGINE_DIR_OPTION = click.option(
    "--engine-dir",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    metavar="DIR",
    help="Take TensorRT-LLM engines that trtllm-build made elsewhere, after checking them. For one variant and target.",
)


def plain(value: object) -> Any:
    """A dataclass as plain JSON values; paths as text."""
    return asdict(value) if is_dataclass(value) and not isinstance(value, type) else str(value)


def print_json(document: object) -> None:
    """Print a document on stdout as JSON; paths as text."""
    click.echo(json.dumps(document, indent=2, default=str))

"""What the verbs of the command line share: options with one meaning, and JSON on stdout."""

from __future__ import annotations

import json
from dataclasses import asdict, is_dataclass
from typing import Any

import click

JSON_OPTION = click.option("--json", "as_json", is_flag=True, help="Print JSON on stdout.")
SERVER_OPTION = click.option(
    "--server",
    default="auto",
    metavar="auto|PATH",
    help="The tritonserver to run. [default: the one that is found]",
)


def plain(value: object) -> Any:
    """A dataclass as plain JSON values; paths as text."""
    return asdict(value) if is_dataclass(value) and not isinstance(value, type) else str(value)


def print_json(document: object) -> None:
    """Print a document on stdout as JSON; paths as text."""
    click.echo(json.dumps(document, indent=2, default=str))

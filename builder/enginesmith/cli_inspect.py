"""The verb ``inspect``: what is inside of an artifact, an engine or a model. stdout is the answer, as tables or JSON."""

from __future__ import annotations

from pathlib import Path

import click

from enginesmith.cli_options import JSON_OPTION, print_json


@click.command()
@click.argument("what", metavar="ARTIFACT|ENGINE|MODEL")
@click.option(
    "--repository",
    type=click.Path(path_type=Path),
    default=Path("model_repository"),
    show_default=True,
    metavar="DIR",
    help="Where a published model's name is looked up.",
)
@JSON_OPTION
@click.pass_obj
def inspect(store_root: Path, what: str, *, repository: Path, as_json: bool) -> None:
    """Show what is inside of a path, of an artifact (at least 8 digits of its key), or of a published model.

    Knows ONNX files, checkpoints (Hugging Face, safetensors, TensorRT-LLM), engines (ONNX Runtime, TensorRT,
    TensorRT-LLM), Triton models and repositories, and every artifact of the store. Weights are not read.

    \b
    Examples:
      enginesmith inspect model.onnx
      enginesmith inspect 3f9a01c2                       # an artifact; `plan` shows the keys
      enginesmith inspect minilm-l6-int8                 # a model in model_repository
      enginesmith inspect model.onnx --json | jq '.products[] | select(.quantized | not) | .node'
    """
    from enginesmith.cli_build import open_store, print_tables
    from enginesmith.inspect_anything import inspect_anything

    found = inspect_anything(what, store=lambda: open_store(store_root), repository=repository)
    if as_json:
        print_json(found.as_json())
    else:
        print_tables(list(found.as_tables()))


VERBS = (inspect,)

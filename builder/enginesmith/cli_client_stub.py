"""The verb ``client-stub``: typed clients of models, as a Python module. stdout is the code, or JSON about it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from enginesmith.cli_options import JSON_OPTION, print_json

if TYPE_CHECKING:
    from collections.abc import Sequence

    from enginesmith.client_stub.source import StubModel


@click.command("client-stub")
@click.argument("models", nargs=-1, required=True, metavar="MODEL...")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="The module to write. [default: stdout]",
)
@click.option(
    "--repository",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("model_repository"),
    show_default=True,
    metavar="DIR",
    help="Where the models are published.",
)
@click.option("--server", metavar="URL", help="Ask a running server instead of a repository.")
@click.option(
    "--timeout",
    "timeout_s",
    type=click.FloatRange(min=0, min_open=True, max=3600),
    default=30.0,
    show_default=True,
    help="Seconds to wait for the server.",
)
@click.option("--check", is_flag=True, help="Write nothing; exit status 1 if FILE is not current.")
@JSON_OPTION
def client_stub(
    models: tuple[str, ...],
    *,
    output: Path | None,
    repository: Path,
    server: str | None,
    timeout_s: float,
    check: bool,
    as_json: bool,
) -> int:
    """Write a Python module with one typed class for each MODEL, and one for asyncio.

    Methods have the model's real inputs, outputs, dtypes and options; `connect` finds out whether the server still
    serves the model with that interface. The module needs enginesmith-client and numpy.

    \b
    Examples:
      enginesmith client-stub smollm2-135m-int4-awq -o api.py
      enginesmith client-stub minilm-l6-int8-text smollm2-135m-int4-awq -o api.py --check
      enginesmith client-stub my-model --server grpc://127.0.0.1:8001 > api.py
    """
    from enginesmith import __version__
    from enginesmith.client_stub.module import module_code
    from enginesmith.client_stub.source import differences_from_file, models_from

    if check and output is None:
        raise click.UsageError("--check compares a file: name it with -o FILE")
    found = models_from(models, repository=repository, server=server, timeout_s=timeout_s)
    code = module_code(found, generated_by=__version__)
    differences = differences_from_file(output, code) if check and output is not None else []
    if output is not None and not check:
        _write(output, code)
    if as_json:
        print_json(_document(found, output, code, differences=differences if check else None))
    elif output is None:
        click.echo(code, nl=False)
    elif check:
        _report(output, differences)
    else:
        click.echo(f"wrote {output}: {', '.join(model.name for model in found)}", err=True)
    return 1 if differences else 0


def _write(output: Path, code: str) -> None:
    from enginesmith.errors import OperatorError

    try:
        output.write_text(code, encoding="utf-8")
    except OSError as error:
        raise OperatorError(
            f"cannot write {output}: {error.strerror}", hint="its directory must exist and be writable"
        ) from error


def _report(output: Path, differences: Sequence[str]) -> None:
    if not differences:
        click.echo(f"{output} is current", err=True)
        return
    click.echo(f"{output} is not current:", err=True)
    for line in differences:
        click.echo(f"  {line}", err=True)
    click.echo("  hint: the same command without --check writes it again", err=True)


def _document(
    models: Sequence[StubModel], output: Path | None, code: str, *, differences: Sequence[str] | None
) -> dict[str, Any]:
    from enginesmith.client_stub.module import class_names, methods_of

    classes = class_names(models)
    return {
        "file": output,
        "models": [
            {
                "model": model.name,
                "version": model.version,
                "digest": model.digest or None,
                "class": classes[model.name],
                "async_class": f"Async{classes[model.name]}",
                "methods": methods_of(model.metadata),
            }
            for model in models
        ],
        "code": code if output is None else None,
        "current": None if differences is None else not differences,
        "differences": differences,
    }


VERBS = (client_stub,)

"""The command line: verbs that load a spec, call the library, and print. The only place that exits.

stdout is data, stderr is progress. Exit status: 0 ok, 1 expected failure, 2 usage, 3 unexpected, 130 interrupted.
Everything heavier than click is imported inside the verb that needs it, so that ``--help`` answers at once.
"""

from __future__ import annotations

import os
import sys
import tempfile
import traceback
from collections.abc import Sequence
from pathlib import Path

import click

from enginesmith import (
    __version__,
    cli_bench,
    cli_build,
    cli_client_stub,
    cli_compare,
    cli_demo,
    cli_doctor,
    cli_inspect,
    cli_openai,
    cli_rehearse,
    cli_sensitivity,
    cli_serve,
)
from enginesmith.errors import EnginesmithError


def main() -> None:
    """The program's entry point."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Run a command line and return its exit status; every failure is one message on stderr."""
    try:
        status = commands.main(args=list(arguments), prog_name="enginesmith", standalone_mode=False)
        return status if isinstance(status, int) else 0
    except EnginesmithError as error:
        click.echo(f"error: {error}", err=True)
        return error.exit_code
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted; finished steps are kept, the same command continues", err=True)
        return 130
    except BrokenPipeError:
        # The reader of stdout has gone; what Python still wants to say to it at exit goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:  # noqa: BLE001 - the process boundary: no traceback reaches the terminal.
        click.echo(f"error: unexpected {type(error).__name__}: {error}", err=True)
        click.echo(
            f"  hint: this is a defect of enginesmith; the traceback is in {_write_traceback()}", err=True
        )
        return 3


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, message="%(version)s")
@click.option(
    "--store",
    "store_root",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path(".enginesmith"),
    envvar="ENGINESMITH_STORE",
    show_default=True,
    show_envvar=True,
    help="The directory that keeps finished steps.",
)
@click.pass_context
def commands(context: click.Context, store_root: Path) -> None:
    """From a model checkpoint to engines that NVIDIA Triton serves, every variant measured and verified.

    \b
    Examples:
      enginesmith plan  models/smollm2-135m.yaml --explain
      enginesmith build models/smollm2-135m.yaml --publish model_repository
      enginesmith serve model_repository
      enginesmith ask   smollm2-135m-int4-awq "What is a compiler?"
    """
    context.obj = store_root


_MODULES = (
    cli_build,
    cli_rehearse,
    cli_serve,
    cli_client_stub,
    cli_demo,
    cli_doctor,
    cli_inspect,
    cli_sensitivity,
    cli_openai,
    cli_bench,
    cli_compare,
)
for _verb in (verb for module in _MODULES for verb in module.VERBS):
    commands.add_command(_verb)


def _write_traceback() -> str:
    with tempfile.NamedTemporaryFile(
        "w", prefix="enginesmith-", suffix=".traceback.txt", delete=False
    ) as file:
        file.write(traceback.format_exc())
    return file.name


if __name__ == "__main__":
    main()

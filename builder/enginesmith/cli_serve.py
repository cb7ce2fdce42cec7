"""Verbs that use a model repository: ``serve`` and ``ask``.

Each loads what it needs when it runs. stdout is data, stderr is progress.
"""

from __future__ import annotations

import sys
from pathlib import Path

import click

from enginesmith.cli_options import JSON_OPTION, SERVER_OPTION, plain, print_json
from enginesmith.errors import OperatorError, ToolchainError


@click.command()
@click.argument("repository", type=click.Path(path_type=Path), default=Path("model_repository"))
@SERVER_OPTION
@click.option(
    "--http-port",
    type=click.IntRange(0, 65535),
    default=8000,
    show_default=True,
    help="0 chooses a free port.",
)
@click.option(
    "--grpc-port",
    type=click.IntRange(0, 65535),
    default=8001,
    show_default=True,
    help="0 chooses a free port.",
)
@click.option(
    "--metrics-port",
    type=click.IntRange(0, 65535),
    default=8002,
    show_default=True,
    help="0 chooses a free port.",
)
def serve(repository: Path, *, server: str, http_port: int, grpc_port: int, metrics_port: int) -> None:
    """Run tritonserver on REPOSITORY (default: model_repository), on 127.0.0.1, until Ctrl-C.

    \b
    Examples:
      enginesmith serve
      enginesmith serve /srv/models --http-port 9000 --grpc-port 9001 --metrics-port 9002
      enginesmith serve --server /opt/tritonserver/bin/tritonserver
    """
    from enginesmith.console import work_display
    from enginesmith.triton.server import serve_forever

    with work_display(sys.stderr) as on_progress:
        serve_forever(
            repository,
            server=server,
            http_port=http_port,
            grpc_port=grpc_port,
            metrics_port=metrics_port,
            on_progress=on_progress,
        )


@click.command()
@click.argument("model")
@click.argument("prompt")
@click.option("--url", default="grpc://127.0.0.1:8001", show_default=True, help="The Triton server.")
@click.option("--max-tokens", type=click.IntRange(min=1), help="Longest answer. [default: the model's]")
@click.option("--temperature", type=click.FloatRange(min=0), help="0 is greedy. [default: the model's]")
@click.option("--seed", type=click.IntRange(min=0), help="Makes sampling repeatable.")
@click.option("--raw", is_flag=True, help="Continue PROMPT as text, without the model's chat template.")
@click.option("--timeout-s", type=click.FloatRange(min=0, min_open=True), default=120.0, show_default=True)
@click.option(
    "--wait-s",
    type=click.FloatRange(min=0),
    default=0.0,
    show_default=True,
    help="Wait this long for the server and the model to be ready.",
)
@JSON_OPTION
def ask(
    model: str,
    prompt: str,
    *,
    url: str,
    max_tokens: int | None,
    temperature: float | None,
    seed: int | None,
    raw: bool,
    timeout_s: float,
    wait_s: float,
    as_json: bool,
) -> None:
    """Send PROMPT to MODEL on a running server and print the answer. PROMPT - reads stdin.

    \b
    Examples:
      enginesmith ask smollm2-135m-int4-awq "What is a compiler?"
      enginesmith ask smollm2-135m-bf16 "Once upon a time" --raw --max-tokens 40
      enginesmith ask smollm2-135m-fp8 - --json < prompt.txt
      enginesmith ask smollm2-135m-int8-wo "What is gravity?" --wait-s 120
    """
    try:
        from enginesmith_client import Client, TritonClientError
    except ImportError as error:
        raise ToolchainError(
            "this needs enginesmith-client", hint="pip install 'enginesmith[serve]'"
        ) from error
    text = _text_from_stdin() if prompt == "-" else prompt
    try:
        with Client(url, timeout_s=timeout_s) as client:
            if wait_s:
                client.wait_ready(model, timeout_s=wait_s)
            answer = client.generate(
                model, text, max_tokens=max_tokens, temperature=temperature, seed=seed, chat=not raw
            )
    except TritonClientError as error:
        raise OperatorError(error.message, hint=error.hint) from error
    if as_json:
        print_json(plain(answer))
    else:
        click.echo(answer.text)


def _text_from_stdin() -> str:
    try:
        return sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise OperatorError(
            f"the prompt on stdin is not UTF-8: {error.reason} at byte {error.start}",
            hint="convert it, e.g. with `iconv -f ENCODING -t UTF-8`",
        ) from error


VERBS = (serve, ask)

"""The verb ``openai``: the HTTP API of OpenAI in front of a running tritonserver. stdout is data, stderr is progress."""

from __future__ import annotations

import json
from pathlib import Path

import click

from enginesmith.cli_options import JSON_OPTION
from enginesmith.errors import ToolchainError


@click.command()
@click.option(
    "--triton",
    "triton_urls",
    multiple=True,
    default=("grpc://127.0.0.1:8001",),
    show_default=True,
    metavar="URL",
    help="The Triton server; repeated: several that serve the same models.",
)
@click.option("--host", default="127.0.0.1", show_default=True, help="The address to listen on.")
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=8080,
    show_default=True,
    help="0 chooses a free port.",
)
@click.option(
    "--timeout-s",
    type=click.FloatRange(min=0, min_open=True),
    default=120.0,
    show_default=True,
    help="Longest time from a request to the end of its answer.",
)
@click.option(
    "--api-key-file",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Callers must send one of these keys, one a line. [default: anybody may call]",
)
@click.option(
    "--alias",
    "aliases",
    multiple=True,
    metavar="NAME=MODEL",
    help="One more name of a model. May be repeated.",
)
@click.option(
    "--chat-template",
    "chat_templates",
    multiple=True,
    metavar="MODEL=DIR",
    help="The chat template in DIR, for a model that takes no messages. May be repeated.",
)
@click.option(
    "--default-max-tokens",
    type=click.IntRange(min=1),
    help="The longest answer of a chat that names no limit. [default: the model's]",
)
@click.option(
    "--max-generations",
    type=click.IntRange(min=1),
    default=256,
    show_default=True,
    help="Answers that may be generated at once; more get 429.",
)
@click.option(
    "--max-request-mib", type=click.IntRange(min=1), default=16, show_default=True, help="Longest body."
)
@click.option(
    "--drain-s",
    type=click.IntRange(min=0),
    default=30,
    show_default=True,
    help="How long answers may still take after SIGTERM.",
)
@click.option("--access-log", is_flag=True, help="A line on stderr for each request.")
@JSON_OPTION
def openai(
    *,
    triton_urls: tuple[str, ...],
    host: str,
    port: int,
    timeout_s: float,
    api_key_file: Path | None,
    aliases: tuple[str, ...],
    chat_templates: tuple[str, ...],
    default_max_tokens: int | None,
    max_generations: int,
    max_request_mib: int,
    drain_s: int,
    access_log: bool,
    as_json: bool,
) -> None:
    """Serve OpenAI's HTTP API over the models of a running tritonserver, until Ctrl-C.

    \b
    Examples:
      enginesmith openai
      enginesmith openai --triton grpc://gpu1:8001 --triton grpc://gpu2:8001 --port 9000
      enginesmith openai --alias gpt-4o=smollm2-135m-int4-awq --api-key-file keys.txt
      enginesmith openai --chat-template ensemble=checkpoints/llama --default-max-tokens 512
    """
    try:
        from enginesmith.openai_front.serving import serve
        from enginesmith.openai_front.settings import FrontSettings, api_keys_from_file
    except ImportError as error:
        raise ToolchainError(
            f"this needs {error.name}, which is not installed", hint="pip install 'enginesmith[openai]'"
        ) from error
    settings = FrontSettings(
        triton_urls=triton_urls,
        timeout_s=timeout_s,
        api_keys=api_keys_from_file(api_key_file) if api_key_file else (),
        aliases=_pairs("--alias", aliases),
        chat_templates={
            model: Path(path) for model, path in _pairs("--chat-template", chat_templates).items()
        },
        default_max_tokens=default_max_tokens,
        max_generations=max_generations,
        max_request_bytes=max_request_mib << 20,
        drain_s=drain_s,
    )

    def tell(url: str) -> None:
        if as_json:
            click.echo(json.dumps({"url": f"{url}/v1", "triton": list(triton_urls)}))
        else:
            click.echo(f"listening on {url}/v1 for {', '.join(triton_urls)}", err=True)

    serve(settings, host=host, port=port, on_listening=tell, access_log=access_log)


def _pairs(option: str, texts: tuple[str, ...]) -> dict[str, str]:
    pairs: dict[str, str] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not (name and equals and value):
            raise click.UsageError(f"{option} {text}: give two names with = between")
        if name in pairs:
            raise click.UsageError(f"{option} gives {name} twice")
        pairs[name] = value
    return pairs


VERBS = (openai,)

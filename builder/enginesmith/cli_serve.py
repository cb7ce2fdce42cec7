"""Verbs that use a model repository: ``serve`` and ``ask``.

Each loads what it needs when it runs. stdout is data, stderr is progress.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from enginesmith.cli_launch import LaunchRequest, print_launch, run_request
from enginesmith.cli_options import JSON_OPTION, SERVER_OPTION, plain, print_json
from enginesmith.errors import OperatorError, SpecError, ToolchainError

if TYPE_CHECKING:
    from enginesmith.targets import LlmApiTarget, TensorRtLlmTarget


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
@click.option(
    "--response-cache-mib",
    type=click.IntRange(min=0),
    help="Size of the response cache. [default: 64 if a model asks for one]",
)
@click.option("--address", default="127.0.0.1", show_default=True, help="The address to listen on.")
@click.option(
    "--gpus",
    "gpu_groups",
    multiple=True,
    metavar="0,1",
    help="Give a server these GPUs. Repeated: one server each, their ports 10 apart.",
)
@click.option(
    "--spec",
    "spec_path",
    type=click.Path(path_type=Path),
    help="Take NCCL settings, and what a repository without launch.json does not say, from this spec.",
)
@click.option("--target", "target_name", help="The target in the spec. [default: its only multi-GPU one]")
@click.option("--variant", help="The variant, where the target's model_prefix depends on it.")
@click.option("--slurm", is_flag=True, help="Start with srun, also on one machine.")
@click.option("--print", "only_print", is_flag=True, help="Print the command and run nothing; needs no GPU.")
@JSON_OPTION
def serve(
    repository: Path,
    *,
    server: str,
    http_port: int,
    grpc_port: int,
    metrics_port: int,
    response_cache_mib: int | None,
    address: str,
    gpu_groups: tuple[str, ...],
    spec_path: Path | None,
    target_name: str | None,
    variant: str | None,
    slurm: bool,
    only_print: bool,
    as_json: bool,
) -> None:
    """Run tritonserver on REPOSITORY (default: model_repository), on 127.0.0.1, until Ctrl-C.

    TensorRT-LLM models are started as they need it: under mpirun with one process per GPU, as an orchestrator, or
    with srun over several machines.

    \b
    Examples:
      enginesmith serve
      enginesmith serve /srv/models --http-port 9000 --grpc-port 9001 --metrics-port 9002
      enginesmith serve --server /opt/tritonserver/bin/tritonserver
      enginesmith serve /srv/trtllm --print
      enginesmith serve /srv/trtllm --spec models/llama.yaml --target tensorrt-llm --print --json
      enginesmith serve /srv/trtllm --gpus 0,1 --gpus 2,3
    """
    from enginesmith.console import work_display
    from enginesmith.triton.launch import Endpoints, read_deployments
    from enginesmith.triton.response_cache import cache_bytes_for
    from enginesmith.triton.server import serve_forever

    if as_json and not only_print:
        raise click.UsageError("--json belongs to --print: a running server has nothing to say on stdout")
    target = _target(spec_path, target_name, variant)
    deployments = read_deployments(repository)
    cache_bytes = cache_bytes_for(repository, response_cache_mib and response_cache_mib << 20)
    plain_server = not (deployments or target or gpu_groups or slurm or only_print)
    if plain_server and address == "127.0.0.1":
        with work_display(sys.stderr) as on_progress:
            serve_forever(
                repository,
                server=server,
                http_port=http_port,
                grpc_port=grpc_port,
                metrics_port=metrics_port,
                cache_bytes=cache_bytes,
                on_progress=on_progress,
            )
        return
    request = LaunchRequest(
        repository=repository,
        endpoints=Endpoints(address, http_port, grpc_port, metrics_port),
        server=server,
        target=target,
        gpu_groups=tuple(_gpu_group(group) for group in gpu_groups),
        slurm=slurm,
        cache_bytes=cache_bytes,
    )
    if only_print:
        print_launch(request, as_json=as_json)
    else:
        run_request(request)


def _gpu_group(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise click.UsageError(f"--gpus {text}: give GPU numbers with commas between, e.g. 0,1") from error


def _target(
    spec_path: Path | None, name: str | None, variant: str | None
) -> TensorRtLlmTarget | LlmApiTarget | None:
    """The target of the spec that says how to start the repository, its model prefix filled in."""
    from enginesmith.spec_file import load_spec
    from enginesmith.targets import LlmApiTarget, TensorRtLlmTarget

    if spec_path is None:
        if name or variant:
            raise click.UsageError("--target and --variant name parts of a spec: give it with --spec")
        return None
    spec = load_spec(spec_path)
    targets = [target for target in spec.targets if isinstance(target, TensorRtLlmTarget | LlmApiTarget)]
    chosen = [target for target in targets if name in (None, target.name)]
    if len(chosen) != 1:
        raise SpecError(
            f"{spec_path} has {len(chosen)} targets of TensorRT-LLM {f'named {name}' if name else 'to choose from'}; "
            f"it has: {', '.join(target.name for target in targets) or 'none'}",
            hint="name one with --target",
        )
    prefix = chosen[0].model_prefix
    if variant is None and "{variant}" in prefix:
        raise SpecError(
            f"the names of the models depend on the variant (model_prefix: {prefix})",
            hint=f"name one with --variant: {', '.join(spec.variants)}",
        )
    return chosen[0].model_copy(update={"model_prefix": chosen[0].prefix_for(spec.name, variant or "")})


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

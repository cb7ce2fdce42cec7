"""Where the models are that ``bench`` and ``compare`` measure: on a server that runs, or on one started for this alone."""

from __future__ import annotations

import sys
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from enginesmith.cli_options import SERVER_OPTION
from enginesmith.errors import EnginesmithError, OperatorError, SpecError, ToolchainError

if TYPE_CHECKING:
    from enginesmith.triton.server import TritonServer
    from enginesmith_client.perf._target import Target

DEFAULT_URL = "grpc://127.0.0.1:8001"
_DEFAULT_GRPC_PORT = 8001
_DEFAULT_METRICS_PORT = 8002
_METRICS_TIMEOUT_S = 2.0
_LOAD_TIMEOUT_S = 300.0

MakeTarget = Callable[[str, str], "Target"]
"""From a model and its version (empty: the one that the server chooses)."""


@dataclass(frozen=True)
class ServerFlags:
    """What the command line says about the server."""

    url: str | None
    metrics_url: str | None
    repository: Path | None
    server: str


def server_options(command: Callable[..., int]) -> Callable[..., int]:
    """The options that make ``ServerFlags``."""
    for option in (
        SERVER_OPTION,
        click.option(
            "--repository",
            type=click.Path(path_type=Path),
            metavar="DIR",
            help="Start a tritonserver of its own on this model repository, on free ports, for the time of the run.",
        ),
        click.option(
            "--metrics-url", metavar="URL", help="[default: port 8002 of the server, if it answers]"
        ),
        click.option("--url", metavar="URL", help=f"A server that runs, over gRPC. [default: {DEFAULT_URL}]"),
    ):
        command = option(command)
    return command


def model_and_version(text: str) -> tuple[str, str]:
    """``NAME`` or ``NAME:VERSION``; the version is empty for the one that the server chooses.

    Raises:
        UsageError: the version is no number.
    """
    model, colon, version = text.partition(":")
    if colon and not version.isdecimal():
        raise click.UsageError(f"{text}: give a version after the colon, e.g. {model}:2")
    return model, version


@contextmanager
def client_errors() -> Iterator[None]:
    """Errors of the client and of the harness as those of the command line.

    Raises:
        ToolchainError: a package is not installed.
        SpecError: the profile is wrong.
        OperatorError: everything else.
    """
    try:
        from enginesmith_client import TritonClientError
        from enginesmith_client.perf._errors import ProfileError
    except ImportError as error:
        raise _missing(error) from error
    try:
        yield
    except ProfileError as error:
        raise SpecError(error.message, hint=error.hint) from error
    except TritonClientError as error:
        raise OperatorError(error.message, hint=error.hint) from error
    except ImportError as error:
        raise _missing(error) from error


@contextmanager
def served(flags: ServerFlags, models: Sequence[tuple[str, str]]) -> Iterator[MakeTarget]:
    """What makes targets of ``models`` (name and version) while the server is there.

    A server that was started for this ends with the block; that it died meanwhile is an error when the block is over.

    Raises:
        OperatorError: it does not start, or died.
    """
    from enginesmith_client.perf._target import Target

    if flags.repository is None:
        url = flags.url or DEFAULT_URL
        metrics_url = flags.metrics_url or _metrics_of(url)
        yield lambda model, version: Target(model, url, version=version, metrics_url=metrics_url)
        return
    if flags.url or flags.metrics_url:
        raise click.UsageError("--repository starts a server of its own; leave out --url and --metrics-url")
    with _own_server(flags.repository, models, server=flags.server) as server:
        url, metrics_url, pid = f"grpc://{server.grpc_url}", server.metrics_url, server.pid
        yield lambda model, version: Target(
            model, url, version=version, metrics_url=metrics_url, server_pid=pid
        )
        server.require_alive("while it was measured")


def require_served(*targets: Target) -> None:
    """Return when all are there. Of several, none must be found missing only after the others were measured.

    Raises:
        TritonClientError: a server does not answer or does not serve the model.
    """
    from enginesmith_client import Client

    for target in targets:
        with Client(target.url) as client:
            client.metadata(target.model, version=target.version)


@contextmanager
def _own_server(
    repository: Path, models: Sequence[tuple[str, str]], *, server: str
) -> Iterator[TritonServer]:
    from enginesmith.console import work_display
    from enginesmith.triton.launch import read_deployments
    from enginesmith.triton.response_cache import cache_bytes_for
    from enginesmith.triton.server import TritonServer, find_server

    names = tuple(dict.fromkeys(model for model, _ in models))
    _require_published(repository, names)
    if read_deployments(repository):
        raise OperatorError(
            f"{repository} holds models of TensorRT-LLM, which a plain tritonserver cannot start",
            hint=f"enginesmith serve {repository}, then give its --url",
        )
    instance = TritonServer(
        repository,
        installation=find_server(server),
        model_control="explicit",
        load_models=names,
        cache_bytes=cache_bytes_for(repository),
    )
    with instance:
        with work_display(sys.stderr) as on_progress:
            instance.wait_ready(on_progress=on_progress)
        for name in names:
            versions = sorted({int(version) for model, version in models if model == name and version})
            if versions:
                _serve_versions(f"grpc://{instance.grpc_url}", name, versions)
        yield instance


def _serve_versions(url: str, model: str, versions: Sequence[int]) -> None:
    """Have the server serve these versions, whichever the published configuration names."""
    from enginesmith_client import Client

    with Client(url, timeout_s=_LOAD_TIMEOUT_S) as client:
        config = dict(client.config(model))
        config["version_policy"] = {"specific": {"versions": list(versions)}}
        client.load(model, config=config, timeout_s=_LOAD_TIMEOUT_S)


def _require_published(repository: Path, models: Sequence[str]) -> None:
    import difflib

    there = sorted(path.parent.name for path in repository.glob("*/config.pbtxt"))
    for model in models:
        if there and model not in there:
            close = difflib.get_close_matches(model, there, n=1)
            raise OperatorError(
                f"{repository} has no model {model!r}; it has: {', '.join(there)}",
                hint=f"did you mean {close[0]!r}?" if close else None,
            )


def _metrics_of(url: str) -> str | None:
    """Where the metrics of a server on Triton's usual ports are, if they are there."""
    parts = urllib.parse.urlsplit(url if "://" in url else f"grpc://{url}")
    try:
        usual = parts.port == _DEFAULT_GRPC_PORT
    except ValueError:
        return None
    if not usual or not parts.hostname:
        return None
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    metrics_url = f"http://{host}:{_DEFAULT_METRICS_PORT}/metrics"
    try:
        with urllib.request.urlopen(metrics_url, timeout=_METRICS_TIMEOUT_S) as answer:
            return metrics_url if b"nv_inference" in answer.read(1 << 20) else None
    except (OSError, ValueError):
        return None


def _missing(error: ImportError) -> EnginesmithError:
    return ToolchainError(
        f"this needs {error.name}, which is not installed", hint="pip install 'enginesmith-client[perf]'"
    )

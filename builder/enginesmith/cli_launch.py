"""What ``serve`` does with TensorRT-LLM repositories: print the command that starts one, or run it."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from enginesmith.cli_options import print_json
from enginesmith.errors import ServerError

if TYPE_CHECKING:
    from enginesmith.targets import LlmApiTarget, TensorRtLlmTarget
    from enginesmith.triton.launch import Deployment, Endpoints, Launch


@dataclass(frozen=True)
class LaunchRequest:
    """What the user asked ``serve`` for."""

    repository: Path
    endpoints: Endpoints
    server: str
    """The tritonserver: "auto" or a path."""
    target: TensorRtLlmTarget | LlmApiTarget | None
    gpu_groups: tuple[tuple[int, ...], ...]
    slurm: bool
    cache_bytes: int = 0
    """The size of the response cache; 0: none."""

    def deployments(self) -> tuple[Deployment, ...]:
        """The TensorRT-LLM models of the repository; where it does not say, the one of the target."""
        from enginesmith.triton.launch import deployment_of, read_deployments

        found = read_deployments(self.repository)
        return found or ((deployment_of(self.target),) if self.target else ())

    def launch(self, tritonserver: tuple[str, ...]) -> Launch:
        """The commands, with this program and its first arguments as the server."""
        from enginesmith.triton.launch import plan_launch

        return plan_launch(
            self.deployments(),
            self.repository,
            endpoints=self.endpoints,
            tritonserver=tritonserver,
            nccl=self.target.nccl if self.target else None,
            gpu_groups=self.gpu_groups,
            slurm=self.slurm,
        )


def print_launch(request: LaunchRequest, *, as_json: bool) -> None:
    """Print the commands on stdout, for a shell or as JSON. Looks at no GPU and runs nothing."""
    from enginesmith.triton.response_cache import cache_arguments

    program = "tritonserver" if request.server == "auto" else request.server
    launch = request.launch((program, *cache_arguments(request.cache_bytes)))
    if as_json:
        commands = [{"argv": command.argv, "environment": command.environment} for command in launch.commands]
        endpoints = [asdict(one) for one in launch.endpoints]
        print_json({"commands": commands, "endpoints": endpoints, "gpus": launch.gpus})
        return
    several = len(launch.commands) > 1
    for command in launch.commands:
        click.echo(command.shell() + (" &" if several else ""))
    if several:
        click.echo("wait")


def run_request(request: LaunchRequest) -> None:
    """Start the commands and stay until Ctrl-C.

    Raises:
        ToolchainError, OperatorError: a program or a GPU is missing.
        ServerError: there is no model, a port is in use, or a process ended by itself.
    """
    from enginesmith.triton.installation import find_server
    from enginesmith.triton.ports import claim_ports
    from enginesmith.triton.response_cache import cache_arguments
    from enginesmith.triton.supervise import require_runnable, run_launch

    if not any(request.repository.glob("*/config.pbtxt")):
        raise ServerError(
            f"there is no model in {request.repository}: no directory with a config.pbtxt",
            hint=f"enginesmith build SPEC --publish {request.repository}",
        )
    elsewhere = request.slurm or any(one.nodes > 1 for one in request.deployments())
    require_runnable(request.launch(("tritonserver",)), elsewhere=elsewhere)
    installation = find_server(request.server)
    given = request.endpoints
    ports = claim_ports({"HTTP": given.http_port, "gRPC": given.grpc_port, "metrics": given.metrics_port})
    endpoints = replace(
        given, http_port=ports["HTTP"], grpc_port=ports["gRPC"], metrics_port=ports["metrics"]
    )
    backends = installation.backend_directory
    tritonserver = (
        str(installation.executable),
        *((f"--backend-directory={backends}",) if backends else ()),
        *cache_arguments(request.cache_bytes, installation),
    )
    run_launch(
        replace(request, endpoints=endpoints).launch(tritonserver),
        installation.environment(os.environ),
        on_ready=_say_ready,
    )


def _say_ready(endpoints: Endpoints) -> None:
    click.echo(
        f"serving\n  gRPC     {endpoints.address}:{endpoints.grpc_port}\n  HTTP     http://{endpoints.address}:{endpoints.http_port}"
        f"\n  metrics  http://{endpoints.address}:{endpoints.metrics_port}/metrics",
        err=True,
    )

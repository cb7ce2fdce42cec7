"""How a repository of TensorRT-LLM models is started: command lines and environments, and running them.

Packages write what a launch must know beside the model (``<model>/<version>/launch.json``), so a repository can be
started where there is no spec. Everything down to ``Launch`` is pure: it needs no GPU, no MPI and no tritonserver.
``enginesmith.triton.supervise`` runs a ``Launch``.

The shapes are NVIDIA's. *Leader*: one tritonserver per GPU under mpirun, of which rank 0 serves and the others load
the engine only. *Orchestrator*: one tritonserver that spawns its workers. The LLM API: one tritonserver that spawns
its workers, or, over several machines, ``trtllm-llmapi-launch`` on every rank, of which rank 0 becomes the server.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

from enginesmith.errors import OperatorError, SpecError
from enginesmith.targets import LlmApiTarget, Nccl, TensorRtLlmTarget
from enginesmith.triton.config import parse_config

LAUNCH_FILE = "launch.json"
LAUNCH_FORMAT = 1
PORT_STRIDE = 10
"""Distance of the ports of one server to those of the next, where one command starts several."""
_MPIRUN = ("mpirun", "--allow-run-as-root")
# Every rank runs this under srun: $1 is the model, $2 begins the name of the rank's shared memory, the rest is the
# server's command line for rank 0.
_SLURM_RANK = (
    'model=$1; prefix="--backend-config=python,shm-region-prefix-name=$2rank${SLURM_PROCID}_"; shift 2; '
    'if [ "$SLURM_PROCID" -eq 0 ]; then exec "$@" "$prefix"; fi; '
    'exec "$@" "$prefix" --allow-http=false --allow-grpc=false --allow-metrics=false '
    '--model-control-mode=explicit --load-model="$model"'
)


@dataclass(frozen=True)
class Deployment:
    """What a launch must know of one TensorRT-LLM model."""

    runtime: Literal["tensorrt_llm", "tensorrt_llm_llmapi"]
    model: str
    """The Triton model that holds the engine: the one that every rank loads."""
    world_size: int = 1
    """GPUs of one copy of the model."""
    gpus_per_node: int = 8
    mode: Literal["leader", "orchestrator"] = "leader"
    devices: tuple[tuple[int, ...], ...] = ()
    """GPU ids of each copy, as the model's configuration names them; empty: one copy on the first GPUs."""

    @property
    def nodes(self) -> int:
        """Machines of one copy of the model."""
        return -(-self.world_size // self.gpus_per_node)

    @property
    def gpus(self) -> tuple[int, ...]:
        """The GPU ids that it uses on one machine."""
        named = tuple(sorted(gpu for ids in self.devices for gpu in ids))
        return named or tuple(range(min(self.world_size, self.gpus_per_node)))


@dataclass(frozen=True)
class Endpoints:
    """Where a server listens."""

    address: str = "127.0.0.1"
    http_port: int = 8000
    grpc_port: int = 8001
    metrics_port: int = 8002

    def shifted(self, places: int) -> Endpoints:
        """The endpoints of another server, ``places`` strides further."""
        offset = places * PORT_STRIDE
        return replace(
            self,
            http_port=self.http_port + offset,
            grpc_port=self.grpc_port + offset,
            metrics_port=self.metrics_port + offset,
        )

    def arguments(self) -> tuple[str, ...]:
        """The server's arguments for them."""
        ports = {"http": self.http_port, "grpc": self.grpc_port, "metrics": self.metrics_port}
        return tuple(
            argument
            for name, port in ports.items()
            for argument in (f"--{name}-address={self.address}", f"--{name}-port={port}")
        )


@dataclass(frozen=True)
class Command:
    """One process to start."""

    groups: tuple[tuple[str, ...], ...]
    """The argument vector, cut where a reader would break the line."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Variables to set on top of the inherited ones."""

    @property
    def argv(self) -> tuple[str, ...]:
        """The argument vector."""
        return tuple(argument for group in self.groups for argument in group)

    def shell(self) -> str:
        """The command for a POSIX shell, one group of arguments a line."""
        lines = [" ".join(shlex.quote(argument) for argument in group) for group in self.groups]
        if self.environment:
            lines.insert(
                0, " ".join(["env", *(shlex.quote(f"{k}={v}") for k, v in self.environment.items())])
            )
        return " \\\n  ".join(lines)


@dataclass(frozen=True)
class Launch:
    """Everything that one ``serve`` starts."""

    commands: tuple[Command, ...]
    endpoints: tuple[Endpoints, ...]
    """Of each server, in the order of the commands."""
    gpus: tuple[int, ...] = ()
    """GPU ids that must be on this machine."""


def deployment_of(target: TensorRtLlmTarget | LlmApiTarget) -> Deployment:
    """What a launch must know of ``target``, whose ``model_prefix`` must be a plain one."""
    return Deployment(
        runtime=target.runtime,
        model=target.triton_model("tensorrt_llm"),
        world_size=target.parallelism.world_size,
        gpus_per_node=target.parallelism.gpus_per_node,
        mode=target.launch if isinstance(target, TensorRtLlmTarget) else "leader",
        devices=target.devices,
    )


def write_deployment(version: Path, deployment: Deployment) -> Path:
    """Write ``launch.json`` into a version directory and return its path."""
    path = version / LAUNCH_FILE
    path.write_text(json.dumps({"format": LAUNCH_FORMAT, **asdict(deployment)}, indent=2) + "\n")
    return path


def read_deployments(repository: Path) -> tuple[Deployment, ...]:
    """The TensorRT-LLM models of a repository; empty for one that a plain tritonserver serves.

    Of each model the version counts that Triton serves.

    Raises:
        OperatorError: a ``launch.json`` is damaged, or was written by another enginesmith.
    """
    found = []
    for path in sorted(repository.glob("*/config.pbtxt")):
        version = _served_version(path)
        if version is not None and (version / LAUNCH_FILE).is_file():
            found.append(_read_deployment(version / LAUNCH_FILE))
    return tuple(found)


def _served_version(config_path: Path) -> Path | None:
    """The version directory that Triton serves: the one that the configuration names, else the newest."""
    config = parse_config(config_path.read_text(encoding="utf-8"), origin=str(config_path))
    named = list(config.version_policy.specific.versions)
    present = [int(path.name) for path in config_path.parent.iterdir() if path.name.isdigit()]
    versions = named or present
    return config_path.parent / str(max(versions)) if versions else None


def _read_deployment(path: Path) -> Deployment:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if document.pop("format") != LAUNCH_FORMAT:
            raise ValueError("it was written by another version of enginesmith")
        document["devices"] = tuple(tuple(ids) for ids in document["devices"])
        return Deployment(**document)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise OperatorError(
            f"{path} does not say how to start its model: {error}", hint="build and publish the model again"
        ) from error


def nccl_environment(nccl: Nccl) -> dict[str, str]:
    """NCCL's variables for the ``nccl`` block of a target; what is null is left to NCCL."""
    values: dict[str, str | bool | None] = {
        "NCCL_SOCKET_IFNAME": nccl.socket_interface,
        "NCCL_IB_DISABLE": nccl.ib_disable,
        "NCCL_IB_HCA": nccl.ib_hca,
        "NCCL_P2P_LEVEL": nccl.p2p_level,
        "NCCL_NET_GDR_LEVEL": nccl.net_gdr_level,
        "NCCL_DEBUG": nccl.debug,
    }
    return {
        name: str(int(value)) if isinstance(value, bool) else value
        for name, value in values.items()
        if value is not None
    }


def plan_launch(
    deployments: Sequence[Deployment],
    repository: Path,
    *,
    endpoints: Endpoints,
    tritonserver: Sequence[str] = ("tritonserver",),
    nccl: Nccl | None = None,
    gpu_groups: Sequence[tuple[int, ...]] = (),
    slurm: bool = False,
) -> Launch:
    """The commands that serve ``repository``.

    ``tritonserver`` is the program and arguments that any server gets. ``gpu_groups`` starts one server per group of
    GPU ids, each on its own ports. ``slurm`` starts the ranks with ``srun`` also on one machine.

    Raises:
        SpecError: the models cannot be served together, or do not fit the GPUs.
        OperatorError: a path that a launcher of NVIDIA's cannot pass on.
    """
    deployment = _one_of(deployments)
    _check_groups(deployments, gpu_groups)
    variables = nccl_environment(nccl) if nccl else {}
    groups: Sequence[tuple[int, ...] | None] = tuple(gpu_groups) or (None,)
    commands, listening = [], []
    for place, gpus in enumerate(groups):
        shifted = endpoints.shifted(place)
        base = (*tritonserver, f"--model-repository={repository.absolute()}", *_COMMON)
        seen = {"CUDA_VISIBLE_DEVICES": ",".join(map(str, gpus))} if gpus else {}
        server = _Server(base, shifted, {**variables, **seen}, prefix=f"port{shifted.grpc_port}_")
        commands.append(_command(deployment, deployments, server, slurm=slurm))
        listening.append(shifted)
    on_this_machine = (
        tuple(gpu for group in gpu_groups for gpu in group)
        if gpu_groups
        else tuple(sorted({gpu for one in deployments for gpu in one.gpus}))
    )
    return Launch(tuple(commands), tuple(listening), on_this_machine)


_COMMON = ("--disable-auto-complete-config",)


@dataclass(frozen=True)
class _Server:
    """One tritonserver on its way to a command line."""

    base: tuple[str, ...]
    endpoints: Endpoints
    environment: Mapping[str, str]
    prefix: str

    def rank(self, rank: int, models: Sequence[str]) -> tuple[tuple[str, ...], ...]:
        """The groups of arguments of one rank; all but rank 0 load ``models`` only and listen nowhere."""
        memory = f"--backend-config=python,shm-region-prefix-name={self.prefix}rank{rank}_"
        if rank == 0:
            return self.base, self.endpoints.arguments(), (memory,)
        silent = ("--allow-http=false", "--allow-grpc=false", "--allow-metrics=false")
        explicit = ("--model-control-mode=explicit", *(f"--load-model={model}" for model in models))
        return self.base, silent, explicit, (memory,)


def _one_of(deployments: Sequence[Deployment]) -> Deployment | None:
    """The deployment that decides how the server is started; None for a plain tritonserver.

    Several may share a server only where they are started in the same way.
    """
    if not deployments:
        return None
    first = max(deployments, key=lambda one: (one.nodes, one.world_size))
    for other in deployments:
        alike = (other.runtime, other.mode) == (first.runtime, first.mode)
        if not alike or (first.runtime == "tensorrt_llm" and first.world_size != other.world_size):
            raise SpecError(
                f"{first.model} ({_described(first)}) and {other.model} ({_described(other)}) cannot be served by one tritonserver",
                hint="publish them into repositories of their own and serve each with other ports",
            )
    if len(deployments) > 1 and first.nodes > 1:
        raise SpecError(
            f"{first.model} needs {first.nodes} machines and shares its repository with {len(deployments) - 1} more",
            hint="publish it into a repository of its own",
        )
    return first


def _described(deployment: Deployment) -> str:
    return f"{deployment.runtime}, {deployment.mode} mode, {deployment.world_size} GPUs"


def _check_groups(deployments: Sequence[Deployment], gpu_groups: Sequence[tuple[int, ...]]) -> None:
    flat = [gpu for group in gpu_groups for gpu in group]
    if len(set(flat)) != len(flat):
        raise SpecError("the groups of GPUs share a GPU", hint="give every server GPUs of its own")
    for deployment in deployments if gpu_groups else ():
        if deployment.devices:
            raise SpecError(
                f"{deployment.model} already names its GPUs: {[list(ids) for ids in deployment.devices]}",
                hint="remove devices from the target, or do not choose GPUs for the server",
            )
        for group in gpu_groups:
            if len(group) != deployment.world_size:
                raise SpecError(
                    f"{deployment.model} needs {deployment.world_size} GPUs (tensor x pipeline), the group {list(group)} has {len(group)}",
                    hint=f"name {deployment.world_size} GPUs for each server",
                )


def _command(
    deployment: Deployment | None, deployments: Sequence[Deployment], server: _Server, *, slurm: bool
) -> Command:
    if deployment is None:
        return Command(server.rank(0, ()), server.environment)
    if deployment.runtime == "tensorrt_llm_llmapi":
        return _llmapi_command(deployment, server, slurm=slurm)
    if deployment.mode == "orchestrator":
        return _orchestrator_command(deployments, server)
    models = [one.model for one in deployments]
    if deployment.nodes > 1 or slurm:
        return _slurm_leader_command(deployment, server)
    if deployment.world_size == 1:
        return Command(server.rank(0, models), server.environment)
    groups: list[tuple[str, ...]] = [_MPIRUN]
    for rank in range(deployment.world_size):
        start, *rest = server.rank(rank, models)
        groups += [(*((":",) if rank else ()), "-n", "1", *start), *rest]
    return Command(tuple(groups), server.environment)


def _orchestrator_command(deployments: Sequence[Deployment], server: _Server) -> Command:
    """One process; its own pools of GPU memory are closed, because only the workers it spawns use GPUs."""
    gpus = sorted({gpu for one in deployments for gpu in one.gpus})
    base, *rest = server.rank(0, ())
    pools = (
        "--pinned-memory-pool-byte-size=0",
        "--enable-peer-access=false",
        *(f"--cuda-memory-pool-byte-size={gpu}:0" for gpu in gpus),
    )
    environment = {
        **server.environment,
        "TRTLLM_ORCHESTRATOR": "1",
        "TRTLLM_ORCHESTRATOR_SPAWN_PROCESSES": "1",
    }
    return Command((_MPIRUN, ("-n", "1", *base), *rest, pools), environment)


def _slurm_leader_command(deployment: Deployment, server: _Server) -> Command:
    base, endpoints, _ = server.rank(0, ())
    rank = ("sh", "-c", _SLURM_RANK, "rank", deployment.model, server.prefix)
    return Command((_srun(deployment), rank, base, endpoints), server.environment)


def _llmapi_command(deployment: Deployment, server: _Server, *, slurm: bool) -> Command:
    groups = server.rank(0, ())
    if deployment.nodes == 1 and not slurm:
        # No mpirun: the LLM API spawns its own MPI workers, which a process that is a rank itself cannot.
        return Command(groups, server.environment)
    if len(deployment.devices) > 1:
        raise SpecError(
            f"{deployment.model} has {len(deployment.devices)} instances; under srun the LLM API serves one",
            hint="remove devices from the target, or serve it without Slurm",
        )
    for argument in (argument for group in groups for argument in group):
        if any(character.isspace() or character in "*?[\\" for character in argument):
            raise OperatorError(
                f"trtllm-llmapi-launch splits its arguments at white space and expands * ? [, so it cannot pass on {argument!r}",
                hint="move the model repository to a path without such characters",
            )
    return Command((_srun(deployment), ("trtllm-llmapi-launch",), *groups), server.environment)


def _srun(deployment: Deployment) -> tuple[str, ...]:
    tasks = min(deployment.world_size, deployment.gpus_per_node)
    return (
        "srun",
        "--mpi=pmix",
        f"--nodes={deployment.nodes}",
        f"--ntasks={deployment.world_size}",
        f"--ntasks-per-node={tasks}",
        "--kill-on-bad-exit=1",
    )


def needed_programs(launch: Launch) -> Iterator[str]:
    """The launchers that must be on ``PATH``, each once."""
    launchers = {"mpirun", "srun", "trtllm-llmapi-launch"}
    argv = [argument for command in launch.commands for argument in command.argv]
    yield from sorted(launchers.intersection(argv))

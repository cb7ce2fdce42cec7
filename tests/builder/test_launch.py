"""Starting TensorRT-LLM repositories: the command lines, what they become in a shell, and running them."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from echo_models import write_model

from enginesmith.errors import OperatorError, SpecError
from enginesmith.targets import LlmApiTarget, Nccl, TensorRtLlmTarget
from enginesmith.triton.config import parse_config
from enginesmith.triton.installation import find_server
from enginesmith.triton.launch import (
    Command,
    Deployment,
    Endpoints,
    Launch,
    deployment_of,
    nccl_environment,
    plan_launch,
    read_deployments,
    write_deployment,
)

HOSTILE = "models of 'Ann'; rm -rf $HOME \"x\" `y` *"
RECORDER = f"""#!{sys.executable}
import json, os, sys
names = ("CUDA_VISIBLE_DEVICES", "TRTLLM_ORCHESTRATOR", "NCCL_DEBUG", "NCCL_SOCKET_IFNAME")
environment = {{name: os.environ[name] for name in names if name in os.environ}}
with open(os.environ["RECORD"], "a") as record:
    record.write(json.dumps({{"argv": [os.path.basename(sys.argv[0]), *sys.argv[1:]], "environment": environment}}) + "\\n")
"""
SRUN = """#!/bin/sh
while [ "${1#--}" != "$1" ]; do shift; done
SLURM_PROCID=0 "$@"
SLURM_PROCID=1 "$@"
"""


def leader(**changes: Any) -> Deployment:
    return Deployment(**{"runtime": "tensorrt_llm", "model": "tensorrt_llm", "world_size": 2, **changes})


def llmapi(**changes: Any) -> Deployment:
    return leader(runtime="tensorrt_llm_llmapi", **changes)


def planned(*deployments: Deployment, repository: Path = Path("/models"), **options: Any) -> Launch:
    return plan_launch(deployments, repository, endpoints=Endpoints(), **options)


def programs(directory: Path, contents: Mapping[str, str]) -> Path:
    """A directory for PATH with stand-ins for programs."""
    directory.mkdir(exist_ok=True)
    for name, text in contents.items():
        (directory / name).write_text(text)
        (directory / name).chmod(0o755)
    return directory


def run_in_shell(text: str, tmp_path: Path, stand_ins: Mapping[str, str]) -> list[dict[str, Any]]:
    """What the stand-ins were started with when a shell runs ``text``."""
    record = tmp_path / "record.jsonl"
    path = f"{programs(tmp_path / 'bin', stand_ins)}:/usr/bin:/bin"
    subprocess.run(["sh", "-eu", "-c", text], env={"PATH": path, "RECORD": str(record)}, check=True)
    return [json.loads(line) for line in record.read_text().splitlines()]


def ranks(argv: Sequence[str]) -> list[list[str]]:
    """The application contexts of an mpirun command line, without ``-n 1``."""
    assert argv[:2] == ["mpirun", "--allow-run-as-root"]
    contexts: list[list[str]] = [[]]
    for argument in argv[2:]:
        if argument == ":":
            contexts.append([])
        else:
            contexts[-1].append(argument)
    assert all(context[:2] == ["-n", "1"] for context in contexts)
    return [context[2:] for context in contexts]


def test_leader_mode_starts_one_server_per_gpu_of_which_only_the_first_listens(tmp_path: Path) -> None:
    launch = planned(leader(world_size=4))
    (recorded,) = run_in_shell(launch.commands[0].shell(), tmp_path, {"mpirun": RECORDER})
    first, *others = ranks(recorded["argv"])
    assert first[0] == "tritonserver"
    assert {"--http-address=127.0.0.1", "--grpc-port=8001", "--metrics-port=8002"} <= set(first)
    assert not any(argument.startswith(("--load-model", "--allow-")) for argument in first)
    assert len(others) == 3
    for rank in others:
        assert {"--model-control-mode=explicit", "--load-model=tensorrt_llm", "--allow-http=false"} <= set(
            rank
        )
        assert not any("port=" in argument for argument in rank)
    prefixes = {next(a for a in rank if "shm-region" in a) for rank in (first, *others)}
    assert len(prefixes) == 4
    assert launch.gpus == (0, 1, 2, 3)


@pytest.mark.parametrize("stand_in", ["mpirun", "tritonserver"])
def test_the_printed_command_survives_hostile_paths(tmp_path: Path, stand_in: str) -> None:
    repository = tmp_path / HOSTILE
    launch = planned(leader(world_size=2 if stand_in == "mpirun" else 1), repository=repository)
    (recorded,) = run_in_shell(launch.commands[0].shell(), tmp_path, {stand_in: RECORDER})
    assert recorded["argv"] == list(launch.commands[0].argv)
    assert f"--model-repository={repository}" in recorded["argv"]


def test_one_gpu_in_leader_mode_needs_no_mpirun() -> None:
    (command,) = planned(leader(world_size=1)).commands
    assert command.argv[0] == "tritonserver"


def test_the_orchestrator_is_one_process_that_takes_no_gpu_memory() -> None:
    (command,) = planned(leader(mode="orchestrator", devices=((2, 3), (4, 5)))).commands
    (server,) = ranks(list(command.argv))
    assert {f"--cuda-memory-pool-byte-size={gpu}:0" for gpu in (2, 3, 4, 5)} < set(server)
    assert "--pinned-memory-pool-byte-size=0" in server
    assert command.environment["TRTLLM_ORCHESTRATOR"] == "1"


def test_engines_over_several_machines_start_with_srun_and_know_their_rank(tmp_path: Path) -> None:
    repository = tmp_path / HOSTILE
    launch = planned(leader(world_size=16, gpus_per_node=8, model="x-tensorrt_llm"), repository=repository)
    (command,) = launch.commands
    assert {"--mpi=pmix", "--nodes=2", "--ntasks=16", "--ntasks-per-node=8"} <= set(command.argv)
    zero, one = run_in_shell(command.shell(), tmp_path, {"srun": SRUN, "tritonserver": RECORDER})
    assert "--http-port=8000" in zero["argv"]
    assert f"--model-repository={repository}" in zero["argv"]
    assert "--backend-config=python,shm-region-prefix-name=port8001_rank0_" in zero["argv"]
    assert not any(argument.startswith("--load-model") for argument in zero["argv"])
    assert one["argv"][-2:] == ["--model-control-mode=explicit", "--load-model=x-tensorrt_llm"]
    assert "--allow-grpc=false" in one["argv"]
    assert "--backend-config=python,shm-region-prefix-name=port8001_rank1_" in one["argv"]


def test_the_llm_api_on_one_machine_is_a_plain_server_also_with_several_instances() -> None:
    for deployment in (llmapi(), llmapi(devices=((0, 1), (2, 3)))):
        (command,) = planned(deployment).commands
        assert command.argv[0] == "tritonserver"
        assert "mpirun" not in command.argv


def test_the_llm_api_over_several_machines_starts_under_its_launcher() -> None:
    (command,) = planned(llmapi(world_size=16)).commands
    assert command.argv[0] == "srun"
    launcher = command.argv.index("trtllm-llmapi-launch")
    assert command.argv[launcher + 1] == "tritonserver"


@pytest.mark.parametrize("name", ["with space", "star*", "tab\there"])
def test_a_path_that_the_llm_apis_launcher_would_split_is_refused(name: str) -> None:
    with pytest.raises(OperatorError, match="trtllm-llmapi-launch splits"):
        planned(llmapi(world_size=16), repository=Path("/models") / name)


def test_instances_of_the_llm_api_under_srun_are_refused() -> None:
    with pytest.raises(SpecError, match="2 instances; under srun"):
        planned(llmapi(devices=((0, 1), (2, 3))), slurm=True)


def test_groups_of_gpus_get_a_server_each_on_ports_of_its_own(tmp_path: Path) -> None:
    launch = planned(leader(), gpu_groups=((0, 1), (2, 3)))
    recorded = run_in_shell(
        "\n".join(command.shell() for command in launch.commands), tmp_path, {"mpirun": RECORDER}
    )
    assert [one["environment"]["CUDA_VISIBLE_DEVICES"] for one in recorded] == ["0,1", "2,3"]
    assert [one.http_port for one in launch.endpoints] == [8000, 8010]
    assert "--grpc-port=8011" in recorded[1]["argv"]
    shared_memory = [{a for a in one["argv"] if "shm-region" in a} for one in recorded]
    assert not shared_memory[0] & shared_memory[1]


@pytest.mark.parametrize(
    ("groups", "devices", "message"),
    [
        (((0, 1), (1, 2)), (), "share a GPU"),
        (((0,),), (), "needs 2 GPUs .* has 1"),
        (((0, 1),), ((0, 1),), "already names its GPUs"),
    ],
)
def test_groups_of_gpus_that_do_not_fit_are_refused(
    groups: tuple[tuple[int, ...], ...], devices: tuple[tuple[int, ...], ...], message: str
) -> None:
    with pytest.raises(SpecError, match=message):
        planned(leader(devices=devices), gpu_groups=groups)


def test_models_that_need_different_launches_are_refused_together() -> None:
    for other in (llmapi(model="b"), leader(model="b", world_size=4), leader(model="b", mode="orchestrator")):
        with pytest.raises(SpecError, match="cannot be served by one tritonserver"):
            planned(leader(model="a"), other)


def test_two_engines_of_one_size_share_their_ranks() -> None:
    (command,) = planned(leader(model="a"), leader(model="b")).commands
    assert {"--load-model=a", "--load-model=b"} <= set(ranks(list(command.argv))[1])


def test_nccl_settings_become_variables_and_null_ones_stay_away(tmp_path: Path) -> None:
    nccl = Nccl(socket_interface="eth 0", ib_disable=True, debug="WARN")
    assert nccl_environment(nccl) == {
        "NCCL_SOCKET_IFNAME": "eth 0",
        "NCCL_IB_DISABLE": "1",
        "NCCL_DEBUG": "WARN",
    }
    assert nccl_environment(Nccl(ib_disable=False)) == {"NCCL_IB_DISABLE": "0"}
    (command,) = planned(leader(), nccl=nccl).commands
    (recorded,) = run_in_shell(command.shell(), tmp_path, {"mpirun": RECORDER})
    assert recorded["environment"] == {"NCCL_DEBUG": "WARN", "NCCL_SOCKET_IFNAME": "eth 0"}


def test_a_command_breaks_lines_between_groups_only() -> None:
    command = Command((("mpirun", "-x"), ("-n", "1", "a b")), {"A": "1 2"})
    assert command.shell() == "env 'A=1 2' \\\n  mpirun -x \\\n  -n 1 'a b'"


@pytest.mark.parametrize(
    "target",
    [
        TensorRtLlmTarget.model_validate(
            {"runtime": "tensorrt_llm", "launch": "orchestrator", "devices": [[0, 1], [2, 3]], "parallelism": {"tensor": 2}, "model_prefix": "x-"}
        ),
        LlmApiTarget.model_validate({"runtime": "tensorrt_llm_llmapi", "parallelism": {"tensor": 4, "pipeline": 2}}),
    ],
    ids=["engines", "llmapi"],
)  # fmt: skip
def test_a_repository_says_itself_how_it_is_started(
    tmp_path: Path, target: TensorRtLlmTarget | LlmApiTarget
) -> None:
    deployment = deployment_of(target)
    write_model(tmp_path, deployment.model)
    write_model(tmp_path, "plain")
    write_deployment(tmp_path / deployment.model / "1", deployment)
    assert read_deployments(tmp_path) == (deployment,)


def test_the_served_version_says_how_it_is_started_not_the_newest(tmp_path: Path) -> None:
    model = write_model(tmp_path, "tensorrt_llm")
    for version, size in ((1, 2), (2, 4)):
        (model / str(version)).mkdir(exist_ok=True)
        write_deployment(model / str(version), leader(world_size=size))
    assert read_deployments(tmp_path)[0].world_size == 4
    config = model / "config.pbtxt"
    config.write_text(f"{config.read_text()}\nversion_policy {{ specific {{ versions: 1 }} }}")
    assert parse_config(config.read_text()).version_policy.specific.versions == [1]
    assert read_deployments(tmp_path)[0].world_size == 2


@pytest.mark.parametrize(
    "text", ["", "{}", '{"format": 9}', '{"format": 1, "unknown": 2, "devices": []}', "[]"]
)
def test_a_damaged_launch_file_is_one_clear_error(tmp_path: Path, text: str) -> None:
    (write_model(tmp_path, "m") / "1" / "launch.json").write_text(text)
    with pytest.raises(OperatorError, match=r"launch\.json does not say how to start"):
        read_deployments(tmp_path)


SERVER = f"""#!{sys.executable}
import http.server, os, sys, time
if "--load-model=tensorrt_llm" in sys.argv:
    time.sleep(3600)
if os.environ.get("DIE"):
    sys.exit(7)
port = int(next(a for a in sys.argv if a.startswith("--http-port=")).split("=")[1])
class Ready(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
    def log_message(self, *_):
        pass
http.server.HTTPServer(("127.0.0.1", port), Ready).serve_forever()
"""
MPIRUN = f"""#!{sys.executable}
import signal, subprocess, sys
contexts, here = [], []
for argument in [*sys.argv[2:], ":"]:
    if argument == ":":
        contexts.append(here[2:]); here = []
    else:
        here.append(argument)
ranks = [subprocess.Popen(context) for context in contexts]
signal.signal(signal.SIGTERM, lambda *_: [rank.terminate() for rank in ranks])
sys.exit(max(rank.wait() for rank in ranks) if ranks[0].wait() >= 0 else 0)
"""
TWO_GPUS = "#!/bin/sh\necho 0\necho 1\n"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def serve(
    repository: Path, stand_ins: Path | None, *arguments: str, **variables: str
) -> subprocess.Popen[str]:
    path = "/usr/bin:/bin" if stand_ins is None else f"{stand_ins}:/usr/bin:/bin"
    return subprocess.Popen(
        [sys.executable, "-m", "enginesmith.cli", "serve", str(repository), *arguments],
        env={**os.environ, "PATH": path, **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A repository of an engine on two GPUs."""
    models = tmp_path / "models"
    write_deployment(write_model(models, "tensorrt_llm") / "1", leader())
    return models


def test_serve_runs_all_ranks_and_ends_all_on_sigterm(tmp_path: Path, repository: Path) -> None:
    path = programs(tmp_path / "bin", {"mpirun": MPIRUN, "tritonserver": SERVER, "nvidia-smi": TWO_GPUS})
    ports = [str(free_port()) for _ in range(3)]
    flags = [
        part
        for name, port in zip(("http", "grpc", "metrics"), ports, strict=True)
        for part in (f"--{name}-port", port)
    ]
    with serve(repository, path, *flags) as process:
        assert process.stderr is not None
        said = [process.stderr.readline() for _ in range(4)]
        assert said[0] == "serving\n"
        assert ports[0] in said[2]
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    assert all(str(tmp_path) not in line for line in _running_commands())


def _running_commands() -> list[str]:
    lines = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            lines.append(entry.read_bytes().replace(b"\0", b" ").decode(errors="replace"))
        except OSError:
            continue
    return [line for line in lines if "tritonserver" in line]


def test_a_rank_that_dies_ends_serve_with_one_error(tmp_path: Path, repository: Path) -> None:
    path = programs(tmp_path / "bin", {"mpirun": RECORDER, "tritonserver": SERVER, "nvidia-smi": TWO_GPUS})
    process = serve(repository, path, "--http-port", "0", "--grpc-port", "0", "--metrics-port", "0", RECORD=str(tmp_path / "r"))  # fmt: skip
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (1, "")
    assert "error: mpirun ended with 0" in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("stand_ins", "message"),
    [
        ({}, "mpirun is not on PATH"),
        ({"mpirun": RECORDER, "nvidia-smi": "#!/bin/sh\nexit 9\n"}, "needs the GPUs [0, 1]; this machine has none"),
        ({"mpirun": RECORDER, "nvidia-smi": "#!/bin/sh\necho 0\n"}, "needs the GPUs [0, 1]; this machine has [0]"),
    ],
    ids=["no mpirun", "no GPU", "too few GPUs"],
)  # fmt: skip
def test_what_is_missing_is_one_clear_error(
    tmp_path: Path, repository: Path, stand_ins: Mapping[str, str], message: str
) -> None:
    process = serve(repository, programs(tmp_path / "bin", stand_ins))
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (1, "")
    assert message in err
    assert "--print" in err
    assert "Traceback" not in err


def test_print_needs_no_gpu_and_its_json_is_the_same_command(repository: Path) -> None:
    text, _ = serve(repository, None, "--print").communicate(timeout=60)
    document = json.loads(serve(repository, None, "--print", "--json").communicate(timeout=60)[0])
    assert text.startswith("mpirun --allow-run-as-root \\\n")
    assert document["commands"][0]["argv"] == text.replace("\\\n", " ").split()
    assert document["gpus"] == [0, 1]


def test_print_takes_nccl_and_missing_facts_from_a_spec(tmp_path: Path) -> None:
    write_model(tmp_path / "models", "tensorrt_llm")
    spec = tmp_path / "spec.yaml"
    spec.write_text(
        json.dumps(
            {
                "name": "tiny",
                "source": {"path": "checkpoint"},
                "variants": {"bf16": {"scheme": "none"}},
                "targets": [
                    {"runtime": "tensorrt_llm", "parallelism": {"tensor": 2}, "nccl": {"debug": "INFO"}}
                ],
            }
        )
    )
    out, err = serve(tmp_path / "models", None, "--print", "--spec", str(spec)).communicate(timeout=60)
    assert out.startswith("env NCCL_DEBUG=INFO \\\n  mpirun"), err
    assert out.count("tritonserver") == 2


def test_a_target_without_a_spec_is_a_usage_error(repository: Path) -> None:
    process = serve(repository, None, "--print", "--target", "x")
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "--spec" in err


@pytest.mark.server
def test_a_real_server_accepts_the_arguments_of_every_rank(tmp_path: Path) -> None:
    """Ranks other than 0 listen nowhere and load one model only."""
    write_model(tmp_path / "models", "tensorrt_llm")
    write_model(tmp_path / "models", "other")
    installation = find_server()
    backends = f"--backend-directory={installation.backend_directory}"
    launch = planned(
        leader(), repository=tmp_path / "models", tritonserver=(str(installation.executable), backends)
    )
    rank = ranks(list(launch.commands[0].argv))[1]
    log = tmp_path / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            rank, env=installation.environment(os.environ), stdout=output, stderr=output
        )
    try:
        deadline = time.monotonic() + 60
        while b"successfully loaded 'tensorrt_llm'" not in log.read_bytes() and process.poll() is None:
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)
        assert process.poll() is None, log.read_text()
        said = log.read_text()
        assert "Started" not in said
        assert "loading: other" not in said
    finally:
        process.terminate()
        process.wait(60)

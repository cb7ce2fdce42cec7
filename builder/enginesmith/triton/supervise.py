"""Runs a ``Launch``: checks that it can work here, starts its processes, and ends all of them when one ends.

Knows processes, signals, GPUs by number and one HTTP endpoint; nothing of models. What the servers print goes where
this process prints, on stderr: stdout belongs to data.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import FrameType

from enginesmith.errors import OperatorError, ServerError, ToolchainError
from enginesmith.triton.launch import Endpoints, Launch, needed_programs

EXIT_TIMEOUT_S = 60.0
_POLL_INTERVAL_S = 0.2
_GET_THEM: Mapping[str, str] = {
    "mpirun": "it is Open MPI's; run inside nvcr.io/nvidia/tritonserver:YY.MM-trtllm-python-py3, which has it",
    "srun": "it is Slurm's; run this on a machine of the cluster, or in an allocation",
    "trtllm-llmapi-launch": "it comes with TensorRT-LLM; run inside nvcr.io/nvidia/tritonserver:YY.MM-trtllm-python-py3",
}
OnReady = Callable[[Endpoints], None]


def require_runnable(launch: Launch, *, elsewhere: bool = False) -> None:
    """Return when this machine has the programs and GPUs that ``launch`` needs.

    ``elsewhere``: the GPUs are on other machines (srun chooses them), so they are not looked for here.

    Raises:
        ToolchainError: mpirun, srun or trtllm-llmapi-launch is not on PATH.
        OperatorError: GPUs are missing.
    """
    for program in needed_programs(launch):
        if shutil.which(program) is None and not (elsewhere and program == "trtllm-llmapi-launch"):
            raise ToolchainError(
                f"{program} is not on PATH, and this repository is started with it",
                hint=f"{_GET_THEM[program]}; --print shows the whole command",
            )
    missing = [] if elsewhere else sorted(set(launch.gpus) - set(visible_gpus()))
    if missing:
        raise OperatorError(
            f"this repository needs the GPUs {list(launch.gpus)}; this machine has {list(visible_gpus()) or 'none'}",
            hint="run it on the machine with the GPUs; --print shows the command and needs none",
        )


def visible_gpus() -> tuple[int, ...]:
    """The numbers of this machine's GPUs, as nvidia-smi gives them; empty where there are none."""
    try:
        listed = subprocess.run(
            ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        )
    except (OSError, subprocess.SubprocessError):
        return ()
    return tuple(int(line) for line in listed.stdout.split() if line.isdigit())


def run_launch(launch: Launch, base_environment: Mapping[str, str], *, on_ready: OnReady) -> None:
    """Run ``launch`` until Ctrl-C or SIGTERM, then end its processes and return. Call it from the main thread.

    ``on_ready`` is called once for each server, when it answers that all its models are ready.

    Raises:
        ServerError: a process ended by itself; all others were ended too.
        ToolchainError: a program could not be started.
    """
    with _interrupted_by_sigterm(), contextlib.suppress(KeyboardInterrupt):
        processes: list[subprocess.Popen[bytes]] = []
        try:
            for command in launch.commands:
                processes.append(_start(command.argv, {**base_environment, **command.environment}))
            _watch(processes, list(launch.endpoints), on_ready)
        finally:
            _end(processes)


def _start(argv: Sequence[str], environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    try:
        return subprocess.Popen(
            argv,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=sys.stderr,
            stderr=sys.stderr,
            process_group=0,
        )
    except OSError as error:
        raise ToolchainError(f"cannot run {argv[0]}: {error.strerror}") from error


def _watch(processes: Sequence[subprocess.Popen[bytes]], waiting: list[Endpoints], on_ready: OnReady) -> None:
    """Return never; report servers as they become ready."""
    while True:
        for process in processes:
            if (status := process.poll()) is not None:
                how = (
                    f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with {status}"
                )
                raise ServerError(
                    f"{os.path.basename(str(process.args[0]))} {how}; its own messages are above",  # type: ignore[index]
                    hint="everything that was started with it has been ended",
                )
        for endpoints in [one for one in waiting if _is_ready(one)]:
            waiting.remove(endpoints)
            on_ready(endpoints)
        time.sleep(_POLL_INTERVAL_S)


def _is_ready(endpoints: Endpoints) -> bool:
    host = "127.0.0.1" if endpoints.address in ("0.0.0.0", "::") else endpoints.address
    connection = http.client.HTTPConnection(host, endpoints.http_port, timeout=2)
    try:
        connection.request("GET", "/v2/health/ready")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _end(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """End the processes and what they started: politely first, as a server needs time to finish its requests."""
    for process in processes:
        process.terminate()
    deadline = time.monotonic() + EXIT_TIMEOUT_S
    for process in processes:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, deadline - time.monotonic()))
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@contextlib.contextmanager
def _interrupted_by_sigterm() -> Iterator[None]:
    def interrupt(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)

"""Finds ``trtllm-build`` and GPUs on this machine, and says how to use the ones in NVIDIA's container instead.

Owns the questions to the machine: which program, which version, which GPUs, and the command lines for another machine.
Whether an engine can be built is decided by ``require_compiler``, before any step runs.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from enginesmith.errors import OperatorError, ToolchainError
from enginesmith.platforms import GPUS, TOOLCHAINS, Gpu, Toolchain, toolchain_with
from enginesmith.targets import TensorRtLlmTarget

COMPILER_VARIABLE = "ENGINESMITH_TRTLLM_BUILD"
GPU_FILE = "gpu.csv"
"""Beside engines: the line of ``nvidia-smi`` about the GPU that built them; engines do not say it themselves."""
SUMS_FILE = "SHA256SUMS"
"""Beside engines: digests, so that a copy from another machine can be checked."""

_GPU_QUERY = "name,compute_cap,memory.total,driver_version"
GPU_COMMAND = ("nvidia-smi", f"--query-gpu={_GPU_QUERY}", "--format=csv,noheader,nounits")
# Printed when tensorrt_llm is imported; the product is spelled with and without a hyphen.
_BANNER = re.compile(r"^\[TensorRT-LLM\] TensorRT[- ]LLM version: (\S+)", re.MULTILINE)
_PROBE_TIMEOUT_S = 300.0  # The import alone takes half a minute from a cold disk.
_SAME_MEMORY = 0.15
"""Two GPU models of one architecture (H100 and H200, A100 of 40 and 80 GB) differ by more than this share of memory."""


@dataclass(frozen=True)
class SeenGpu:
    """One GPU of this machine, as ``nvidia-smi`` describes it."""

    name: str
    compute_capability: int
    """Major * 10 + minor."""
    memory_mib: int
    driver: str


@dataclass(frozen=True)
class Compiler:
    """A ``trtllm-build`` that runs here."""

    executable: Path
    version: str


def find_compiler() -> Compiler | None:
    """The ``trtllm-build`` named by ENGINESMITH_TRTLLM_BUILD, else the one on ``PATH``; None when there is none.

    Raises:
        ToolchainError: the named one is not executable, or the one that was found does not run.
    """
    named = os.environ.get(COMPILER_VARIABLE)
    found = named or shutil.which("trtllm-build")
    if not found:
        return None
    executable = Path(found).expanduser().absolute()
    if not (executable.is_file() and os.access(executable, os.X_OK)):
        raise ToolchainError(
            f"{COMPILER_VARIABLE} names {executable}, which is not an executable file",
            hint="give the path of trtllm-build, or unset the variable to look on PATH",
        )
    return Compiler(executable, _version_of(executable))


def version_in(text: str) -> str | None:
    """The version in TensorRT-LLM's banner line, wherever it is in ``text``."""
    banner = _BANNER.search(text)
    return banner[1] if banner else None


def visible_gpus() -> tuple[SeenGpu, ...]:
    """The GPUs that ``nvidia-smi`` lists; none where it is missing or fails."""
    try:
        done = subprocess.run(GPU_COMMAND, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ()
    return gpus_in(done.stdout) if done.returncode == 0 else ()


def gpus_in(text: str) -> tuple[SeenGpu, ...]:
    """The GPUs in the output of ``GPU_COMMAND``; lines of another form are passed over."""
    gpus = []
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.split(",")]
        if len(cells) == 4 and re.fullmatch(r"\d+\.\d", cells[1]) and cells[2].isdecimal():
            major, minor = cells[1].split(".")
            gpus.append(SeenGpu(cells[0], int(major) * 10 + int(minor), int(cells[2]), cells[3]))
    return tuple(gpus)


def is_model(seen: SeenGpu, gpu: Gpu) -> bool:
    """Whether ``seen`` can be a GPU of this model: its architecture, and about its memory."""
    nominal_mib = gpu.memory_gib * 1024
    return (
        seen.compute_capability == gpu.compute_capability
        and abs(seen.memory_mib - nominal_mib) <= _SAME_MEMORY * nominal_mib
    )


def require_compiler(target: TensorRtLlmTarget) -> Compiler:
    """The ``trtllm-build`` of the target's version, on a machine with the target's GPU.

    Raises:
        ToolchainError: something is missing or different; names all of it, and both ways out.
    """
    toolchain, gpu = TOOLCHAINS[target.toolchain], GPUS[target.gpu]
    compiler, problems = find_compiler(), []
    if compiler is None:
        problems.append(f"trtllm-build is not on PATH and {COMPILER_VARIABLE} is not set")
    elif compiler.version != toolchain.tensorrt_llm:
        problems.append(
            f"{compiler.executable} is TensorRT-LLM {compiler.version}{_image_of(compiler.version)}"
        )
    gpus = visible_gpus()
    if not gpus:
        problems.append("nvidia-smi shows no GPU")
    elif others := [seen for seen in gpus[: target.workers] if not is_model(seen, gpu)]:
        problems.append(f"its GPU is {describe_gpu(others[0])}")
    if problems or compiler is None:
        raise ToolchainError(
            f"target {target.name} needs TensorRT-LLM {toolchain.tensorrt_llm} and a GPU {gpu.name} "
            f"(SM{gpu.compute_capability}, {gpu.memory_gib} GB) to build engines; on this machine: {'; '.join(problems)}",
            hint=ways_out(toolchain),
        )
    return compiler


def ways_out(toolchain: Toolchain) -> str:
    """What somebody can do who cannot build engines here."""
    return (
        f"the image {toolchain.image} has the right TensorRT-LLM. Two ways out: `enginesmith rehearse` runs all but the "
        "engines on this machine; or build them where the GPU is, with the script that `enginesmith trtllm-command` prints, "
        "and give the directory with --engine-dir"
    )


def describe_gpu(gpu: SeenGpu) -> str:
    """Name, architecture and memory of a GPU."""
    return f"{gpu.name} (SM{gpu.compute_capability}, {gpu.memory_mib / 1024:.0f} GiB)"


def container_command(
    arguments: Sequence[str],
    *,
    toolchain: Toolchain,
    read: Sequence[Path],
    write: Sequence[Path],
    gpus: str = "all",
) -> tuple[str, ...]:
    """The ``docker run`` that executes ``trtllm-build`` with these arguments in the toolchain's image.

    Directories appear in the container under the paths that they have here, so ``arguments`` are the same in both.
    Those of ``write`` must exist: docker would make them, but as root. What is written belongs to the caller.

    Raises:
        OperatorError: a directory's name cannot be given to ``docker run -v``.
    """
    mounts = [(path, ":ro") for path in read] + [(path, "") for path in write]
    for path, _ in mounts:
        if ":" in str(path) or not path.is_absolute():
            raise OperatorError(
                f"{path} cannot be mounted into a container: docker wants an absolute path without a colon",
                hint="use another directory",
            )
    volumes = [part for path, mode in mounts for part in ("-v", f"{path}:{path}{mode}")]
    return (*_docker_run(gpus, volumes), toolchain.image, "trtllm-build", *arguments)


def container_script(
    arguments: Sequence[str],
    *,
    toolchain: Toolchain,
    checkpoint_dir: Path,
    engine_dir: Path,
    gpus: str = "all",
) -> str:
    """A shell script for the GPU machine: compile, then record GPU and digests beside the engines."""
    compile_ = container_command(
        arguments, toolchain=toolchain, read=[checkpoint_dir], write=[engine_dir], gpus=gpus
    )
    ask = (*_docker_run(gpus, []), toolchain.image, *GPU_COMMAND)
    place = shlex.quote(str(engine_dir))
    lines = (
        "set -eu",
        f"mkdir -p {place}",
        shlex.join(compile_),
        f"{shlex.join(ask)} > {place}/{GPU_FILE}",
        f"(cd {place} && sha256sum config.json rank*.engine > {SUMS_FILE})",
    )
    return "\n".join(lines) + "\n"


def _docker_run(gpus: str, volumes: Sequence[str]) -> tuple[str, ...]:
    limits = ("--ipc=host", "--ulimit", "memlock=-1", "--ulimit", "stack=67108864")
    # The caller has no home directory in the image, and caches of kernels are written to one.
    owner = ("--user", f"{os.getuid()}:{os.getgid()}", "-e", "HOME=/tmp")
    return ("docker", "run", "--rm", "--gpus", gpus, *limits, *owner, *volumes)


def _version_of(executable: Path) -> str:
    try:
        done = subprocess.run(
            [executable, "--help"],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_PROBE_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ToolchainError(f"{executable} --help does not run: {error}") from error
    said = done.stdout + done.stderr
    version = version_in(said)
    if version is None:
        tail = " | ".join(said.strip().splitlines()[-3:])
        raise ToolchainError(
            f"{executable} --help does not say which TensorRT-LLM it is (exit status {done.returncode}): {tail}",
            hint="run it by hand; it must start before it can build",
        )
    return version


def _image_of(version: str) -> str:
    known = toolchain_with(version)
    return f" (that of toolchain {known.tag})" if known else ""

"""Which compiler and GPU a machine has, what is said when they are not the target's, and the way over a container."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
from pathlib import Path

import pytest
import trtllm_build_standin
from trtllm_build_cases import (
    A100,
    H100,
    H200,
    SERVING,
    make_context,
    make_target,
    write_checkpoint,
)

from enginesmith.engines.tensorrt_llm.arguments import Precision, trtllm_build_arguments
from enginesmith.engines.tensorrt_llm.compile import run
from enginesmith.engines.tensorrt_llm.toolchain import (
    container_command,
    container_script,
    find_compiler,
    gpus_in,
    is_model,
    require_compiler,
    version_in,
    visible_gpus,
)
from enginesmith.errors import OperatorError, ToolchainError
from enginesmith.platforms import GPUS, TOOLCHAINS


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty directory that is first on the PATH of a machine without TensorRT-LLM."""
    directory = tmp_path / "bin"
    directory.mkdir()
    monkeypatch.setenv("PATH", f"{directory}:/usr/bin:/bin")
    monkeypatch.delenv("ENGINESMITH_TRTLLM_BUILD", raising=False)
    return directory


def refusal(**keys: object) -> ToolchainError:
    with pytest.raises(ToolchainError) as raised:
        require_compiler(make_target(**keys))
    return raised.value


def test_machine_with_the_right_parts_passes(programs: Path) -> None:
    trtllm_build_standin.install(programs, gpu=H100)
    assert require_compiler(make_target()).version == "1.2.1"
    assert [gpu.compute_capability for gpu in visible_gpus()] == [90]


def test_machine_without_anything_gets_one_error_with_both_ways_out(programs: Path) -> None:
    error = refusal()
    assert "target tensorrt-llm needs TensorRT-LLM 1.2.1 and a GPU h100 (SM90, 80 GB)" in error.message
    assert "trtllm-build is not on PATH and ENGINESMITH_TRTLLM_BUILD is not set" in error.message
    assert "nvidia-smi shows no GPU" in error.message
    assert error.hint is not None
    assert "nvcr.io/nvidia/tritonserver:26.07-trtllm-python-py3 has the right TensorRT-LLM" in error.hint
    assert "`enginesmith rehearse`" in error.hint
    assert "--engine-dir" in error.hint


def test_another_version_names_the_toolchain_that_has_it(
    programs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = trtllm_build_standin.install(programs, gpu=H100)
    monkeypatch.setenv("STANDIN_VERSION", "1.1.0")
    assert f"{program} is TensorRT-LLM 1.1.0 (that of toolchain 26.02)" in refusal().message
    assert require_compiler(make_target(toolchain="26.02")).version == "1.1.0"


@pytest.mark.parametrize(("line", "words"), [(A100, "SM80, 80 GiB"), (H200, "SM90, 140 GiB")])
def test_another_gpu_is_refused(line: str, words: str, programs: Path) -> None:
    trtllm_build_standin.install(programs, gpu=line)
    assert words in refusal(gpu="h100").message


def test_every_gpu_of_the_workers_is_looked_at(programs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trtllm_build_standin.install(programs, gpu=H100)
    (programs / "nvidia-smi").write_text(f"#!/bin/sh\necho '{H100}'\necho '{A100}'\n")
    assert "A100" in refusal(workers=2, parallelism={"tensor": 2}).message
    assert require_compiler(make_target()).version == "1.2.1"


@pytest.mark.parametrize(
    ("name", "mib"),
    [
        *(("h100", 81559), ("h200", 143771), ("a100", 81920), ("a100-40g", 40960), ("l4", 23034)),
        *(("a10", 23028), ("a30", 24576), ("a40", 46068), ("l40s", 46068), ("rtx-4090", 24564)),
        *(("gh200", 97871), ("b200", 183359)),
    ],
)
def test_gpus_are_told_apart_by_architecture_and_memory(name: str, mib: int) -> None:
    major, minor = divmod(GPUS[name].compute_capability, 10)
    (seen,) = gpus_in(f"NVIDIA something, {major}.{minor}, {mib}, 590.44.01\n")
    matching = {gpu.name for gpu in GPUS.values() if is_model(seen, gpu)}
    assert name in matching
    assert matching <= {name, "l40", "l40s", "l4", "rtx-4090"}, "cards of one chip and size look alike"


def test_lines_that_are_no_gpu_are_passed_over() -> None:
    assert gpus_in("NVIDIA-SMI has failed because it couldn't communicate with the driver\n\n") == ()


@pytest.mark.parametrize(
    "banner", ["[TensorRT-LLM] TensorRT-LLM version: 1.2.1", "[TensorRT-LLM] TensorRT LLM version: 1.2.1"]
)
def test_version_is_read_from_both_spellings_of_the_banner(banner: str) -> None:
    assert version_in(f"a warning first\n{banner}\nusage: trtllm-build\n") == "1.2.1"
    assert version_in("usage: trtllm-build") is None


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("echo usage: something else", "does not say which TensorRT-LLM it is"),
        ("echo libcuda.so.1: cannot open >&2; exit 1", r"exit status 1\): libcuda\.so\.1"),
    ],
)
def test_compiler_that_does_not_run_is_told_apart_from_a_missing_one(
    body: str, words: str, programs: Path
) -> None:
    (programs / "trtllm-build").write_text(f"#!/bin/sh\n{body}\n")
    (programs / "trtllm-build").chmod(0o755)
    with pytest.raises(ToolchainError, match=words):
        find_compiler()


def test_named_compiler_must_be_there(programs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENGINESMITH_TRTLLM_BUILD", str(programs / "nothing"))
    with pytest.raises(ToolchainError, match="ENGINESMITH_TRTLLM_BUILD names"):
        find_compiler()


def test_container_command_is_exact(tmp_path: Path) -> None:
    command = container_command(
        ("--checkpoint_dir", "/data/in", "--output_dir", "/data/out"),
        toolchain=TOOLCHAINS["26.07"],
        read=[Path("/data/in")],
        write=[Path("/data/out")],
        gpus="device=0",
    )
    assert command == (
        *("docker", "run", "--rm", "--gpus", "device=0", "--ipc=host"),
        *("--ulimit", "memlock=-1", "--ulimit", "stack=67108864"),
        *("--user", f"{os.getuid()}:{os.getgid()}", "-e", "HOME=/tmp"),
        *("-v", "/data/in:/data/in:ro", "-v", "/data/out:/data/out"),
        "nvcr.io/nvidia/tritonserver:26.07-trtllm-python-py3",
        *("trtllm-build", "--checkpoint_dir", "/data/in", "--output_dir", "/data/out"),
    )


@pytest.mark.parametrize("path", ["/data/a:b", "relative"])
def test_paths_that_docker_would_misread_are_refused(path: str) -> None:
    with pytest.raises(OperatorError, match="cannot be mounted"):
        container_command((), toolchain=TOOLCHAINS["26.07"], read=[Path(path)], write=[])


# Plays `docker run`: drops its own options and runs the rest here, which works because paths are the same inside.
DOCKER = """#!/bin/sh
[ "$1" = run ] || exit 64
shift
while [ $# -gt 0 ]; do
  case "$1" in
    --rm|--ipc=host) shift ;;
    --gpus|--ulimit|--user|-e|-v) shift 2 ;;
    *) break ;;
  esac
done
shift
exec "$@"
"""


def test_engines_of_the_container_script_are_adopted(tmp_path: Path, programs: Path) -> None:
    trtllm_build_standin.install(programs, gpu=H100)
    (programs / "docker").write_text(DOCKER)
    (programs / "docker").chmod(0o755)
    place = tmp_path / "a place with 'quotes' and ; signs"
    converted = write_checkpoint(place / "converted", tensor=2, quant_algo="W4A16_AWQ")
    target, engines = make_target(parallelism={"tensor": 2}), place / "engines"
    arguments = trtllm_build_arguments(
        target,
        SERVING,
        checkpoint_dir=converted,
        output_dir=engines,
        precision=Precision("W4A16_AWQ"),
    )
    script = container_script(
        arguments, toolchain=TOOLCHAINS["26.07"], checkpoint_dir=converted, engine_dir=engines
    )
    done = subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert [path.name for path in tmp_path.glob("*.cache")] == []
    context = make_context(tmp_path, target, converted, engine_dir=str(engines))
    facts = run(context)
    assert (facts["origin"], facts["digests_checked"]) == ("adopted", True)
    assert facts["gpu"]["compute_capability"] == 90
    json.dumps(facts)


def test_container_script_stops_at_the_first_failure(tmp_path: Path, programs: Path) -> None:
    (programs / "docker").write_text("#!/bin/sh\nexit 125\n")
    (programs / "docker").chmod(0o755)
    engines = tmp_path / "engines"
    script = container_script(
        (), toolchain=TOOLCHAINS["26.07"], checkpoint_dir=tmp_path / "c", engine_dir=engines
    )
    done = subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 125
    assert list(engines.iterdir()) == []
    assert shlex.split(script.splitlines()[2])[:3] == ["docker", "run", "--rm"]

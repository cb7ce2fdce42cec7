"""The ``compile`` step: engines from a converted checkpoint, by ``trtllm-build`` here or adopted from where it ran.

Either way the directory is checked against the target before it becomes an artifact, and completed with the tokenizer:
``trtllm-build`` does not copy it, and an engine without one cannot be served.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import subprocess
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from enginesmith.checkpoints.tensors import read_json_object
from enginesmith.engines.tensorrt_llm.arguments import Precision, TimingCache, trtllm_build_arguments
from enginesmith.engines.tensorrt_llm.engine_directory import (
    EngineFacts,
    rank_files,
    validate_engine_directory,
)
from enginesmith.engines.tensorrt_llm.toolchain import (
    GPU_FILE,
    SUMS_FILE,
    Compiler,
    container_script,
    describe_gpu,
    require_compiler,
    version_in,
    visible_gpus,
)
from enginesmith.errors import OperatorError, SourceError, ToolchainError
from enginesmith.platforms import TOOLCHAINS
from enginesmith.spec import Serving
from enginesmith.steps import StepContext
from enginesmith.targets import TensorRtLlmTarget

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
)
_TAIL_LINES = 15


def run(context: StepContext) -> Mapping[str, Any]:
    """Run the step. ``params``: target, serving, version, compute_capability, location {engine_dir, timing_cache, workers}.

    Inputs: ``converted`` (config.json and rank files of the checkpoint), ``checkpoint`` (its tokenizer). Artifact: what
    ``trtllm-build`` writes, tokenizer files, ``gpu.csv`` where the GPU is known.
    """
    target = TensorRtLlmTarget.model_validate(context.params["target"])
    serving = Serving.model_validate(context.params["serving"])
    location = context.params.get("location") or {}
    converted = context.inputs["converted"]
    precision = precision_of(converted)
    _require_tokenizer(context.inputs["checkpoint"])
    model = read_json_object(converted / "config.json")
    checks = _Checks(target, serving, context.params["version"], precision, model, _rank_bytes(converted))
    if engine_dir := location.get("engine_dir"):
        context.progress(None, f"checking the engines in {engine_dir}")
        checks.validate(Path(engine_dir), digests=False)
        _adopt(Path(engine_dir), context)
    else:
        _compile(context, target, serving, precision, location=location)
    facts = checks.validate(context.out)
    _add_tokenizer(context.inputs["checkpoint"], context.out)
    return {
        **asdict(facts),
        "origin": "adopted" if engine_dir else "built",
        "quant_algo": precision.quant_algo,
        "kv_cache_quant_algo": precision.kv_cache_quant_algo,
    }


def precision_of(converted: Path) -> Precision:
    """How the checkpoint in ``converted`` is quantized, from its ``config.json``."""
    section = read_json_object(converted / "config.json").get("quantization")
    quantization = section if isinstance(section, dict) else {}
    return Precision(quantization.get("quant_algo"), quantization.get("kv_cache_quant_algo"))


@dataclass(frozen=True)
class _Checks:
    """What a directory of engines is held against."""

    target: TensorRtLlmTarget
    serving: Serving
    version: str
    precision: Precision
    model: Mapping[str, Any]
    checkpoint_bytes: Sequence[int]

    def validate(self, directory: Path, *, digests: bool = True) -> EngineFacts:
        return validate_engine_directory(
            directory,
            target=self.target,
            serving=self.serving,
            version=self.version,
            precision=self.precision,
            model=self.model,
            checkpoint_bytes=self.checkpoint_bytes,
            digests=digests,
        )


def _adopt(source: Path, context: StepContext) -> None:
    """Copy, not link: the directory is its owner's, who may build into it again."""
    records = (source / name for name in (GPU_FILE, SUMS_FILE))
    files = [*rank_files(source), *(record for record in records if record.is_file())]
    total = max(1, sum(file.stat().st_size for file in files))
    copied = 0
    for file in files:
        context.progress(copied / total, f"copying {file.name}")
        shutil.copyfile(file, context.out / file.name)
        copied += file.stat().st_size


def _compile(
    context: StepContext,
    target: TensorRtLlmTarget,
    serving: Serving,
    precision: Precision,
    *,
    location: Mapping[str, Any],
) -> None:
    compiler = require_compiler(target)
    gpu = visible_gpus()[0]
    kept = Path(cache) if (cache := location.get("timing_cache")) else None
    fresh = context.scratch / "timing.cache"
    arguments = trtllm_build_arguments(
        target,
        serving,
        checkpoint_dir=context.inputs["converted"],
        output_dir=context.out,
        precision=precision,
        workers=int(location.get("workers") or 1),
        timing_cache=TimingCache(kept if kept and kept.is_file() else None, fresh),
    )
    context.progress(0.0, f"TensorRT-LLM {compiler.version} on {describe_gpu(gpu)}")
    _run_compiler(compiler, arguments, context=context, world_size=target.parallelism.world_size)
    major, minor = divmod(gpu.compute_capability, 10)
    record = f"{gpu.name}, {major}.{minor}, {gpu.memory_mib}, {gpu.driver}\n"
    (context.out / GPU_FILE).write_text(record, encoding="utf-8")
    if kept and fresh.is_file():
        _keep(fresh, kept)


def _keep(fresh: Path, kept: Path) -> None:
    """Replace the kept timing cache whole: builds that read it meanwhile see the old one or the new one."""
    kept.parent.mkdir(parents=True, exist_ok=True)
    beside = kept.with_name(f".{kept.name}.{os.getpid()}")
    shutil.copyfile(fresh, beside)
    os.replace(beside, kept)


def _run_compiler(
    compiler: Compiler, arguments: Sequence[str], *, context: StepContext, world_size: int
) -> None:
    """Run it to its end; its log goes to this step's log as it comes."""
    command = [str(compiler.executable), *arguments]
    print("$ " + " ".join(command), flush=True)  # noqa: T201 - a step's stdout is its log.
    tail: deque[str] = deque(maxlen=_TAIL_LINES)
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    ) as process:
        assert process.stdout is not None, "it was asked for"
        try:
            progress = BuildProgress(world_size)
            _follow(process.stdout, tail, context=context, progress=progress, compiler=compiler)
        except BaseException:
            process.kill()  # Whatever ends this step ends the compiler too.
            raise
    status = process.returncode
    if status != 0:
        raise _failure(status, tail)


def _follow(
    lines: Iterable[str],
    tail: deque[str],
    *,
    context: StepContext,
    progress: BuildProgress,
    compiler: Compiler,
) -> None:
    for line in lines:
        print(line, end="", flush=True)  # noqa: T201
        tail.append(line.rstrip())
        version = version_in(line)
        if version is not None and version != compiler.version:
            raise ToolchainError(
                f"{compiler.executable} said that it is TensorRT-LLM {compiler.version}, and now says {version}",
                hint="somebody is changing the installation; build again when that is over",
            )
        if progress.read(line):
            context.progress(progress.fraction, progress.note)


@dataclass
class BuildProgress:
    """How far ``trtllm-build`` is, read from its log: ranks that are done, and the phase of the one it is at."""

    world_size: int
    done: int = 0
    phase: str = "reading the checkpoint"
    share: float = 0.0
    _phases: tuple[tuple[re.Pattern[str], str, float], ...] = field(
        default=(
            (re.compile(r"Total time of constructing network"), "building", 0.15),
            (re.compile(r"Build TensorRT engine"), "building", 0.2),
            (re.compile(r"Engine generation completed"), "built", 0.85),
            (re.compile(r"Serializing engine to"), "writing", 0.9),
        ),
        repr=False,
    )

    def read(self, line: str) -> bool:
        """Take in a line; whether it changed anything."""
        if "Engine serialized." in line:
            self.done, self.phase, self.share = min(self.done + 1, self.world_size), "reading", 0.0
            return True
        for pattern, phase, share in self._phases:
            if pattern.search(line):
                self.phase, self.share = phase, share
                return True
        return False

    @property
    def fraction(self) -> float:
        """Share of the whole work, in [0, 1]."""
        return min(1.0, (self.done + self.share) / self.world_size)

    @property
    def note(self) -> str:
        """For people: ``engine 2 of 4: building``."""
        if self.done == self.world_size:
            return f"{self.world_size} of {self.world_size} engines built"
        return f"engine {self.done + 1} of {self.world_size}: {self.phase}"


def _failure(status: int, tail: Sequence[str]) -> Exception:
    said = "\n".join(f"  | {line}" for line in tail if line.strip())
    text = "\n".join(tail)
    if "No space left on device" in text:
        return OSError(errno.ENOSPC, "trtllm-build: No space left on device")
    message = f"trtllm-build failed (exit status {status})\n{said}"
    if re.search(r"out of memory|OutOfMemory|insufficient memory", text, re.IGNORECASE):
        return OperatorError(
            message,
            hint="the GPU's memory was too small: fewer workers, a smaller max_num_tokens, or more tensor parallelism",
        )
    if "unrecognized arguments" in text or "invalid choice" in text:
        return ToolchainError(
            message,
            hint="this trtllm-build has other flags than TensorRT-LLM 1.0 to 1.2; check the toolchain",
        )
    return ToolchainError(message, hint="its whole log is in this step's log")


def _rank_bytes(converted: Path) -> list[int]:
    files = sorted(converted.glob("rank*.safetensors"), key=lambda path: int(path.stem.removeprefix("rank")))
    return [file.stat().st_size for file in files]


def _require_tokenizer(checkpoint: Path) -> None:
    if not (checkpoint / TOKENIZER_FILES[0]).is_file():
        raise SourceError(
            f"{checkpoint} has no {TOKENIZER_FILES[0]}: engines are served with their model's tokenizer",
            hint="put the model's tokenizer files beside its config.json",
        )


def _add_tokenizer(checkpoint: Path, out: Path) -> None:
    for name in TOKENIZER_FILES:
        if (checkpoint / name).is_file():
            shutil.copyfile(checkpoint / name, out / name)


def plain_arguments(params: Mapping[str, Any], converted: Path, output_dir: Path) -> tuple[str, ...]:
    """The ``trtllm-build`` arguments of a compile step with these parameters, without kept timings."""
    return trtllm_build_arguments(
        TensorRtLlmTarget.model_validate(params["target"]),
        Serving.model_validate(params["serving"]),
        checkpoint_dir=converted,
        output_dir=output_dir,
        precision=precision_of(converted),
        workers=int((params.get("location") or {}).get("workers") or 1),
    )


def script_for_another_machine(params: Mapping[str, Any], converted: Path, engine_dir: Path) -> str:
    """A shell script that does this compile step in NVIDIA's container, where the GPU is.

    ``converted`` and ``engine_dir`` are absolute paths on that machine; precision is read from ``converted`` here, so the
    checkpoint lies under the same path on both, or is mounted there. What the script makes is adopted by ``engine_dir``.

    Raises:
        OperatorError: a path cannot be mounted into a container.
    """
    return container_script(
        plain_arguments(params, converted, engine_dir),
        toolchain=TOOLCHAINS[params["target"]["toolchain"]],
        checkpoint_dir=converted,
        engine_dir=engine_dir,
    )

"""What is in a directory of TensorRT-LLM engines, and whether it is what a spec asked for.

Owns the layout that ``trtllm-build`` writes (``Engine.save`` in builder.py): ``rank{r}.engine``, optional
``rank{r}_managed_weights.safetensors``, and ``config.json`` = {version, pretrained_config, build_config}. The plan files
themselves are opaque: whether one is whole is judged by its size and, where it is there, by ``SHA256SUMS``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from enginesmith.checkpoints.tensors import read_json_object
from enginesmith.digests import file_digest
from enginesmith.engines.tensorrt_llm.arguments import (
    Precision,
    effective_max_num_tokens,
    paged_context_attention,
)
from enginesmith.engines.tensorrt_llm.toolchain import (
    GPU_FILE,
    SUMS_FILE,
    SeenGpu,
    describe_gpu,
    gpus_in,
    is_model,
)
from enginesmith.errors import OperatorError, SourceError, ToolchainError
from enginesmith.platforms import GPUS, toolchain_with
from enginesmith.spec import Serving
from enginesmith.targets import TensorRtLlmTarget

CONFIG_FILE = "config.json"

_MODEL_KEYS = (
    "architecture",
    "dtype",
    "num_hidden_layers",
    "hidden_size",
    "num_attention_heads",
    "vocab_size",
)
# An engine holds the weights of its rank's checkpoint: about as many bytes, half of them where 16-bit weights are
# quantized while building (W8A16), less an output head that shares the embedding's memory.
_LEAST_SHARE_OF_CHECKPOINT = 0.4
_LEAST_SHARE_OF_NEIGHBOUR = 0.9
"""Ranks of one pipeline stage have the same layers in the same shapes."""


@dataclass(frozen=True)
class EngineFacts:
    """What a checked directory holds."""

    version: str
    world_size: int
    engine_bytes: int
    gpu: SeenGpu | None
    """What built the engines, or None where it was not recorded."""
    digests_checked: bool


def validate_engine_directory(
    directory: Path,
    *,
    target: TensorRtLlmTarget,
    serving: Serving,
    version: str,
    precision: Precision,
    model: Mapping[str, Any],
    checkpoint_bytes: Sequence[int] = (),
    digests: bool = True,
) -> EngineFacts:
    """Facts about ``directory``, if it holds the complete engines of this target.

    ``model`` is the ``config.json`` of the checkpoint that was compiled. ``checkpoint_bytes`` are the sizes of the ranks' checkpoints that were compiled, where they are known;
    ``digests`` says whether to read every byte against ``SHA256SUMS``, where that is there.

    Raises:
        SourceError: a file is missing, damaged or cut off.
        ToolchainError: another version of TensorRT-LLM or another GPU built the engines.
        OperatorError: they are another model's, or were built with another mapping, precision or limits than the spec's.
    """
    if not directory.is_dir():
        raise SourceError(
            f"engine directory {directory} does not exist", hint="give the directory that trtllm-build wrote"
        )
    config = read_json_object(directory / CONFIG_FILE)
    _check_version(directory, config, version)
    gpu = _recorded_gpu(directory, target)
    _check_mapping(directory, config, target)
    _check_model(directory, config, model)
    _check_precision(directory, config, precision)
    _check_limits(directory, config, target, serving, precision=precision)
    sizes = _check_ranks(directory, target, checkpoint_bytes)
    digests_checked = digests and _check_digests(directory, len(sizes))
    return EngineFacts(version, len(sizes), sum(sizes), gpu, digests_checked)


def rank_files(directory: Path) -> Iterator[Path]:
    """The files of ``directory`` that the runtime loads, without tokenizer or records."""
    for pattern in (CONFIG_FILE, "rank*.engine", "rank*_managed_weights.safetensors"):
        yield from sorted(directory.glob(pattern))


def _check_version(directory: Path, config: Mapping[str, Any], expected: str) -> None:
    seen = config.get("version")
    if seen == expected:
        return
    if not isinstance(seen, str):
        raise SourceError(
            f"{directory / CONFIG_FILE} does not say which TensorRT-LLM wrote it: its version is {seen!r}",
            hint="it must be the config.json that trtllm-build wrote beside the engines, not a checkpoint's",
        )
    known = toolchain_with(seen)
    raise ToolchainError(
        f"the engines in {directory} were built by TensorRT-LLM {seen}, the target's toolchain has {expected}: "
        "an engine runs in the version that built it only",
        hint=f"build them again with {expected}"
        + (f", or set toolchain: {known.tag!r} in the target, which has {seen}" if known else ""),
    )


def _recorded_gpu(directory: Path, target: TensorRtLlmTarget) -> SeenGpu | None:
    path = directory / GPU_FILE
    if not path.is_file():
        return None
    gpus = gpus_in(path.read_text(encoding="utf-8", errors="replace"))
    if not gpus:
        raise SourceError(
            f"{path} does not describe a GPU",
            hint="it holds the output of nvidia-smi that the container script records; delete it or record it again",
        )
    gpu = GPUS[target.gpu]
    if others := [seen for seen in gpus if not is_model(seen, gpu)]:
        raise ToolchainError(
            f"the engines in {directory} were built on {describe_gpu(others[0])}, the target's GPU is {gpu.name} "
            f"(SM{gpu.compute_capability}, {gpu.memory_gib} GB)",
            hint="build them on the GPU that serves them, or name that GPU in the target",
        )
    return gpus[0]


def _check_mapping(directory: Path, config: Mapping[str, Any], target: TensorRtLlmTarget) -> None:
    mapping = _section(directory, config, "pretrained_config", "mapping")
    parallelism = target.parallelism
    expected = {
        "world_size": parallelism.world_size,
        "tp_size": parallelism.tensor,
        "pp_size": parallelism.pipeline,
    }
    if parallelism.expert > 1:
        expected["moe_ep_size"] = parallelism.expert
    for key, value in expected.items():
        if mapping.get(key) != value:
            raise OperatorError(
                f"the engines in {directory} have {key} {mapping.get(key)!r}, the target's parallelism asks for {value}",
                hint="build them from this spec's converted checkpoint, or change parallelism in the target",
            )


def _check_model(directory: Path, config: Mapping[str, Any], model: Mapping[str, Any]) -> None:
    """Engines of another model are not told apart by their files: those load, and answer with noise."""
    built = _section(directory, config, "pretrained_config")
    for key in _MODEL_KEYS:
        if built.get(key) != model.get(key):
            raise OperatorError(
                f"the engines in {directory} have {key} {built.get(key)!r}, the variant's checkpoint has {model.get(key)!r}",
                hint="these are the engines of another model; give the directory of this one's",
            )


def _check_precision(directory: Path, config: Mapping[str, Any], precision: Precision) -> None:
    section = _section(directory, config, "pretrained_config").get("quantization")
    quantization = section if isinstance(section, dict) else {}
    expected = {
        "quant_algo": precision.quant_algo,
        "kv_cache_quant_algo": precision.kv_cache_quant_algo,
    }
    for key, value in expected.items():
        if quantization.get(key) != value:
            raise OperatorError(
                f"the engines in {directory} have {key} {quantization.get(key) or 'none'}, the variant's checkpoint has "
                f"{value or 'none'}",
                hint="these are the engines of another variant; build this variant's, or give its directory",
            )


def _check_limits(
    directory: Path,
    config: Mapping[str, Any],
    target: TensorRtLlmTarget,
    serving: Serving,
    *,
    precision: Precision,
) -> None:
    build = _section(directory, config, "build_config")
    plugins = _section(directory, config, "build_config", "plugin_config")
    at_least = {
        "max_batch_size": serving.max_batch_size,
        "max_input_len": serving.prompt_limit,
        "max_seq_len": serving.max_sequence_length,
        "max_num_tokens": effective_max_num_tokens(target, serving),
        "max_beam_width": target.max_beam_width,
    }
    for key, needed in at_least.items():
        seen = build.get(key)
        if not isinstance(seen, int) or seen < needed:
            raise OperatorError(
                f"the engines in {directory} were built with {key} {seen!r}, the spec needs {needed}",
                hint=f"build them again, or lower the spec's limit to {seen}",
            )
    if str(build.get("kv_cache_type")).upper() != "PAGED":
        raise OperatorError(
            f"the engines in {directory} have kv_cache_type {build.get('kv_cache_type')!r}; in-flight batching needs PAGED",
            hint="build them again with --kv_cache_type paged",
        )
    exact: dict[str, int | bool] = {"tokens_per_block": target.kv_cache.tokens_per_block}
    if paged_context_attention(target, precision):
        exact["use_paged_context_fmha"] = True
    for key, value in exact.items():
        if plugins.get(key) != value:
            raise OperatorError(
                f"the engines in {directory} were built with {key} {plugins.get(key)!r}, the target asks for {value}",
                hint="build them again from this spec",
            )


def _check_ranks(
    directory: Path, target: TensorRtLlmTarget, checkpoint_bytes: Sequence[int]
) -> tuple[int, ...]:
    """The size of every rank's engine, managed weights included."""
    parallelism = target.parallelism
    expected = [f"rank{rank}.engine" for rank in range(parallelism.world_size)]
    seen = sorted(path.name for path in directory.glob("rank*.engine"))
    if missing := [name for name in expected if name not in seen]:
        raise SourceError(
            f"{directory} has no {', '.join(missing)}; a world of {parallelism.world_size} has {len(expected)} engines, "
            f"seen: {', '.join(seen) or 'none'}",
            hint="copy all files that trtllm-build wrote; if it did not write them, its log says why",
        )
    if extra := [name for name in seen if name not in expected]:
        raise OperatorError(
            f"{directory} has {extra[0]} too, but the target has {parallelism.world_size} ranks",
            hint="these are the engines of another parallelism, or left over from it",
        )
    sizes = tuple(_rank_bytes(directory, rank) for rank in range(parallelism.world_size))
    for rank, size in enumerate(sizes):
        stage = rank // parallelism.tensor
        neighbours = sizes[stage * parallelism.tensor : (stage + 1) * parallelism.tensor]
        least = _LEAST_SHARE_OF_NEIGHBOUR * max(neighbours)
        if checkpoint_bytes:
            least = max(least, _LEAST_SHARE_OF_CHECKPOINT * checkpoint_bytes[rank])
        if size == 0 or size < least:
            raise SourceError(
                f"{directory / f'rank{rank}.engine'} looks cut off: {size} bytes, where the weights of its rank "
                f"make {int(least)} or more",
                hint="copy it again, or build again if the disk was full",
            )
    return sizes


def _rank_bytes(directory: Path, rank: int) -> int:
    files = (f"rank{rank}.engine", f"rank{rank}_managed_weights.safetensors")
    paths = [directory / name for name in files]
    if paths[0].stat().st_size == 0:
        return 0
    return sum(path.stat().st_size for path in paths if path.is_file())


def _check_digests(directory: Path, world_size: int) -> bool:
    """Whether ``SHA256SUMS`` was there to check; it is in the format of ``sha256sum``."""
    path = directory / SUMS_FILE
    if not path.is_file():
        return False
    lines = [line.split(maxsplit=1) for line in path.read_text(encoding="utf-8").splitlines()]
    sums = {parts[1].lstrip("*"): parts[0] for parts in lines if len(parts) == 2}
    for name in (CONFIG_FILE, *(f"rank{rank}.engine" for rank in range(world_size))):
        if name not in sums:
            raise SourceError(
                f"{path} has no line for {name}", hint="write it again: sha256sum config.json rank*.engine"
            )
        if (seen := file_digest(directory / name)) != sums[name]:
            raise SourceError(
                f"{directory / name} is not what {SUMS_FILE} says: expected SHA-256 {sums[name]}, seen {seen}",
                hint="copy it again from the machine that built it",
            )
    return True


def _section(directory: Path, config: Mapping[str, Any], *names: str) -> Mapping[str, Any]:
    section: Any = config
    for name in names:
        section = section.get(name) if isinstance(section, dict) else None
    if not isinstance(section, dict):
        raise SourceError(
            f"{directory / CONFIG_FILE} has no section {'.'.join(names)}",
            hint="it must be the config.json that trtllm-build wrote beside the engines, not the checkpoint's",
        )
    return section

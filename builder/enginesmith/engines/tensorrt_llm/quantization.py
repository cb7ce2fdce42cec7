"""How a checkpoint says it is quantized, checked against what its tensors are.

Reads ModelOpt's ``hf_quant_config.json`` and the ``quantization_config`` that transformers keeps in ``config.json``,
so checkpoints that others quantized with ModelOpt are read like our own. Reads headers only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

from enginesmith.checkpoints.tensors import CONFIG_FILE, QUANTIZATION_FILE, CheckpointTensors
from enginesmith.engines.tensorrt_llm.decoder import Decoder, Module
from enginesmith.errors import SourceError

Algorithm = Literal["none", "W8A16", "W8A8_SQ_PER_CHANNEL", "W4A16_AWQ", "W4A8_AWQ", "FP8"]

WEIGHT_DTYPES: Mapping[Algorithm, str] = {
    "none": "",
    "W8A16": "I8",
    "W8A8_SQ_PER_CHANNEL": "I8",
    "W4A16_AWQ": "U8",
    "W4A8_AWQ": "U8",
    "FP8": "F8_E4M3",
}
"""What a quantized weight is stored as, in safetensors' spelling."""
KV_ALGORITHMS = ("FP8", "INT8")
FLOATS = ("BF16", "F16", "F32")
_EXPERT_ALGORITHMS = ("none", "W8A16", "FP8", "W4A16_AWQ")
_LLM_API_HINT = (
    "serve this checkpoint with the runtime tensorrt_llm_llmapi, or quantize again with: "
    + ", ".join(WEIGHT_DTYPES)
)


@dataclass(frozen=True)
class Quantization:
    """How the linear layers and the KV cache are quantized."""

    algorithm: Algorithm
    kv_algorithm: Literal["FP8", "INT8"] | None
    group_size: int
    """Input channels per scale; 0 when scales are not grouped."""
    excluded: frozenset[str]
    """Linear layers (module paths) that stay in 16 bits although the others do not."""

    def of(self, module: str) -> Algorithm:
        """The algorithm of one linear layer."""
        return "none" if module in self.excluded else self.algorithm

    @property
    def grouped(self) -> bool:
        """Whether weights are packed INT4 with one scale per group of input channels."""
        return self.algorithm in ("W4A16_AWQ", "W4A8_AWQ")


def quantization_of(tensors: CheckpointTensors, decoder: Decoder) -> Quantization:
    """How the checkpoint is quantized, once its description and its tensors agree.

    Raises:
        SourceError: the algorithm cannot run in an engine, or a layer is not what the description says.
    """
    described = _described(tensors)
    algorithm = _algorithm(tensors, described)
    if decoder.experts is not None and algorithm not in _EXPERT_ALGORITHMS:
        raise SourceError(
            f"{tensors.directory}: TensorRT-LLM cannot run experts quantized with {algorithm}; "
            f"supported for {decoder.architecture}: {', '.join(_EXPERT_ALGORITHMS)}",
            hint="choose another scheme",
        )
    kv_algorithm = _kv_algorithm(tensors, described)
    _check_kv_scales(tensors, kv_algorithm)
    group_size = described.get("group_size") or 0
    quantization = Quantization(
        algorithm=algorithm,
        kv_algorithm=kv_algorithm,
        group_size=int(group_size) if algorithm in ("W4A16_AWQ", "W4A8_AWQ") else 0,
        excluded=_excluded(tensors, decoder, algorithm, patterns=_patterns(described)),
    )
    if quantization.grouped and quantization.group_size < 1:
        raise SourceError(f"{_description_file(tensors)}: {algorithm} needs group_size, seen: {group_size!r}")
    return quantization


def _described(tensors: CheckpointTensors) -> Mapping[str, Any]:
    """The description, or an empty one. The file beside the checkpoint wins; both must name one algorithm."""
    inline = tensors.config.get("quantization_config")
    beside = tensors.quantization
    if isinstance(inline, dict) and inline.get("quant_method", "modelopt") != "modelopt":
        raise SourceError(
            f"{tensors.directory / CONFIG_FILE}: quantized by {inline['quant_method']!r}; only ModelOpt's checkpoints are read",
            hint="give the unquantized checkpoint, or one that ModelOpt quantized",
        )
    if beside is None:
        return inline if isinstance(inline, dict) else {}
    if isinstance(inline, dict) and inline.get("quant_algo") != beside.get("quant_algo"):
        raise SourceError(
            f"{tensors.directory}: {QUANTIZATION_FILE} says {beside.get('quant_algo')}, {CONFIG_FILE} says {inline.get('quant_algo')}",
            hint="one of them belongs to another checkpoint",
        )
    return beside


def _description_file(tensors: CheckpointTensors) -> str:
    name = CONFIG_FILE if tensors.quantization is None else QUANTIZATION_FILE
    return str(tensors.directory / name)


def _algorithm(tensors: CheckpointTensors, described: Mapping[str, Any]) -> Algorithm:
    name = described.get("quant_algo") or "none"
    for known in WEIGHT_DTYPES:
        if name == known:
            return known
    raise SourceError(
        f"{_description_file(tensors)}: quant_algo {name} cannot become a TensorRT-LLM engine here; "
        f"supported: {', '.join(WEIGHT_DTYPES)}",
        hint=_LLM_API_HINT,
    )


def _kv_algorithm(tensors: CheckpointTensors, described: Mapping[str, Any]) -> Literal["FP8", "INT8"] | None:
    name = described.get("kv_cache_quant_algo")
    scheme = described.get("kv_cache_scheme")
    if name is None and isinstance(scheme, dict):
        kind = f"{scheme.get('type')}{scheme.get('num_bits')}"
        name = {"float8": "FP8", "int8": "INT8"}.get(kind, kind)
    if name is None:
        return None
    if name == "FP8":
        return "FP8"
    if name == "INT8":
        return "INT8"
    raise SourceError(
        f"{_description_file(tensors)}: KV cache quantization {name} is not supported; supported: {', '.join(KV_ALGORITHMS)}"
    )


def _check_kv_scales(tensors: CheckpointTensors, kv_algorithm: str | None) -> None:
    scale = next((name for name in tensors.names() if name.endswith((".k_scale", ".v_scale"))), None)
    if kv_algorithm is None and scale is not None:
        raise SourceError(
            f"{tensors.entry(scale).file} holds {scale}, but {_description_file(tensors)} gives no kv_cache_quant_algo",
            hint="the description and the weights belong to different checkpoints",
        )


def _patterns(described: Mapping[str, Any]) -> Sequence[str]:
    patterns = described.get("exclude_modules", described.get("ignore")) or []
    return [str(pattern) for pattern in patterns]


def _excluded(
    tensors: CheckpointTensors, decoder: Decoder, algorithm: Algorithm, *, patterns: Sequence[str]
) -> frozenset[str]:
    """The linear layers that are not quantized, which their tensors and ``patterns`` both say."""
    excluded = set()
    head = Module("lm_head", decoder.vocab, decoder.hidden)
    modules = [module for layer in range(decoder.layers) for module in decoder.linears(layer)]
    if not decoder.tied:
        modules.append(head)
    for module in modules:
        plain = _is_plain(tensors, module, algorithm)
        named = next((pattern for pattern in patterns if matches(module.name, pattern)), None)
        _check_agreement(tensors, module, algorithm, plain=plain, pattern=named)
        if plain:
            excluded.add(module.name)
    excluded.add("model.embed_tokens")
    return frozenset(excluded) if algorithm != "none" else frozenset()


def matches(module: str, pattern: str) -> bool:
    """Whether an exclusion covers a module: as a shell pattern, or as the path of a module that contains it."""
    return fnmatchcase(module, pattern) or module.startswith(f"{pattern}.")


def _is_plain(tensors: CheckpointTensors, module: Module, algorithm: Algorithm) -> bool:
    entry = tensors.entry(f"{module.name}.weight")
    if entry.dtype in FLOATS:
        return True
    if entry.dtype == WEIGHT_DTYPES[algorithm]:
        return False
    if algorithm == "none":
        raise SourceError(
            f"{entry.file}: {module.name}.weight is stored as {entry.dtype}, but nothing says how it was quantized",
            hint=f"ModelOpt writes {QUANTIZATION_FILE}; put it beside the checkpoint",
        )
    raise SourceError(
        f"{entry.file}: {module.name}.weight is stored as {entry.dtype}; {algorithm} stores {WEIGHT_DTYPES[algorithm]}",
        hint="the description and the weights belong to different checkpoints",
    )


def _check_agreement(
    tensors: CheckpointTensors, module: Module, algorithm: Algorithm, *, plain: bool, pattern: str | None
) -> None:
    entry = tensors.entry(f"{module.name}.weight")
    if plain and f"{module.name}.weight_scale" in tensors:
        raise SourceError(
            f"{entry.file}: {module.name} is stored as {entry.dtype}, not quantized, but has a weight_scale",
            hint="quantize the checkpoint again, or fetch it again if it came quantized",
        )
    if algorithm == "none":
        return
    if plain and pattern is None:
        raise SourceError(
            f"{entry.file}: {module.name} is stored as {entry.dtype}, not quantized, but {_description_file(tensors)} "
            f"says {algorithm} and does not exclude it",
            hint="add it to exclude_modules if it was left out on purpose; else quantize again",
        )
    if not plain and pattern is not None:
        raise SourceError(
            f"{entry.file}: {module.name} is quantized ({entry.dtype}), but {_description_file(tensors)} excludes it ({pattern!r})",
            hint="the description and the weights belong to different checkpoints",
        )

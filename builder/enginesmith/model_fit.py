"""Whether a model's shapes fit a GPU target: architecture, parallelism, quantization groups, exclusions, memory.

Judged from ``config.json`` alone, before anything is fetched or converted. Memory counts weights only: what does not even
hold its weights cannot work; what does may still lack room for the KV cache.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from enginesmith.engines.tensorrt_llm.mapping import Mapping as RankMapping
from enginesmith.errors import SourceError, SpecError
from enginesmith.platforms import ARCHITECTURES, GPUS, RUNTIME_ARCHITECTURES, Execution, Gpu
from enginesmith.schemes import SCHEMES
from enginesmith.spec import ModelSpec, Variant
from enginesmith.stored_quantization import as_stored, stored_algorithm, stored_scheme, stored_section
from enginesmith.targets import LlmApiTarget, TensorRtLlmTarget

if TYPE_CHECKING:
    from enginesmith.checkpoints.validate import Dimensions

GpuTarget = TensorRtLlmTarget | LlmApiTarget

GROUP_SIZES = (32, 64, 128, 256)
_BF16_BYTES = 2
_USABLE_MEMORY = 0.95
"""Share of a GPU's nominal memory: the driver and the CUDA context take the rest on every model in the table."""
# What the engine keeps in one layer, and so has one precision.
_FUSED = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("mlp.gate_proj", "mlp.up_proj"),
)
_LINEARS = (*_FUSED[0], "self_attn.o_proj", *_FUSED[1], "mlp.down_proj")


def check_fit(
    spec: ModelSpec,
    target: GpuTarget,
    variants: Mapping[str, Variant],
    hf_config: Mapping[str, Any],
    *,
    execution: Execution,
) -> None:
    """Return if the model of this ``config.json`` can run on ``target`` in each of ``variants``.

    Raises:
        SpecError: what does not fit, and what would.
        SourceError: ``config.json`` lacks a size, or holds a wrong one.
    """
    from enginesmith.checkpoints.validate import dimensions_of  # Loads numpy, which most plans need not.

    architecture = _supported_architecture(target, hf_config)
    _check_llama_only(target, architecture)
    _check_own_quantization(target, variants, hf_config, execution)
    _check_layers_and_experts(target, hf_config)
    if architecture not in ARCHITECTURES:
        _check_heads(target, config_size(hf_config, "num_attention_heads"), None)
        _require_memory(spec, target, _deepseek_bytes(hf_config), "the checkpoint: at least ")
        return
    path = Path("config.json")  # For messages; where it lies is the source's business.
    dimensions = dimensions_of(hf_config, architecture, path)
    _check_heads(target, dimensions.heads, dimensions.kv_heads)
    _check_widths(target, dimensions)
    stored = {name: as_stored(variant, hf_config) for name, variant in variants.items()}
    for name, variant in stored.items():
        if dimensions.moe is not None and isinstance(target, TensorRtLlmTarget):
            _check_expert_scheme(target, name, variant)
        _check_groups(target, name, variant, dimensions, came_quantized=variant is not variants[name])
        if isinstance(target, TensorRtLlmTarget):
            _check_exclusions(target, name, variant, dimensions)
        if variant.scheme != "none" or stored_section(hf_config) is None:  # Else their width is not known.
            weight_bytes = variant_bytes(architecture, dimensions, variant)
            _require_memory(spec, target, weight_bytes, f"variant {name}: ")
    if isinstance(target, TensorRtLlmTarget):
        _check_conversion(target, stored, hf_config)


def variant_bytes(architecture: str, dimensions: Dimensions, variant: Variant) -> int:
    """Bytes of all weights in one variant: linear layers at the scheme's width, excluded ones and the rest in 16 bits."""
    from enginesmith.checkpoints.validate import expected_shapes

    bits = SCHEMES[variant.scheme].weight_bits
    total = 0.0
    for name, shape in expected_shapes(architecture, dimensions).items():
        module = name.removesuffix(".weight")
        linear = len(shape) == 2 and "layers." in name and not name.endswith("gate.weight")  # Routers stay.
        excluded = any(fnmatch.fnmatchcase(module, pattern) for pattern in variant.exclude)
        total += math.prod(shape) * (bits / 8 if linear and not excluded else _BF16_BYTES)
    return int(total)


def config_size(hf_config: Mapping[str, Any], key: str) -> int:
    """A size in ``config.json``, or a SourceError."""
    value = hf_config.get(key)
    if not isinstance(value, int) or value < 1:
        raise SourceError(
            f"config.json must give {key} as a positive number, seen: {value!r}",
            hint="the checkpoint is damaged or of another kind",
        )
    return value


def _supported_architecture(target: GpuTarget, hf_config: Mapping[str, Any]) -> str:
    seen = hf_config.get("architectures") or []
    supported = RUNTIME_ARCHITECTURES[target.runtime]
    if len(seen) == 1 and seen[0] in supported:
        return str(seen[0])
    named = ", ".join(map(str, seen)) or "(none named in config.json)"
    by_llmapi = len(seen) == 1 and seen[0] in RUNTIME_ARCHITECTURES["tensorrt_llm_llmapi"]
    raise SpecError(
        f"target {target.name}: architecture {named} cannot run on runtime {target.runtime}"
        + ("; TensorRT-LLM has it in the PyTorch backend only" if by_llmapi else ""),
        hint="runtime: tensorrt_llm_llmapi takes it (with verify.twin: false)"
        if by_llmapi
        else f"supported: {', '.join(supported)}",
    )


def _check_llama_only(target: GpuTarget, architecture: str) -> None:
    if not isinstance(target, TensorRtLlmTarget) or architecture == "LlamaForCausalLM":
        return
    for plugin in ("reduce_fusion", "user_buffer"):
        if getattr(target.plugins, plugin):
            raise SpecError(
                f"target {target.name}: plugins.{plugin} is for LlamaForCausalLM; trtllm-build turns it off for {architecture}",
                hint=f"plugins.{plugin}: false",
            )


def _check_own_quantization(
    target: GpuTarget, variants: Mapping[str, Variant], hf_config: Mapping[str, Any], execution: Execution
) -> None:
    """A checkpoint that came quantized is deployed as it is by scheme none."""
    section = stored_section(hf_config)
    if section is None or all(variant.scheme != "none" for variant in variants.values()):
        return
    where = (
        f"target {target.name} ({target.runtime} on {target.gpu}, SM{GPUS[target.gpu].compute_capability})"
    )
    if section.get("quant_method") == "fp8" and section.get("weight_block_size"):
        if not execution.block_fp8:
            raise SpecError(
                f"the checkpoint has FP8 weights in blocks, which {where} cannot execute",
                hint="runtime: tensorrt_llm_llmapi on h100, h200, gh200 or b200",
            )
        return
    algorithm, scheme = stored_algorithm(section), stored_scheme(section)
    if scheme is not None and scheme not in execution.schemes:
        raise SpecError(
            f"the checkpoint came quantized with {algorithm} ({scheme}), which {where} cannot execute",
            hint=f"it executes: {', '.join(execution.schemes)}",
        )
    if scheme is None and isinstance(target, TensorRtLlmTarget):
        known = [scheme.quant_algo for scheme in SCHEMES.values() if scheme.quant_algo]
        raise SpecError(
            f"the checkpoint came quantized with {algorithm}, which cannot become engines",
            hint=f"runtime: tensorrt_llm_llmapi, the unquantized checkpoint, or one of ModelOpt's {', '.join(known)}",
        )


def _check_layers_and_experts(target: GpuTarget, hf_config: Mapping[str, Any]) -> None:
    parallelism = target.parallelism
    layers = config_size(hf_config, "num_hidden_layers")
    if parallelism.pipeline > layers:
        raise SpecError(
            f"target {target.name}: pipeline parallelism {parallelism.pipeline} is more than the model's {layers} layers",
            hint=f"parallelism.pipeline {layers} or less",
        )
    if parallelism.expert == 1:
        return
    keys = [key for key in ("num_local_experts", "num_experts", "n_routed_experts") if hf_config.get(key)]
    experts = config_size(hf_config, keys[0]) if keys else None
    if experts is None:
        raise SpecError(
            f"target {target.name}: expert parallelism {parallelism.expert} is for mixture-of-experts models; this one is dense",
            hint="parallelism.expert 1",
        )
    if experts % parallelism.expert:
        fitting = [
            str(size)
            for size in range(1, parallelism.tensor + 1)
            if experts % size == 0 and parallelism.tensor % size == 0
        ]
        raise SpecError(
            f"target {target.name}: expert parallelism {parallelism.expert} does not divide the model's {experts} experts",
            hint=f"parallelism.expert {' or '.join(fitting)} with tensor {parallelism.tensor}",
        )


def _check_heads(target: GpuTarget, heads: int, kv_heads: int | None) -> None:
    """``kv_heads`` is None where keys and values are not kept per head (DeepSeek's latent attention)."""
    tensor = target.parallelism.tensor

    def fits(size: int) -> bool:
        return heads % size == 0 and (kv_heads is None or kv_heads % size == 0 or size % kv_heads == 0)

    if fits(tensor):
        return
    legal = [str(size) for size in range(1, min(heads, 64) + 1) if fits(size)]
    groups = f"{heads} attention heads" + (f" and {kv_heads} key-value heads" if kv_heads else "")
    raise SpecError(
        f"target {target.name}: tensor parallelism {tensor} does not divide the model's {groups} (fewer key-value heads than "
        "GPUs are copied, if they divide them)",
        hint=f"parallelism.tensor {' or '.join(legal)}",
    )


def _check_widths(target: GpuTarget, dimensions: Dimensions) -> None:
    for what, width, ways in _split_widths(target, dimensions):
        if width % ways:
            legal = [str(size) for size in range(1, 65) if width % size == 0 and dimensions.heads % size == 0]
            raise SpecError(
                f"target {target.name}: the model's {what} of {width} cannot be split into {ways} equal parts",
                hint=f"parallelism.tensor {' or '.join(legal)}"
                + (", or more expert parallelism" if dimensions.moe else ""),
            )


def _split_widths(target: GpuTarget, dimensions: Dimensions) -> Iterator[tuple[str, int, int]]:
    """The inputs of row-parallel layers besides attention's: what, how wide, into how many parts."""
    parallelism, moe = target.parallelism, dimensions.moe
    if moe is None or len(moe.sparse_layers) < dimensions.layers:
        yield "intermediate_size", dimensions.intermediate_size, parallelism.tensor
    if moe is not None:
        yield "experts' intermediate_size", moe.intermediate_size, parallelism.tensor // parallelism.expert
        if moe.shared_intermediate_size is not None:
            yield "shared expert's intermediate_size", moe.shared_intermediate_size, parallelism.tensor


def _check_groups(
    target: GpuTarget, name: str, variant: Variant, dimensions: Dimensions, *, came_quantized: bool
) -> None:
    """Row-parallel layers are cut across their inputs, and a cut must not go through a group of them."""
    group = variant.effective_group_size
    if group is None or target.parallelism.tensor == 1:
        return
    attention = ("o_proj", dimensions.heads * dimensions.head_dim, target.parallelism.tensor)
    rows = [attention, *(("down_proj", width, ways) for _, width, ways in _split_widths(target, dimensions))]
    for layer, width, ways in rows:
        block = "self_attn" if layer == "o_proj" else "mlp"
        modules = [f"model.layers.{index}.{block}.{layer}" for index in range(dimensions.layers)]
        left_out = isinstance(target, LlmApiTarget) and _all_excluded(modules, variant)
        if (width // ways) % group == 0 or left_out:
            continue
        legal = [str(size) for size in GROUP_SIZES if all((wide // cut) % size == 0 for _, wide, cut in rows)]
        tensors = [
            str(size)
            for size in range(1, target.parallelism.tensor)
            if dimensions.heads % size == 0 and all(wide % (size * group) == 0 for _, wide, _ in rows)
        ]
        ways_out = [f"group_size {' or '.join(legal)}"] if legal and not came_quantized else []
        ways_out += [f"parallelism.tensor {' or '.join(tensors)}"] if tensors else []
        if isinstance(target, LlmApiTarget) and not came_quantized:
            ways_out.append(f"exclude '*.{layer}'")
        raise SpecError(
            f"variant {name}: on target {target.name} each of {ways} GPUs has {width // ways} inputs of {layer}, no multiple of "
            f"group_size {group}",
            hint="; ".join(ways_out) or "another scheme",
        )


def _check_conversion(
    target: TensorRtLlmTarget, variants: Mapping[str, Variant], hf_config: Mapping[str, Any]
) -> None:
    """Ask the converter itself, so that ``plan`` passes nothing that ``convert`` refuses for its shapes or its RoPE."""
    from enginesmith.engines.tensorrt_llm.decoder import decoder_from_config
    from enginesmith.engines.tensorrt_llm.quantization import WEIGHT_DTYPES, Quantization
    from enginesmith.engines.tensorrt_llm.splits import check_splits

    decoder = decoder_from_config(hf_config, Path())
    mapping = RankMapping(**target.parallelism.model_dump())
    for variant in variants.values():
        scheme = SCHEMES[variant.scheme]
        quantization = Quantization(
            algorithm=next((name for name in WEIGHT_DTYPES if name == scheme.quant_algo), "none"),
            kv_algorithm=None,
            group_size=variant.effective_group_size or 0,
            excluded=frozenset(() if variant.lm_head == "scheme" else ("lm_head",)),
        )
        check_splits(decoder, quantization, mapping)


def _all_excluded(modules: list[str], variant: Variant) -> bool:
    return all(any(fnmatch.fnmatchcase(module, pattern) for pattern in variant.exclude) for module in modules)


def _check_exclusions(target: TensorRtLlmTarget, name: str, variant: Variant, dimensions: Dimensions) -> None:
    """TensorRT-LLM fuses layers, and counts the layers of each pipeline stage from 0 in ``exclude_modules``."""
    if variant.scheme == "none" or not variant.exclude:
        return
    excluded = {
        (layer, linear)
        for layer in range(dimensions.layers)
        for linear in _LINEARS
        if _all_excluded([f"model.layers.{layer}.{linear}"], variant)
    }
    for layer in range(dimensions.layers):
        for fused in _FUSED if dimensions.moe is None else _FUSED[:1]:
            if len({(layer, linear) in excluded for linear in fused}) > 1:
                left = [linear for linear in fused if (layer, linear) not in excluded]
                raise SpecError(
                    f"variant {name}: exclude takes only some of {', '.join(fused)} in layer {layer}; TensorRT-LLM makes one "
                    f"layer of them on target {target.name}",
                    hint=f"exclude {', '.join(left)} too, or none of them",
                )
    pipeline = RankMapping(pipeline=target.parallelism.pipeline)
    stages = [pipeline.stage_layers(stage, dimensions.layers) for stage in range(pipeline.pipeline)]
    longest = max(len(stage) for stage in stages)
    for position in range(longest):
        for linear in _LINEARS:
            states = {(stage[position], linear) in excluded for stage in stages if position < len(stage)}
            if len(states) > 1:
                raise SpecError(
                    f"variant {name}: exclude takes {linear} of some pipeline stages only at position {position}; target "
                    f"{target.name} has {len(stages)} stages, and TensorRT-LLM counts the layers of each from 0",
                    hint="parallelism.pipeline 1, or exclude the same layers of every stage (e.g. '*.down_proj')",
                )


def _check_expert_scheme(target: TensorRtLlmTarget, name: str, variant: Variant) -> None:
    if variant.scheme in ("int8_sq", "w4a8_awq"):
        raise SpecError(
            f"variant {name}: TensorRT-LLM's engines have no {variant.scheme} for mixtures of experts (target {target.name})",
            hint="schemes for experts: none, int8_wo, int4_awq, fp8",
        )


def _deepseek_bytes(hf_config: Mapping[str, Any]) -> int:
    """The routed experts and embeddings of DeepSeek-V2 and V3, which are nearly all of it."""
    quantized = stored_section(hf_config) is not None
    sparse = config_size(hf_config, "num_hidden_layers") - int(hf_config.get("first_k_dense_replace") or 0)
    hidden = config_size(hf_config, "hidden_size")
    expert = 3 * hidden * int(hf_config.get("moe_intermediate_size") or 0)
    experts = sparse * int(hf_config.get("n_routed_experts") or 0) * expert
    embeddings = 2 * hidden * int(hf_config.get("vocab_size") or 0)
    return experts * (1 if quantized else _BF16_BYTES) + embeddings * _BF16_BYTES


def _require_memory(spec: ModelSpec, target: GpuTarget, weight_bytes: int, whose: str) -> None:
    gpu, world_size = GPUS[target.gpu], target.parallelism.world_size
    each = weight_bytes / world_size
    if each <= _usable_bytes(gpu):
        return
    needed = math.ceil(weight_bytes / _usable_bytes(gpu))
    larger = [other.name for other in GPUS.values() if each <= _usable_bytes(other)]
    ways = [f"parallelism with {needed} GPUs or more (tensor x pipeline)"]
    ways += [f"gpu: {' or '.join(larger)}"] if larger else []
    ways += (
        ["a scheme with smaller weights"] if any(v.scheme == "none" for v in spec.variants.values()) else []
    )
    raise SpecError(
        f"{whose}{weight_bytes / 2**30:.1f} GiB of weights over {world_size} GPU{'s' if world_size > 1 else ''} are "
        f"{each / 2**30:.1f} GiB each, and a {gpu.name} has {gpu.memory_gib} (target {target.name}); the KV cache comes on top",
        hint="; ".join(ways),
    )


def _usable_bytes(gpu: Gpu) -> float:
    return _USABLE_MEMORY * gpu.memory_gib * 2**30

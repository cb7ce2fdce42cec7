"""What a target can execute of a spec, judged before anyone pays for a GPU: every refusal names the legal alternatives.

Owns the rules about toolchain, GPU, scheme, KV cache and plugins; the facts are tables in ``enginesmith.platforms``. What
depends on the model's shapes is in ``enginesmith.model_fit``. Pure: reads no files.
"""

from __future__ import annotations

import difflib
import importlib.metadata
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from packaging.version import Version

from enginesmith.errors import SpecError
from enginesmith.kv_memory import KvShape, kv_cache_bytes, require_kv_memory
from enginesmith.model_fit import check_fit
from enginesmith.platforms import GPUS, TOOLCHAINS, Execution, GpuRuntime, Toolchain, execution_on
from enginesmith.schemes import SCHEMES, SchemeName
from enginesmith.spec import ModelSpec, Serving, Variant
from enginesmith.stored_quantization import as_stored
from enginesmith.targets import LlmApiTarget, OnnxRuntimeTarget, TensorRtLlmTarget

GpuTarget = TensorRtLlmTarget | LlmApiTarget

_TRITON_NAME = re.compile(r"[a-z0-9][a-z0-9_.-]{0,127}")
_MODELOPT_TOO_NEW = Version("0.49.dev0")
_WITH_FP8_WEIGHTS = ("fp8",)


def check_targets(
    spec: ModelSpec,
    hf_config: Mapping[str, Any] | None = None,
    *,
    toolchains: Mapping[str, Toolchain] = TOOLCHAINS,
    modelopt_version: str | None = None,
) -> None:
    """Return if every target of ``spec`` can execute its variants.

    Args:
        hf_config: the checkpoint's ``config.json``; without it, only what does not depend on the model is judged.
        toolchains: the container images that can be named, by tag.
        modelopt_version: that of the ModelOpt that quantizes. Default: the installed one, if there is one.

    Raises:
        SpecError: the first combination that cannot work, with what can.
    """
    for target in spec.targets:
        if isinstance(target, OnnxRuntimeTarget):
            if hf_config is not None:
                _check_kv_memory(target, spec.serving, hf_config)
            continue
        variants = {
            name: variant
            for name, variant in spec.variants.items()
            if target.variants is None or name in target.variants
        }
        _check_toolchain(target, toolchains)
        _check_modelopt(target, variants, modelopt_version or _installed_modelopt())
        execution = execution_on(target.runtime, GPUS[target.gpu])
        for name, variant in variants.items():
            _check_scheme(spec, target, name, variant, execution=execution)
            _check_kv_cache(target, name, variant, execution)
            _check_names(spec, target, name)
        _check_limits(target, spec.serving)
        _check_devices(target)
        if hf_config is not None:
            check_fit(spec, target, variants, hf_config, execution=execution)
            variants = {name: as_stored(variant, hf_config) for name, variant in variants.items()}
            for name, variant in variants.items():
                _check_kv_cache(target, name, variant, execution)
        if isinstance(target, TensorRtLlmTarget):
            _check_attention(target, variants)
            _check_plugins(target, variants, came_as_named=hf_config is not None)


def _check_kv_memory(target: OnnxRuntimeTarget, serving: Serving, hf_config: Mapping[str, Any]) -> None:
    if target.kv_cache.max_bytes is None:
        return
    from enginesmith.checkpoints.validate import (  # Loads numpy, which most plans need not.
        architecture_of,
        dimensions_of,
    )

    path = Path("config.json")  # For messages; where it lies is the source's business.
    sizes = dimensions_of(hf_config, architecture_of(hf_config, path), path)
    shape = KvShape(sizes.layers, sizes.kv_heads, sizes.head_dim)
    require_kv_memory(target.kv_cache, serving, kv_cache_bytes(target.kv_cache, serving, shape))


def _check_toolchain(target: GpuTarget, toolchains: Mapping[str, Toolchain]) -> None:
    toolchain = toolchains.get(target.toolchain)
    usable = [row.tag for row in toolchains.values() if _takes(target, row)]
    if toolchain is None:
        close = difflib.get_close_matches(target.toolchain, toolchains, n=1)
        raise SpecError(
            f"target {target.name}: toolchain {target.toolchain!r} is not a known tag of tritonserver:YY.MM-trtllm-python-py3"
            + (f"; did you mean {close[0]!r}?" if close else ""),
            hint=f"for {target.runtime}: {', '.join(usable)}",
        )
    if _takes(target, toolchain):
        return
    if isinstance(target, TensorRtLlmTarget) and Version(toolchain.tensorrt_llm) >= Version("1.3.dev0"):
        raise SpecError(
            f"target {target.name}: toolchain {toolchain.tag} has TensorRT-LLM {toolchain.tensorrt_llm}, which has no engines: "
            "trtllm-build and their Triton backend were removed in 1.3",
            hint=f"runtime: tensorrt_llm_llmapi, or for engines toolchain {' or '.join(usable)}",
        )
    needed = (
        "flags as of 1.0" if isinstance(target, TensorRtLlmTarget) else "ModelOpt's checkpoints as of 1.2.0"
    )
    raise SpecError(
        f"target {target.name}: toolchain {toolchain.tag} has TensorRT-LLM {toolchain.tensorrt_llm}, too old for runtime "
        f"{target.runtime} ({needed})",
        hint=f"toolchain {' or '.join(usable)}",
    )


def _takes(target: GpuTarget, toolchain: Toolchain) -> bool:
    return toolchain.has_engines if isinstance(target, TensorRtLlmTarget) else toolchain.has_llmapi


def _check_modelopt(target: GpuTarget, variants: Mapping[str, Variant], version: str | None) -> None:
    quantized = [name for name, variant in variants.items() if variant.scheme != "none"]
    if not quantized or version is None or not isinstance(target, TensorRtLlmTarget):
        return
    if Version(version) >= _MODELOPT_TOO_NEW:
        raise SpecError(
            f"target {target.name}: ModelOpt {version} is too new for engines: 0.49 removed the TensorRT-LLM export that the "
            f"converted checkpoints of variant {quantized[0]} are proven against",
            hint="pip install nvidia-modelopt==0.47.0, or runtime: tensorrt_llm_llmapi",
        )


def _installed_modelopt() -> str | None:
    try:
        return importlib.metadata.version("nvidia-modelopt")
    except importlib.metadata.PackageNotFoundError:
        return None


def _check_scheme(
    spec: ModelSpec, target: GpuTarget, name: str, variant: Variant, *, execution: Execution
) -> None:
    if variant.scheme in execution.schemes:
        return
    where = _where(target)
    raise SpecError(
        f"variant {name}: scheme {variant.scheme} ({SCHEMES[variant.scheme].title}) cannot run on target {target.name} "
        f"({where}): {_why_not(target, variant.scheme)}",
        hint=_alternatives(spec, target, variant.scheme, execution),
    )


def _where(target: GpuTarget) -> str:
    return f"{target.runtime} on {target.gpu}, SM{GPUS[target.gpu].compute_capability}"


def _why_not(target: GpuTarget, scheme: SchemeName) -> str:
    capability = GPUS[target.gpu].compute_capability
    if scheme in ("fp8", "w4a8_awq") and capability < 89:
        return "FP8 needs SM89 (Ada) or newer"
    if isinstance(target, LlmApiTarget) and scheme in ("int8_sq", "int8_wo"):
        return "the LLM API (PyTorch backend) does not take ModelOpt's INT8 checkpoints"
    return "TensorRT-LLM has no INT8 and INT4 kernels for SM100"


def _alternatives(spec: ModelSpec, target: GpuTarget, scheme: SchemeName, execution: Execution) -> str:
    """Schemes for this target, GPUs and runtimes for this scheme; and that a target may leave a variant out."""
    other_gpus = [gpu.name for gpu in GPUS.values() if scheme in execution_on(target.runtime, gpu).schemes]
    other_runtime: GpuRuntime = "tensorrt_llm" if isinstance(target, LlmApiTarget) else "tensorrt_llm_llmapi"
    on_other = scheme in execution_on(other_runtime, GPUS[target.gpu]).schemes
    ways = [f"schemes for this target: {', '.join(execution.schemes)}"]
    if other_gpus:
        ways.append(f"gpu for this scheme: {', '.join(other_gpus)}")
    if on_other:
        ways.append(f"runtime: {other_runtime}")
    if len(spec.variants) > 1:
        ways.append("or leave it out with the target's key variants")
    return "; ".join(ways)


def _check_kv_cache(target: GpuTarget, name: str, variant: Variant, execution: Execution) -> None:
    if variant.kv_cache in execution.kv_caches:
        return
    if isinstance(target, LlmApiTarget) and variant.kv_cache == "int8":
        reason = "the LLM API has no INT8 KV cache"
    elif variant.kv_cache == "fp8":
        reason = "FP8 needs SM89 (Ada) or newer"
    else:
        reason = "TensorRT-LLM has no INT8 KV cache for SM100"
    raise SpecError(
        f"variant {name}: kv_cache: {variant.kv_cache} cannot run on target {target.name} ({_where(target)}): {reason}",
        hint=f"kv_cache for this target: {', '.join(execution.kv_caches)}",
    )


def _check_names(spec: ModelSpec, target: GpuTarget, variant: str) -> None:
    prefix = target.prefix_for(spec.name, variant)
    longest = f"{prefix}tensorrt_llm_bls"
    if not _TRITON_NAME.fullmatch(longest) or ".." in prefix:
        raise SpecError(
            f"target {target.name}: model_prefix {target.model_prefix!r} makes the Triton model name {longest!r}",
            hint="names begin with a letter or digit, hold a-z, 0-9, '_', '-' and single dots, and have at most 128 characters",
        )


def _check_limits(target: GpuTarget, serving: Serving) -> None:
    beams = target.max_beam_width if isinstance(target, TensorRtLlmTarget) else 1
    busy = serving.max_batch_size * beams
    if target.max_num_tokens < busy:
        product = f"max_batch_size {serving.max_batch_size}" + (
            f" x max_beam_width {beams}" if beams > 1 else ""
        )
        raise SpecError(
            f"target {target.name}: max_num_tokens {target.max_num_tokens} is less than {product}: a step holds at least one "
            "token of every running answer",
            hint=f"max_num_tokens {busy} or more, or a smaller serving.max_batch_size",
        )
    if not target.chunked_context and target.max_num_tokens < serving.prompt_limit:
        raise SpecError(
            f"target {target.name}: prompts may have {serving.prompt_limit} tokens, but max_num_tokens is "
            f"{target.max_num_tokens} and chunked_context is off: the longest prompts would be refused",
            hint=f"chunked_context: true, max_num_tokens {serving.prompt_limit} or more, or a smaller serving.max_prompt_length",
        )
    _check_pools(target, serving)


def _check_pools(target: GpuTarget, serving: Serving) -> None:
    tokens = target.kv_cache.max_tokens
    if tokens is not None and tokens < serving.max_sequence_length:
        raise SpecError(
            f"target {target.name}: kv_cache.max_tokens {tokens} cannot hold one sequence of serving.max_sequence_length "
            f"{serving.max_sequence_length}",
            hint=f"kv_cache.max_tokens {serving.max_sequence_length} or more, or leave it out",
        )
    if isinstance(target, TensorRtLlmTarget) and (target.opt_num_tokens or 0) > target.max_num_tokens:
        raise SpecError(
            f"target {target.name}: opt_num_tokens {target.opt_num_tokens} is more than max_num_tokens {target.max_num_tokens}",
            hint=f"opt_num_tokens {target.max_num_tokens} or less, or leave it out",
        )


def _check_devices(target: GpuTarget) -> None:
    parallelism = target.parallelism
    per_node = parallelism.gpus_per_node
    beyond = [gpu for ids in target.devices for gpu in ids if gpu >= per_node]
    if beyond:
        raise SpecError(
            f"target {target.name}: devices names GPU {beyond[0]}, a machine has {per_node} (parallelism.gpus_per_node)",
            hint=f"ids are 0 to {per_node - 1}",
        )
    tensor = parallelism.tensor
    if parallelism.nodes > 1 and per_node % tensor and tensor % per_node:
        fitting = [str(size) for size in range(1, per_node + 1) if per_node % size == 0]
        raise SpecError(
            f"target {target.name}: {parallelism.world_size} GPUs need {parallelism.nodes} machines of {per_node}, and a "
            f"tensor-parallel group of {tensor} would lie across two of them",
            hint=f"parallelism.tensor {', '.join(fitting)} or a multiple of {per_node}; use pipeline parallelism between machines",
        )


def _check_attention(target: TensorRtLlmTarget, variants: Mapping[str, Variant]) -> None:
    """KV reuse and chunked prompts need paged context attention; the executor asserts it when it loads the engine."""
    wanted = [
        key
        for key, on in (
            ("kv_cache.reuse", target.kv_cache.reuse),
            ("chunked_context", target.chunked_context),
        )
        if on
    ]
    if wanted and not target.plugins.use_paged_context_fmha:
        raise SpecError(
            f"target {target.name}: {' and '.join(wanted)} need plugins.use_paged_context_fmha",
            hint=f"plugins.use_paged_context_fmha: true, or {' and '.join(f'{key}: false' for key in wanted)}",
        )
    for name, variant in variants.items():
        if wanted and variant.kv_cache == "int8":
            raise SpecError(
                f"variant {name}: an INT8 KV cache excludes {' and '.join(wanted)} on target {target.name}: TensorRT-LLM has "
                "no paged context attention for it",
                hint=f"set {' and '.join(f'{key}: false' for key in wanted)} in the target, or kv_cache: none",
            )
        if variant.kv_cache == "fp8" and not target.plugins.use_fp8_context_fmha and wanted:
            raise SpecError(
                f"variant {name}: an FP8 KV cache with {' and '.join(wanted)} needs plugins.use_fp8_context_fmha on target "
                f"{target.name}; trtllm-build would turn it on against the spec",
                hint="plugins.use_fp8_context_fmha: true",
            )
    if target.plugins.gpt_attention_plugin == "disable":
        raise SpecError(
            f"target {target.name}: in-flight batching and the paged KV cache need plugins.gpt_attention_plugin",
            hint="plugins.gpt_attention_plugin: auto",
        )


def _check_plugins(
    target: TensorRtLlmTarget, variants: Mapping[str, Variant], *, came_as_named: bool
) -> None:
    """``came_as_named`` is False as long as scheme none may turn out to be a checkpoint that came in FP8."""
    plugins, parallelism = target.plugins, target.parallelism
    if plugins.gemm_plugin == "nvfp4":
        _refuse_plugin(target, "gemm_plugin: nvfp4", "no scheme here makes NVFP4 weights", "auto or fp8")
    if plugins.norm_quant_fusion:
        _refuse_plugin(target, "norm_quant_fusion", "trtllm-build takes it with NVFP4 weights only", "false")
    if plugins.reduce_fusion and parallelism.tensor == 1:
        _refuse_plugin(
            target, "reduce_fusion", "there is nothing to reduce with parallelism.tensor 1", "false"
        )
    if plugins.nccl_plugin == "disable" and parallelism.world_size > 1:
        _refuse_plugin(
            target, "nccl_plugin: disable", f"{parallelism.world_size} GPUs talk through it", "auto"
        )
    if plugins.gemm_swiglu_plugin == "fp8":
        if GPUS[target.gpu].compute_capability != 90:
            _refuse_plugin(target, "gemm_swiglu_plugin: fp8", "it is for Hopper (SM90) only", "disable")
        if not plugins.use_fused_mlp:
            _refuse_plugin(target, "gemm_swiglu_plugin: fp8", "it needs use_fused_mlp", "disable")
    if plugins.low_latency_gemm_plugin == "fp8" and GPUS[target.gpu].compute_capability >= 100:
        _refuse_plugin(target, "low_latency_gemm_plugin: fp8", "it is not supported on SM100", "disable")
    fp8_only = {
        "gemm_plugin: fp8": plugins.gemm_plugin == "fp8",
        "gemm_swiglu_plugin: fp8": plugins.gemm_swiglu_plugin == "fp8",
        "low_latency_gemm_plugin: fp8": plugins.low_latency_gemm_plugin == "fp8",
        "user_buffer": plugins.user_buffer,
    }
    for plugin, chosen in fp8_only.items():
        legal = _WITH_FP8_WEIGHTS if came_as_named else (*_WITH_FP8_WEIGHTS, "none")
        others = [name for name, variant in variants.items() if variant.scheme not in legal]
        if chosen and others:
            _refuse_plugin(
                target, plugin, f"it needs scheme fp8, and variant {others[0]} has another", "disable (false)"
            )


def _refuse_plugin(target: TensorRtLlmTarget, plugin: str, reason: str, legal: str) -> None:
    raise SpecError(
        f"target {target.name}: plugins.{plugin} cannot take effect: {reason}",
        hint=f"set it to {legal}, or give the target other variants with its key variants",
    )

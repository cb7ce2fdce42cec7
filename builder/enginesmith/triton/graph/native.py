"""What Triton's own backends need to know of a graph, by the names that they document.

Sources: README.md and src/onnxruntime.cc of triton-inference-server/onnxruntime_backend (parameters, accelerators and
their options), model_configuration.md of triton-inference-server/server (platform ``tensorrt_plan``).
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping

from tritonclient.grpc.model_config_pb2 import ModelConfig

from enginesmith.errors import SpecError
from enginesmith.graph_targets import GraphOnnxRuntimeTarget
from enginesmith.triton.config import with_gpu_accelerator
from enginesmith.triton.graph.deployment import Deployment

# Names that differ between ONNX Runtime, whose names a spec has, and Triton's backend.
_TRITON_NAMES: Mapping[str, str] = {
    "trt_max_workspace_size": "max_workspace_size_bytes",
    "trt_int8_calibration_table_name": "int8_calibration_table_name",
    "trt_int8_use_native_calibration_table": "int8_use_native_calibration_table",
}
_SAME_NAMES = frozenset(
    f"trt_{name}"
    for name in [
        "max_partition_iterations",
        "min_subgraph_size",
        "dla_enable",
        "dla_core",
        "engine_cache_enable",
        "engine_cache_path",
        "engine_cache_prefix",
        "dump_subgraphs",
        "force_sequential_engine_build",
        "context_memory_sharing_enable",
        "layer_norm_fp32_fallback",
        "timing_cache_enable",
        "timing_cache_path",
        "force_timing_cache",
        "detailed_build_log",
        "build_heuristics_enable",
        "sparsity_enable",
        "builder_optimization_level",
        "auxiliary_streams",
        "tactic_sources",
        "extra_plugin_lib_paths",
        "profile_min_shapes",
        "profile_max_shapes",
        "profile_opt_shapes",
        "cuda_graph_enable",
        "dump_ep_context_model",
        "ep_context_file_path",
        "ep_context_embed_mode",
    ]
)
# For these the backend reads ``parameters`` of the model and, where there are any, overwrites the accelerator's with them or
# with its defaults. What a value is called there; None: the same.
_CUDA_PARAMETERS: Mapping[str, Mapping[str, str] | None] = {
    "arena_extend_strategy": {"kNextPowerOfTwo": "0", "kSameAsRequested": "1"},
    "cudnn_conv_algo_search": {"EXHAUSTIVE": "0", "HEURISTIC": "1", "DEFAULT": "2"},
    "do_copy_in_default_stream": None,
    "gpu_mem_limit": None,
}
_PRECISION_FLAGS = ("trt_fp16_enable", "trt_bf16_enable", "trt_int8_enable")
_PRECISIONS: Mapping[str, str] = {"none": "FP32", "fp16": "FP16", "bf16": "BF16", "int8": "INT8"}


def with_provider(config: ModelConfig, deployment: Deployment) -> ModelConfig:
    """``config`` of Triton's ONNX Runtime backend with the execution provider of the target.

    Raises:
        SpecError: the backend does not know an option, or the provider cannot execute the scheme.
    """
    target = deployment.target
    assert isinstance(target, GraphOnnxRuntimeTarget)
    match target.provider:
        case "cpu":
            return config
        case "cuda":
            return _with_cuda_options(config, target)
        case "tensorrt":
            return with_gpu_accelerator(config, "tensorrt", _tensorrt_parameters(deployment, target))


def _with_cuda_options(config: ModelConfig, target: GraphOnnxRuntimeTarget) -> ModelConfig:
    given = target.provider_options
    # With instances on GPUs the backend uses CUDA anyway; other options need the accelerator to be named.
    others = {name: value for name, value in given.items() if name not in _CUDA_PARAMETERS}
    accelerated = ModelConfig()
    accelerated.CopyFrom(with_gpu_accelerator(config, "cuda", others) if others else config)
    for name, values in _CUDA_PARAMETERS.items():
        if name in given:
            value = given[name]
            if values is not None and value not in values:
                raise SpecError(
                    f"target {target.name}: provider_options.{name} is {value}; allowed: {', '.join(values)}"
                )
            accelerated.parameters[name].string_value = value if values is None else values[value]
    return accelerated


def _tensorrt_parameters(deployment: Deployment, target: GraphOnnxRuntimeTarget) -> dict[str, str]:
    if deployment.scheme not in _PRECISIONS:
        raise SpecError(
            f"target {target.name}: ONNX Runtime's TensorRT provider has no precision for scheme {deployment.scheme}; it has: {', '.join(_PRECISIONS)}",
            hint="build this variant for `runtime: tensorrt` instead",
        )
    profile = {
        f"trt_profile_{which}_shapes": _profile(deployment.shapes(which)) for which in ("min", "opt", "max")
    }
    given = {_triton_name(target, name): value for name, value in target.provider_options.items()}
    return {"precision_mode": _PRECISIONS[deployment.scheme], **profile, **given}


def _triton_name(target: GraphOnnxRuntimeTarget, name: str) -> str:
    if name in _PRECISION_FLAGS:
        raise SpecError(
            f"target {target.name}: provider_options.{name} is decided by the variant's scheme; leave it out"
        )
    if name in _TRITON_NAMES:
        return _TRITON_NAMES[name]
    if name not in _SAME_NAMES:
        close = difflib.get_close_matches(name, [*_TRITON_NAMES, *_SAME_NAMES], n=3, cutoff=0.4)
        raise SpecError(
            f"target {target.name}: Triton's ONNX Runtime backend knows no option {name} of the TensorRT provider",
            hint=f"close to it: {', '.join(close)}" if close else "see the README of onnxruntime_backend",
        )
    return name


def _profile(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """ONNX Runtime's text for shapes, ``input_ids:1x16,attention_mask:1x16``."""
    return ",".join(f"{name}:{'x'.join(map(str, shape))}" for name, shape in shapes.items())

"""The keyword arguments of ``tensorrt_llm.LLM``: which exist, which the spec decides, and what ``model.yaml`` says.

The tables name the fields of ``TorchLlmArgs`` (with ``BaseLlmArgs``) and ``KvCacheConfig`` in TensorRT-LLM's
``tensorrt_llm/llmapi/llm_args.py`` of the 1.2 line. Both classes refuse unknown keys, but only on a machine with a
GPU and after minutes of loading; here a typo is found while packaging.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal

from enginesmith.errors import SpecError
from enginesmith.spec import Serving
from enginesmith.targets import LlmApiTarget

CHECKPOINT_DIRECTORY = "checkpoint"
"""Where the checkpoint is, relative to the version directory."""

LLM_OPTIONS = frozenset(
    [
        "model",
        "tokenizer",
        "tokenizer_mode",
        "skip_tokenizer_init",
        "trust_remote_code",
        "dtype",
        "revision",
        "tokenizer_revision",
        "tensor_parallel_size",
        "pipeline_parallel_size",
        "context_parallel_size",
        "gpus_per_node",
        "cp_config",
        "moe_cluster_parallel_size",
        "moe_tensor_parallel_size",
        "moe_expert_parallel_size",
        "moe_config",
        "enable_attention_dp",
        "enable_lm_head_tp_in_adp",
        "attention_dp_config",
        "allreduce_strategy",
        "load_format",
        "fail_fast_on_attention_window_too_large",
        "checkpoint_loader",
        "checkpoint_format",
        "force_dynamic_quantization",
        "enable_lora",
        "lora_config",
        "peft_cache_config",
        "guided_decoding_backend",
        "batched_logits_processor",
        "kv_cache_config",
        "enable_chunked_prefill",
        "sparse_attention_config",
        "speculative_config",
        "decoding_config",
        "scheduler_config",
        "cache_transceiver_config",
        "kv_connector_config",
        "max_batch_size",
        "max_input_len",
        "max_seq_len",
        "max_beam_width",
        "max_num_tokens",
        "iter_stats_max_iterations",
        "request_stats_max_iterations",
        "return_perf_metrics",
        "perf_metrics_max_requests",
        "enable_iter_perf_stats",
        "enable_iter_req_stats",
        "print_iter_log",
        "enable_layerwise_nvtx_marker",
        "gather_generation_logits",
        "num_postprocess_workers",
        "postprocess_tokenizer_dir",
        "reasoning_parser",
        "stream_interval",
        "mpi_session",
        "backend",
        "build_config",
        "orchestrator_type",
        "ray_worker_extension_cls",
        "garbage_collection_gen0_threshold",
        "cuda_graph_config",
        "torch_compile_config",
        "enable_autotuner",
        "enable_min_latency",
        "disable_overlap_scheduler",
        "attn_backend",
        "sampler_type",
        "mm_encoder_only",
        "batch_wait_timeout_ms",
        "batch_wait_timeout_iters",
        "batch_wait_max_tokens_ratio",
    ]
)
KV_CACHE_OPTIONS = frozenset(
    [
        "enable_block_reuse",
        "max_tokens",
        "max_attention_window",
        "sink_token_length",
        "free_gpu_memory_fraction",
        "host_cache_size",
        "onboard_blocks",
        "cross_kv_cache_fraction",
        "secondary_offload_min_priority",
        "event_buffer_max_size",
        "attention_dp_events_gather_period_ms",
        "enable_partial_reuse",
        "copy_on_partial_reuse",
        "use_uvm",
        "max_gpu_total_bytes",
        "dtype",
        "mamba_ssm_cache_dtype",
        "tokens_per_block",
    ]
)
DERIVED_OPTIONS: Mapping[str, str] = {
    "model": "the variant's checkpoint",
    "backend": "this target's runtime",
    "tensor_parallel_size": "parallelism.tensor",
    "pipeline_parallel_size": "parallelism.pipeline",
    "moe_expert_parallel_size": "parallelism.expert",
    "moe_tensor_parallel_size": "parallelism.tensor and parallelism.expert",
    "gpus_per_node": "parallelism.gpus_per_node",
    "max_batch_size": "serving.max_batch_size",
    "max_num_tokens": "max_num_tokens",
    "max_seq_len": "serving.max_sequence_length",
    "max_input_len": "serving.max_prompt_length",
    "enable_chunked_prefill": "chunked_context",
}
"""Options that other keys of the spec decide."""
DERIVED_KV_CACHE_OPTIONS: Mapping[str, str] = {
    "free_gpu_memory_fraction": "kv_cache.free_gpu_fraction",
    "enable_block_reuse": "kv_cache.reuse",
    "max_tokens": "kv_cache.max_tokens",
    "tokens_per_block": "kv_cache.tokens_per_block",
    "host_cache_size": "kv_cache.host_memory_bytes",
    "dtype": "kv_cache of the variant",
}
REFUSED_OPTIONS: Mapping[str, str] = {
    "trust_remote_code": "a checkpoint must not run code of its own; it is always false",
    "skip_tokenizer_init": "the model serves text and needs its tokenizer",
    "max_beam_width": "the served model has no beams; it is always 1",
    "build_config": "it belongs to TensorRT engines, which the LLM API does not use",
    "decoding_config": "TensorRT-LLM deprecated it; use speculative_config",
    "batched_logits_processor": "it takes a Python object, which YAML cannot hold",
    "checkpoint_loader": "it takes a Python object, which YAML cannot hold",
    "mpi_session": "it takes a Python object, which YAML cannot hold",
}


def check_options(options: Mapping[str, Any]) -> None:
    """Return when ``llm_options`` of a target may be written into ``model.yaml``.

    Raises:
        SpecError: a key does not exist, is decided elsewhere in the spec, or cannot work; says which and what to do.
    """
    for key, value in options.items():
        _check_key(key, LLM_OPTIONS, DERIVED_OPTIONS, where="llm_options", of="tensorrt_llm.LLM")
        if key in REFUSED_OPTIONS:
            raise SpecError(f"llm_options.{key} cannot be set: {REFUSED_OPTIONS[key]}", hint="leave it out")
        if key == "kv_cache_config":
            if not isinstance(value, Mapping):
                raise SpecError(
                    f"llm_options.kv_cache_config must be a mapping, seen: {type(value).__name__}",
                    hint="write its keys below it",
                )
            for part in value:
                _check_key(
                    part,
                    KV_CACHE_OPTIONS,
                    DERIVED_KV_CACHE_OPTIONS,
                    where="llm_options.kv_cache_config",
                    of="KvCacheConfig",
                )


def _check_key(key: str, known: Collection[str], derived: Mapping[str, str], *, where: str, of: str) -> None:
    if key in derived:
        raise SpecError(
            f"{where}.{key} is decided by the spec: {derived[key]}", hint=f"set {derived[key]} instead"
        )
    if key not in known:
        near = difflib.get_close_matches(str(key), sorted(known - derived.keys()), n=1)
        raise SpecError(
            f"{where}.{key} is not an argument of {of} in TensorRT-LLM 1.2",
            hint=f"did you mean {near[0]}?"
            if near
            else f"allowed: {', '.join(sorted(known - derived.keys()))}",
        )


def model_yaml(target: LlmApiTarget, serving: Serving, checkpoint: Path) -> dict[str, Any]:
    """The document of ``model.yaml``: arguments of ``tensorrt_llm.LLM``, and under ``triton_config`` the model's own.

    ``checkpoint`` is read for the type of its KV cache. NVIDIA's model reads ``max_batch_size``, ``decoupled`` and
    ``cancellation_check_period_ms`` of ``triton_config``; the rest is for the model that enginesmith writes.

    Raises:
        SpecError: an option is wrong, or the checkpoint is quantized in a way that the LLM API cannot run.
    """
    check_options(target.llm_options)
    parallelism, options = target.parallelism, dict(target.llm_options)
    queue = serving.dynamic_batching.queue_policy if serving.dynamic_batching else None
    document: dict[str, Any] = {
        "model": CHECKPOINT_DIRECTORY,
        "backend": "pytorch",
        "tensor_parallel_size": parallelism.tensor,
        "pipeline_parallel_size": parallelism.pipeline,
        "max_batch_size": serving.max_batch_size,
        "max_num_tokens": target.max_num_tokens,
        "max_seq_len": serving.max_sequence_length,
        "max_input_len": serving.prompt_limit,
        "max_beam_width": 1,
        "enable_chunked_prefill": target.chunked_context,
        "trust_remote_code": False,
        "kv_cache_config": _kv_cache_config(target, checkpoint) | options.pop("kv_cache_config", {}),
    }
    if parallelism.expert > 1:
        document["moe_expert_parallel_size"] = parallelism.expert
        document["moe_tensor_parallel_size"] = parallelism.tensor // parallelism.expert
    if parallelism.nodes > 1:
        document["gpus_per_node"] = parallelism.gpus_per_node
    return {
        **document,
        **options,
        "triton_config": {
            "max_batch_size": 0,
            "decoupled": target.streaming,
            "cancellation_check_period_ms": target.cancellation_check_period_ms,
            "max_prompt_length": serving.prompt_limit,
            "default_max_tokens": serving.default_max_tokens,
            "max_queue_size": queue.max_queue_size if queue else 0,
        },
    }


def _kv_cache_config(target: LlmApiTarget, checkpoint: Path) -> dict[str, Any]:
    pool = target.kv_cache
    config: dict[str, Any] = {
        "free_gpu_memory_fraction": pool.free_gpu_fraction,
        "enable_block_reuse": pool.reuse,
        "tokens_per_block": pool.tokens_per_block,
        "dtype": kv_cache_dtype(checkpoint),
    }
    if pool.max_tokens is not None:
        config["max_tokens"] = pool.max_tokens
    if pool.host_memory_bytes:
        config["host_cache_size"] = pool.host_memory_bytes
    return config


def kv_cache_dtype(checkpoint: Path) -> Literal["auto", "fp8"]:
    """The ``dtype`` of ``KvCacheConfig`` that fits a unified Hugging Face checkpoint.

    Raises:
        SpecError: its weights or its KV cache are quantized to INT8, which the PyTorch backend has no kernels for.
    """
    path = checkpoint / "hf_quant_config.json"
    if not path.is_file():
        return "auto"
    quantization = json.loads(path.read_text(encoding="utf-8")).get("quantization", {})
    if str(quantization.get("quant_algo")).startswith("W8A8"):
        raise SpecError(
            f"the LLM API cannot run {quantization['quant_algo']} (INT8 SmoothQuant) checkpoints",
            hint="use scheme fp8 or int4_awq here, or the runtime tensorrt_llm for int8_sq",
        )
    kv_cache = quantization.get("kv_cache_quant_algo")
    if kv_cache not in (None, "FP8"):
        raise SpecError(
            f"the LLM API cannot run a KV cache of type {kv_cache}; allowed: none, FP8",
            hint="set kv_cache: none or fp8 for the variant, or use the runtime tensorrt_llm",
        )
    return "fp8" if kv_cache == "FP8" else "auto"

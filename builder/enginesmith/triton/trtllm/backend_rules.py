"""What NVIDIA's backend ``tensorrtllm`` makes of the configuration of its model, judged without it.

On a CPU another backend runs that model, so a parameter that is gone or misspelled would show on a GPU only, where the
backend refuses to load or, worse, takes its default and says so in a log. Source: ``model_state.cc`` and
``model_instance_state.cc`` of ``triton_backend/inflight_batcher_llm`` in TensorRT-LLM 1.2 (c8c6df0, 0c8de69).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from tritonclient.grpc.model_config_pb2 import ModelConfig

_ANY = r".*"
_COUNT = r"\d+"
_NUMBER = r"\d+(\.\d+)?([eE][-+]?\d+)?"
_FLAG = r"true|false"
_ABSOLUTE = r"/.+"
_REQUIRED: Mapping[str, str] = {
    "gpt_model_type": r"inflight_fused_batching|inflight_batching|V1",
    "gpt_model_path": _ABSOLUTE,
    "tokenizer_dir": _ANY,
    "guided_decoding_backend": r"(xgrammar)?",
    "xgrammar_tokenizer_info_path": _ANY,
}
"""Without one of these the model does not load."""
_OPTIONAL: Mapping[str, str] = {
    "FORCE_CPU_ONLY_INPUT_TENSORS": r"yes|no",
    "batch_scheduler_policy": r"guaranteed_no_evict|max_utilization|static_batch",
    "decoding_mode": r"top_k|top_p|top_k_top_p|beam_search|medusa|redrafter|lookahead|eagle",
    "encoder_model_path": _ABSOLUTE,
    "executor_worker_path": _ABSOLUTE,
    "gpu_device_ids": r"\d+(,\d+)*(;\d+(,\d+)*)*",
    "participant_ids": r"\d+(,\d+)*(;\d+(,\d+)*)*",
    "max_attention_window_size": r"\d+(,\d+)*",
    "medusa_choices": _ANY,
    "eagle_choices": _ANY,
    **dict.fromkeys(
        (
            "max_beam_width",
            "max_tokens_in_paged_kv_cache",
            "sink_token_length",
            "kv_cache_host_memory_bytes",
            "cancellation_check_period_ms",
            "stats_check_period_ms",
            "iter_stats_max_iterations",
            "request_stats_max_iterations",
            "num_nodes",
            "lora_cache_optimal_adapter_size",
            "lora_cache_max_adapter_size",
            "lora_cache_host_memory_bytes",
            "lookahead_window_size",
            "lookahead_ngram_size",
            "lookahead_verification_set_size",
            "cuda_graph_cache_size",
            "recv_poll_period_ms",
        ),
        _COUNT,
    ),
    **dict.fromkeys(
        (
            "kv_cache_free_gpu_mem_fraction",
            "cross_kv_cache_fraction",
            "lora_cache_gpu_memory_fraction",
            "gpu_weights_percent",
        ),
        _NUMBER,
    ),
    **dict.fromkeys(
        (
            "kv_cache_onboard_blocks",
            "exclude_input_in_output",
            "enable_kv_cache_reuse",
            "enable_chunked_context",
            "normalize_log_probs",
            "enable_context_fmha_fp32_acc",
            "multi_block_mode",
            "cuda_graph_mode",
            "speculative_decoding_fast_logits",
            "enable_trt_overlap",
        ),
        _FLAG,
    ),
}
"""Where one of these is not there, is empty or cannot be read, the backend takes its default."""
_FORBIDDEN: Mapping[str, str] = {
    "lora_prefetch_dir": "any value, also none, is a directory that it reads adapters from",
    "worker_path": "it was replaced by executor_worker_path",
}


def backend_problems(config: ModelConfig) -> list[str]:
    """What NVIDIA's backend would not load, or not understand, in ``config``; for people, empty when nothing."""
    given = {name: value.string_value for name, value in config.parameters.items()}
    return [f"{config.name}: {problem}" for problem in _problems(config.name, given)]


def _problems(model: str, given: Mapping[str, str]) -> Iterator[str]:
    for name in _REQUIRED.keys() - given.keys():
        yield f"the parameter {name} is missing, without which the backend does not load"
    for name, value in sorted(given.items()):
        rule = _REQUIRED.get(name) or _OPTIONAL.get(name)
        if name in _FORBIDDEN:
            yield f"the parameter {name} must not be there: {_FORBIDDEN[name]}"
        elif rule is None:
            yield f"the backend reads no parameter {name}"
        elif not (re.fullmatch(rule, value) or (not value and name in _OPTIONAL)):
            yield f"the parameter {name} is {value!r}; allowed: {rule}"
    path = given.get("gpt_model_path", "")
    if path and not re.search(rf"/{re.escape(model)}/\d+$", path):
        yield f"gpt_model_path is {path!r}, which is no version directory of {model}: the engines would not be found"

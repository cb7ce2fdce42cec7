"""The ``config.pbtxt`` of the five models of a TensorRT-LLM deployment.

Pure functions from a target and its serving limits to protobuf messages; knows no files. The parameters are those
that the backend of TensorRT-LLM 1.2 reads (``triton_backend/inflight_batcher_llm/src/model_state.cc`` and
``model_instance_state.cc`` at c8c6df0) and what our own Python models read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tritonclient.grpc.model_config_pb2 import ModelConfig

from enginesmith.errors import SourceError
from enginesmith.spec import Serving
from enginesmith.spec_part import DynamicBatching
from enginesmith.targets import TensorRtLlmTarget
from enginesmith.triton.config import DataType, EnsembleStep, ensemble_config, model_config
from enginesmith.triton.trtllm import tensors

PARTS = ("preprocessing", "tensorrt_llm", "postprocessing", "ensemble", "tensorrt_llm_bls")
"""The models of a deployment: what others refer to comes before those that refer to it."""
DEFAULT_REPOSITORY_PATH = "/models"
ENGINE_BACKEND = "tensorrtllm"
BLS_THREADS = 8
"""Requests that one process of BLS serves at once: enough to keep it busy, few enough to share one interpreter."""

_MODEL_TYPES: Mapping[str, DataType] = {
    "bfloat16": "TYPE_BF16",
    "float16": "TYPE_FP16",
    "float32": "TYPE_FP32",
}
_EXECUTOR_WORKER = "/opt/tritonserver/backends/tensorrtllm/trtllmExecutorWorker"
# The backend reads an empty parameter as one that is not there and takes its default: a number or a boolean that
# cannot be parsed, a path that does not exist. NVIDIA's template lists these, so they are listed here too.
_UNSET = (
    "encoder_model_path",
    "max_attention_window_size",
    "sink_token_length",
    "cross_kv_cache_fraction",
    "kv_cache_onboard_blocks",
    "stats_check_period_ms",
    "iter_stats_max_iterations",
    "request_stats_max_iterations",
    "normalize_log_probs",
    "participant_ids",
    "lora_cache_optimal_adapter_size",
    "lora_cache_max_adapter_size",
    "lora_cache_gpu_memory_fraction",
    "lora_cache_host_memory_bytes",
    "decoding_mode",
    "lookahead_window_size",
    "lookahead_ngram_size",
    "lookahead_verification_set_size",
    "medusa_choices",
    "eagle_choices",
    "gpu_weights_percent",
    "enable_context_fmha_fp32_acc",
    "multi_block_mode",
    "cuda_graph_mode",
    "cuda_graph_cache_size",
    "speculative_decoding_fast_logits",
    # The backend refuses to load where one of these three is missing; empty they mean: no guided decoding.
    "tokenizer_dir",
    "guided_decoding_backend",
    "xgrammar_tokenizer_info_path",
)
# `lora_prefetch_dir` is in the template and must not be here: any string, also an empty one, is a directory that the
# backend reads adapters from.


@dataclass(frozen=True)
class Deployment:
    """What decides the configurations."""

    target: TensorRtLlmTarget
    serving: Serving
    model_dtype: str
    """The dtype of the converted checkpoint: bfloat16, float16 or float32."""
    repository_path: str = DEFAULT_REPOSITORY_PATH
    """Where the model repository is inside the container; an absolute path."""

    def version_path(self, part: str) -> str:
        """The version directory of one of ``PARTS`` inside the container."""
        return f"{self.repository_path.rstrip('/')}/{self.target.triton_model(part)}/1"


def deployment_configs(deployment: Deployment) -> dict[str, ModelConfig]:
    """The configuration of each of ``PARTS``, in that order.

    Raises:
        SourceError: TensorRT-LLM has no engine of that dtype.
    """
    if deployment.model_dtype not in _MODEL_TYPES:
        raise SourceError(
            f"the converted checkpoint has dtype {deployment.model_dtype!r}; allowed: {', '.join(_MODEL_TYPES)}",
            hint="set source.dtype in the spec",
        )
    return {
        "preprocessing": preprocessing(deployment),
        "tensorrt_llm": engine(deployment),
        "postprocessing": postprocessing(deployment),
        "ensemble": ensemble(deployment),
        "tensorrt_llm_bls": bls(deployment),
    }


def preprocessing(deployment: Deployment) -> ModelConfig:
    """Text to tokens."""
    target = deployment.target
    return model_config(
        target.triton_model("preprocessing"),
        inputs=tensors.PREPROCESSING_INPUTS,
        outputs=tensors.PREPROCESSING_OUTPUTS,
        max_batch_size=deployment.serving.max_batch_size,
        dynamic_batching=_batching(deployment.serving),
        instances=target.preprocessing_instances,
        parameters={
            "tokenizer_dir": deployment.version_path("preprocessing"),
            "add_special_tokens": _flag(target.add_special_tokens),
            "multimodal_model_path": "",
            "gpt_model_path": deployment.version_path("tensorrt_llm"),
            "max_num_images": "",
        },
    )


def engine(deployment: Deployment) -> ModelConfig:
    """The engine itself, in NVIDIA's backend."""
    target, logits = deployment.target, _logits_type(deployment.target)
    return model_config(
        target.triton_model("tensorrt_llm"),
        inputs=tensors.engine_inputs(_MODEL_TYPES[deployment.model_dtype], logits),
        outputs=tensors.engine_outputs(logits),
        max_batch_size=deployment.serving.max_batch_size,
        dynamic_batching=_batching(deployment.serving, ordered=False),
        instances=target.instances,
        parameters=engine_parameters(deployment),
        backend=ENGINE_BACKEND,
        decoupled=target.streaming,
    )


def engine_parameters(deployment: Deployment) -> dict[str, str]:
    """Every parameter of ``tensorrt_llm``; an empty one is unset."""
    target, cache = deployment.target, deployment.target.kv_cache
    return dict.fromkeys(_UNSET, "") | {
        "FORCE_CPU_ONLY_INPUT_TENSORS": "no",
        "gpt_model_type": "inflight_fused_batching",
        "gpt_model_path": deployment.version_path("tensorrt_llm"),
        "max_beam_width": str(target.max_beam_width),
        "batch_scheduler_policy": target.scheduler_policy,
        "kv_cache_free_gpu_mem_fraction": f"{cache.free_gpu_fraction:g}",
        "max_tokens_in_paged_kv_cache": str(cache.max_tokens or ""),
        "kv_cache_host_memory_bytes": str(cache.host_memory_bytes or ""),
        "enable_kv_cache_reuse": _flag(cache.reuse),
        "enable_chunked_context": _flag(target.chunked_context),
        "exclude_input_in_output": _flag(_EXCLUDE_INPUT),
        "cancellation_check_period_ms": str(target.cancellation_check_period_ms),
        "gpu_device_ids": ";".join(",".join(map(str, ids)) for ids in target.devices),
        "num_nodes": str(target.parallelism.nodes),
        "executor_worker_path": _EXECUTOR_WORKER,
    }


# NVIDIA's default: an answer that comes in one piece begins with the prompt. Requests may ask otherwise.
_EXCLUDE_INPUT = False


def postprocessing(deployment: Deployment) -> ModelConfig:
    """Tokens to text."""
    target = deployment.target
    return model_config(
        target.triton_model("postprocessing"),
        inputs=tensors.POSTPROCESSING_INPUTS,
        outputs=tensors.POSTPROCESSING_OUTPUTS,
        max_batch_size=deployment.serving.max_batch_size,
        # The ensemble sends each response of a stream here as a request of its own: several instances end them in
        # another order (seen on tritonserver 2.51), and the pieces of a text would change places.
        dynamic_batching=DynamicBatching(
            max_queue_delay_us=0, preserve_ordering=target.postprocessing_instances > 1
        ),
        instances=target.postprocessing_instances,
        parameters={
            "tokenizer_dir": deployment.version_path("postprocessing"),
            "skip_special_tokens": _flag(target.skip_special_tokens),
        },
    )


def ensemble(deployment: Deployment) -> ModelConfig:
    """The three in a row, without any code of their own."""
    target = deployment.target
    steps = (
        ("preprocessing", tensors.PREPROCESSING_MAP),
        ("tensorrt_llm", tensors.ENGINE_MAP),
        ("postprocessing", tensors.POSTPROCESSING_MAP),
    )
    return ensemble_config(
        target.triton_model("ensemble"),
        inputs=tensors.ensemble_inputs(_MODEL_TYPES[deployment.model_dtype]),
        outputs=tensors.text_outputs(_logits_type(target)),
        max_batch_size=deployment.serving.max_batch_size,
        steps=[EnsembleStep(target.triton_model(part), inputs, outputs) for part, (inputs, outputs) in steps],
    )


def bls(deployment: Deployment) -> ModelConfig:
    """The three called from Python, so that streams are cut between characters and stop words are whole."""
    target = deployment.target
    at_once = target.bls_instances or deployment.serving.max_batch_size
    instances = -(-at_once // BLS_THREADS)
    return model_config(
        target.triton_model("tensorrt_llm_bls"),
        inputs=tensors.bls_inputs(_MODEL_TYPES[deployment.model_dtype]),
        outputs=tensors.text_outputs(_logits_type(target)),
        max_batch_size=deployment.serving.max_batch_size,
        dynamic_batching=None,
        instances=instances,
        parameters={
            "accumulate_tokens": _flag(target.accumulate_tokens),
            "tensorrt_llm_model_name": target.triton_model("tensorrt_llm"),
            "tensorrt_llm_draft_model_name": "",
            "multimodal_encoders_name": "",
            "preprocessing_model_name": target.triton_model("preprocessing"),
            "postprocessing_model_name": target.triton_model("postprocessing"),
            "exclude_input_in_output": _flag(_EXCLUDE_INPUT),
            "cancellation_check_period_ms": str(target.cancellation_check_period_ms),
            "requests_at_once": str(-(-at_once // instances)),
        },
        decoupled=target.streaming,
    )


def _batching(serving: Serving, *, ordered: bool = True) -> DynamicBatching | None:
    """The spec's batcher; where it names no batch sizes, a full batch goes at once."""
    batching = serving.dynamic_batching
    if batching is None:
        return None
    return batching.model_copy(
        update={
            "preferred_batch_sizes": batching.preferred_batch_sizes or (serving.max_batch_size,),
            # Under in-flight batching requests end in another order than they came; holding answers back gains nothing.
            "preserve_ordering": ordered and batching.preserve_ordering,
        }
    )


def _logits_type(target: TensorRtLlmTarget) -> DataType:
    return _MODEL_TYPES[target.logits_dtype]


def _flag(value: bool) -> str:
    return "true" if value else "false"

"""The ``config.pbtxt`` of a model behind TensorRT-LLM's LLM API.

Names, types and shapes are those of ``all_models/llmapi/tensorrt_llm`` in TensorRT-LLM 1.2.1, so that clients written
for it work unchanged. Knows nothing of files.
"""

from __future__ import annotations

from tritonclient.grpc.model_config_pb2 import ModelConfig

from enginesmith.targets import LlmApiTarget
from enginesmith.triton.config import Tensor, model_config

LLMAPI_INPUTS = (
    Tensor("text_input", "TYPE_STRING", (-1,)),
    Tensor("streaming", "TYPE_BOOL", optional=True),
    Tensor("sampling_param_best_of", "TYPE_INT32", optional=True),
    Tensor("sampling_param_temperature", "TYPE_FP32", optional=True),
    Tensor("sampling_param_top_k", "TYPE_INT32", optional=True),
    Tensor("sampling_param_top_p", "TYPE_FP32", optional=True),
    Tensor("sampling_param_frequency_penalty", "TYPE_FP32", optional=True),
    Tensor("sampling_param_presence_penalty", "TYPE_FP32", optional=True),
    Tensor("sampling_param_max_tokens", "TYPE_INT32", optional=True),
    Tensor("sampling_param_stop", "TYPE_STRING", (-1,), optional=True),
    Tensor("sampling_param_seed", "TYPE_UINT64", optional=True),
    Tensor("sampling_param_exclude_input_from_output", "TYPE_BOOL", optional=True),
    Tensor("sampling_param_return_perf_metrics", "TYPE_BOOL", optional=True),
    Tensor("return_finish_reason", "TYPE_BOOL", optional=True),
    Tensor("return_stop_reason", "TYPE_BOOL", optional=True),
    Tensor("return_cumulative_logprob", "TYPE_BOOL", optional=True),
    Tensor("stop", "TYPE_BOOL", optional=True),
)
LLMAPI_OUTPUTS = (
    Tensor("text_output", "TYPE_STRING", (-1,)),
    Tensor("finish_reason", "TYPE_STRING", (-1,)),
    Tensor("stop_reason", "TYPE_STRING", (-1,)),
    Tensor("cumulative_logprob", "TYPE_FP32", (-1,)),
    Tensor("kv_cache_reused_block", "TYPE_INT32", (-1,)),
    Tensor("kv_cache_missed_block", "TYPE_INT32", (-1,)),
    Tensor("kv_cache_alloc_new_blocks", "TYPE_INT32", (-1,)),
    Tensor("kv_cache_alloc_total_blocks", "TYPE_INT32", (-1,)),
    Tensor("kv_cache_hit_rate", "TYPE_FP32", (-1,)),
    Tensor("arrival_time_ns", "TYPE_INT64"),
    Tensor("first_scheduled_time_ns", "TYPE_INT64"),
    Tensor("first_token_time_ns", "TYPE_INT64"),
    Tensor("last_token_time_ns", "TYPE_INT64"),
    Tensor("acceptance_rate", "TYPE_FP32"),
    Tensor("total_accepted_draft_tokens", "TYPE_INT32"),
    Tensor("total_draft_tokens", "TYPE_INT32"),
)


def llmapi_config(target: LlmApiTarget, *, variant: str, scheme: str) -> ModelConfig:
    """The complete configuration of the model.

    Triton forms no batches (``max_batch_size: 0``): TensorRT-LLM batches requests itself while they run. The
    transaction policy is here and not only in ``model.yaml``, because a server that does not complete configurations
    (``--disable-auto-complete-config``, which NVIDIA's launch script always passes) never reads it there.
    The instances are of KIND_CPU, as NVIDIA's: the Python process chooses its GPUs itself, from ``gpu_device_ids``.
    """
    parameters = {"scheme": scheme, "variant": variant}
    if target.devices:
        parameters["gpu_device_ids"] = gpu_device_ids(target.devices)
    return model_config(
        target.triton_model("tensorrt_llm"),
        inputs=LLMAPI_INPUTS,
        outputs=LLMAPI_OUTPUTS,
        max_batch_size=0,
        dynamic_batching=None,
        instances=target.instances,
        decoupled=target.streaming,
        parameters=parameters,
    )


def gpu_device_ids(devices: tuple[tuple[int, ...], ...]) -> str:
    """GPU ids as NVIDIA writes them: ``0,1;2,3`` gives GPUs 0 and 1 to the first instance, 2 and 3 to the second."""
    return ";".join(",".join(str(gpu) for gpu in ids) for ids in devices)

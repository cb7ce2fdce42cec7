"""Writes ``config.pbtxt`` by filling Triton's own protobuf message, and reads it back.

Knows the message, for models and for ensembles, and the tensors of a text-generation model. Knows nothing of engines. The format is
``ModelConfig`` of Triton's ``model_config.proto``, printed in protobuf text format.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2 as pb
from tritonclient.grpc.model_config_pb2 import ModelConfig

from enginesmith.errors import SourceError
from enginesmith.spec_part import DynamicBatching

DataType = Literal[
    "TYPE_STRING",
    "TYPE_UINT8",
    "TYPE_INT32",
    "TYPE_INT64",
    "TYPE_UINT64",
    "TYPE_FP16",
    "TYPE_BF16",
    "TYPE_FP32",
    "TYPE_BOOL",
]
InstanceKind = Literal["KIND_CPU", "KIND_GPU", "KIND_MODEL"]


@dataclass(frozen=True)
class Tensor:
    """An input or output of a model; ``dims`` do not count the batch dimension."""

    name: str
    data_type: DataType
    dims: tuple[int, ...] = (1,)
    optional: bool = False
    ragged: bool = False
    """Requests with different shapes may share a batch. The Python backend hands over each request's own tensor."""
    reshape: tuple[int, ...] | None = None
    """The shape that the backend sees instead of ``dims``; ``()`` is one number per row of the batch."""
    label_file: str | None = None
    """Of an output whose values are classes: a file in the model's directory with one name a line."""


@dataclass(frozen=True)
class EnsembleStep:
    """One model of an ensemble; the maps give the ensemble's tensor for each tensor of the model."""

    model: str
    inputs: Mapping[str, str]
    outputs: Mapping[str, str]


@dataclass(frozen=True)
class WarmupInput:
    """One input of a warm-up request; ``dims`` without the batch, ``file`` in the model's directory ``warmup``."""

    data_type: DataType
    dims: tuple[int, ...]
    file: str


@dataclass(frozen=True)
class WarmupSample:
    """``batch_size`` equal requests that a model answers, as one batch, before it is ready."""

    name: str
    batch_size: int
    inputs: Mapping[str, WarmupInput]


LLM_INPUTS = (
    Tensor("text_input", "TYPE_STRING", optional=True),
    Tensor("messages", "TYPE_STRING", optional=True),
    Tensor("apply_chat_template", "TYPE_BOOL", optional=True),
    Tensor("max_tokens", "TYPE_INT32", optional=True),
    Tensor("min_tokens", "TYPE_INT32", optional=True),
    Tensor("temperature", "TYPE_FP32", optional=True),
    Tensor("top_k", "TYPE_INT32", optional=True),
    Tensor("top_p", "TYPE_FP32", optional=True),
    Tensor("repetition_penalty", "TYPE_FP32", optional=True),
    Tensor("presence_penalty", "TYPE_FP32", optional=True),
    Tensor("frequency_penalty", "TYPE_FP32", optional=True),
    Tensor("seed", "TYPE_UINT64", optional=True),
    Tensor("stop_words", "TYPE_STRING", (-1,), optional=True, ragged=True),
    Tensor("bad_words", "TYPE_STRING", (-1,), optional=True, ragged=True),
    Tensor("end_id", "TYPE_INT32", optional=True),
    Tensor("pad_id", "TYPE_INT32", optional=True),
    Tensor("beam_width", "TYPE_INT32", optional=True),
    Tensor("stream", "TYPE_BOOL", optional=True),
    Tensor("return_log_probs", "TYPE_BOOL", optional=True),
    Tensor("exclude_input_in_output", "TYPE_BOOL", optional=True),
    Tensor("return_num_input_tokens", "TYPE_BOOL", optional=True),
    Tensor("return_num_output_tokens", "TYPE_BOOL", optional=True),
    Tensor("return_perf_metrics", "TYPE_BOOL", optional=True),
)
"""Inputs of a text-generation model, named and typed as in NVIDIA's ``tensorrt_llm_bls`` where it has them too."""
LLM_OUTPUTS = (
    Tensor("text_output", "TYPE_STRING", (-1,)),
    Tensor("finish_reason", "TYPE_STRING"),
    Tensor("num_input_tokens", "TYPE_INT32"),
    Tensor("num_output_tokens", "TYPE_INT32"),
    Tensor("cum_log_probs", "TYPE_FP32", (-1,)),
    Tensor("output_log_probs", "TYPE_FP32", (-1, -1)),
    Tensor("output_tokens", "TYPE_STRING", (-1,)),
    Tensor("kv_cache_reused_blocks", "TYPE_INT32"),
    Tensor("kv_cache_alloc_new_blocks", "TYPE_INT32"),
    Tensor("kv_cache_alloc_total_blocks", "TYPE_INT32"),
    Tensor("arrival_time_ns", "TYPE_INT64"),
    Tensor("first_scheduled_time_ns", "TYPE_INT64"),
    Tensor("first_token_time_ns", "TYPE_INT64"),
    Tensor("last_token_time_ns", "TYPE_INT64"),
)
"""A response carries the first four; log-probabilities and times where the request asks for them."""


def model_config(
    name: str,
    *,
    inputs: Sequence[Tensor],
    outputs: Sequence[Tensor],
    max_batch_size: int,
    dynamic_batching: DynamicBatching | None,
    instances: int = 1,
    instance_kind: InstanceKind = "KIND_CPU",
    parameters: Mapping[str, str] | None = None,
    backend: str = "python",
    platform: str = "",
    decoupled: bool = False,
) -> ModelConfig:
    """The complete configuration of a model; by default for the Python backend on CPUs.

    Complete means that tritonserver has nothing to fill in (``--disable-auto-complete-config``). A model that is
    not ``decoupled`` gives one answer per request, when it is complete.
    """
    config = ModelConfig(name=name, backend=backend, platform=platform, max_batch_size=max_batch_size)
    _add_tensors(config, inputs, outputs)
    config.instance_group.add(kind=pb.ModelInstanceGroup.Kind.Value(instance_kind), count=instances)
    if dynamic_batching is not None:
        config.dynamic_batching.CopyFrom(_dynamic_batching(dynamic_batching))
    config.model_transaction_policy.decoupled = decoupled
    for key, value in sorted((parameters or {}).items()):
        config.parameters[key].string_value = value
    return config


def ensemble_config(
    name: str,
    *,
    inputs: Sequence[Tensor],
    outputs: Sequence[Tensor],
    max_batch_size: int,
    steps: Sequence[EnsembleStep],
) -> ModelConfig:
    """The configuration of an ensemble. Each step runs whichever version of its model is served."""
    config = ModelConfig(name=name, platform="ensemble", max_batch_size=max_batch_size)
    _add_tensors(config, inputs, outputs)
    for step in steps:
        config.ensemble_scheduling.step.add(
            model_name=step.model, model_version=-1, input_map=step.inputs, output_map=step.outputs
        )
    return config


def _add_tensors(config: ModelConfig, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
    for tensor in inputs:
        added = config.input.add(
            name=tensor.name,
            data_type=pb.DataType.Value(tensor.data_type),
            dims=tensor.dims,
            optional=tensor.optional,
            allow_ragged_batch=tensor.ragged,
        )
        if tensor.reshape is not None:
            added.reshape.CopyFrom(pb.ModelTensorReshape(shape=tensor.reshape))
    for tensor in outputs:
        config.output.add(
            name=tensor.name,
            data_type=pb.DataType.Value(tensor.data_type),
            dims=tensor.dims,
            label_filename=tensor.label_file or "",
        )


def _dynamic_batching(batching: DynamicBatching) -> pb.ModelDynamicBatching:
    message = pb.ModelDynamicBatching(
        preferred_batch_size=batching.preferred_batch_sizes,
        max_queue_delay_microseconds=batching.max_queue_delay_us,
        preserve_ordering=batching.preserve_ordering,
    )
    policy = batching.queue_policy
    if policy.says_anything:
        message.default_queue_policy.CopyFrom(
            pb.ModelQueuePolicy(
                timeout_action=pb.ModelQueuePolicy.TimeoutAction.Value(policy.timeout_action),
                default_timeout_microseconds=policy.default_timeout_us,
                allow_timeout_override=policy.allow_timeout_override,
                max_queue_size=policy.max_queue_size,
            )
        )
    return message


def with_warmup(config: ModelConfig, samples: Sequence[WarmupSample]) -> ModelConfig:
    """A copy of ``config`` whose model answers ``samples`` before it is ready."""
    warmed = _copy(config)
    for sample in samples:
        added = warmed.model_warmup.add(name=sample.name, batch_size=sample.batch_size)
        for name, given in sample.inputs.items():
            added.inputs[name].data_type = pb.DataType.Value(given.data_type)
            added.inputs[name].dims[:] = given.dims
            added.inputs[name].input_data_file = given.file
    return warmed


def with_response_cache(config: ModelConfig) -> ModelConfig:
    """A copy of ``config`` whose model's answers are kept; without effect on a server that has no cache."""
    cached = _copy(config)
    cached.response_cache.enable = True
    return cached


def with_gpu_accelerator(config: ModelConfig, name: str, parameters: Mapping[str, str]) -> ModelConfig:
    """A copy of ``config`` with a GPU accelerator of Triton's ONNX Runtime backend: "cuda" or "tensorrt"."""
    accelerated = _copy(config)
    accelerator = accelerated.optimization.execution_accelerators.gpu_execution_accelerator.add(name=name)
    for key, value in sorted(parameters.items()):
        accelerator.parameters[key] = value
    return accelerated


def _copy(config: ModelConfig) -> ModelConfig:
    copied = ModelConfig()
    copied.CopyFrom(config)
    return copied


def serve_only_version(config: ModelConfig, version: int) -> ModelConfig:
    """A copy of ``config`` with which Triton serves exactly ``version``, whatever other directories there are."""
    pinned = _copy(config)
    pinned.version_policy.specific.versions[:] = [version]
    return pinned


def config_text(config: ModelConfig) -> str:
    """``config`` as the text of a ``config.pbtxt``."""
    text = text_format.MessageToString(config)
    # proto3 does not print zeros, and Triton reads a missing max_batch_size as "choose one for me".
    return str(text) if config.max_batch_size else f"max_batch_size: 0\n{text}"


def parse_config(text: str, *, origin: str = "config.pbtxt") -> ModelConfig:
    """The message in the text of a ``config.pbtxt``; ``origin`` is named in the message of an error.

    Raises:
        SourceError: the text is not a ModelConfig; says where.
    """
    try:
        return text_format.Parse(text, ModelConfig())
    except text_format.ParseError as error:
        raise SourceError(
            f"{origin} is not a Triton model configuration: {error}", hint="build and publish the model again"
        ) from error

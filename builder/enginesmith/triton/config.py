"""Writes ``config.pbtxt`` by filling Triton's own protobuf message, and reads it back.

Knows the message and the tensors of a text-generation model. Knows nothing of files and engines. The format is
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
from enginesmith.spec import DynamicBatching

DataType = Literal["TYPE_STRING", "TYPE_INT32", "TYPE_UINT64", "TYPE_FP32", "TYPE_BOOL"]


@dataclass(frozen=True)
class Tensor:
    """An input or output of a model; ``dims`` do not count the batch dimension."""

    name: str
    data_type: DataType
    dims: tuple[int, ...] = (1,)
    optional: bool = False
    ragged: bool = False
    """Requests with different shapes may share a batch. The Python backend hands over each request's own tensor."""


LLM_INPUTS = (
    Tensor("text_input", "TYPE_STRING"),
    Tensor("max_tokens", "TYPE_INT32", optional=True),
    Tensor("temperature", "TYPE_FP32", optional=True),
    Tensor("top_k", "TYPE_INT32", optional=True),
    Tensor("top_p", "TYPE_FP32", optional=True),
    Tensor("repetition_penalty", "TYPE_FP32", optional=True),
    Tensor("seed", "TYPE_UINT64", optional=True),
    Tensor("stop_words", "TYPE_STRING", (-1,), optional=True, ragged=True),
    Tensor("apply_chat_template", "TYPE_BOOL", optional=True),
)
LLM_OUTPUTS = (
    Tensor("text_output", "TYPE_STRING"),
    Tensor("finish_reason", "TYPE_STRING"),
    Tensor("num_input_tokens", "TYPE_INT32"),
    Tensor("num_output_tokens", "TYPE_INT32"),
)


def model_config(
    name: str,
    *,
    inputs: Sequence[Tensor],
    outputs: Sequence[Tensor],
    max_batch_size: int,
    dynamic_batching: DynamicBatching | None,
    instances: int = 1,
    parameters: Mapping[str, str] | None = None,
) -> ModelConfig:
    """The complete configuration of a model for the Python backend on CPUs.

    Complete means that tritonserver has nothing to fill in (``--disable-auto-complete-config``).
    """
    config = ModelConfig(name=name, backend="python", max_batch_size=max_batch_size)
    for tensor in inputs:
        config.input.add(
            name=tensor.name,
            data_type=pb.DataType.Value(tensor.data_type),
            dims=tensor.dims,
            optional=tensor.optional,
            allow_ragged_batch=tensor.ragged,
        )
    for tensor in outputs:
        config.output.add(name=tensor.name, data_type=pb.DataType.Value(tensor.data_type), dims=tensor.dims)
    config.instance_group.add(kind=pb.ModelInstanceGroup.KIND_CPU, count=instances)
    if dynamic_batching is not None:
        config.dynamic_batching.CopyFrom(_dynamic_batching(dynamic_batching))
    # Answers come one per request, when it is complete.
    config.model_transaction_policy.decoupled = False
    for key, value in sorted((parameters or {}).items()):
        config.parameters[key].string_value = value
    return config


def _dynamic_batching(batching: DynamicBatching) -> pb.ModelDynamicBatching:
    message = pb.ModelDynamicBatching(
        preferred_batch_size=batching.preferred_batch_sizes,
        max_queue_delay_microseconds=batching.max_queue_delay_us,
        preserve_ordering=batching.preserve_ordering,
    )
    policy = batching.queue_policy
    if policy.model_dump(exclude_defaults=True):
        message.default_queue_policy.CopyFrom(
            pb.ModelQueuePolicy(
                timeout_action=pb.ModelQueuePolicy.TimeoutAction.Value(policy.timeout_action),
                default_timeout_microseconds=policy.default_timeout_us,
                allow_timeout_override=policy.allow_timeout_override,
                max_queue_size=policy.max_queue_size,
            )
        )
    return message


def serve_only_version(config: ModelConfig, version: int) -> ModelConfig:
    """A copy of ``config`` with which Triton serves exactly ``version``, whatever other directories there are."""
    pinned = ModelConfig()
    pinned.CopyFrom(config)
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

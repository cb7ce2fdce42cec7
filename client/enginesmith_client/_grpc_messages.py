"""The messages of Triton's gRPC protocol (KServe v2 with Triton's extensions), shared by both gRPC transports. Pure.

Format: ``grpc_service.proto`` of tritonclient.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import grpc  # type: ignore[import-untyped]
from google.protobuf.message import Message
from tritonclient.grpc import service_pb2

from enginesmith_client._errors import (
    Call,
    InvalidInput,
    ServerError,
    Status,
    TritonClientError,
    error_from_status,
)
from enginesmith_client._messages import InferReply, InferRequest, WireTensor
from enginesmith_client._operations import (
    Infer,
    LoadModel,
    ModelReady,
    ReadConfig,
    ReadIndex,
    ReadMetadata,
    ReadStatistics,
    ServerReady,
    UnloadModel,
)

CHANNEL_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    # The default backoff grows to 120 s, so a client that waits for a server would sleep long after it is up.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
    # Without this, channels to one address share a connection and its backoff with each other.
    ("grpc.use_local_subchannel_pool", 1),
    # A proxy for web traffic is not a way to an inference server; the HTTP transport ignores them as well.
    ("grpc.enable_http_proxy", 0),
)
_MAX_MESSAGE_BYTES = 2**31 - 1

_STATUSES: dict[grpc.StatusCode, Status] = {
    grpc.StatusCode.INVALID_ARGUMENT: "invalid_argument",
    grpc.StatusCode.NOT_FOUND: "not_found",
    grpc.StatusCode.UNAVAILABLE: "unavailable",
    grpc.StatusCode.RESOURCE_EXHAUSTED: "unavailable",
    grpc.StatusCode.DEADLINE_EXCEEDED: "deadline",
    grpc.StatusCode.UNIMPLEMENTED: "unimplemented",
    grpc.StatusCode.CANCELLED: "cancelled",
}
# gRPC uses UNAVAILABLE for a connection that it could not make or keep, and so does Triton for a full queue.
# Nothing but the text of the library tells them apart (grpcio 1.85: no metadata either way).
_UNSENT_TEXTS = (
    "failed to connect",
    "errors resolving",
    "name resolution",
    "dns resolution",
)
_CONNECTION_TEXTS = (
    "socket closed",
    "connection reset",
    "connection refused",
    "connection aborted",
    "broken pipe",
    "recvmsg",
    "sendmsg",
    "goaway",
    "endpoint closing",
    "stream removed",
    "transport closed",
    "keepalive",
    "ping timeout",
)


@dataclass(frozen=True)
class Rpc:
    """How an operation travels over gRPC."""

    method: str
    """Of ``GRPCInferenceServiceStub``."""
    message: Callable[[Any], Message]
    """From the operation."""
    reply: Callable[[Any], Any]
    """From the answer."""


def _load_message(operation: LoadModel) -> Message:
    message = service_pb2.RepositoryModelLoadRequest(model_name=operation.model)
    if operation.config is not None:
        message.parameters["config"].string_param = json.dumps(operation.config)
    for path, content in operation.files.items():
        message.parameters[f"file:{path}"].bytes_param = content
    return message  # type: ignore[no-any-return]


def _unload_message(operation: UnloadModel) -> Message:
    message = service_pb2.RepositoryModelUnloadRequest(model_name=operation.model)
    message.parameters["unload_dependents"].bool_param = operation.dependents
    return message  # type: ignore[no-any-return]


def _named(kind: Any) -> Callable[[Any], Message]:
    return lambda operation: kind(name=operation.model, version=operation.version)


RPCS: dict[type, Rpc] = {
    ServerReady: Rpc(
        "ServerReady", lambda _: service_pb2.ServerReadyRequest(), lambda reply: bool(reply.ready)
    ),
    ModelReady: Rpc("ModelReady", _named(service_pb2.ModelReadyRequest), lambda reply: bool(reply.ready)),
    ReadMetadata: Rpc(
        "ModelMetadata", _named(service_pb2.ModelMetadataRequest), lambda reply: json_from_message(reply)
    ),
    ReadConfig: Rpc(
        "ModelConfig", _named(service_pb2.ModelConfigRequest), lambda reply: json_from_message(reply.config)
    ),
    ReadStatistics: Rpc(
        "ModelStatistics", _named(service_pb2.ModelStatisticsRequest), lambda reply: json_from_message(reply)
    ),
    ReadIndex: Rpc(
        "RepositoryIndex",
        lambda _: service_pb2.RepositoryIndexRequest(),
        lambda reply: json_from_message(reply),
    ),
    LoadModel: Rpc("RepositoryModelLoad", _load_message, lambda _: None),
    UnloadModel: Rpc("RepositoryModelUnload", _unload_message, lambda _: None),
    Infer: Rpc(
        "ModelInfer",
        lambda operation: message_from_request(operation.request),
        lambda reply: reply_from_message(reply),
    ),
}


def error_from_rpc(error: grpc.RpcError, call: Call) -> TritonClientError:
    """The error for a failed gRPC call."""
    return error_from_status(
        status_from_rpc(error),
        error.details() or error.code().name,
        call=call,
        retry_after_s=_pushback_s(error),
    )


def _pushback_s(error: grpc.RpcError) -> float | None:
    """When the server wants the call again; infinite for a number below zero, which means not at all.

    Source: gRFC A6, "Pushback".
    """
    metadata = getattr(error, "trailing_metadata", lambda: None)() or ()
    for name, value in metadata:
        if name == "grpc-retry-pushback-ms":
            milliseconds = int(value) if str(value).lstrip("-").isdigit() else -1
            return milliseconds / 1000 if milliseconds >= 0 else math.inf
    return None


def is_final(message: Any) -> bool:
    """Whether an answer of a stream is the last one."""
    return (
        bool(message.parameters["triton_final_response"].bool_param)
        if "triton_final_response" in message.parameters
        else False
    )


def message_from_request(request: InferRequest) -> Any:
    """The ``ModelInferRequest`` of an inference."""
    size_bytes = sum(len(tensor.data) for tensor in request.inputs)
    if size_bytes >= _MAX_MESSAGE_BYTES:
        raise InvalidInput(
            f"the inputs are {size_bytes} bytes; a gRPC message holds at most {_MAX_MESSAGE_BYTES}",
            hint="send smaller batches, or use HTTP",
        )
    message = service_pb2.ModelInferRequest(
        model_name=request.model, model_version=request.version, id=request.id
    )
    for tensor in request.inputs:
        message.inputs.add(name=tensor.name, datatype=tensor.datatype, shape=tensor.shape)
        message.raw_input_contents.append(tensor.data)
    for name in request.outputs:
        output = message.outputs.add(name=name)
        if request.classes:
            output.parameters["classification"].int64_param = request.classes
    for name, value in request.parameters.items():
        # bool is an int in Python, so it comes first.
        if isinstance(value, bool):
            message.parameters[name].bool_param = value
        elif isinstance(value, int):
            message.parameters[name].int64_param = value
        elif isinstance(value, float):
            message.parameters[name].double_param = value
        else:
            message.parameters[name].string_param = value
    return message


def reply_from_message(message: Any) -> InferReply:
    """The reply in a ``ModelInferResponse``."""
    if len(message.outputs) != len(message.raw_output_contents):
        raise ServerError(
            f"the answer of model {message.model_name!r} has {len(message.outputs)} outputs and {len(message.raw_output_contents)} raw contents",
            hint="the server must answer with raw_output_contents, as Triton does",
        )
    tensors = zip(message.outputs, message.raw_output_contents, strict=True)
    outputs = tuple(
        WireTensor(tensor.name, tensor.datatype, tuple(tensor.shape), data) for tensor, data in tensors
    )
    return InferReply(message.model_name, message.model_version, message.id, outputs)


def json_from_message(message: Message) -> dict[str, Any]:
    """A protobuf message as the JSON that Triton's HTTP endpoint gives for it.

    ``google.protobuf.json_format`` writes 64-bit integers as strings, and the name of its option for default
    values depends on the version of protobuf.
    """
    return {
        field.name: _json_from_field(message, field)
        for field in message.DESCRIPTOR.fields
        if _is_written(message, field)
    }


def _is_written(message: Message, field: Any) -> bool:
    return message.HasField(field.name) if field.has_presence else True


def _json_from_field(message: Message, field: Any) -> Any:
    value = getattr(message, field.name)
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        inner = field.message_type.fields_by_name["value"]
        return {str(key): _json_from_value(value[key], inner) for key in value}
    if isinstance(value, (Message, str, bytes, int, float)):
        return _json_from_value(value, field)
    return [_json_from_value(element, field) for element in value]


def _json_from_value(value: Any, field: Any) -> Any:
    if isinstance(value, Message):
        return json_from_message(value)
    return field.enum_type.values_by_number[value].name if field.enum_type is not None else value


def status_from_rpc(error: grpc.RpcError) -> Status:
    code, detail = error.code(), (error.details() or "").lower()
    if code is grpc.StatusCode.UNAVAILABLE:
        if any(text in detail for text in _UNSENT_TEXTS):
            return "unreachable"
        if any(text in detail for text in _CONNECTION_TEXTS):
            return "broken"
    return _STATUSES.get(code, "internal")

"""The messages of Triton's gRPC protocol (KServe v2 with Triton's extensions), shared by both gRPC transports. Pure.

Format: ``grpc_service.proto`` of tritonclient.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
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
from enginesmith_client._messages import InferReply, InferRequest, Parameter, WireTensor
from enginesmith_client._operations import (
    Infer,
    LoadModel,
    ModelReady,
    ReadConfig,
    ReadIndex,
    ReadMetadata,
    ReadStatistics,
    Region,
    RegisterMemory,
    ServerReady,
    UnloadModel,
    UnregisterMemory,
)
from enginesmith_client._settings import ConnectionSettings, Tls, ssl_context

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
    # A server that vanished without a word is noticed at last, but no sooner than servers allow: gRPC servers, Triton
    # among them, end connections that are pinged more than once in 300 s without data.
    ("grpc.keepalive_time_ms", 310_000),
    ("grpc.keepalive_timeout_ms", 20_000),
)
_MAX_MESSAGE_BYTES = 2**31 - 1
ENDING_TIMEOUT_S = 1.0
"""How long closing a connection waits for the statuses of streams that are complete but for these."""
# tritonserver sends an error in a stream as a text without a status. (With the metadata triton_grpc_error it sends one,
# but 2.51 then ends with SIGSEGV or SIGABRT when an error and a client's cancellation cross.) So the models that
# enginesmith builds begin the text with the name of the status, which _errors reads; others are known by their words.
_STREAM_TEXTS: tuple[tuple[str, Status], ...] = (
    ("exceeds maximum queue size", "unavailable"),
    ("request timeout expired", "unavailable"),
    ("inference input", "invalid_argument"),
    ("unexpected shape", "invalid_argument"),
    ("unexpected datatype", "invalid_argument"),
    ("inputs but got", "invalid_argument"),
    ("input byte size mismatch", "invalid_argument"),
    ("unexpected total byte size", "invalid_argument"),
    ("batch-size must be", "invalid_argument"),
    ("unexpected inference output", "invalid_argument"),
)

_STATUSES: dict[grpc.StatusCode, Status] = {
    grpc.StatusCode.INVALID_ARGUMENT: "invalid_argument",
    grpc.StatusCode.NOT_FOUND: "not_found",
    grpc.StatusCode.UNAVAILABLE: "unavailable",
    grpc.StatusCode.RESOURCE_EXHAUSTED: "unavailable",
    grpc.StatusCode.DEADLINE_EXCEEDED: "deadline",
    grpc.StatusCode.UNIMPLEMENTED: "unimplemented",
    grpc.StatusCode.CANCELLED: "cancelled",
}
_STATUSES_BY_CODE = {code.value[0]: status for code, status in _STATUSES.items()}
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
    "connection closed",
    "connection timed out",
    "host unreachable",
    "no route to host",
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


def _register_message(operation: RegisterMemory) -> Message:
    message: Message = service_pb2.SystemSharedMemoryRegisterRequest(
        name=operation.name, key=f"/{operation.name}", byte_size=operation.size_bytes
    )
    return message


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
    RegisterMemory: Rpc("SystemSharedMemoryRegister", _register_message, lambda _: None),
    UnregisterMemory: Rpc(
        "SystemSharedMemoryUnregister",
        lambda operation: service_pb2.SystemSharedMemoryUnregisterRequest(name=operation.name),
        lambda _: None,
    ),
    Infer: Rpc(
        "ModelInfer",
        lambda operation: message_from_request(
            operation.request, inputs_at=operation.input_regions, outputs_at=operation.output_regions
        ),
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


COMPRESSIONS: dict[str, grpc.Compression] = {
    "none": grpc.Compression.NoCompression,
    "gzip": grpc.Compression.Gzip,
    "deflate": grpc.Compression.Deflate,
}


def channel_options(settings: ConnectionSettings) -> list[tuple[str, int | str]]:
    """The options of every channel, with those of ``settings``."""
    options: list[tuple[str, int | str]] = list(CHANNEL_OPTIONS)
    if settings.tls is not None and settings.tls.server_name is not None:
        options.append(("grpc.ssl_target_name_override", settings.tls.server_name))
    return options


def channel_credentials(tls: Tls) -> Any:
    """The credentials of a channel that verifies as ``tls`` says."""
    import ssl

    # Checks the files: gRPC would only fail to connect. It also knows where the system keeps its authorities, while
    # gRPC brings a list of its own.
    context = ssl_context(tls)
    trusted = [ssl.DER_cert_to_PEM_cert(one) for one in context.get_ca_certs(binary_form=True)]
    return grpc.ssl_channel_credentials(
        root_certificates="".join(trusted).encode() or None,
        private_key=Path(tls.key_file).read_bytes() if tls.key_file else None,
        certificate_chain=Path(tls.cert_file).read_bytes() if tls.cert_file else None,
    )


def is_final(message: Any) -> bool:
    """Whether an answer of a stream is the last one."""
    return (
        bool(message.parameters["triton_final_response"].bool_param)
        if "triton_final_response" in message.parameters
        else False
    )


def stream_message_from_request(request: InferRequest) -> Any:
    """The message that opens a stream of answers; the last of them says so, if need be without outputs."""
    message = message_from_request(request)
    message.parameters["triton_enable_empty_final_response"].bool_param = True
    return message


def reply_from_stream(answer: Any, call: Call) -> InferReply | None:
    """The reply in a ``ModelStreamInferResponse``; None in a last one that has no outputs.

    Raises what the server says went wrong.
    """
    if answer.error_message:
        raise error_from_status(status_from_text(answer.error_message), answer.error_message, call=call)
    reply = answer.infer_response
    if is_final(reply) and not reply.outputs:
        return None
    return reply_from_message(reply)


def status_from_text(text: str) -> Status:
    """What the error text of a stream stands for where it does not begin with the name of a status."""
    lower = text.lower()
    return next((status for words, status in _STREAM_TEXTS if words in lower), "internal")


def message_from_request(
    request: InferRequest,
    *,
    inputs_at: Mapping[str, Region] = MappingProxyType({}),
    outputs_at: Mapping[str, Region] = MappingProxyType({}),
) -> Any:
    """The ``ModelInferRequest`` of an inference, without the data that is in shared memory."""
    message = service_pb2.ModelInferRequest(
        model_name=request.model, model_version=request.version, id=request.id
    )
    size_bytes = 0
    for tensor in request.inputs:
        written = message.inputs.add(name=tensor.name, datatype=tensor.datatype, shape=tensor.shape)
        if tensor.name in inputs_at:
            _write_region(written, inputs_at[tensor.name])
        else:
            message.raw_input_contents.append(tensor.data)
            size_bytes += len(tensor.data)
    if size_bytes >= _MAX_MESSAGE_BYTES:
        raise InvalidInput(
            f"the inputs are {size_bytes} bytes; a gRPC message holds at most {_MAX_MESSAGE_BYTES}",
            hint="send smaller batches, or use HTTP or shared memory",
        )
    for name in request.outputs:
        output = message.outputs.add(name=name)
        if request.classes:
            output.parameters["classification"].int64_param = request.classes
        if name in outputs_at:
            _write_region(output, outputs_at[name])
    for name, value in request.parameters.items():
        _write_parameter(message.parameters[name], value)
    return message


def _write_region(tensor: Any, region: Region) -> None:
    tensor.parameters["shared_memory_region"].string_param = region.name
    tensor.parameters["shared_memory_byte_size"].int64_param = region.size_bytes


def _write_parameter(parameter: Any, value: Parameter) -> None:
    # bool is an int in Python, so it comes first.
    if isinstance(value, bool):
        parameter.bool_param = value
    elif isinstance(value, int):
        parameter.int64_param = value
    elif isinstance(value, float):
        parameter.double_param = value
    else:
        parameter.string_param = value


def reply_from_message(message: Any) -> InferReply:
    """The reply in a ``ModelInferResponse``."""
    if len(message.outputs) != len(message.raw_output_contents):
        raise ServerError(
            f"the answer of model {message.model_name!r} has {len(message.outputs)} outputs and {len(message.raw_output_contents)} raw contents",
            hint="the server must answer with raw_output_contents, as Triton does",
        )
    outputs = tuple(
        [
            WireTensor(tensor.name, tensor.datatype, tuple(tensor.shape), data)
            for tensor, data in zip(message.outputs, message.raw_output_contents, strict=False)
        ]
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


def status_from_code(code: int) -> Status:
    """The status of a call by the number that a server sent; it was reached, so it is not about the connection."""
    return _STATUSES_BY_CODE.get(code, "internal")

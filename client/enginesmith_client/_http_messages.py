"""The messages of Triton's HTTP protocol, shared by both HTTP transports. Pure.

Format: https://github.com/triton-inference-server/server/blob/main/docs/protocol/extension_binary_data.md
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any
from urllib.parse import quote

from enginesmith_client._errors import Call, InvalidInput, ServerError, Status, error_from_status
from enginesmith_client._messages import InferReply, InferRequest, WireTensor
from enginesmith_client._operations import (
    Infer,
    LoadModel,
    ModelReady,
    Operation,
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

HEADER_LENGTH = "Inference-Header-Content-Length"
# Triton answers 400 for UNKNOWN, ALREADY_EXISTS and CANCELLED as well; HTTP cannot tell them apart.
_STATUSES: dict[int, Status] = {
    400: "invalid_argument",
    404: "not_found",
    408: "deadline",
    429: "unavailable",
    501: "unimplemented",
    503: "unavailable",
    504: "deadline",
}


@dataclass(frozen=True)
class HttpCall:
    """A request as HTTP has it."""

    method: str
    path: str
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class HttpAnswer:
    status: int
    headers: Mapping[str, str]
    body: bytes


def http_from_operation(operation: Operation) -> HttpCall:
    """How an operation travels over HTTP."""
    if isinstance(operation, Infer):
        body, header_length = body_from_request(
            operation.request, inputs_at=operation.input_regions, outputs_at=operation.output_regions
        )
        path = model_path(operation.model, operation.version) + "/infer"
        return HttpCall("POST", path, body, {HEADER_LENGTH: str(header_length)})
    if isinstance(operation, ServerReady):
        return HttpCall("GET", "/v2/health/ready")
    if isinstance(operation, ReadIndex):
        return HttpCall("POST", "/v2/repository/index")
    if isinstance(operation, LoadModel):
        parameters: dict[str, str] = {}
        if operation.config is not None:
            parameters["config"] = json.dumps(operation.config)
        for name, content in operation.files.items():
            parameters[f"file:{name}"] = base64.b64encode(content).decode()
        return HttpCall(
            "POST",
            f"/v2/repository{model_path(operation.model, '')[3:]}/load",
            json.dumps({"parameters": parameters}).encode(),
        )
    if isinstance(operation, UnloadModel):
        body = json.dumps({"parameters": {"unload_dependents": operation.dependents}}).encode()
        return HttpCall("POST", f"/v2/repository{model_path(operation.model, '')[3:]}/unload", body)
    if isinstance(operation, RegisterMemory):
        place = {"key": f"/{operation.name}", "offset": 0, "byte_size": operation.size_bytes}
        path = f"/v2/systemsharedmemory/region/{operation.name}/register"
        return HttpCall("POST", path, json.dumps(place).encode())
    if isinstance(operation, UnregisterMemory):
        return HttpCall("POST", f"/v2/systemsharedmemory/region/{operation.name}/unregister")
    if isinstance(operation, ReadStatistics) and not operation.model:
        return HttpCall("GET", "/v2/models/stats")
    ending = {ModelReady: "/ready", ReadMetadata: "", ReadConfig: "/config", ReadStatistics: "/stats"}[
        type(operation)
    ]
    return HttpCall("GET", model_path(operation.model, operation.version) + ending)


def reply_from_http(operation: Operation, answer: HttpAnswer, call: Call) -> Any:
    """The reply to an operation in an HTTP answer."""
    if isinstance(operation, (ServerReady, ModelReady)):
        return answer.status == 200
    raise_for_status(answer, call)
    if isinstance(operation, Infer):
        length = answer.headers.get(HEADER_LENGTH.lower())
        return reply_from_body(answer.body, length, outputs_at=operation.output_regions)
    if isinstance(operation, (LoadModel, UnloadModel, RegisterMemory, UnregisterMemory)):
        return None
    try:
        value: Any = json.loads(answer.body)
    except ValueError as error:
        raise ServerError(
            f"{call.action}: the answer of {call.address} is not JSON: {answer.body[:80]!r}"
        ) from error
    # The repository index is a bare list over HTTP and has a name over gRPC.
    return {"models": value} if isinstance(value, list) else dict(value)


def body_from_request(
    request: InferRequest,
    *,
    inputs_at: Mapping[str, Region] = MappingProxyType({}),
    outputs_at: Mapping[str, Region] = MappingProxyType({}),
) -> tuple[bytes, int]:
    """The HTTP body of an inference, and the length of the JSON that comes before the tensor data in it."""
    sent = [tensor for tensor in request.inputs if tensor.name not in inputs_at]
    header: dict[str, Any] = {
        "inputs": [
            {
                "name": tensor.name,
                "datatype": tensor.datatype,
                "shape": tensor.shape,
                "parameters": _region_parameters(inputs_at[tensor.name])
                if tensor.name in inputs_at
                else {"binary_data_size": len(tensor.data)},
            }
            for tensor in request.inputs
        ],
        "parameters": {**request.parameters, "binary_data_output": True},
    }
    if request.id:
        header["id"] = request.id
    if request.outputs:
        asked = {"classification": request.classes} if request.classes else {}
        header["outputs"] = [
            {
                "name": name,
                "parameters": _region_parameters(outputs_at[name])
                if name in outputs_at
                else {"binary_data": True, **asked},
            }
            for name in request.outputs
        ]
    encoded = json.dumps(header, allow_nan=False).encode("utf-8")
    return b"".join([encoded, *(tensor.data for tensor in sent)]), len(encoded)


def _region_parameters(region: Region) -> dict[str, str | int]:
    return {"shared_memory_region": region.name, "shared_memory_byte_size": region.size_bytes}


def reply_from_body(
    body: bytes, header_length: str | None, *, outputs_at: Mapping[str, Region] = MappingProxyType({})
) -> InferReply:
    """The reply in the body of an answer whose JSON part is ``header_length`` long (all of it when None)."""
    try:
        end = int(header_length) if header_length is not None else len(body)
        header = json.loads(body[:end])
        outputs: list[WireTensor] = []
        for tensor in header["outputs"]:
            size_bytes = 0 if tensor["name"] in outputs_at else tensor["parameters"]["binary_data_size"]
            data = body[end : end + size_bytes]
            outputs.append(WireTensor(tensor["name"], tensor["datatype"], tuple(tensor["shape"]), data))
            end += size_bytes
        return InferReply(header["model_name"], header["model_version"], header.get("id", ""), tuple(outputs))
    except (ValueError, KeyError, TypeError) as error:
        raise ServerError(
            f"the answer to an inference cannot be read: {type(error).__name__}: {error}",
            hint="the server must support the binary tensor data extension, as Triton does",
        ) from error


def model_path(model: str, version: str) -> str:
    """The path below which a model's calls are."""
    # Triton does not decode percent escapes in a model's name, so a name that needs them has no URL.
    if quote(model, safe="!$&'()*+,;=:@") != model:
        raise InvalidInput(
            f"model name {model!r} cannot be part of an HTTP path", hint="use gRPC for this model"
        )
    return f"/v2/models/{model}" + (f"/versions/{version}" if version else "")


def raise_for_status(answer: HttpAnswer, call: Call) -> None:
    """Raises the error that an answer with another status than 200 is."""
    if answer.status == 200:
        return
    try:
        detail = str(json.loads(answer.body)["error"])
    except (ValueError, KeyError, TypeError):
        detail = f"HTTP status {answer.status}: {answer.body[:200].decode('utf-8', 'replace')}"
    status = _STATUSES.get(answer.status, "internal")
    raise error_from_status(status, detail, call=call, retry_after_s=_retry_after_s(answer))


def _retry_after_s(answer: HttpAnswer) -> float | None:
    """``Retry-After`` in seconds; its other form, a date, needs clocks that agree and is not read (RFC 9110, 10.2.3)."""
    value = answer.headers.get("retry-after", "").strip()
    return float(value) if value.isascii() and value.isdigit() else None

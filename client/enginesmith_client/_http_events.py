"""Requests to decoupled models over HTTP: Triton's ``/generate_stream``, JSON in and server-sent events out. Pure.

The JSON has neither datatypes nor shapes, so the model's metadata gives both: a tensor is flat, a variable dimension is as
large as the number of its values makes it. Bytes that are no UTF-8 travel as they are, in both directions (Triton
neither checks nor escapes them), so they are kept as Python's ``surrogateescape`` has them.

Formats: https://github.com/triton-inference-server/server/blob/main/docs/protocol/extension_generate.md and
https://html.spec.whatwg.org/multipage/server-sent-events.html
"""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np

from enginesmith_client._codec import NUMPY_TYPES, array_from_bytes, bytes_from_array
from enginesmith_client._errors import Call, InvalidInput, ServerError, Status, error_from_status
from enginesmith_client._http_messages import HttpAnswer, HttpCall, model_path, raise_for_status
from enginesmith_client._messages import (
    InferReply,
    InferRequest,
    ModelMetadata,
    Parameter,
    TensorMetadata,
    WireTensor,
)

_MAX_EVENT_BYTES = 1 << 30
_WITHOUT_JSON = ("FP16", "BF16")
"""Datatypes that Triton does not read from or write to JSON."""


class EventReader:
    """Cuts a stream of bytes into the data of its events."""

    def __init__(self) -> None:
        self._rest = bytearray()

    def feed(self, data: bytes) -> list[bytes]:
        """The data of the events that ``data`` completes.

        Raises:
            ServerError: an event never ends.
        """
        start = max(0, len(self._rest) - 1)
        self._rest += data
        if len(self._rest) > _MAX_EVENT_BYTES:
            raise ServerError(f"an event of the answer is larger than {_MAX_EVENT_BYTES} bytes")
        if self._rest.find(b"\n\n", start) < 0:
            return []
        *events, rest = bytes(self._rest).split(b"\n\n")
        self._rest = bytearray(rest)
        return [data for data in map(_event_data, events) if data]

    @property
    def in_an_event(self) -> bool:
        """Whether the last event was begun and not ended."""
        return bool(self._rest.strip())


def _event_data(event: bytes) -> bytes:
    lines = [line[5:].removeprefix(b" ") for line in event.split(b"\n") if line.startswith(b"data:")]
    return b"\n".join(lines)


def http_from_stream_request(request: InferRequest) -> HttpCall:
    """The call that makes a decoupled model answer in events.

    Raises:
        InvalidInput: the request has something that this way cannot carry; gRPC can.
    """
    metadata = _metadata(request)
    values = {tensor.name: _json_values(tensor, metadata) for tensor in request.inputs}
    body: dict[str, Any] = dict(values)
    if request.id:
        body["id"] = request.id
    parameters = _custom_parameters(request)
    if parameters:
        body["parameters"] = parameters
    encoded = json.dumps(body, ensure_ascii=False).encode("utf-8", "surrogateescape")
    path = model_path(request.model, request.version) + "/generate_stream"
    return HttpCall("POST", path, encoded, {"Content-Type": "application/json"})


def _custom_parameters(request: InferRequest) -> dict[str, Parameter]:
    for name in ("priority", "sequence_id", "sequence_start", "sequence_end"):
        if name in request.parameters:
            raise InvalidInput(
                f"Triton takes no {name} for decoupled models over HTTP", hint="use a grpc:// address"
            )
    # The time limit holds without it: the connection is closed when the time is up, which cancels the request.
    return {name: value for name, value in request.parameters.items() if name != "timeout"}


def _json_values(tensor: WireTensor, metadata: ModelMetadata) -> list[Any]:
    if tensor.datatype in _WITHOUT_JSON:
        raise InvalidInput(
            f"input {tensor.name!r} is {tensor.datatype}, which Triton does not take for decoupled models over HTTP",
            hint="use a grpc:// address",
        )
    flat = (1,) if metadata.max_batch_size else ()
    if len(tensor.shape) != len(flat) + 1 or tensor.shape[: len(flat)] != flat:
        raise InvalidInput(
            f"input {tensor.name!r} has shape {list(tensor.shape)}; Triton takes only {[*flat, -1]} for decoupled models over HTTP",
            hint="use a grpc:// address, or send one row at a time",
        )
    values = array_from_bytes(tensor.data, tensor.datatype, tensor.shape).reshape(-1).tolist()
    if tensor.datatype == "BYTES":
        return [value.decode("utf-8", "surrogateescape") for value in values]
    return list(values)


def reply_from_event(event: bytes, request: InferRequest, call: Call) -> InferReply:
    """The reply in the data of one event.

    Raises the error that the event is, if it is one.
    """
    try:
        value = json.loads(event.decode("utf-8", "surrogateescape"))
        if "error" in value and "model_name" not in value:  # A model may have an output of that name.
            raise error_from_status(_status_from_text(str(value["error"])), str(value["error"]), call=call)
        outputs = tuple(
            _wire_tensor(tensor, value[tensor.name], batched=_metadata(request).max_batch_size > 0)
            for tensor in _metadata(request).outputs
            if tensor.name in value and tensor.name in (request.outputs or value)
        )
        return InferReply(value["model_name"], value["model_version"], value.get("id", ""), outputs)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise ServerError(
            f"a piece of the answer cannot be read: {type(error).__name__}: {error}: {event[:80]!r}"
        ) from error


def raise_for_stream_status(answer: HttpAnswer, call: Call) -> None:
    """Raises the error of an answer that is no stream; a model's own comes as an event."""
    events = EventReader().feed(answer.body)
    if answer.status == 400 and events:
        detail = _error_text(events[0])
        status = _status_from_text(detail)
        # Triton says 400 whatever the model's error was. Most often it is what the client sent.
        raise error_from_status("invalid_argument" if status == "internal" else status, detail, call=call)
    raise_for_status(answer, call)


def _error_text(event: bytes) -> str:
    try:
        return str(json.loads(event)["error"])
    except (ValueError, KeyError, TypeError):
        return event[:200].decode("utf-8", "replace")


def _status_from_text(detail: str) -> Status:
    """What a model's error means; over HTTP its text is all there is."""
    lower = detail.lower()
    if "exceeds maximum queue size" in lower or "try again later" in lower:
        return "unavailable"
    return "cancelled" if "cancelled" in lower else "internal"


def _wire_tensor(tensor: TensorMetadata, value: Any, *, batched: bool) -> WireTensor:
    values = value if isinstance(value, list) else [value]
    shape = _shape(tensor, len(values), batched=batched)
    if tensor.datatype == "BYTES":
        array = np.empty(len(values), np.object_)
        array[:] = [text.encode("utf-8", "surrogateescape") for text in values]
    else:
        array = np.array(values, NUMPY_TYPES[tensor.datatype])
    return WireTensor(tensor.name, tensor.datatype, shape, bytes_from_array(array, tensor.datatype))


def _shape(tensor: TensorMetadata, count: int, *, batched: bool) -> tuple[int, ...]:
    """The shape that ``count`` values have; of several variable dimensions the last one takes them."""
    shape = list(tensor.shape)
    if batched:
        shape[0] = 1
    variable = [position for position, size in enumerate(shape) if size < 0]
    for position in variable:
        shape[position] = 1
    if variable:
        fixed = math.prod(shape)
        shape[variable[-1]] = count // fixed if fixed else 0
    if math.prod(shape) != count:
        raise ValueError(f"output {tensor.name} holds {count} values; its shape is {list(tensor.shape)}")
    return tuple(shape)


def _metadata(request: InferRequest) -> ModelMetadata:
    assert request.metadata is not None, "requests to decoupled models carry the metadata"
    return request.metadata

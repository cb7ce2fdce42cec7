"""Asks a model behind the LLM API over gRPC, as its clients do: streams, single answers, cancellation.

Knows the tensors of ``enginesmith.triton.llmapi.config`` and nothing of what the answers should be.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import tritonclient.grpc as grpc
from tritonclient.utils import InferenceServerException

from enginesmith.triton.llmapi.config import LLMAPI_INPUTS, LLMAPI_OUTPUTS

REQUEST_TIMEOUT_S = 300.0
_WIRE_TYPES: Mapping[str, tuple[str, type]] = {
    "TYPE_STRING": ("BYTES", np.object_),
    "TYPE_INT32": ("INT32", np.int32),
    "TYPE_UINT64": ("UINT64", np.uint64),
    "TYPE_FP32": ("FP32", np.float32),
    "TYPE_BOOL": ("BOOL", np.bool_),
}
_INPUT_TYPES = {tensor.name: _WIRE_TYPES[tensor.data_type] for tensor in LLMAPI_INPUTS}
_OUTPUTS = tuple(tensor.name for tensor in LLMAPI_OUTPUTS)

Value = bytes | str | bool | int | float
Inputs = Mapping[str, Value | list[bytes]]


@dataclass(frozen=True)
class Reply:
    """Everything that came back for one request."""

    pieces: tuple[bytes, ...] = ()
    """``text_output`` of each response."""
    outputs: Mapping[str, Any] | None = None
    """The first value of every other output of the last response."""
    refusal: str | None = None

    @property
    def text(self) -> str:
        """The pieces joined; what is not UTF-8 shows as U+FFFD."""
        return b"".join(self.pieces).decode(errors="replace")

    def value(self, name: str) -> Any:
        """An output of the last response, None where it was not sent."""
        return (self.outputs or {}).get(name)

    def shown(self) -> str:
        """For people."""
        if self.refusal is not None:
            return f"refused: {self.refusal[:300]}"
        return self.text


class Pending:
    """A request under way."""

    def __init__(self, cancel: Callable[[], None], replies: queue.SimpleQueue[Reply]) -> None:
        self._cancel = cancel
        self._replies = replies

    def cancel(self) -> None:
        """Tell the server that nobody waits any more."""
        self._cancel()

    def reply(self, timeout_s: float) -> Reply:
        """The reply, once it is complete.

        Raises:
            queue.Empty: that took longer than ``timeout_s``.
        """
        return self._replies.get(timeout=timeout_s)


class Asking:
    """Asks one model. Thread-safe: every request has a connection of its own, as separate clients have."""

    def __init__(self, grpc_url: str, model: str, *, decoupled: bool) -> None:
        self._url = grpc_url
        self._model = model
        self._decoupled = decoupled
        self._lock = threading.Lock()
        # A model that was silent once would be for every check.
        self._silent = False
        self.requests = 0

    def __call__(self, inputs: Inputs, *, request_id: str = "") -> Reply:
        """The reply to one request; ``inputs`` by tensor name."""
        if self._silent:
            return Reply(refusal="not asked: an earlier request got no final response")
        client = grpc.InferenceServerClient(self._url)
        try:
            pending = self._start(client, inputs, request_id)
            try:
                return pending.reply(REQUEST_TIMEOUT_S)
            except queue.Empty:
                self._silent = True
                # Closing would wait for it, too.
                pending.cancel()
                return Reply(refusal=f"no final response in {REQUEST_TIMEOUT_S:g} s")
        finally:
            client.close()

    def start(self, client: grpc.InferenceServerClient, inputs: Inputs, *, request_id: str = "") -> Pending:
        """Start a request on ``client``, which must have no other under way, and do not wait for it."""
        return self._start(client, inputs, request_id)

    def connect(self) -> grpc.InferenceServerClient:
        """A connection of its own, to be closed by the caller."""
        return grpc.InferenceServerClient(self._url)

    def _start(self, client: grpc.InferenceServerClient, inputs: Inputs, request_id: str) -> Pending:
        with self._lock:
            self.requests += 1
        tensors = [_tensor(name, value) for name, value in inputs.items()]
        replies: queue.SimpleQueue[Reply] = queue.SimpleQueue()
        if self._decoupled:
            client.start_stream(_Collector(replies))
            try:
                client.async_stream_infer(self._model, tensors, request_id=request_id)
            except InferenceServerException as error:  # The server went away between the two calls.
                replies.put(Reply(refusal=str(error.message())))
            return Pending(lambda: client.stop_stream(cancel_requests=True), replies)
        collector = _Collector(replies, single=True)
        call = client.async_infer(
            self._model,
            tensors,
            lambda result, error: collector(result, error),
            request_id=request_id,
            client_timeout=REQUEST_TIMEOUT_S,
        )
        return Pending(lambda: _cancel_call(call), replies)


def _cancel_call(call: Any) -> None:
    call.cancel()


class _Collector:
    """Receives responses and puts the complete reply into a queue."""

    def __init__(self, replies: queue.SimpleQueue[Reply], *, single: bool = False) -> None:
        self._replies = replies
        self._single = single
        self._pieces: list[bytes] = []

    def __call__(self, result: grpc.InferResult | None, error: InferenceServerException | None) -> None:
        if error is not None or result is None:
            message = str(error.message()) if error is not None else "an empty response"
            self._replies.put(Reply(pieces=tuple(self._pieces), refusal=message))
            return
        text = result.as_numpy("text_output")
        if text is not None:
            self._pieces += [bytes(piece) for piece in text.reshape(-1)]
        final = result.get_response().parameters["triton_final_response"].bool_param
        if final or self._single:
            self._replies.put(Reply(tuple(self._pieces), _other_outputs(result)))


def _other_outputs(result: grpc.InferResult) -> dict[str, Any]:
    values = {name: result.as_numpy(name) for name in _OUTPUTS if name != "text_output"}
    return {
        name: array.reshape(-1)[0].decode() if array.dtype == np.object_ else array.reshape(-1)[0].item()
        for name, array in values.items()
        if array is not None
    }


def _tensor(name: str, value: Value | list[bytes]) -> grpc.InferInput:
    datatype, dtype = _INPUT_TYPES[name]
    values = value if isinstance(value, list) else [value]
    array: np.ndarray[Any, Any] = np.array(values, dtype=dtype)
    return grpc.InferInput(name, list(array.shape), datatype).set_data_from_numpy(array)

"""Asks the models of a TensorRT-LLM deployment over gRPC and HTTP, and says what came back.

Decoupled models take streams only, others take single calls only; ``Asking`` does what the served configuration wants.
"""

from __future__ import annotations

import http.client
import json
import queue
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tritonclient.grpc as grpc
from tritonclient.grpc import model_config_pb2 as pb
from tritonclient.grpc.model_config_pb2 import ModelConfig
from tritonclient.utils import InferenceServerException

Inputs = Mapping[str, Sequence[object]]
"""The values of each input of one row."""
_TIMEOUT_S = 300.0
_WIRE_TYPES: Mapping[str, tuple[str, Any]] = {
    "TYPE_STRING": ("BYTES", np.object_),
    "TYPE_INT32": ("INT32", np.int32),
    "TYPE_UINT64": ("UINT64", np.uint64),
    "TYPE_FP32": ("FP32", np.float32),
    "TYPE_BOOL": ("BOOL", np.bool_),
}


@dataclass(frozen=True)
class Answer:
    """The responses to one request, or why it was refused."""

    texts: tuple[str, ...] = ()
    """The text of each response, in order; of requests with several rows as ``row: text``."""
    counts: tuple[int, ...] = ()
    """``num_input_tokens`` and ``num_output_tokens`` of the last response, where they were asked for."""
    refusal: str | None = None

    @property
    def text(self) -> str:
        """All texts joined."""
        return "".join(self.texts)

    def shown(self) -> str:
        """For people."""
        if self.refusal is not None:
            return f"refused: {self.refusal[:300]}"
        return self.text if len(self.texts) <= 1 else f"{self.text} ({len(self.texts)} responses)"


class Asking:
    """Asks the models at ``grpc_url`` and counts. ``entries`` are the configurations of those that take text."""

    def __init__(
        self, grpc_url: str, http_url: str, *, entries: Mapping[str, ModelConfig], decoupled: bool
    ) -> None:
        self._grpc_url = grpc_url
        self._http_url = http_url
        self._types = {
            name: {tensor.name: pb.DataType.Name(tensor.data_type) for tensor in config.input}
            for name, config in entries.items()
        }
        self.decoupled = decoupled
        self.requests = 0

    def __call__(
        self,
        model: str,
        prompts: bytes | Sequence[bytes],
        *,
        inputs: Inputs,
        request_id: str = "",
        cancel_after: int | None = None,
        wire_types: Mapping[str, str] | None = None,
    ) -> Answer:
        """The answer to one request with one prompt or, in as many rows, several.

        ``inputs`` are the other inputs, the same for every row. ``cancel_after`` cancels after so many responses.
        ``wire_types`` sends inputs as another type than the model's.
        """
        self.requests += 1
        rows = [prompts] if isinstance(prompts, bytes) else prompts
        given: dict[str, list[list[object]]] = {"text_input": [[prompt] for prompt in rows]}
        given |= {name: [list(values)] * len(rows) for name, values in inputs.items()}
        types = {**self._types[model], **(wire_types or {})}
        tensors = [_tensor(name, values, types[name]) for name, values in given.items()]
        with grpc.InferenceServerClient(self._grpc_url) as client:
            try:
                if not self.decoupled:
                    result = client.infer(model, tensors, request_id=request_id, client_timeout=_TIMEOUT_S)
                    return _answer([result])
                return _answer(
                    _stream(client, model, tensors, request_id=request_id, cancel_after=cancel_after)
                )
            except InferenceServerException as error:
                return Answer(refusal=str(error.message()))

    def generate(self, model: str, document: Mapping[str, object]) -> Answer:
        """The answer of the HTTP endpoint ``generate``, asked with that JSON."""
        self.requests += 1
        connection = http.client.HTTPConnection(self._http_url, timeout=_TIMEOUT_S)
        try:
            connection.request("POST", f"/v2/models/{model}/generate", json.dumps(document))
            response = connection.getresponse()
            body = response.read().decode(errors="replace")
        finally:
            connection.close()
        if response.status != 200:
            return Answer(refusal=f"HTTP {response.status}: {body}")
        return Answer(texts=(str(json.loads(body)["text_output"]),))


def _tensor(name: str, rows: Sequence[Sequence[object]], data_type: str) -> Any:
    wire_type, dtype = _WIRE_TYPES[data_type]
    array: np.ndarray[Any, Any] = np.array(rows, dtype=dtype)
    return grpc.InferInput(name, list(array.shape), wire_type).set_data_from_numpy(array)


def _stream(
    client: Any, model: str, tensors: list[Any], *, request_id: str, cancel_after: int | None
) -> list[Any]:
    """Every response up to the final one, which is left out where it is empty."""
    arrived: queue.Queue[tuple[Any, Any]] = queue.Queue()
    client.start_stream(lambda result, error: arrived.put((result, error)))
    results: list[Any] = []
    try:
        client.async_stream_infer(model, tensors, request_id=request_id, enable_empty_final_response=True)
        while cancel_after is None or len(results) < cancel_after:
            result, error = arrived.get(timeout=_TIMEOUT_S)
            if error is not None:
                raise error
            response = result.get_response()
            if response.outputs:
                results.append(result)
            if response.parameters["triton_final_response"].bool_param:
                break
        return results
    finally:
        client.stop_stream(cancel_requests=cancel_after is not None)


def _answer(results: Sequence[Any]) -> Answer:
    texts = []
    for result in results:
        # Bytes that are no text must not end the rehearsal but differ from what is expected.
        values = [value.decode(errors="backslashreplace") for value in result.as_numpy("text_output").ravel()]
        text = "|".join(values)
        row = result.as_numpy("batch_index")
        texts.append(text if row is None else f"{int(row.ravel()[0])}: {text}")
    counts = [
        results[-1].as_numpy(name) if results else None for name in ("num_input_tokens", "num_output_tokens")
    ]
    return Answer(tuple(texts), tuple(int(count.ravel()[0]) for count in counts if count is not None))

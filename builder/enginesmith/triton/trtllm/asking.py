"""Asks the models of a TensorRT-LLM deployment over gRPC and HTTP, and says what came back.

Decoupled models take streams only, others take single calls only; ``Asking`` does what the served configuration wants.
"""

from __future__ import annotations

import http.client
import json
import queue
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import tritonclient.grpc as grpc
from tritonclient.grpc import model_config_pb2 as pb
from tritonclient.grpc.model_config_pb2 import ModelConfig
from tritonclient.utils import InferenceServerException

from enginesmith.triton.server import TritonServer

Inputs = Mapping[str, Sequence[object]]
"""The values of each input of one row."""
PATIENCE_S = 300.0
"""How long a response may take to come, where nothing better is known."""
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


_NOT_ASKED = Answer(refusal="not asked: an earlier request got no final response")


class Asking:
    """Asks the models of ``server`` and counts. ``entries`` are the configurations of those that take text."""

    def __init__(
        self,
        server: TritonServer,
        *,
        entries: Mapping[str, ModelConfig],
        decoupled: bool,
        patience_s: float = PATIENCE_S,
    ) -> None:
        self._server = server
        self._types = {
            name: {tensor.name: pb.DataType.Name(tensor.data_type) for tensor in config.input}
            for name, config in entries.items()
        }
        self.decoupled = decoupled
        self.requests = 0
        self._patience_s = patience_s
        # A model that was silent once would be for every check.
        self._silent: set[str] = set()

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
        if model in self._silent:
            return _NOT_ASKED
        with grpc.InferenceServerClient(self._server.grpc_url) as client:
            try:
                if not self.decoupled:
                    result = client.infer(
                        model, tensors, request_id=request_id, client_timeout=self._patience_s
                    )
                    return _answer([result])
                call = _Stream(client, self._patience_s)
                return _answer(call.ask(model, tensors, request_id=request_id, cancel_after=cancel_after))
            except InferenceServerException as error:
                if "Deadline Exceeded" not in str(error.message()):
                    return Answer(refusal=str(error.message()))
            except queue.Empty:
                pass
        return self._gave_up(model)

    def _gave_up(self, model: str) -> Answer:
        self._silent.add(model)
        return Answer(refusal=f"no final response in {self._patience_s:.0f} s")

    def generate(
        self,
        model: str,
        document: Mapping[str, object],
        endpoint: Literal["generate", "generate_stream"] = "generate",
    ) -> Answer:
        """The answer of the HTTP endpoint, asked with that JSON; of ``generate_stream`` the text of each event."""
        self.requests += 1
        if model in self._silent:
            return _NOT_ASKED
        connection = http.client.HTTPConnection(self._server.http_url, timeout=self._patience_s)
        try:
            connection.request("POST", f"/v2/models/{model}/{endpoint}", json.dumps(document))
            response = connection.getresponse()
            body = response.read().decode(errors="replace")
        except TimeoutError:
            return self._gave_up(model)
        except (OSError, http.client.HTTPException) as error:
            return Answer(refusal=f"the HTTP connection broke: {error!r}")
        finally:
            connection.close()
        if response.status != 200:
            return Answer(refusal=f"HTTP {response.status}: {body}")
        events = [line.removeprefix("data: ") for line in body.splitlines() if line.startswith("data: ")]
        documents = map(json.loads, events if endpoint == "generate_stream" else [body])
        return Answer(texts=tuple(str(one.get("text_output", one)) for one in documents))


def _tensor(name: str, rows: Sequence[Sequence[object]], data_type: str) -> Any:
    wire_type, dtype = _WIRE_TYPES[data_type]
    array: np.ndarray[Any, Any] = np.array(rows, dtype=dtype)
    return grpc.InferInput(name, list(array.shape), wire_type).set_data_from_numpy(array)


class _Stream:
    """One request over a gRPC stream of its own."""

    def __init__(self, client: Any, patience_s: float) -> None:
        self._client = client
        self._patience_s = patience_s

    def ask(self, model: str, tensors: list[Any], *, request_id: str, cancel_after: int | None) -> list[Any]:
        """Every response up to the final one, which is left out where it is empty.

        Raises:
            queue.Empty: a response did not come in time.
        """
        arrived: queue.Queue[tuple[Any, Any]] = queue.Queue()
        self._client.start_stream(lambda result, error: arrived.put((result, error)))
        results: list[Any] = []
        ended = False
        try:
            self._client.async_stream_infer(
                model, tensors, request_id=request_id, enable_empty_final_response=True
            )
            while not ended and (cancel_after is None or len(results) < cancel_after):
                result, error = arrived.get(timeout=self._patience_s)
                if error is not None:
                    ended = True
                    raise error
                response = result.get_response()
                if response.outputs:
                    results.append(result)
                ended = response.parameters["triton_final_response"].bool_param
            return results
        finally:
            # Without cancelling, this waits for a final response that may never come.
            self._client.stop_stream(cancel_requests=not ended)


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

"""A real tritonserver with the served LLM over an engine, and the plainest client that can speak to it."""

from __future__ import annotations

import importlib.resources
import json
import queue
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tritonclient.grpc as grpc
from tritonclient.utils import InferenceServerException

from enginesmith.triton.config import LLM_INPUTS, LLM_OUTPUTS, config_text, model_config
from enginesmith.triton.server import TritonServer

PATIENCE_S = 60
SERVING = {
    "max_batch_size": 2,
    "max_sequence_length": 64,
    "max_prompt_length": 40,
    "default_max_tokens": 6,
    "threads": 1,
}
_DTYPES = {
    "TYPE_STRING": ("BYTES", np.object_),
    "TYPE_INT32": ("INT32", np.int32),
    "TYPE_UINT64": ("UINT64", np.uint64),
    "TYPE_FP32": ("FP32", np.float32),
    "TYPE_BOOL": ("BOOL", np.bool_),
}
_INPUTS = {tensor.name: _DTYPES[tensor.data_type] for tensor in LLM_INPUTS}


def place_model(repository: Path, name: str, engine: Path, checkpoint: Path, **serving: Any) -> None:
    """Write the model ``name``; ``serving`` is laid over the limits of ``serving.json``."""
    version = repository / name / "1"
    version.mkdir(parents=True)
    for file in engine.iterdir():
        (version / file.name).hardlink_to(file)
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (checkpoint / file).exists():
            (version / file).write_bytes((checkpoint / file).read_bytes())
    folder = importlib.resources.files("enginesmith.triton.models") / "llm_onnxruntime"
    for part in folder.iterdir():
        if part.name.endswith(".py") and part.name != "__init__.py":
            (version / part.name).write_bytes(part.read_bytes())
    limits = {**SERVING, **serving}
    (version / "serving.json").write_text(json.dumps(limits))
    config = model_config(
        name,
        inputs=LLM_INPUTS,
        outputs=LLM_OUTPUTS,
        max_batch_size=limits["max_batch_size"],
        dynamic_batching=None,
        decoupled=True,
    )
    (repository / name / "config.pbtxt").write_text(config_text(config))


@dataclass(frozen=True)
class Reply:
    """One response; ``error`` is empty unless it is a refusal or a failure."""

    tensors: dict[str, Any]
    final: bool
    error: str = ""
    status: str = ""

    def text(self, row: int = 0) -> str:
        """The text of one row."""
        return str(self.tensors["text_output"][row, 0].decode())

    def number(self, name: str, row: int = 0) -> int:
        """An INT32 or INT64 of one row."""
        return int(self.tensors[name][row, 0])

    @property
    def finish_reason(self) -> str:
        """Of the first row."""
        return str(self.tensors["finish_reason"][0, 0].decode())


class Stream:
    """One gRPC stream to the server; its requests are answered one after the other or at once."""

    def __init__(self, url: str) -> None:
        self._client = grpc.InferenceServerClient(url)
        self._replies: queue.Queue[tuple[Any, Any]] = queue.Queue()
        self._client.start_stream(lambda result, error: self._replies.put((result, error)))
        self._closed = False

    def send(
        self, model: str, texts: Sequence[bytes] | None, *, timeout_us: int | None = None, **inputs: Any
    ) -> None:
        """Send a request with a row per text; other inputs are the same in every row."""
        rows = len(texts) if texts is not None else 1
        columns = {name: value if isinstance(value, list) else [value] for name, value in inputs.items()}
        tensors = [] if texts is None else [_tensor("text_input", [[text] for text in texts])]
        tensors += [_tensor(name, [values] * rows) for name, values in columns.items()]
        self._client.async_stream_infer(model, tensors, enable_empty_final_response=True, timeout=timeout_us)

    def receive(self) -> Reply:
        """The next response."""
        result, error = self._replies.get(timeout=PATIENCE_S)
        if error is not None:
            assert isinstance(error, InferenceServerException)
            return Reply({}, final=True, error=str(error.message()), status=str(error.status()))
        message = result.get_response()
        tensors = {output.name: result.as_numpy(output.name) for output in message.outputs}
        return Reply(tensors, final=message.parameters["triton_final_response"].bool_param)

    def all(self) -> list[Reply]:
        """Every response up to the final one."""
        replies = [self.receive()]
        while not replies[-1].final:
            replies.append(self.receive())
        return replies

    def ask(self, model: str, texts: Sequence[bytes] | None, **inputs: Any) -> Reply:
        """The one response of a request that does not stream; that it is one is checked."""
        self.send(model, texts, **inputs)
        (only,) = self.all()
        return only

    def cancel(self) -> None:
        """End the stream as a client that leaves does."""
        if not self._closed:
            self._closed = True
            self._client.stop_stream(cancel_requests=True)
            self._client.close()

    def close(self) -> None:
        """End the stream when everything is answered."""
        if not self._closed:
            self._closed = True
            self._client.stop_stream()
            self._client.close()


def _tensor(name: str, values: Sequence[Sequence[Any]]) -> grpc.InferInput:
    triton, dtype = _INPUTS[name]
    array = np.array(values, dtype)
    tensor = grpc.InferInput(name, list(array.shape), triton)
    tensor.set_data_from_numpy(array)
    return tensor


@contextmanager
def stream_to(url: str) -> Iterator[Stream]:
    """A stream that is closed at the end."""
    stream = Stream(url)
    try:
        yield stream
    finally:
        stream.close()


@contextmanager
def serving_llm(repository: Path) -> Iterator[TritonServer]:
    """A tritonserver that serves every model in ``repository``."""
    with TritonServer(repository) as server:
        server.wait_ready()
        yield server

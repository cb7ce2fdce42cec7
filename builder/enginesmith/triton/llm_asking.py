"""Asks a served language model over gRPC streams and HTTP, and says what came back.

tritonserver takes requests to decoupled models over ``ModelStreamInfer`` only (and over HTTP at ``/generate``). Every
request here is a stream of its own: it is written, the client's side is closed, and the responses are read to their end.

An error in a stream is a text without a status, so the served model begins it with the name of one. The metadata ``triton_grpc_error``, which asks for one, is not sent:
tritonserver 2.51 ends with SIGSEGV after some refused requests that carry it.
"""

from __future__ import annotations

import asyncio
import http.client
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import grpc  # type: ignore[import-untyped]
import grpc.aio  # type: ignore[import-untyped]
import numpy as np
from tritonclient.grpc import InferResult, service_pb2, service_pb2_grpc
from tritonclient.utils import serialize_byte_tensor

from enginesmith.triton.config import LLM_INPUTS

PATIENCE_S = 300.0
"""How long a request may take altogether."""
_STATUS = re.compile(r"^(?:\[request id: [^\]]*\] )?\[([A-Z_]+)\] ")
_WIRE_TYPES: Mapping[str, tuple[str, type]] = {
    "TYPE_STRING": ("BYTES", np.object_),
    "TYPE_INT32": ("INT32", np.int32),
    "TYPE_UINT64": ("UINT64", np.uint64),
    "TYPE_FP32": ("FP32", np.float32),
    "TYPE_BOOL": ("BOOL", np.bool_),
}
_INPUT_TYPES = {tensor.name: _WIRE_TYPES[tensor.data_type] for tensor in LLM_INPUTS}


@dataclass(frozen=True)
class Response:
    """One response; of requests with several rows the texts and reasons of all, the numbers of the first."""

    texts: tuple[str, ...]
    finish_reasons: tuple[str, ...]
    input_tokens: int = 0
    output_tokens: int = 0
    log_probs: tuple[float, ...] | None = None
    cum_log_prob: float | None = None
    tokens: tuple[bytes, ...] | None = None
    reused_blocks: int | None = None


@dataclass(frozen=True)
class Answer:
    """The responses to one request, or why it was refused; both where a stream broke."""

    responses: tuple[Response, ...] = ()
    refusal: str | None = None
    status: str | None = None
    """The name that the model gave a refusal, e.g. ``INVALID_ARG``; else that of HTTP, or of a gRPC call that broke."""

    @property
    def text(self) -> str:
        """The text of all responses, joined; of several rows, one line for each."""
        return "".join("\n".join(response.texts) for response in self.responses)

    @property
    def last(self) -> Response:
        """The last response; an empty one where there is none."""
        return self.responses[-1] if self.responses else Response((), ())

    def shown(self) -> str:
        """For people."""
        if self.refusal is not None:
            status = "" if self.status is None else f" ({self.status})"
            return f"refused{status}: {self.refusal[:300]}"
        return self.text if len(self.responses) == 1 else f"{self.text} ({len(self.responses)} responses)"


class Ask(Protocol):
    """How checks ask. Inputs are values by name, the same for every row; ``exclude_input_in_output`` is true if not given."""

    def __call__(self, *prompts: bytes, **inputs: Sequence[object]) -> Answer:
        """The answer to one request with these prompts as its rows; with none, whatever ``inputs`` say."""

    def flood(self, prompt: bytes, *, count: int, max_tokens: int, wants_refusal: bool) -> list[str]:
        """Stream ``count`` long answers at once, wait for a refusal or else for some text, then cancel all.

        Returns the refusals that came by then.
        """

    def generate(
        self, document: Mapping[str, object], endpoint: Literal["generate", "generate_stream"]
    ) -> Answer:
        """The answer of an HTTP endpoint, asked with that JSON."""


class Asking:
    """``Ask`` for one model on a running server. Counts its requests."""

    def __init__(self, grpc_url: str, http_url: str, model: str) -> None:
        self._grpc_url = grpc_url
        self._channel = grpc.insecure_channel(grpc_url)
        self._stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)
        self._http_url, self._model = http_url, model
        self.requests = 0

    def close(self) -> None:
        """Close the connection."""
        self._channel.close()

    def __call__(self, *prompts: bytes, **inputs: Sequence[object]) -> Answer:
        """The answer to one request; see ``Ask``."""
        responses: list[Response] = []
        try:
            for message in self._open(self._stub, prompts, inputs):
                if message.error_message:
                    return _refused(message.error_message, tuple(responses))
                responses.append(_response(message.infer_response))
        except grpc.RpcError as error:
            return Answer(tuple(responses), refusal=str(error.details()), status=error.code().name)
        return Answer(tuple(responses))

    def flood(self, prompt: bytes, *, count: int, max_tokens: int, wants_refusal: bool) -> list[str]:
        """Load the model beyond what it can take; see ``Ask``."""
        inputs: dict[str, Sequence[object]] = {"max_tokens": [max_tokens], "stream": [True]}
        return asyncio.run(self._flood([prompt], inputs, count=count, wants_refusal=wants_refusal))

    async def _flood(
        self,
        prompts: Sequence[bytes],
        inputs: Mapping[str, Sequence[object]],
        *,
        count: int,
        wants_refusal: bool,
    ) -> list[str]:
        refusals: list[str] = []
        async with grpc.aio.insecure_channel(self._grpc_url) as channel:
            stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
            calls = [self._open(stub, prompts, inputs) for _ in range(count)]
            waiting = {asyncio.ensure_future(_refusal(call, or_text=not wants_refusal)) for call in calls}
            while waiting and not refusals:
                seen, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                refusals += [refusal for one in seen if (refusal := one.result()) is not None]
                if not wants_refusal:
                    break
            for call in calls:
                call.cancel()
            await asyncio.gather(*waiting)
        return refusals

    def generate(
        self, document: Mapping[str, object], endpoint: Literal["generate", "generate_stream"]
    ) -> Answer:
        """The answer of an HTTP endpoint; see ``Ask``."""
        self.requests += 1
        connection = http.client.HTTPConnection(self._http_url, timeout=PATIENCE_S)
        try:
            connection.request("POST", f"/v2/models/{self._model}/{endpoint}", json.dumps(document))
            response = connection.getresponse()
            body = response.read().decode(errors="backslashreplace")
        except (OSError, http.client.HTTPException) as error:
            return Answer(refusal=f"the HTTP connection broke: {error!r}")
        finally:
            connection.close()
        if response.status != 200:
            return Answer(refusal=body, status=f"HTTP {response.status}")
        events = [line.removeprefix("data: ") for line in body.splitlines() if line.startswith("data: ")]
        documents = map(json.loads, events if endpoint == "generate_stream" else [body])
        return Answer(
            tuple(
                Response((str(one.get("text_output", one)),), (str(one.get("finish_reason")),))
                for one in documents
            )
        )

    def _open(self, stub: Any, prompts: Sequence[bytes], inputs: Mapping[str, Sequence[object]]) -> Any:
        self.requests += 1
        rows = max(1, len(prompts))
        request = service_pb2.ModelInferRequest(model_name=self._model)
        if prompts:
            _add_input(request, "text_input", [[prompt] for prompt in prompts])
        for name, values in {"exclude_input_in_output": [True], **inputs}.items():
            _add_input(request, name, [list(values)] * rows)
        return stub.ModelStreamInfer(iter([request]), timeout=PATIENCE_S)


def _refused(text: str, responses: tuple[Response, ...]) -> Answer:
    named = _STATUS.search(text)
    return Answer(responses, refusal=text, status=named and named[1])


async def _refusal(call: Any, *, or_text: bool) -> str | None:
    """Why the model refused the request, if it did. ``or_text`` waits no longer than for the first response."""
    try:
        async for message in call:
            if message.error_message:
                return str(message.error_message)
            if or_text:
                return None
    except (grpc.RpcError, asyncio.CancelledError):
        return None if call.cancelled() else f"the call broke: {call.debug_error_string()}"
    return None


def _add_input(request: Any, name: str, rows: Sequence[Sequence[object]]) -> None:
    datatype, dtype = _INPUT_TYPES[name]
    array: np.ndarray[Any, Any] = np.array(rows, dtype=dtype)
    request.inputs.add(name=name, datatype=datatype, shape=list(array.shape))
    if datatype == "BYTES":
        serialized = serialize_byte_tensor(array)
        request.raw_input_contents.append(serialized.item() if serialized.size else b"")
    else:
        request.raw_input_contents.append(array.tobytes())


def _response(message: Any) -> Response:
    result = InferResult(message)
    log_probs, tokens = result.as_numpy("output_log_probs"), result.as_numpy("output_tokens")
    cum_log_probs, reused = result.as_numpy("cum_log_probs"), result.as_numpy("kv_cache_reused_blocks")
    return Response(
        texts=tuple(_texts(result.as_numpy("text_output"))),
        finish_reasons=tuple(_texts(result.as_numpy("finish_reason"))),
        input_tokens=_first(result.as_numpy("num_input_tokens")),
        output_tokens=_first(result.as_numpy("num_output_tokens")),
        log_probs=None if log_probs is None else tuple(log_probs[0].ravel().tolist()),
        cum_log_prob=None if cum_log_probs is None else float(cum_log_probs.ravel()[0]),
        tokens=None if tokens is None else tuple(map(bytes, tokens[0].ravel())),
        reused_blocks=None if reused is None else _first(reused),
    )


def _texts(values: np.ndarray[Any, Any] | None) -> Iterable[str]:
    """Bytes that are no text must not end the rehearsal but differ from what is expected."""
    return () if values is None else (value.decode(errors="backslashreplace") for value in values.ravel())


def _first(values: np.ndarray[Any, Any] | None) -> int:
    return 0 if values is None else int(values.ravel()[0])

"""Triton's entry point of ``tensorrt_llm_bls``: a request through preprocessing, the engine and postprocessing.

What it adds to the ensemble: streams of whole characters, stop words that are never shown by halves, the whole text
in each response (``accumulate_tokens``), and a generation that ends when its client goes away. Several requests run at
once, each in a thread that mostly waits. It holds no tokenizer: ``postprocessing`` decodes. Beside this file are
``bls_tensors.py`` and ``text_pieces.py``.
"""

from __future__ import annotations

import json
import threading
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils
from bls_tensors import (
    DRAFTING,
    FROM_PREPROCESSING,
    PASSED_ON,
    PLACES,
    REFUSED,
    TEXTS,
    TO_ENGINE,
    TO_PREPROCESSING,
)
from text_pieces import RefusedError, StopText, TokenWindow, read_parameters, utf8

_FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL
_ERRORS = ("INVALID_ARG", "UNAVAILABLE", "CANCELLED", "INTERNAL")
"""Names in ``pb_utils.TritonError``."""


class PartError(Exception):
    """A model that was called answered with an error."""

    def __init__(self, error: Any) -> None:
        super().__init__(error.message())
        self.code = error.code()


class TritonPythonModel:
    """One process, which serves several requests at once."""

    def initialize(self, args: dict[str, str]) -> None:
        """Read the names of the other models and start what watches for cancelled requests."""
        parameters = read_parameters(args["model_config"])
        self._models = {
            part: parameters[f"{part}_model_name"]
            for part in ("preprocessing", "tensorrt_llm", "postprocessing")
        }
        self._decoupled = pb_utils.using_decoupled_model_transaction_policy(json.loads(args["model_config"]))
        self.accumulates = parameters["accumulate_tokens"] == "true"
        self._exclude_input = parameters["exclude_input_in_output"] == "true"
        at_once = int(parameters["requests_at_once"])
        self._threads = ThreadPoolExecutor(at_once, thread_name_prefix="request")
        self._free = threading.Semaphore(at_once)
        self._running: dict[str, _Request] = {}
        self._ended = threading.Event()
        period_s = int(parameters["cancellation_check_period_ms"]) / 1000
        self._watcher = threading.Thread(target=self._watch, args=(period_s,), daemon=True)
        self._watcher.start()

    def execute(self, requests: list[Any]) -> list[None] | None:
        """Start each request. Returning at once lets Triton bring the next; it waits while all threads are busy."""
        for request in requests:
            self._free.acquire()
            self._threads.submit(self._serve, _Request(request))
        return None if self._decoupled else [None for _ in requests]

    def finalize(self) -> None:
        """Let running requests end."""
        self._ended.set()
        self._threads.shutdown(wait=True)
        self._watcher.join()

    def _serve(self, request: _Request) -> None:
        """A boundary: whatever goes wrong with one request is its answer, and never the end of the others."""
        self._running[request.id] = request
        try:
            self._answer(request)
        except RefusedError as error:
            request.fail(str(error), pb_utils.TritonError.INVALID_ARG)
        except PartError as error:
            request.fail(str(error), error.code)
        except Exception as error:  # noqa: BLE001
            pb_utils.Logger.log_error(f"request {request.id}: {error!r}")
            request.fail(f"internal error: {type(error).__name__}: {error}", pb_utils.TritonError.INTERNAL)
        finally:
            del self._running[request.id]
            self._free.release()

    def _answer(self, request: _Request) -> None:
        if request.cancelled():
            raise PartError(pb_utils.TritonError("cancelled", pb_utils.TritonError.CANCELLED))
        given = [name for name in REFUSED if name in request.inputs]
        given += [name for name in DRAFTING if name in request.inputs and request.inputs[name].any()]
        if given:
            raise RefusedError(f"{', '.join(given)}: not served by this deployment")
        prepared = self._call(
            "preprocessing", request.renamed(TO_PREPROCESSING), FROM_PREPROCESSING, request.id
        )
        tensors = {FROM_PREPROCESSING[name]: array for name, array in prepared.items()}
        texts = _Texts(self, request, tensors, exclude_input=self._exclude_input)
        engine_inputs = tensors | request.renamed(TO_ENGINE)
        for outputs in self._generate(engine_inputs, request.id):
            response = texts.respond(outputs)
            if response is not None:
                request.send(response, stream=self._decoupled)
            if texts.stopped and not texts.told:
                texts.told = True
                self._stop(request.id)
        for response in texts.leftovers():
            request.send(response, stream=self._decoupled)
        request.end()

    def _generate(self, inputs: dict[str, Any], request_id: str) -> Iterator[dict[str, Any]]:
        call = self._request("tensorrt_llm", inputs, (*TEXTS, *PASSED_ON), request_id)
        responses = call.exec(decoupled=True) if self._decoupled else [call.exec()]
        for response in responses:
            if response.has_error():
                raise PartError(response.error())
            if tensors := response.output_tensors():
                yield {tensor.name(): tensor.as_numpy() for tensor in tensors}

    def _call(self, part: str, inputs: dict[str, Any], outputs: Any, request_id: str) -> dict[str, Any]:
        response = self._request(part, inputs, outputs, request_id).exec()
        if response.has_error():
            raise PartError(response.error())
        return {tensor.name(): tensor.as_numpy() for tensor in response.output_tensors()}

    def _request(self, part: str, inputs: dict[str, Any], outputs: Any, request_id: str) -> Any:
        return pb_utils.InferenceRequest(
            model_name=self._models[part],
            inputs=[pb_utils.Tensor(name, array) for name, array in inputs.items()],
            requested_output_names=list(outputs),
            request_id=request_id,
        )

    def decode(self, beams: list[list[int]], request_id: str) -> list[str]:
        """The text of each token list, decoded by ``postprocessing`` in one call."""
        width = max(map(len, beams), default=0)
        tokens = np.full((1, len(beams), width), -1, np.int32)
        for place, beam in zip(tokens[0], beams, strict=True):
            place[: len(beam)] = beam
        lengths = np.array([[len(beam) for beam in beams]], np.int32)
        inputs = {"TOKENS_BATCH": tokens, "SEQUENCE_LENGTH": lengths}
        answer = self._call("postprocessing", inputs, ("OUTPUT",), request_id)
        return [utf8(text, "OUTPUT") for text in answer["OUTPUT"].ravel()]

    def _stop(self, request_id: str) -> None:
        """Tell the engine to end the request of that id: an empty request with ``stop``, as its backend wants it.

        Where that fails it is logged: the request itself, and those who watch over others, go on.
        """
        inputs = {
            "input_ids": np.zeros((1, 1), np.int32),
            "input_lengths": np.zeros((1, 1), np.int32),
            "request_output_len": np.zeros((1, 1), np.int32),
            "stop": np.ones((1, 1), np.bool_),
        }
        call = self._request("tensorrt_llm", inputs, TEXTS, request_id)
        try:
            answers = list(call.exec(decoupled=True)) if self._decoupled else [call.exec()]
            errors = [answer.error().message() for answer in answers if answer.has_error()]
        except pb_utils.TritonModelException as error:
            errors = [str(error)]
        for message in errors:
            pb_utils.Logger.log_error(f"request {request_id}: stop: {message}")

    def _watch(self, period_s: float) -> None:
        """Stop generations whose client went away. Triton does not tell the models that a model calls."""
        told: set[str] = set()
        while not self._ended.wait(period_s):
            running = dict(self._running)
            told &= running.keys()
            for request_id, request in running.items():
                if request_id not in told and request.cancelled():
                    told.add(request_id)
                    self._stop(request_id)


class _Request:
    """A request of a client, and the way back to it."""

    def __init__(self, request: Any) -> None:
        self.inputs = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
        self._sender = request.get_response_sender()
        # tritonserver 2.51 crashes when it is asked about a request whose last response was sent.
        self._open = threading.Lock()
        self._ended = False
        # Two clients may use the same id, and `stop` must end one generation only.
        self.id = f"{request.request_id()}~{uuid.uuid4().hex}"
        self._waiting: Any = None

    def renamed(self, names: dict[str, str]) -> dict[str, Any]:
        """The inputs that ``names`` maps, under their other name and with a dimension for the row."""
        return {
            other: self.inputs[name].reshape(-1, 1) if self.inputs[name].ndim == 1 else self.inputs[name]
            for name, other in names.items()
            if name in self.inputs
        }

    def flag(self, name: str, row: int, *, default: bool) -> bool:
        """A boolean input of one row."""
        given = self.inputs.get(name)
        return default if given is None else bool(given.ravel()[row])

    def send(self, tensors: dict[str, Any], *, stream: bool) -> None:
        """Send a response; outside a stream it waits for ``end``, because there may be only one."""
        response = pb_utils.InferenceResponse(
            [pb_utils.Tensor(name, array) for name, array in tensors.items()]
        )
        if stream:
            self._sender.send(response)
        else:
            self._waiting = response

    def cancelled(self) -> bool:
        """Whether its client went away."""
        with self._open:
            return not self._ended and bool(self._sender.is_cancelled())

    def fail(self, message: str, code: int) -> None:
        """Send an error as the last response.

        Its text begins with the code's name, because tritonserver sends no code with an error in a stream.
        """
        names = [name for name in _ERRORS if getattr(pb_utils.TritonError, name) == code]
        text = f"[{names[0]}] {message}" if names else message
        self._end(pb_utils.InferenceResponse(error=pb_utils.TritonError(text, code)))

    def end(self) -> None:
        """Nothing more comes."""
        self._end(self._waiting)

    def _end(self, response: Any) -> None:
        with self._open:
            if self._ended:
                return
            self._ended = True
            if response is None:
                self._sender.send(flags=_FINAL)
            else:
                self._sender.send(response, flags=_FINAL)


class _Beam:
    """The text of one answer, as far as it came."""

    def __init__(self, stops: list[str]) -> None:
        self.window = TokenWindow()
        self.stop = StopText(stops)
        self.text = ""


class _Texts:
    """Turns the engine's responses to one request into responses with text."""

    def __init__(
        self, model: TritonPythonModel, request: _Request, tensors: dict[str, Any], *, exclude_input: bool
    ) -> None:
        self._model = model
        self._request = request
        self._prompts = [
            ids[:length].tolist()
            for ids, length in zip(tensors["input_ids"], tensors["input_lengths"].ravel(), strict=True)
        ]
        self._exclude_input = exclude_input
        words = request.inputs.get("stop_words")
        self._stops = [
            [utf8(word, "stop_words") for word in ([] if words is None else words[row])]
            for row in range(len(self._prompts))
        ]
        self._beams: dict[tuple[int, int, int], _Beam] = {}
        self.told = False

    @property
    def stopped(self) -> bool:
        """Whether every row and beam of a stream has come to a stop word."""
        rows = {row for row, _, _ in self._beams}
        return len(rows) == len(self._prompts) and all(beam.stop.found for beam in self._beams.values())

    def respond(self, outputs: dict[str, Any]) -> dict[str, Any] | None:
        """The response for one of the engine's, or None where it brings nothing that can be shown yet."""
        row = int(outputs["batch_index"].ravel()[0]) if "batch_index" in outputs else 0
        sequence = int(outputs["sequence_index"].ravel()[0]) if "sequence_index" in outputs else 0
        answers = [
            [token for token in beam[:length].tolist() if token >= 0]
            for beam, length in zip(outputs["output_ids"][0], outputs["sequence_length"][0], strict=True)
        ]
        passed_on = {name: outputs[name] for name in PASSED_ON if name in outputs}
        if self._request.flag("stream", row, default=False):
            texts = [self._piece((row, sequence, place), tokens) for place, tokens in enumerate(answers)]
            if not any(texts) and not passed_on.keys() - PLACES:
                return None
            if self._model.accumulates:
                texts = [self._beams[row, sequence, place].text for place in range(len(answers))]
        else:
            texts = self._whole(row, answers)
        return {"text_output": _bytes(texts)} | passed_on

    def leftovers(self) -> Iterator[dict[str, Any]]:
        """What streams held back until their end: an unfinished character, the beginning of a stop word."""
        for (row, sequence, place), beam in self._beams.items():
            piece = self._advance(beam, last=True)
            if piece:
                texts = [""] * (1 + max(b for r, s, b in self._beams if (r, s) == (row, sequence)))
                texts[place] = beam.text if self._model.accumulates else piece
                index = {"batch_index": np.array([[row]], np.int32)} if len(self._prompts) > 1 else {}
                yield {"text_output": _bytes(texts)} | index

    def _piece(self, place: tuple[int, int, int], tokens: list[int]) -> str:
        beam = self._beams.setdefault(place, _Beam(self._stops[place[0]]))
        beam.window.add(tokens)
        return self._advance(beam)

    def _advance(self, beam: _Beam, *, last: bool = False) -> str:
        new = ""
        if beam.window.pending and not beam.stop.found:
            before, after = self._model.decode(list(beam.window.questions()), self._request.id)
            new = beam.window.take(before, after, last=last)
        piece: str = beam.stop.add(new, last=last)
        beam.text += piece
        return piece

    def _whole(self, row: int, answers: list[list[int]]) -> list[str]:
        """Complete answers; stop words are looked for after the prompt, where the answer begins with it."""
        prompt = self._prompts[row]
        excluded = self._request.flag("exclude_input_in_output", row, default=self._exclude_input)
        shown, *texts = self._model.decode([[] if excluded else prompt, *answers], self._request.id)
        cut = []
        for text in texts:
            start = len(shown) if text.startswith(shown) else 0
            cut.append(text[:start] + StopText(self._stops[row]).add(text[start:], last=True))
        return cut


def _bytes(texts: list[str]) -> Any:
    array: Any = np.empty((1, len(texts)), np.object_)
    array[0] = [text.encode() for text in texts]
    return array

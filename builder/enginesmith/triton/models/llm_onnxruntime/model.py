"""Triton's entry point: batches of text requests through the generation runtime beside this file.

Requests that Triton's dynamic batcher hands over together run together, each at its own length and with its
own sampling. A request that cannot run (prompt too long, text that is not UTF-8, a parameter out of range) is
answered with its own error; the others are not affected.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils
from llm_runtime import Generation, NonFiniteLogitsError, Runtime, Sampling
from llm_text import Text

_SAMPLING_INPUTS = {
    "max_tokens": int,
    "temperature": float,
    "top_k": int,
    "top_p": float,
    "repetition_penalty": float,
    "seed": int,
}


class TritonPythonModel:
    """One instance of the served model."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the engine; an exception here becomes the reason that Triton gives for a failed load."""
        directory = Path(args["model_repository"]) / args["model_version"]
        self._serving: dict[str, Any] = json.loads((directory / "serving.json").read_text())
        self._text = Text(directory)
        self._runtime = Runtime(
            directory,
            slots=self._serving["max_batch_size"],
            capacity=self._serving["max_sequence_length"],
            threads=self._serving["threads"],
        )

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answer ``requests``, in order. Each holds one or more prompts (rows of ``text_input``)."""
        jobs: list[list[Generation] | Exception] = [self._prepare(request) for request in requests]
        waiting = [generation for job in jobs if isinstance(job, list) for generation in job]
        try:
            self._runtime.run(waiting)
        except NonFiniteLogitsError as error:
            jobs = [error if isinstance(job, list) else job for job in jobs]
        finally:
            self._runtime.clear()  # Whatever ended the run, the next one must not continue these sequences.
        return [self._respond(job) for job in jobs]

    def finalize(self) -> None:
        """Release the engine."""
        del self._runtime

    def _prepare(self, request: Any) -> list[Generation] | Exception:
        try:
            rows = _rows(request)
            return [self._generation(row) for row in rows]
        except ValueError as error:
            return error

    def _generation(self, row: dict[str, Any]) -> Generation:
        text = _utf8(row["text_input"][0], "text_input")
        chat = bool(row.get("apply_chat_template", [False])[0])
        prompt = self._text.encode(self._text.as_chat(text) if chat else text, chat=chat)
        limit = self._serving["max_prompt_length"]
        if not prompt:
            raise ValueError("text_input is empty: the prompt has no tokens")
        if len(prompt) > limit:
            raise ValueError(f"the prompt has {len(prompt)} tokens; this model accepts at most {limit}")
        given = {name: kind(row[name][0]) for name, kind in _SAMPLING_INPUTS.items() if name in row}
        sampling = Sampling(**{"max_tokens": self._serving["default_max_tokens"], **given})
        stops = [_utf8(stop, "stop_words") for stop in row.get("stop_words", ()) if stop]
        return Generation(prompt, sampling, on_token=StopStrings(self._text, stops) if stops else None)

    def _respond(self, job: list[Generation] | Exception) -> Any:
        if isinstance(job, NonFiniteLogitsError):
            return pb_utils.InferenceResponse(
                error=pb_utils.TritonError(str(job), pb_utils.TritonError.INTERNAL)
            )
        if isinstance(job, Exception):
            return pb_utils.InferenceResponse(
                error=pb_utils.TritonError(str(job), pb_utils.TritonError.INVALID_ARG)
            )
        columns = {
            "text_output": np.array([[self._answer(one).encode()] for one in job], np.object_),
            "finish_reason": np.array([[str(one.finish_reason).encode()] for one in job], np.object_),
            "num_input_tokens": np.array([[len(one.prompt)] for one in job], np.int32),
            "num_output_tokens": np.array([[len(one.tokens)] for one in job], np.int32),
        }
        return pb_utils.InferenceResponse([pb_utils.Tensor(name, column) for name, column in columns.items()])

    def _answer(self, generation: Generation) -> str:
        text = self._text.decode(generation.tokens)
        stop = generation.on_token
        return stop.cut(text) if isinstance(stop, StopStrings) else text


class StopStrings:
    """Ends a generation as soon as its text holds one of ``stops``."""

    def __init__(self, text: Text, stops: list[str]) -> None:
        self._text = text
        self._stops = stops

    def __call__(self, generation: Generation) -> bool:
        """Whether the text so far holds a stop string."""
        text = self._text.decode(generation.tokens)
        return any(stop in text for stop in self._stops)

    def cut(self, text: str) -> str:
        """The text before the first stop string."""
        return text[: min([text.find(stop) for stop in self._stops if stop in text], default=len(text))]


def _rows(request: Any) -> list[dict[str, Any]]:
    """The request's prompts; each maps input names to that row's values."""
    inputs = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
    return [{name: array[row] for name, array in inputs.items()} for row in range(len(inputs["text_input"]))]


def _utf8(value: bytes | str, name: str) -> str:
    if isinstance(value, str):
        return value
    try:
        return bytes(value).decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not valid UTF-8: {error.reason} at byte {error.start}") from error

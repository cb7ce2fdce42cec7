"""Triton's entry point of ``preprocessing``: text, words and biases of requests become tokens for the engine.

All prompts of all requests that Triton hands over at once are tokenized in one call. A request that cannot be served
(not UTF-8, longer than the engine, malformed) gets an error of its own, and the others are not affected. Beside this
file are ``text_pieces.py``, ``limits.json`` and ``tokenizer.json``.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils
from text_pieces import RefusedError, load_tokenizer, padded, read_parameters, utf8, word_lists

_VISION = ("IMAGE_BYTES", "IMAGE_URL", "IMAGE_SIZES", "VIDEO_BYTES")


@dataclass
class _Job:
    """One request on its way."""

    inputs: dict[str, Any]
    prompts: list[str]
    decoder_prompts: list[str]
    tensors: dict[str, Any]


class TritonPythonModel:
    """One instance of the model."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the tokenizer; an exception here becomes the reason that Triton gives for a failed load."""
        version = Path(args["model_repository"]) / args["model_version"]
        parameters = read_parameters(args["model_config"])
        self._limits: dict[str, Any] = json.loads((version / "limits.json").read_text(encoding="utf-8"))
        self._tokenizer = load_tokenizer(version, parameters["tokenizer_dir"])
        self._add_special_tokens = parameters["add_special_tokens"] == "true"
        self._tokens_of_word = lru_cache(maxsize=4096)(self._encode_word)

    def execute(self, requests: list[Any]) -> list[Any]:
        """One response for each request, in order."""
        jobs = [self._attempt(self._read, request) for request in requests]
        texts = [text for job in jobs if isinstance(job, _Job) for text in job.prompts + job.decoder_prompts]
        tokens = iter(self._tokenizer.encode_batch(texts, add_special_tokens=self._add_special_tokens))
        for place, job in enumerate(jobs):
            if isinstance(job, _Job):
                prompts = [next(tokens).ids for _ in job.prompts]
                decoder_prompts = [next(tokens).ids for _ in job.decoder_prompts]
                jobs[place] = self._attempt(self._finish, job, prompts, decoder_prompts)
        return [self._respond(job) for job in jobs]

    def _attempt(self, step: Any, *arguments: Any) -> Any:
        try:
            return step(*arguments)
        except RefusedError as error:
            return error

    def _read(self, request: Any) -> _Job:
        inputs = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
        if given := [name for name in _VISION if name in inputs]:
            raise RefusedError(f"{', '.join(given)}: this model takes text only")
        lengths = inputs["REQUEST_OUTPUT_LEN"].ravel()
        if len(lengths) and int(lengths.min()) < 1:
            raise RefusedError(f"max_tokens is {int(lengths.min())}; allowed: at least 1")
        rows = len(inputs["QUERY"])
        stops = [*map(tuple, self._words(inputs, "STOP_WORDS_DICT", "stop_words", rows))]
        further = tuple((token,) for token in self._limits["further_end_ids"])
        return _Job(
            inputs=inputs,
            prompts=[utf8(row[0], "text_input") for row in inputs["QUERY"]],
            decoder_prompts=[utf8(row[0], "decoder_text_input") for row in inputs.get("DECODER_QUERY", ())],
            tensors={
                "REQUEST_OUTPUT_LEN": inputs["REQUEST_OUTPUT_LEN"],
                "BAD_WORDS_IDS": word_lists(self._words(inputs, "BAD_WORDS_DICT", "bad_words", rows)),
                # The engine knows one end token; what else ends an answer of this model stops it as a word.
                "STOP_WORDS_IDS": word_lists([words + further for words in stops]),
                "EMBEDDING_BIAS": self._bias(inputs, rows),
                "OUT_END_ID": self._given(inputs, "END_ID", rows, default=self._limits["end_id"]),
                "OUT_PAD_ID": self._given(inputs, "PAD_ID", rows, default=self._limits["pad_id"]),
            },
        )

    def _finish(
        self, job: _Job, prompts: Sequence[list[int]], decoder_prompts: Sequence[list[int]]
    ) -> dict[str, Any]:
        longest, limit = max(map(len, prompts)), self._limits["max_input_len"]
        if longest > limit:
            raise RefusedError(f"the prompt has {longest} tokens; this model accepts at most {limit}")
        if not all(prompts):
            raise RefusedError("text_input is empty: the prompt has no tokens")
        padding = int(job.tensors["OUT_PAD_ID"].ravel()[0])
        decoder = decoder_prompts or [[int(pad)] for pad in job.tensors["OUT_PAD_ID"].ravel()]
        ids = padded(prompts, padding)
        tensors = job.tensors | {
            "INPUT_ID": ids,
            "REQUEST_INPUT_LEN": np.array([[len(prompt)] for prompt in prompts], np.int32),
            "DECODER_INPUT_ID": padded(decoder, padding),
            "REQUEST_DECODER_INPUT_LEN": np.array([[len(prompt)] for prompt in decoder], np.int32),
        }
        if "PROMPT_TABLE_EXTRA_ID" in job.inputs:
            virtual = ids >= self._limits["vocab_size"]
            extra = np.where(virtual, job.inputs["PROMPT_TABLE_EXTRA_ID"], 0)
            tensors["OUT_PROMPT_TABLE_EXTRA_IDS"] = extra.astype(np.uint64)
        return tensors

    def _respond(self, job: Any) -> Any:
        if isinstance(job, RefusedError):
            error = pb_utils.TritonError(str(job), pb_utils.TritonError.INVALID_ARG)
            return pb_utils.InferenceResponse(error=error)
        return pb_utils.InferenceResponse([pb_utils.Tensor(name, array) for name, array in job.items()])

    def _words(
        self, inputs: dict[str, Any], name: str, shown: str, rows: int
    ) -> list[tuple[tuple[int, ...], ...]]:
        given = inputs.get(name, [()] * rows)
        return [tuple(self._tokens_of_word(utf8(word, shown)) for word in row) for row in given]

    def _encode_word(self, word: str) -> tuple[int, ...]:
        return tuple(self._tokenizer.encode(word, add_special_tokens=False).ids)

    def _given(self, inputs: dict[str, Any], name: str, rows: int, *, default: int) -> Any:
        given = inputs.get(name)
        return np.full((rows, 1), default, np.int32) if given is None else given

    def _bias(self, inputs: dict[str, Any], rows: int) -> Any:
        """float32 [rows, vocabulary]; no columns where there is no bias, which the engine reads as none."""
        words, weights = inputs.get("EMBEDDING_BIAS_WORDS"), inputs.get("EMBEDDING_BIAS_WEIGHTS")
        if words is None and weights is None:
            return np.zeros((rows, 0), np.float32)
        if words is None or weights is None or words.shape != weights.shape:
            raise RefusedError(
                "embedding_bias_words and embedding_bias_weights must come together, one weight a word"
            )
        bias = np.zeros((rows, self._limits["vocab_size"]), np.float32)
        for place, row_words, row_weights in zip(bias, words, weights, strict=True):
            for word, weight in zip(row_words, row_weights, strict=True):
                np.add.at(place, list(self._tokens_of_word(utf8(word, "embedding_bias_words"))), weight)
        return bias

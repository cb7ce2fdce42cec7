"""Triton's entry point of the tokenization stage: TEXT, and TEXT_PAIR of models that read pairs, become a graph's inputs.

All texts of all requests that Triton hands over at once are tokenized in one call. A request that cannot be served
(not UTF-8, too long where nothing is cut, no tokens) gets an error of its own; the others are not affected.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton_python_backend_utils as pb_utils
from graph_text import GraphText, TextRefusedError, utf8


@dataclass(frozen=True)
class _Texts:
    """The rows of one request."""

    texts: list[str]
    pairs: list[str]


class TritonPythonModel:
    """One instance of the tokenization model."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the tokenizer; an exception here becomes the reason that Triton gives for a failed load."""
        self._text = GraphText(Path(args["model_repository"]) / args["model_version"])

    def execute(self, requests: list[Any]) -> list[Any]:
        """One response for each request, in order."""
        jobs = [self._read(request) for request in requests]
        good = [job for job in jobs if isinstance(job, _Texts)]
        encoded = iter(self._encoded(good))
        answers = [next(encoded) if isinstance(job, _Texts) else job for job in jobs]
        return [
            _refused(answer) if isinstance(answer, TextRefusedError) else self._respond(answer)
            for answer in answers
        ]

    def _read(self, request: Any) -> _Texts | TextRefusedError:
        arrays = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
        try:
            texts = [utf8(row[0], "TEXT") for row in arrays["TEXT"]]
            pairs = [utf8(row[0], "TEXT_PAIR") for row in arrays["TEXT_PAIR"]] if self._text.pairs else []
        except TextRefusedError as error:
            return error
        return _Texts(texts, pairs)

    def _encoded(self, jobs: list[_Texts]) -> list[list[Any] | TextRefusedError]:
        """The tokens of each request's rows, or why there are none."""
        texts = [text for job in jobs for text in job.texts]
        pairs = [text for job in jobs for text in job.pairs] if self._text.pairs else None
        try:
            encodings = iter(self._text.encode(texts, pairs))
        except TextRefusedError as error:
            # The one that is wrong answers for itself; this is the rare way.
            return [error] if len(jobs) == 1 else [one for job in jobs for one in self._encoded([job])]
        return [[next(encodings) for _ in job.texts] for job in jobs]

    def _respond(self, encodings: list[Any]) -> Any:
        try:
            inputs = self._text.inputs(encodings)
        except TextRefusedError as error:
            return _refused(error)
        return pb_utils.InferenceResponse([pb_utils.Tensor(name, array) for name, array in inputs.items()])


def _refused(error: TextRefusedError) -> Any:
    return pb_utils.InferenceResponse(
        error=pb_utils.TritonError(str(error), pb_utils.TritonError.INVALID_ARG)
    )

"""Triton's entry point of ``postprocessing``: the engine's tokens become text.

It sees one response of the engine at a time and keeps nothing. In a stream through the ensemble it therefore decodes
every piece by itself, and a character whose bytes arrive in two responses is cut: ``tensorrt_llm_bls`` is for
streams. Beside this file are ``text_pieces.py`` and ``tokenizer.json``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils
from text_pieces import load_tokenizer, read_parameters


class TritonPythonModel:
    """One instance of the model."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the tokenizer; an exception here becomes the reason that Triton gives for a failed load."""
        parameters = read_parameters(args["model_config"])
        version = Path(args["model_repository"]) / args["model_version"]
        self._tokenizer = load_tokenizer(version, parameters["tokenizer_dir"])
        self._skip_special_tokens = parameters["skip_special_tokens"] != "false"

    def execute(self, requests: list[Any]) -> list[Any]:
        """One response for each request, in order; all beams of all requests are decoded in one call."""
        shapes, beams, refused = [], [], {}
        for place, request in enumerate(requests):
            tokens = pb_utils.get_input_tensor_by_name(request, "TOKENS_BATCH").as_numpy()
            lengths = pb_utils.get_input_tensor_by_name(request, "SEQUENCE_LENGTH").as_numpy()
            if tokens.shape[:2] != lengths.shape:
                refused[place] = f"TOKENS_BATCH {tokens.shape} and SEQUENCE_LENGTH {lengths.shape} do not fit"
                tokens, lengths = np.empty((0, 0, 0), np.int32), np.empty((0, 0), np.int32)
            shapes.append(lengths.shape)
            beams += [
                [int(token) for token in beam[: max(0, int(length))] if token >= 0]
                for row, row_lengths in zip(tokens, lengths, strict=True)
                for beam, length in zip(row, row_lengths, strict=True)
            ]
        texts = iter(self._tokenizer.decode_batch(beams, skip_special_tokens=self._skip_special_tokens))
        return [
            self._refuse(refused[place])
            if place in refused
            else self._respond([next(texts).encode() for _ in range(int(np.prod(shape)))], shape)
            for place, shape in enumerate(shapes)
        ]

    def _respond(self, texts: list[bytes], shape: tuple[int, ...]) -> Any:
        array: Any = np.empty(len(texts), np.object_)
        array[:] = texts
        return pb_utils.InferenceResponse([pb_utils.Tensor("OUTPUT", array.reshape(shape))])

    def _refuse(self, message: str) -> Any:
        return pb_utils.InferenceResponse(
            error=pb_utils.TritonError(message, pb_utils.TritonError.INVALID_ARG)
        )

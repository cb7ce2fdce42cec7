"""Triton's entry point of a graph over ONNX Runtime: the requests of a batch run together, as one.

A request that cannot run (another dtype or shape than the model's, a token that the vocabulary does not have) gets an
error of its own; the others of its batch are answered.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import triton_python_backend_utils as pb_utils
from graph_runtime import GraphInputError, GraphRuntime


class TritonPythonModel:
    """One instance of the served model."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the engine; an exception here becomes the reason that Triton gives for a failed load."""
        parameters = json.loads(args["model_config"]).get("parameters", {})
        threads = int(parameters.get("threads", {}).get("string_value", "0"))
        directory = Path(args["model_repository"]) / args["model_version"]
        self._runtime = GraphRuntime(directory, threads)

    def execute(self, requests: list[Any]) -> list[Any]:
        """One response for each request, in order."""
        inputs = [{tensor.name(): tensor.as_numpy() for tensor in request.inputs()} for request in requests]
        return [_response(answer) for answer in self._answers(inputs)]

    def finalize(self) -> None:
        """Release the engine."""
        del self._runtime

    def _answers(self, inputs: list[dict[str, Any]]) -> list[dict[str, Any] | Exception]:
        try:
            return list(self._runtime.run_requests(inputs))
        except Exception as error:  # noqa: BLE001 - ONNX Runtime's errors have no common base; Triton must get an answer.
            if len(inputs) == 1:
                return [error]
        # The one that is wrong answers for itself; this is the rare way.
        return [answer for one in inputs for answer in self._answers([one])]


def _response(answer: dict[str, Any] | Exception) -> Any:
    if isinstance(answer, Exception):
        is_clients = isinstance(answer, GraphInputError) or type(answer).__name__ == "InvalidArgument"
        kind = pb_utils.TritonError.INVALID_ARG if is_clients else pb_utils.TritonError.INTERNAL
        return pb_utils.InferenceResponse(error=pb_utils.TritonError(str(answer), kind))
    return pb_utils.InferenceResponse([pb_utils.Tensor(name, array) for name, array in answer.items()])

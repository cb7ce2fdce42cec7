"""Triton's entry point of a graph over TensorRT: the requests of a batch run together, as one. Not yet run on a GPU.

A request that cannot run (another dtype or shape than the model's) gets an error of its own; the others of its batch are
answered.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import triton_python_backend_utils as pb_utils
from graph_runtime import GraphInputError
from graph_tensorrt import TensorRtGraph


class TritonPythonModel:
    """One instance of the served model, on one GPU."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the engine; an exception here becomes the reason that Triton gives for a failed load."""
        if args["model_instance_kind"] != "GPU":
            raise RuntimeError(
                f"this model needs a GPU; its instance is of kind {args['model_instance_kind']}"
            )
        parameters = json.loads(args["model_config"]).get("parameters", {})
        library = parameters["runtime"]["string_value"]
        directory = Path(args["model_repository"]) / args["model_version"]
        self._graph = TensorRtGraph(directory, library=library, device=int(args["model_instance_device_id"]))

    def execute(self, requests: list[Any]) -> list[Any]:
        """One response for each request, in order."""
        inputs = [{tensor.name(): tensor.as_numpy() for tensor in request.inputs()} for request in requests]
        return [_response(answer) for answer in self._answers(inputs)]

    def finalize(self) -> None:
        """Release the engine."""
        self._graph.close()

    def _answers(self, inputs: list[dict[str, Any]]) -> list[dict[str, Any] | Exception]:
        try:
            return list(self._graph.run_requests(inputs))
        except Exception as error:  # noqa: BLE001 - the boundary of the process: Triton must get an answer.
            if len(inputs) == 1:
                return [error]
        # The one that is wrong answers for itself; this is the rare way.
        return [answer for one in inputs for answer in self._answers([one])]


def _response(answer: dict[str, Any] | Exception) -> Any:
    if isinstance(answer, Exception):
        is_clients = isinstance(answer, GraphInputError)
        kind = pb_utils.TritonError.INVALID_ARG if is_clients else pb_utils.TritonError.INTERNAL
        return pb_utils.InferenceResponse(error=pb_utils.TritonError(str(answer), kind))
    return pb_utils.InferenceResponse([pb_utils.Tensor(name, array) for name, array in answer.items()])

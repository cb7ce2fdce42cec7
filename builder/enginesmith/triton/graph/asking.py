"""Asks the models of a graph deployment over gRPC, and says what came back."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import tritonclient.grpc as grpc
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

Array = npt.NDArray[Any]
_REQUEST_TIMEOUT_S = 300.0
_SETTLED_S = 0.1


@dataclass(frozen=True)
class Answer:
    """The outputs of one request, or why it was refused."""

    outputs: Mapping[str, Array] = field(default_factory=dict)
    refusal: str | None = None
    status: str | None = None
    """The gRPC status of a refusal."""

    def shown(self) -> str:
        """For people."""
        if self.refusal is not None:
            return f"refused ({self.status}): {self.refusal[:300]}"
        return ", ".join(f"{name} {array.dtype}{list(array.shape)}" for name, array in self.outputs.items())


class Asking:
    """Asks the models of one server and counts. Safe to use from several threads."""

    def __init__(self, client: grpc.InferenceServerClient) -> None:
        self._client = client
        self.requests = 0

    def __call__(self, model: str, inputs: Mapping[str, Array], *, classes: int = 0) -> Answer:
        """The answer to one request. With ``classes``, the outputs are so many of the highest values with their labels."""
        self.requests += 1
        tensors = []
        for name, array in inputs.items():
            tensor = grpc.InferInput(name, list(array.shape), np_to_triton_dtype(array.dtype))
            tensors.append(tensor.set_data_from_numpy(array))
        try:
            outputs = [
                grpc.InferRequestedOutput(one["name"], class_count=classes)
                for one in self.metadata(model)["outputs"]
            ]
            result = self._client.infer(model, tensors, outputs=outputs, client_timeout=_REQUEST_TIMEOUT_S)
        except InferenceServerException as error:
            return Answer(refusal=str(error.message()), status=str(error.status()))
        names = [output.name for output in result.get_response().outputs]
        return Answer({name: result.as_numpy(name) for name in names})

    def metadata(self, model: str) -> dict[str, Any]:
        """Triton's metadata: ``inputs`` and ``outputs`` with ``name``, ``datatype`` and ``shape``."""
        metadata: dict[str, Any] = self._client.get_model_metadata(model, as_json=True)
        return metadata

    def statistics(self, model: str) -> Statistics:
        """What the server counted for ``model`` since it was loaded.

        Triton counts a request when its answer is on its way already: returns when the counts stand still, which takes
        as long as others ask.
        """
        seen = self._counted(model)
        while True:
            time.sleep(_SETTLED_S)
            before, seen = seen, self._counted(model)
            if seen == before:
                return seen

    def _counted(self, model: str) -> Statistics:
        counted = self._client.get_inference_statistics(model, as_json=True)["model_stats"][0]
        batches = [int(one["batch_size"]) for one in counted.get("batch_stats", ())]
        return Statistics(
            rows=int(counted.get("inference_count", 0)),
            executions=int(counted.get("execution_count", 0)),
            cache_hits=int(counted["inference_stats"].get("cache_hit", {}).get("count", 0)),
            largest_batch=max(batches, default=0),
        )


@dataclass(frozen=True)
class Statistics:
    """What a server counted for one model."""

    rows: int
    """Rows that the model computed."""
    executions: int
    """Batches that the model computed."""
    cache_hits: int
    """Requests that the response cache answered."""
    largest_batch: int


def text_rows(*texts: bytes) -> Array:
    """A BYTES tensor [texts, 1]."""
    rows: Array = np.array([[text] for text in texts], np.object_)
    return rows

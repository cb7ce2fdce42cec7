"""What decides the Triton models of one variant of a graph on one target: names, limits and who executes.

Pure data from a step's parameters and the graph's signature; knows no files but those it is read from.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import TypeAdapter

from enginesmith.graph_spec import SEQUENCE_AXIS, GraphServing
from enginesmith.graph_targets import GraphOnnxRuntimeTarget, GraphTarget, TensorRtRtxTarget, TensorRtTarget
from enginesmith.graphs.signature import Signature

_MASK = "attention_mask"
_SHORTEST_BUCKET = 16
_TARGET: TypeAdapter[GraphTarget] = TypeAdapter(GraphTarget)


@dataclass(frozen=True)
class Deployment:
    """One variant on one target."""

    name: str
    variant: str
    scheme: str
    text: bool
    """Also served as a model that takes text."""
    signature: Signature
    serving: GraphServing
    target: GraphTarget

    @property
    def tokenizer_name(self) -> str:
        """The model that turns text into the graph's inputs."""
        return f"{self.name}-tokenizer"

    @property
    def text_name(self) -> str:
        """The ensemble of both: text in, the graph's outputs out."""
        return f"{self.name}-text"

    @property
    def models(self) -> tuple[str, ...]:
        """What is served; those that others refer to come first."""
        return (self.name, self.tokenizer_name, self.text_name) if self.text else (self.name,)

    @property
    def is_native(self) -> bool:
        """Whether one of Triton's own backends executes the graph, instead of our Python model."""
        return self.target.backend != "python"

    @property
    def needs_gpu(self) -> bool:
        """Whether it can be executed on a GPU only."""
        return not isinstance(self.target, GraphOnnxRuntimeTarget) or self.target.provider != "cpu"

    @property
    def joins_lengths(self) -> bool:
        """Whether requests of different length run together: our Python model pads them, a native backend does not."""
        return not self.is_native and any(tensor.name == _MASK for tensor in self.signature.inputs)

    @property
    def longest(self) -> int:
        """Longest sequence in tokens (models that read text)."""
        known = self.signature.axes.get(SEQUENCE_AXIS)
        served = self.serving.max_sequence_length
        return min(served, known.max) if known else served

    @property
    def pad_to(self) -> tuple[int, ...]:
        """The lengths that the tokenization stage pads to; none where the engine joins any lengths."""
        if self.serving.pad_to or not self.is_native:
            return self.serving.pad_to
        lengths = [_SHORTEST_BUCKET]
        while lengths[-1] < self.longest:
            lengths.append(2 * lengths[-1])
        return (*(length for length in lengths if length < self.longest), self.longest)

    def shapes(self, which: str) -> dict[str, tuple[int, ...]]:
        """The smallest ("min"), usual ("opt") or largest ("max") shape of each input, with the batch."""
        largest = self.serving.max_batch_size
        batch = 1 if which == "min" else largest
        return {
            tensor.name: (batch, *(self._length(size, which) for size in tensor.shape[1:]))
            for tensor in self.signature.inputs
        }

    def _length(self, size: int | str, which: str) -> int:
        if isinstance(size, int):
            return size
        known = self.signature.axes[size]
        length: int = getattr(known, which)
        return (
            min(length, self.longest)
            if size == SEQUENCE_AXIS and self.signature.task != "tensors"
            else length
        )


def read_deployment(params: Mapping[str, Any], signature: Signature) -> Deployment:
    """The deployment that ``graph_params.package_params`` describes."""
    serving = GraphServing.model_validate(params["serving"])
    return Deployment(
        name=str(params["model_name"]),
        variant=str(params["variant"]),
        scheme=str(params["scheme"]),
        text=bool(params["text"]),
        signature=signature,
        serving=serving,
        target=_TARGET.validate_python(params["target"]),
    )


def runtime_of(target: GraphTarget) -> str:
    """Which Python package executes the graph in our Python model: onnxruntime, tensorrt or tensorrt_rtx."""
    match target:
        case TensorRtTarget() | TensorRtRtxTarget():
            return target.runtime
        case GraphOnnxRuntimeTarget():
            return "onnxruntime"

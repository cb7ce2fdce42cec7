"""What goes to a server and what comes back, independent of how it travels.

``InferRequest`` and ``InferReply`` are the wire side (bytes); the other classes are what callers get. The
``*_from_json`` functions read the JSON of Triton's HTTP protocol; the gRPC transport renders its protobuf
messages as the same JSON, so what a caller gets does not depend on the protocol.

Formats: https://github.com/triton-inference-server/server/tree/main/docs/protocol
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeAlias

from enginesmith_client._codec import Array

Json: TypeAlias = Mapping[str, Any]
Parameter: TypeAlias = "str | int | float | bool"


@dataclass(frozen=True)
class TensorMetadata:
    """One input or output of a model. In ``shape``, -1 is any size; a batch dimension is included."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    optional: bool = False


@dataclass(frozen=True)
class ModelMetadata:
    """The interface of a served model."""

    name: str
    versions: tuple[str, ...]
    """The versions that are ready."""
    platform: str
    inputs: tuple[TensorMetadata, ...]
    outputs: tuple[TensorMetadata, ...]
    max_batch_size: int
    """0 when the model has no batch dimension; otherwise the first dimension of every tensor is at most this."""
    decoupled: bool
    """Whether one request may have any number of answers."""

    def input(self, name: str) -> TensorMetadata | None:
        """The input called ``name``, or None."""
        return self._inputs.get(name)

    def output(self, name: str) -> TensorMetadata | None:
        """The output called ``name``, or None."""
        return self._outputs.get(name)

    @cached_property
    def required(self) -> frozenset[str]:
        """The names of the inputs that every request must have."""
        return frozenset(tensor.name for tensor in self.inputs if not tensor.optional)

    @cached_property
    def _inputs(self) -> dict[str, TensorMetadata]:
        return {tensor.name: tensor for tensor in self.inputs}

    @cached_property
    def _outputs(self) -> dict[str, TensorMetadata]:
        return {tensor.name: tensor for tensor in self.outputs}


@dataclass(frozen=True)
class ModelStatus:
    """One version of a model in the server's repository. ``state`` is Triton's word: READY, UNAVAILABLE, ..."""

    name: str
    version: str
    state: str
    reason: str


@dataclass(frozen=True)
class Duration:
    """A total over ``count`` events."""

    count: int = 0
    total_s: float = 0.0

    @property
    def mean_s(self) -> float:
        """Seconds per event; 0 when there was none."""
        return self.total_s / self.count if self.count else 0.0


@dataclass(frozen=True)
class BatchStatistics:
    """The executions of one batch size."""

    batch_size: int
    compute_input: Duration
    compute_infer: Duration
    compute_output: Duration


@dataclass(frozen=True)
class ModelStatistics:
    """What one version of a model did since it was loaded. Durations count requests, not executions."""

    name: str
    version: str
    inference_count: int
    """Requests, each counted with its batch size."""
    execution_count: int
    """Times the model ran; inference_count / execution_count is the mean batch size."""
    success: Duration
    fail: Duration
    queue: Duration
    compute_input: Duration
    compute_infer: Duration
    compute_output: Duration
    batches: tuple[BatchStatistics, ...]
    cache_hit: Duration = Duration()
    """Requests that the response cache answered; they count in ``success`` too."""
    cache_miss: Duration = Duration()
    """Requests that it was asked for in vain, and what storing their answers took."""


@dataclass(frozen=True)
class InferResult:
    """The outputs of one inference. Numeric arrays are read-only views; BYTES are object arrays of bytes."""

    outputs: Mapping[str, Array]
    model: str
    version: str
    id: str

    def __getitem__(self, name: str) -> Array:
        return self.outputs[name]


@dataclass(frozen=True)
class TokenLogprob:
    """A token of an answer."""

    token: bytes
    """Its text; bytes because a token may be a part of a character."""
    logprob: float
    """Natural logarithm of the probability that the model gave it."""


@dataclass(frozen=True)
class Generation:
    """The answer of a language model. What the model does not report is None."""

    text: str
    finish_reason: str | None
    """``stop`` (end of text or a stop word) or ``length`` (max_tokens reached)."""
    prompt_tokens: int | None
    output_tokens: int | None
    model: str
    model_version: str
    latency_s: float
    """From the call to the decoded answer, as seen by the caller."""
    logprobs: tuple[TokenLogprob, ...] | None = None
    """Of every token of the answer, where they were asked for."""
    ttft_s: float | None = None
    """From the call to the first piece of a streamed answer, as seen by the caller."""


@dataclass(frozen=True)
class TextDelta:
    """One piece of a streamed answer. What the model does not report is None."""

    text: str
    """The new text; may be empty, the last piece often is."""
    output_tokens: int | None
    """Of the whole answer so far."""
    prompt_tokens: int | None
    finish_reason: str | None
    """As of ``Generation``; None before the last piece."""
    logprobs: tuple[TokenLogprob, ...] | None
    """Of the tokens of this piece, where they were asked for."""


@dataclass(frozen=True)
class Classification:
    """The classes of one text."""

    label: str
    """Of the most likely class; its number where the model names none."""
    score: float
    """Its probability."""
    scores: Mapping[str, float]
    """The probability of every class, the most likely first."""


@dataclass(frozen=True)
class RankedDocument:
    """One document of a ranking."""

    index: int
    """Its place in the list that was given."""
    score: float
    """As the model gives it: higher is more relevant."""
    document: str


@dataclass(frozen=True)
class WireTensor:
    """A named tensor in wire form."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    data: bytes = field(repr=False)


@dataclass(frozen=True)
class InferRequest:
    """An inference, checked and encoded. No ``outputs`` means all of them."""

    model: str
    version: str
    id: str
    inputs: tuple[WireTensor, ...]
    outputs: tuple[str, ...]
    parameters: Mapping[str, Parameter]
    classes: int = 0
    """Above 0: the outputs as Triton's classification extension gives them, this many classes of each row."""
    metadata: ModelMetadata | None = None
    """Of the model, for the answers to a decoupled one over HTTP: their JSON has no datatypes of its own."""


@dataclass(frozen=True)
class InferReply:
    """What the server answered to an ``InferRequest``."""

    model: str
    version: str
    id: str
    outputs: tuple[WireTensor, ...]


def metadata_from_json(metadata: Json, config: Json) -> ModelMetadata:
    """The interface of a model; the protocol spreads it over its metadata and its configuration."""
    optional = {tensor["name"] for tensor in config.get("input", ()) if tensor.get("optional")}
    return ModelMetadata(
        name=metadata["name"],
        versions=tuple(metadata.get("versions", ())),
        platform=metadata.get("platform", ""),
        inputs=tuple(_tensor_from_json(tensor, optional) for tensor in metadata.get("inputs", ())),
        outputs=tuple(_tensor_from_json(tensor, set()) for tensor in metadata.get("outputs", ())),
        max_batch_size=int(config.get("max_batch_size", 0)),
        decoupled=bool(config.get("model_transaction_policy", {}).get("decoupled", False)),
    )


def statuses_from_json(index: Json) -> list[ModelStatus]:
    """Every model of a repository index, by name and version."""
    statuses = [
        ModelStatus(
            name=model["name"],
            version=model.get("version", ""),
            state=model.get("state") or "UNAVAILABLE",
            reason=model.get("reason", "").strip() or ("" if model.get("state") else "never loaded"),
        )
        for model in index["models"]
    ]
    return sorted(statuses, key=lambda status: (status.name, int(status.version or 0)))


def statistics_from_json(statistics: Json) -> tuple[ModelStatistics, ...]:
    """The statistics of every version in a statistics message."""
    return tuple(_version_statistics(entry) for entry in statistics.get("model_stats", ()))


def _tensor_from_json(tensor: Json, optional: set[str]) -> TensorMetadata:
    shape = tuple(int(size) for size in tensor.get("shape", ()))
    return TensorMetadata(tensor["name"], tensor["datatype"], shape, tensor["name"] in optional)


def _version_statistics(entry: Json) -> ModelStatistics:
    totals = entry.get("inference_stats", {})
    return ModelStatistics(
        name=entry["name"],
        version=entry["version"],
        inference_count=entry.get("inference_count", 0),
        execution_count=entry.get("execution_count", 0),
        success=_duration(totals, "success"),
        fail=_duration(totals, "fail"),
        queue=_duration(totals, "queue"),
        compute_input=_duration(totals, "compute_input"),
        compute_infer=_duration(totals, "compute_infer"),
        compute_output=_duration(totals, "compute_output"),
        batches=tuple(
            BatchStatistics(
                batch["batch_size"],
                compute_input=_duration(batch, "compute_input"),
                compute_infer=_duration(batch, "compute_infer"),
                compute_output=_duration(batch, "compute_output"),
            )
            for batch in entry.get("batch_stats", ())
        ),
        cache_hit=_duration(totals, "cache_hit"),
        cache_miss=_duration(totals, "cache_miss"),
    )


def _duration(totals: Json, name: str) -> Duration:
    total = totals.get(name, {})
    return Duration(total.get("count", 0), total.get("ns", 0) / 1e9)

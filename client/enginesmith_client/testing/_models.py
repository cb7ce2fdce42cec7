"""A model of the fake server: its configuration, what it refuses, and what it answers. Pure.

Refusals carry the words of tritonserver 2.51, so that they become the errors that a real server's become. Knows nothing
of other models, of faults or of time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np

from enginesmith_client._codec import Array, array_from_bytes, bytes_from_array, datatype_from_dtype
from enginesmith_client._errors import Status
from enginesmith_client._messages import (
    InferReply,
    InferRequest,
    Json,
    ModelMetadata,
    TensorMetadata,
    WireTensor,
    metadata_from_json,
)

Arrays: TypeAlias = Mapping[str, Array]
Answers: TypeAlias = Callable[[Arrays], Iterable[Arrays]]
"""What the model answers to the inputs of one request: one mapping of outputs for each answer."""

_BATCH_NOTE = (
    " NOTE: Setting a non-zero max_batch_size in the model config requires a batch dimension to be prepended to each input "
    "shape. If you want to specify the full shape including the batch dim in your input dims config, try setting "
    "max_batch_size to zero. See the model configuration docs for more info on max_batch_size."
)


class Refusal(Exception):  # noqa: N818 - what a server does, not a defect.
    """The server's no: a status and its words."""

    def __init__(self, status: Status, detail: str) -> None:
        super().__init__(detail)
        self.status: Status = status
        self.detail = detail


@dataclass(frozen=True)
class FakeModel:
    """One model; ``config`` is its configuration in the JSON of Triton's protocol."""

    config: Json
    versions: tuple[str, ...]
    answers: Answers
    labels: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """The names of the classes of an output, for Triton's classification extension."""

    @property
    def name(self) -> str:
        return str(self.config["name"])

    @property
    def metadata(self) -> ModelMetadata:
        """The interface as a client sees it."""
        return metadata_from_json(metadata_json(self.config, self.versions), self.config)

    def checked_inputs(self, request: InferRequest) -> dict[str, Array]:
        """The arrays of a request.

        Raises:
            Refusal: a real server would not give the request to the model.
        """
        metadata = self.metadata
        _check_names(metadata, request)
        for tensor in request.inputs:
            _check_tensor(metadata, tensor)
        inputs = {
            tensor.name: array_from_bytes(tensor.data, tensor.datatype, tensor.shape)
            for tensor in request.inputs
        }
        if metadata.max_batch_size and inputs:
            size = len(next(iter(inputs.values())))
            if size > metadata.max_batch_size:
                raise Refusal(
                    "invalid_argument",
                    f"inference request batch-size must be <= {metadata.max_batch_size} for '{self.name}'",
                )
        return inputs

    def reply(self, request: InferRequest, outputs: Arrays) -> InferReply:
        """One answer, with the outputs that the request names; a mistake of whoever wrote the fake is a ValueError."""
        metadata = self.metadata
        tensors = []
        for name, array in outputs.items():
            declared = metadata.output(name)
            if declared is None:
                raise ValueError(
                    f"the fake model {self.name!r} answers with the output {name!r}; it was added with: "
                    + ", ".join(tensor.name for tensor in metadata.outputs)
                )
            if not request.outputs or name in request.outputs:
                tensors.append(self._tensor(declared, np.asarray(array), request.classes))
        version = request.version or max(self.versions, key=int)
        return InferReply(self.name, version, request.id, tuple(tensors))

    def _tensor(self, declared: TensorMetadata, array: Array, classes: int) -> WireTensor:
        wanted = declared.shape
        fits = len(wanted) == array.ndim and all(
            size in (-1, seen) for size, seen in zip(wanted, array.shape, strict=True)
        )
        sendable = datatype_from_dtype(array.dtype) == declared.datatype or (
            declared.datatype == "BF16" and array.dtype == np.float32
        )
        if not fits or not sendable:
            raise ValueError(
                f"the fake model {self.name!r} answers with {declared.name!r} as {array.dtype} {list(array.shape)}; "
                f"it was added as {declared.datatype} {list(wanted)}"
            )
        if classes:
            array = _classified(array, classes, self.labels.get(declared.name, ()), batched=self._batches)
        datatype = "BYTES" if classes else declared.datatype
        return WireTensor(declared.name, datatype, array.shape, bytes_from_array(array, datatype))

    @property
    def _batches(self) -> bool:
        return int(self.config.get("max_batch_size", 0)) > 0


def config_json(metadata: ModelMetadata, *, labels: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """The configuration of a model with this interface, in the JSON of Triton's protocol."""
    batched = metadata.max_batch_size > 0
    for tensor in (*metadata.inputs, *metadata.outputs):
        if batched and tensor.shape[:1] != (-1,):
            raise ValueError(
                f"{metadata.name!r} has batches, so the shape of {tensor.name!r} must begin with -1; seen: {tensor.shape}"
            )
    return {
        "name": metadata.name,
        "platform": metadata.platform,
        "backend": "" if metadata.platform == "ensemble" else "python",
        "max_batch_size": metadata.max_batch_size,
        "input": [_config_tensor(one, batched) | {"optional": one.optional} for one in metadata.inputs],
        "output": [
            _config_tensor(one, batched) | {"label_filename": "labels.txt" if one.name in labels else ""}
            for one in metadata.outputs
        ],
        "model_transaction_policy": {"decoupled": metadata.decoupled},
        "parameters": {},
    }


def metadata_json(config: Json, versions: Sequence[str]) -> dict[str, Any]:
    """The metadata that a server makes of a configuration."""
    batch = [-1] if config.get("max_batch_size", 0) else []

    def tensors(side: str) -> list[dict[str, Any]]:
        return [
            {
                "name": tensor["name"],
                "datatype": tensor["data_type"].removeprefix("TYPE_").replace("STRING", "BYTES"),
                "shape": batch + list(tensor["dims"]),
            }
            for tensor in config.get(side, ())
        ]

    platform = config.get("platform") or config.get("backend", "")
    return {
        "name": config["name"],
        "versions": list(versions),
        "platform": platform,
        "inputs": tensors("input"),
        "outputs": tensors("output"),
    }


def _config_tensor(tensor: TensorMetadata, batched: bool) -> dict[str, Any]:
    data_type = "TYPE_" + ("STRING" if tensor.datatype == "BYTES" else tensor.datatype)
    return {
        "name": tensor.name,
        "data_type": data_type,
        "dims": list(tensor.shape[1:] if batched else tensor.shape),
    }


def _check_names(metadata: ModelMetadata, request: InferRequest) -> None:
    given = [tensor.name for tensor in request.inputs]
    required = [tensor.name for tensor in metadata.inputs if not tensor.optional]
    missing = [name for name in required if name not in given]
    all_required = len(required) == len(metadata.inputs)
    # With optional inputs the server names the input that it does not know; without, it counts first.
    if missing or (all_required and len(given) != len(required)):
        raise Refusal(
            "invalid_argument",
            f"expected {len(required)} inputs but got {len(given)} inputs for model '{metadata.name}'. Got input(s) "
            f"[{_quoted(given)}], but missing required input(s) [{_quoted(missing)}]. Please provide all required input(s).",
        )
    for name in given:
        if metadata.input(name) is None:
            raise Refusal(
                "invalid_argument", f"unexpected inference input '{name}' for model '{metadata.name}'"
            )
    for name in request.outputs:
        if metadata.output(name) is None:
            raise Refusal(
                "invalid_argument", f"unexpected inference output '{name}' for model '{metadata.name}'"
            )


def _quoted(names: Iterable[str]) -> str:
    return ",".join(f"'{name}'" for name in names)


def _check_tensor(metadata: ModelMetadata, tensor: WireTensor) -> None:
    declared = metadata.input(tensor.name)
    assert declared is not None, "names are checked first"
    if tensor.datatype != declared.datatype:
        raise Refusal(
            "invalid_argument",
            f"inference input '{tensor.name}' data-type is '{tensor.datatype}', but model '{metadata.name}' expects '{declared.datatype}'",
        )
    fits = len(tensor.shape) == len(declared.shape) and all(
        wanted in (-1, size) for wanted, size in zip(declared.shape, tensor.shape, strict=True)
    )
    if not fits:
        expected, got = (",".join(map(str, shape)) for shape in (declared.shape, tensor.shape))
        raise Refusal(
            "invalid_argument",
            f"unexpected shape for input '{tensor.name}' for model '{metadata.name}'. Expected [{expected}], got [{got}]."
            + (_BATCH_NOTE if metadata.max_batch_size else ""),
        )


def _classified(array: Array, classes: int, labels: Sequence[str], *, batched: bool) -> Array:
    """``score:index`` or ``score:index:label`` of the best classes of each row, the best first, six decimals."""
    rows = array.reshape(len(array) if batched else 1, -1)
    best = np.argsort(-rows, axis=1, kind="stable")[:, : min(classes, rows.shape[1])]
    texts = np.empty(best.shape, np.object_)
    for row, index in np.ndindex(*best.shape):
        number = int(best[row, index])
        label = f":{labels[number]}" if number < len(labels) else ""
        texts[row, index] = f"{float(rows[row, number]):f}:{number}{label}".encode()
    return texts if batched else texts.reshape(-1)


def tensor(name: str, datatype: str, *shape: int, optional: bool = False) -> TensorMetadata:
    """A tensor in one line; ``shape`` with the batch dimension."""
    return TensorMetadata(name, datatype, shape, optional)


def once(answer: Callable[[Arrays], Arrays]) -> Answers:
    """A model that gives each request one answer."""

    def answers(inputs: Arrays) -> Iterator[Arrays]:
        yield answer(inputs)

    return answers


def several(answer: Callable[[Arrays], Arrays | Iterable[Arrays]]) -> Answers:
    """A model that gives each request any number of answers; one mapping of outputs is one answer."""

    def answers(inputs: Arrays) -> Iterator[Arrays]:
        given = answer(inputs)
        if isinstance(given, Mapping):
            yield given
        else:
            yield from given

    return answers

"""The file of a graph: written, checked, and its outputs described for the signature."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx

from enginesmith.errors import SourceError
from enginesmith.graphs.original import Arrays
from enginesmith.graphs.signature import MODEL_FILE, WEIGHTS_FILE, GraphTensor

LARGEST_PROTOBUF_BYTES = 2_000_000_000
"""Protobuf's limit is 2 GiB for the whole message."""
_SMALLEST_EXTERNAL_BYTES = 1024


def write_graph(model: Any, directory: Path) -> None:
    """Write ``model.onnx``, with the weights in a file beside it where one protobuf cannot hold them."""
    weight_bytes = sum(len(tensor.raw_data) for tensor in model.graph.initializer)
    onnx.save_model(
        model,
        directory / MODEL_FILE,
        save_as_external_data=weight_bytes > LARGEST_PROTOBUF_BYTES,
        location=WEIGHTS_FILE,
        size_threshold=_SMALLEST_EXTERNAL_BYTES,
    )


def check_graph(path: Path) -> None:
    """Return if ONNX's own checker, shape inference included, accepts the file and all operators are standard ones.

    Raises:
        SourceError: it does not.
    """
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise SourceError(f"{path.name} is not a valid ONNX graph: {str(error).strip()}") from error


def described_outputs(model: Any, answers: Sequence[Arrays]) -> tuple[GraphTensor, ...]:
    """The outputs for the signature, and the same written into ``model``.

    Lengths are what shape inference says, held against ``answers``, the outputs of every run; what it cannot say is
    dynamic.
    """
    inferred = {}
    if sum(len(tensor.raw_data) for tensor in model.graph.initializer) <= LARGEST_PROTOBUF_BYTES:
        shapes = onnx.shape_inference.infer_shapes(model, strict_mode=False, data_prop=True)
        inferred = {value.name: value.type.tensor_type.shape.dim for value in shapes.graph.output}
    described = []
    for value in model.graph.output:
        arrays = [answer[value.name] for answer in answers]
        own = list(value.type.tensor_type.shape.dim)
        known = list(inferred.get(value.name, ())) or own
        shape: list[int | str] = ["batch"]
        for index in range(1, arrays[0].ndim):
            seen = {array.shape[index] for array in arrays}
            shape.append(_size(known, index, seen, name=f"{value.name}_{index}"))
        tensor = GraphTensor(value.name, arrays[0].dtype.name, tuple(shape))
        value.CopyFrom(
            onnx.helper.make_tensor_value_info(
                value.name, onnx.helper.np_dtype_to_tensor_dtype(arrays[0].dtype), shape
            )
        )
        described.append(tensor)
    return tuple(described)


def _size(known: Sequence[Any], index: int, seen: set[int], *, name: str) -> int | str:
    if index < len(known):
        dim = known[index]
        if dim.HasField("dim_value") and seen == {dim.dim_value}:
            return int(dim.dim_value)
        if dim.dim_param:
            return str(dim.dim_param)
    return name

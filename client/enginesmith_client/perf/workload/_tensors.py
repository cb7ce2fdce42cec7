"""Requests of any other model: tensors of the right names, datatypes and shapes, made or read from a file."""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from enginesmith_client._codec import NUMPY_TYPES, Array
from enginesmith_client._messages import TensorMetadata
from enginesmith_client.perf._errors import ProfileError
from enginesmith_client.perf.load._prepared import TokenCounts
from enginesmith_client.perf.workload._payload import Arrays, RefusedError, Subject, Workload
from enginesmith_client.perf.workload._prompts import WORDS
from enginesmith_client.perf.workload._tensors_file import read_tensors

_POOL_BYTES = 64 << 20
"""Of all different requests together: large ones are fewer."""
_INTEGERS_BELOW = 100
"""Small enough to be an index or a token of most models."""


def tensor_workload(subject: Subject) -> Workload:
    """Tensors of ``requests.tensors_file``, or made ones.

    Raises:
        ProfileError: a shape is not known or not possible, the file does not fit the model, or the model refuses the
            first of the requests.
    """
    batches, described = _from_file(subject) if subject.requests.tensors_file else _made(subject)
    requests = tuple(subject.prepared(arrays) for arrays in batches)
    _ask_first(subject, batches[0])
    return Workload(
        kind="tensors",
        streaming=subject.metadata.decoupled,
        counts=TokenCounts(),
        requests=requests,
        described=described
        | {
            "different": len(requests),
            "rows": requests[0].rows,
            "shapes": {name: list(array.shape) for name, array in batches[0].items()},
        },
    )


def _from_file(subject: Subject) -> tuple[list[Arrays], dict[str, Any]]:
    path = subject.requests.tensors_file
    assert path is not None, "the caller looked"
    _check_rows(subject)
    rows = read_tensors(path, subject.metadata)
    size = subject.requests.rows
    batched = subject.metadata.max_batch_size > 0
    batches = [
        _joined([rows[(start + offset) % len(rows)] for offset in range(size)], path.name)
        if batched
        else rows[start]
        for start in range(0, len(rows), size)
    ]
    return batches, {"tensors": f"the {len(rows)} of {path.name}, gone round in their order"}


def _joined(rows: Sequence[Arrays], file: str) -> Arrays:
    """A batch of rows, which must agree in their inputs and shapes."""
    first = rows[0]
    for row in rows[1:]:
        if {name: array.shape for name, array in row.items()} != {
            name: array.shape for name, array in first.items()
        }:
            raise ProfileError(
                f"requests.tensors_file {file} has rows of different inputs or shapes, which cannot be one batch",
                hint="set requests.rows to 1",
            )
    return {name: np.stack([row[name] for row in rows]) for name in first}


def _made(subject: Subject) -> tuple[list[Arrays], dict[str, Any]]:
    _check_rows(subject)
    inputs = _inputs_to_make(subject)
    shapes = {tensor.name: _shape(subject, tensor) for tensor in inputs}
    rng = np.random.default_rng([subject.seed, 1])
    one = {tensor.name: _made_array(tensor, shapes[tensor.name], rng) for tensor in inputs}
    size_bytes = sum(8 * array.size if array.dtype == object else array.nbytes for array in one.values())
    count = min(subject.requests.different, max(1, _POOL_BYTES // max(1, size_bytes)))
    more = (
        {tensor.name: _made_array(tensor, shapes[tensor.name], rng) for tensor in inputs}
        for _ in range(count - 1)
    )
    words = "made: numbers from 0 to 1, integers from 0 to 99, words; 1 in inputs called mask, 0 in those called type"
    fewer = f" ({count} different ones instead of {subject.requests.different}, because they are large)"
    return [one, *more], {"tensors": words + (fewer if count < subject.requests.different else "")}


def _check_rows(subject: Subject) -> None:
    rows, most = subject.requests.rows, subject.metadata.max_batch_size
    if rows > max(1, most):
        reason = f"takes batches of at most {most}" if most else "has no batch dimension"
        raise ProfileError(
            f"requests.rows is {rows}; model {subject.target.model!r} {reason}",
            hint=f"set requests.rows to {max(1, most)} or less",
        )


def _inputs_to_make(subject: Subject) -> list[TensorMetadata]:
    """The required inputs, and those that the profile gives a shape."""
    metadata, shapes = subject.metadata, subject.requests.shapes
    names = [tensor.name for tensor in metadata.inputs]
    for name in shapes:
        if name not in names:
            close = difflib.get_close_matches(name, names, n=1)
            raise ProfileError(
                f"requests.shapes names the input {name!r}, which model {metadata.name!r} does not have",
                hint=f"did you mean {close[0]!r}?" if close else f"it has: {', '.join(names)}",
            )
    wanted = [tensor for tensor in metadata.inputs if not tensor.optional or tensor.name in shapes]
    if not wanted:
        raise ProfileError(
            f"all inputs of model {metadata.name!r} are optional: {', '.join(names)}",
            hint=f"name those to send with their shapes, e.g. requests.shapes: {{{names[0]}: [16]}}",
        )
    return wanted


def _shape(subject: Subject, tensor: TensorMetadata) -> tuple[int, ...]:
    """With the batch dimension."""
    batched = subject.metadata.max_batch_size > 0
    dimensions = tensor.shape[1:] if batched else tensor.shape
    given = subject.requests.shapes.get(tensor.name)
    if given is None and -1 in dimensions:
        example = [16 if size == -1 else size for size in dimensions]
        raise ProfileError(
            f"input {tensor.name!r} of model {subject.metadata.name!r} has the shape {list(dimensions)} (-1: any size), and the profile does not say which to send",
            hint=f"give requests.shapes: {{{tensor.name}: {example}}}",
        )
    shape = dimensions if given is None else given
    fits = len(shape) == len(dimensions) and all(
        size >= 1 and wanted in (-1, size) for size, wanted in zip(shape, dimensions, strict=True)
    )
    if not fits:
        batch = ", without the batch dimension" if batched else ""
        raise ProfileError(
            f"requests.shapes.{tensor.name} is {list(shape)}; model {subject.metadata.name!r} takes {list(dimensions)} (-1: any size){batch}",
            hint="give every dimension, each at least 1",
        )
    return (subject.requests.rows, *shape) if batched else tuple(shape)


def _made_array(tensor: TensorMetadata, shape: tuple[int, ...], rng: np.random.Generator) -> Array:
    name = tensor.name.lower()
    if tensor.datatype == "BYTES":
        array = np.empty(math.prod(shape), np.object_)
        array[:] = [WORDS[index].encode() for index in rng.integers(len(WORDS), size=array.size)]
        return array.reshape(shape)
    if tensor.datatype == "BF16":
        return rng.random(shape, np.float32)
    dtype = np.dtype(NUMPY_TYPES[tensor.datatype])
    if dtype.kind == "f":
        return rng.random(shape, np.float32).astype(dtype)
    if dtype.kind == "b":
        return rng.integers(2, size=shape).astype(dtype)
    for word, value in (("mask", 1), ("type", 0)):
        if word in name:
            return np.full(shape, value, dtype)
    return rng.integers(_INTEGERS_BELOW, size=shape).astype(dtype)


def _ask_first(subject: Subject, arrays: Arrays) -> None:
    try:
        subject.first_answer(arrays)
    except RefusedError as error:
        made = subject.requests.tensors_file is None
        what = "made tensors" if made else "the tensors of requests.tensors_file"
        raise ProfileError(
            f"model {subject.target.model!r} {'refuses' if error.refused else 'failed at'} {what}: {error.words}",
            hint="give tensors that it understands: requests.tensors_file, in the JSON of perf_analyzer's --input-data"
            if made
            else "compare them with enginesmith_client.Client.metadata(model)",
        ) from error

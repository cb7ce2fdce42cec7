"""Tensors from a file in the JSON of perf_analyzer's ``--input-data``, so that both generators send the same.

Format: ``{"data": [{"input": [values in row-major order] | {"content": [...], "shape": [...]} | {"b64": "...", "shape": [...]}}]}``,
each object one row without the batch dimension; ``shape`` is needed where the model leaves dimensions open. ``b64`` is
the little-endian bytes of the tensor, or of a BYTES input its one element.
Source: docs/input_data.md of https://github.com/triton-inference-server/perf_analyzer, "Real Input Data". Lists of lists
(sequences and several streams) and ``validation_data`` are not read here; a file that has them is an error.
"""

from __future__ import annotations

import base64
import binascii
import difflib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from enginesmith_client._codec import NUMPY_TYPES, Array, array_from_bytes, text_bytes
from enginesmith_client._errors import InvalidInput, ServerError
from enginesmith_client._messages import ModelMetadata, TensorMetadata
from enginesmith_client.perf._errors import ProfileError
from enginesmith_client.perf._profile_file import content_of

TENSORS_FILE = "requests.tensors_file"
"""What the file is called in messages."""
_FORM = 'a file looks like {"data": [{"INPUT": [1, 2, 3]}, {"INPUT": {"content": [1, 2], "shape": [2]}}]}'
_TENSOR_KEYS = {"content", "shape", "b64"}


def read_tensors(path: Path, metadata: ModelMetadata) -> list[dict[str, Array]]:
    """The rows of the file as arrays without the batch dimension.

    Raises:
        ProfileError: it cannot be read, or does not fit the model; names the row and the input.
    """
    where = f"{TENSORS_FILE} {path}"
    data = _data(path, where)
    return [_row(row, metadata, where=f"{where}, data[{index}]") for index, row in enumerate(data)]


def _data(path: Path, where: str) -> list[Any]:
    try:
        document = json.loads(content_of(path, what=TENSORS_FILE))
    except ValueError as error:
        raise ProfileError(f"{where} is not JSON: {error}", hint=_FORM) from error
    data = document.get("data") if isinstance(document, dict) else None
    if not isinstance(data, list) or not data:
        raise ProfileError(f"{where} has no list called data with something in it", hint=_FORM)
    if "validation_data" in document:
        raise ProfileError(
            f"{where} has validation_data; answers are not compared here",
            hint="leave it out; enginesmith_client.Client.infer and a test of your own compare answers",
        )
    return data


def _row(row: Any, metadata: ModelMetadata, *, where: str) -> dict[str, Array]:
    if isinstance(row, list):
        raise ProfileError(
            f"{where} is a list: sequences and several streams are not supported",
            hint="give one list of objects, or measure sequences with perf_analyzer itself",
        )
    if not isinstance(row, dict) or not row:
        raise ProfileError(f"{where} must be an object of inputs; seen: {type(row).__name__}", hint=_FORM)
    names = [tensor.name for tensor in metadata.inputs]
    arrays = {}
    for name, value in row.items():
        tensor = metadata.input(name)
        if tensor is None:
            close = difflib.get_close_matches(name, names, n=1)
            raise ProfileError(
                f"{where}: model {metadata.name!r} has no input {name!r}",
                hint=f"did you mean {close[0]!r}?" if close else f"it has: {', '.join(names)}",
            )
        arrays[name] = _array(value, tensor, batched=metadata.max_batch_size > 0, where=f"{where}, {name}")
    missing = sorted(metadata.required - arrays.keys())
    if missing:
        raise ProfileError(
            f"{where}: inputs that model {metadata.name!r} needs are missing: {', '.join(missing)}"
        )
    return arrays


def _array(value: Any, tensor: TensorMetadata, *, batched: bool, where: str) -> Array:
    fields = value if isinstance(value, dict) else {"content": value}
    unknown = set(fields) - _TENSOR_KEYS
    if unknown or len({"content", "b64"} & set(fields)) != 1:
        raise ProfileError(
            f"{where}: a tensor has content or b64, and shape; seen: {', '.join(fields) or 'nothing'}",
            hint=_FORM,
        )
    shape = _shape(fields, tensor.shape[1:] if batched else tensor.shape, where)
    if "b64" in fields:
        return _from_base64(fields["b64"], tensor.datatype, shape, where)
    return _from_values(fields["content"], tensor.datatype, shape, where)


def _shape(fields: Mapping[str, Any], dimensions: tuple[int, ...], where: str) -> tuple[int, ...]:
    given = fields.get("shape")
    if given is None:
        if -1 in dimensions:
            content = fields.get("content")
            if len(dimensions) == 1 and isinstance(content, list):
                return (len(content),)
            raise ProfileError(
                f"{where}: the model takes the shape {list(dimensions)} (-1: any size), so the file must say which",
                hint='write {"content": [...], "shape": [...]}',
            )
        return dimensions
    whole = isinstance(given, list) and all(type(size) is int and size >= 0 for size in given)
    if not whole or len(given) != len(dimensions):
        raise ProfileError(
            f"{where}: shape must be {len(dimensions)} sizes without the batch; seen: {given!r}"
        )
    if any(wanted not in (-1, size) for size, wanted in zip(given, dimensions, strict=True)):
        raise ProfileError(
            f"{where}: the shape is {given}; the model takes {list(dimensions)} (-1: any size)"
        )
    return tuple(given)


def _from_base64(text: Any, datatype: str, shape: tuple[int, ...], where: str) -> Array:
    try:
        content = base64.b64decode(text, validate=True)
    except (TypeError, ValueError, binascii.Error) as error:
        raise ProfileError(f"{where}: b64 is not base64: {error}") from error
    if datatype == "BYTES":
        return _filled([content], shape, where)
    try:
        return array_from_bytes(content, datatype, shape)
    except ServerError as error:
        raise ProfileError(f"{where}: {error.message}") from error


def _from_values(content: Any, datatype: str, shape: tuple[int, ...], where: str) -> Array:
    values = np.array(content, np.object_).reshape(-1).tolist() if isinstance(content, list) else None
    if values is None:
        raise ProfileError(f"{where}: must be a list of values; seen: {type(content).__name__}", hint=_FORM)
    if datatype == "BYTES":
        if not all(isinstance(one, str) for one in values):
            raise ProfileError(f"{where}: elements of a BYTES input must be text", hint="bytes go as b64")
        try:
            return _filled([text_bytes(one, what="an element") for one in values], shape, where)
        except InvalidInput as error:
            raise ProfileError(f"{where}: {error.message}", hint=error.hint) from error
    dtype = np.dtype(np.float32 if datatype == "BF16" else NUMPY_TYPES[datatype])
    kinds = {"b": (bool, int), "f": (int, float)}.get(dtype.kind, (int,))
    wrong = next(
        (one for one in values if not isinstance(one, kinds) or (dtype.kind in "iu" and one is True)), None
    )
    if wrong is not None:
        raise ProfileError(f"{where}: {wrong!r} is no {datatype}")
    if dtype.kind in "iu":
        allowed = np.iinfo(dtype)
        if any(not allowed.min <= one <= allowed.max for one in values):
            raise ProfileError(f"{where}: a value is out of range of {datatype}")
    try:
        with np.errstate(over="ignore"):
            array = np.array(values, dtype)
    except OverflowError as error:
        raise ProfileError(f"{where}: a value is out of range of {datatype}") from error
    return _filled(array, shape, where)


def _filled(values: Any, shape: tuple[int, ...], where: str) -> Array:
    count = math.prod(shape)
    if len(values) != count:
        raise ProfileError(f"{where}: {len(values)} values, but the shape {list(shape)} holds {count}")
    if isinstance(values, np.ndarray):
        return values.reshape(shape)
    array = np.empty(count, np.object_)
    array[:] = values
    return array.reshape(shape)

"""Inputs of models that read no text: from an .npz file, or random numbers, in batches."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from enginesmith.errors import SourceError

Arrays = dict[str, npt.NDArray[Any]]


def tensor_batches(params: Mapping[str, Any]) -> list[Arrays]:
    """The samples of the ``sample`` step's ``params``, in batches; the last may be smaller.

    Random samples take the lengths of a dynamic axis in turn: the usual, the shortest and the longest one. They are
    the lengths that the spec names; a model may refuse others, e.g. those that are no multiple of its stride.

    Raises:
        SourceError: the file is missing, damaged, too short, or does not fit the inputs.
        SpecError: a dynamic axis of the ONNX file has no lengths.
    """
    location = params["location"]
    inputs: Sequence[Mapping[str, Any]] = params["inputs"]
    if not inputs:
        from enginesmith.graphs.onnx_source import inputs_of_file

        inputs = inputs_of_file(Path(location["onnx"]), params["axes"])
    if location["file"] is None:
        return _random_batches(inputs, params)
    arrays = _checked(_read(Path(location["file"])), inputs, params["axes"], path=location["file"])
    count, wanted = len(arrays[inputs[0]["name"]]), params["samples"]
    if count < wanted:
        raise SourceError(
            f"{location['file']} holds {count} samples, {wanted} are needed",
            hint=f"set samples: {count}, or give more",
        )
    chosen = np.random.default_rng(params["seed"]).permutation(count)[:wanted]
    size = params["batch_size"]
    return [
        {name: array[chosen[start : start + size]] for name, array in arrays.items()}
        for start in range(0, wanted, size)
    ]


def _random_batches(inputs: Sequence[Mapping[str, Any]], params: Mapping[str, Any]) -> list[Arrays]:
    random = np.random.default_rng(params["seed"])
    batches = []
    for number, start in enumerate(range(0, params["samples"], params["batch_size"])):
        lengths = {"batch": min(params["batch_size"], params["samples"] - start)}
        for name, axis in params["axes"].items():
            lengths[name] = (axis["opt"] or axis["max"], axis["min"], axis["max"])[number % 3]
        batches.append({tensor["name"]: _random(tensor, lengths, random) for tensor in inputs})
    return batches


def _random(
    tensor: Mapping[str, Any], lengths: Mapping[str, int], random: np.random.Generator
) -> npt.NDArray[Any]:
    shape = tuple(lengths[size] if isinstance(size, str) else size for size in tensor["shape"])
    dtype, low, high = np.dtype(tensor["dtype"]), tensor["low"], tensor["high"]
    if dtype.kind == "f":
        return random.uniform(low, high, shape).astype(dtype)
    if dtype.kind == "b":
        return random.random(shape) < 0.5
    bounds = np.iinfo(dtype)
    if low < bounds.min or high > bounds.max:
        raise SourceError(
            f"input {tensor['name']}: {low:g} to {high:g} is outside of {dtype.name} ({bounds.min} to {bounds.max})"
        )
    return random.integers(int(low), int(high), shape, dtype=dtype.type, endpoint=True)


def _read(path: Path) -> Arrays:
    try:
        with path.open("rb") as file:  # np.load would leave a file open that it cannot read.
            archive = np.load(file, allow_pickle=False)
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise SourceError(
                    f"{path} is a single array (.npy), not an .npz file with one array per input",
                    hint="write it with numpy.savez(path, <input name>=array)",
                )
            return {name: _member(archive, name, path) for name in archive.files}
    except FileNotFoundError as error:
        raise SourceError(
            f"samples {path} do not exist", hint="the path starts at the spec's directory"
        ) from error
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise SourceError(
            f"{path} is no .npz file that can be read: {error}",
            hint="write it with numpy.savez; pickled objects are not read",
        ) from error


def _member(archive: Any, name: str, path: Path) -> npt.NDArray[Any]:
    try:
        array: npt.NDArray[Any] = archive[name]
    except (ValueError, EOFError, OSError, zipfile.BadZipFile, zlib.error) as error:
        pickled = "pickle" in str(error)
        raise SourceError(
            f"{path}: array {name} "
            + ("holds pickled Python objects, which are not read" if pickled else f"is damaged: {error}"),
            hint="write plain numeric arrays with numpy.savez" if pickled else "write the file again",
        ) from error
    return array


def _checked(
    arrays: Arrays, inputs: Sequence[Mapping[str, Any]], axes: Mapping[str, Mapping[str, Any]], *, path: str
) -> Arrays:
    names = [tensor["name"] for tensor in inputs]
    if set(names) != set(arrays):
        raise SourceError(
            f"{path} holds {', '.join(sorted(arrays)) or 'nothing'}; the inputs are {', '.join(names)}",
            hint="one array per input, under its name",
        )
    lengths: dict[str, tuple[int, str]] = {}
    for tensor in inputs:
        name, array = tensor["name"], arrays[tensor["name"]]
        if array.dtype != np.dtype(tensor["dtype"]):
            raise SourceError(
                f"{path}: array {name} is {array.dtype}, the input is {tensor['dtype']}",
                hint=f"convert it with astype({tensor['dtype']!r})",
            )
        if array.ndim != len(tensor["shape"]):
            raise SourceError(
                f"{path}: array {name} has shape {list(array.shape)}, the input is {list(tensor['shape'])}",
                hint="samples lie along the first axis",
            )
        for seen, size in zip(array.shape, tensor["shape"], strict=True):
            _check_length(seen, size, axes, lengths, array=f"{path}: array {name}")
    return {name: arrays[name] for name in names}


def _check_length(
    seen: int,
    size: int | str,
    axes: Mapping[str, Mapping[str, Any]],
    lengths: dict[str, tuple[int, str]],
    *,
    array: str,
) -> None:
    """Hold one length of an array against the input's: fixed, in its axis's range, and equal under the same name."""
    if isinstance(size, int):
        if seen != size:
            raise SourceError(f"{array} has a length of {seen} where the input has {size}")
        return
    axis = axes.get(size)
    if axis is not None and not axis["min"] <= seen <= axis["max"]:
        raise SourceError(f"{array}: axis {size!r} is {seen} long, allowed: {axis['min']} to {axis['max']}")
    known, where = lengths.setdefault(size, (seen, array))
    if known != seen:
        raise SourceError(f"{array}: axis {size!r} is {seen} long, but {known} in {where}")

"""An engine directory ready to run with ONNX Runtime, for one batch or for several requests joined into one.

Self-contained: it is copied into the version directory of the served model and needs numpy and onnxruntime. It reads
``engine.json``, ``signature.json`` and ``model.onnx`` of one directory and knows nothing of Triton.
"""

from __future__ import annotations

import json
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
_MASK = "attention_mask"
_ERRORS_ONLY = 3
# Each falls back on the next for operators that it does not have.
_PROVIDERS = {
    "cpu": ("CPUExecutionProvider",),
    "cuda": ("CUDAExecutionProvider", "CPUExecutionProvider"),
    "tensorrt": ("TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"),
}


class GraphInputError(ValueError):
    """The arrays are not what the signature asks for."""


class GraphRequests(ABC):
    """Checks, joins and parts the requests of one signature; whoever executes the graph adds ``_run``."""

    def __init__(self, directory: Path) -> None:
        """``directory`` has ``signature.json``."""
        signature = json.loads((directory / "signature.json").read_text(encoding="utf-8"))
        self.signature: Mapping[str, Any] = signature
        self._inputs = {tensor["name"]: tensor for tensor in signature["inputs"]}
        self._outputs = {tensor["name"]: tensor for tensor in signature["outputs"]}

    @abstractmethod
    def _run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """The outputs of one batch that fits the signature."""

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """The outputs by name, [batch, ...], of one batch.

        Raises:
            GraphInputError: a name, a dtype or a shape is not the signature's, or an axis is longer than it allows.
        """
        self._check(inputs)
        return self._run(inputs)

    def run_requests(self, requests: Sequence[Mapping[str, Array]]) -> list[dict[str, Array]]:
        """The outputs of each request, computed together where that cannot change them.

        Requests of different lengths are padded along the axes of ``attention_mask``, which says what counts there, if
        the signature has one; along other axes only requests of equal size are joined. Outputs come back without the padding.

        Raises:
            GraphInputError: as ``run``; the message names no request, so ask one by one to find which.
        """
        for request in requests:
            self._check(request)
        answers: list[dict[str, Array]] = [{}] * len(requests)
        for indices in self._groups(requests):
            outputs = self._run(self._joined([requests[index] for index in indices]))
            start = 0
            for index in indices:
                stop = start + _rows(requests[index])
                axes = self._axes(requests[index])
                answers[index] = {
                    name: self._without_padding(name, output[start:stop], axes)
                    for name, output in outputs.items()
                }
                start = stop
        return answers

    def _check(self, inputs: Mapping[str, Array]) -> None:
        if set(inputs) != set(self._inputs):
            raise GraphInputError(f"inputs are {sorted(inputs)}; the model takes {sorted(self._inputs)}")
        for name, array in inputs.items():
            tensor = self._inputs[name]
            if array.dtype != np.dtype(tensor["dtype"]):
                raise GraphInputError(f"input {name} is {array.dtype}; the model takes {tensor['dtype']}")
            wanted = tensor["shape"]
            if len(array.shape) != len(wanted) or any(
                isinstance(size, int) and size != seen for size, seen in zip(wanted, array.shape, strict=True)
            ):
                raise GraphInputError(f"input {name} has shape {list(array.shape)}; the model takes {wanted}")
        for axis, size in self._axes(inputs).items():
            limits = self.signature["axes"].get(axis)
            if limits and not limits["min"] <= size <= limits["max"]:
                raise GraphInputError(
                    f"axis {axis!r} has length {size}; the model takes {limits['min']} to {limits['max']}"
                )

    def _axes(self, inputs: Mapping[str, Array]) -> dict[str, int]:
        """The length of each dynamic axis, the batch included."""
        lengths: dict[str, int] = {}
        for name, array in inputs.items():
            for axis, size in zip(self._inputs[name]["shape"], array.shape, strict=True):
                if isinstance(axis, str) and lengths.setdefault(axis, size) != size:
                    raise GraphInputError(
                        f"axis {axis!r} has length {lengths[axis]} and, in input {name}, length {size}"
                    )
        return lengths

    def _groups(self, requests: Sequence[Mapping[str, Array]]) -> list[list[int]]:
        """Indices of the requests that run together."""
        padded = (
            {axis for axis in self._inputs[_MASK]["shape"] if isinstance(axis, str)}
            if _MASK in self._inputs
            else set()
        )
        groups: dict[tuple[tuple[int, ...], ...], list[int]] = {}
        for index, request in enumerate(requests):
            sizes = tuple(
                tuple(
                    size
                    for axis, size in zip(tensor["shape"][1:], request[name].shape[1:], strict=True)
                    if axis not in padded
                )
                for name, tensor in self._inputs.items()
            )
            groups.setdefault(sizes, []).append(index)
        return list(groups.values())

    def _joined(self, requests: Sequence[Mapping[str, Array]]) -> Mapping[str, Array]:
        if len(requests) == 1:
            return requests[0]
        return {
            name: self._joined_input(name, [request[name] for request in requests]) for name in self._inputs
        }

    def _joined_input(self, name: str, arrays: Sequence[Array]) -> Array:
        shapes = {array.shape[1:] for array in arrays}
        if len(shapes) == 1:
            return np.concatenate(arrays)
        longest = tuple(max(sizes) for sizes in zip(*shapes, strict=True))
        padding = self.signature["pad_id"] if name == "input_ids" else 0
        joined = np.full((sum(map(len, arrays)), *longest), padding, arrays[0].dtype)
        start = 0
        for array in arrays:
            own = (slice(start, start + len(array)), *(slice(size) for size in array.shape[1:]))
            joined[own] = array
            start += len(array)
        return joined

    def _without_padding(self, name: str, rows: Array, axes: Mapping[str, int]) -> Array:
        """``rows`` of an output, cut to the request's own lengths where the output has a padded axis."""
        shape = self._outputs[name]["shape"][1:]
        return rows[
            (
                slice(None),
                *(slice(axes.get(axis)) if isinstance(axis, str) else slice(None) for axis in shape),
            )
        ]


class GraphRuntime(GraphRequests):
    """An engine of ONNX Runtime ready to run. Safe to use from several threads."""

    def __init__(self, directory: Path, threads: int = 0) -> None:
        """``threads`` compute one operator together; 0: as many as this process may use cores."""
        super().__init__(directory)
        self.engine: Mapping[str, Any] = json.loads((directory / "engine.json").read_text(encoding="utf-8"))
        self.threads = threads or len(os.sched_getaffinity(0))
        self._session = _session(directory / "model.onnx", self.engine, self.threads)
        for side, wanted, seen in (
            ("inputs", self._inputs, self._session.get_inputs()),
            ("outputs", self._outputs, self._session.get_outputs()),
        ):
            if sorted(names := [value.name for value in seen]) != sorted(wanted):
                raise ValueError(
                    f"{directory}: the {side} of model.onnx are {names}, of signature.json {list(wanted)}"
                )

    def _run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        names = list(self._outputs)
        return dict(zip(names, self._session.run(names, dict(inputs)), strict=True))


def _session(path: Path, engine: Mapping[str, Any], threads: int) -> Any:
    """An ONNX Runtime session with the settings that ``engine.json`` asks for.

    Raises:
        RuntimeError: the installed ONNX Runtime has no such execution provider; it would take another one silently.
    """
    import onnxruntime as ort

    providers = _PROVIDERS[engine.get("provider", "cpu")]
    if providers[0] not in ort.get_available_providers():
        raise RuntimeError(
            f"this engine needs {providers[0]}; the installed onnxruntime has {', '.join(ort.get_available_providers())}: "
            "install onnxruntime-gpu"
        )
    chosen: list[tuple[str, dict[str, str]]] = [(name, {}) for name in providers]
    chosen[0] = (providers[0], dict(engine.get("provider_options") or {}))
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = _ERRORS_ONLY
    for key, value in engine["session"].items():
        options.add_session_config_entry(key, str(value))
    return ort.InferenceSession(
        str(path),
        options,
        providers=chosen,
        disabled_optimizers=engine.get("disabled_optimizers") or None,
    )


def _rows(request: Mapping[str, Array]) -> int:
    return len(next(iter(request.values())))

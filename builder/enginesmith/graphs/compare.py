"""Whether a graph computes what its model does, also at other lengths of its axes.

A graph that fixed an axis silently answers rightly at the lengths that it was made with, so every axis is changed on
its own, and then all together; the first that fails is named.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from enginesmith.errors import SourceError, StepFailedError
from enginesmith.graphs.original import Arrays, Original
from enginesmith.graphs.signature import GraphTensor

TOLERANCE = 1e-3
"""Largest relative error of a right graph; wrong ones are off by far more. What may be served, the gate decides."""


@dataclass(frozen=True)
class Probe:
    """Inputs whose axes are as long as nothing before them was."""

    axis: str | None
    """The only axis that was changed; None: all of them."""
    length: int
    feeds: Arrays


@dataclass(frozen=True)
class Difference:
    """How far a graph's outputs are from the original's, over all that was compared."""

    largest: float
    """|difference| of any value."""
    relative: float
    """Norm of the difference over the norm of the original; the worst output of the worst batch."""

    def joined(self, other: Difference) -> Difference:
        return Difference(max(self.largest, other.largest), max(self.relative, other.relative))


def probes_of(original: Original, base: Arrays) -> list[Probe]:
    """Inputs made of ``base`` by repeating or cutting: every axis on its own, then batch 1 with all others longest."""
    seen = lengths_of(original.inputs, base)
    others = {"batch": 1 if seen["batch"] > 1 else 2}
    for name, axis in original.axes.items():
        usual = [length for length in (axis.opt, axis.min, axis.max) if length != seen[name]]
        if usual:
            others[name] = min(usual[0], original.longest_probe or usual[0])
    probes = [
        Probe(name, length, resized(original.inputs, base, seen | {name: length}))
        for name, length in others.items()
    ]
    longest = {
        name: min(axis.max, original.longest_probe or axis.max) for name, axis in original.axes.items()
    }
    every = resized(original.inputs, base, {"batch": 1} | longest)
    return [*probes, Probe(None, 1, every)]


def lengths_of(inputs: Sequence[GraphTensor], feeds: Arrays) -> dict[str, int]:
    """The length of each dynamic axis in ``feeds``."""
    return {
        size: length
        for tensor in inputs
        for size, length in zip(tensor.shape, feeds[tensor.name].shape, strict=True)
        if isinstance(size, str)
    }


def resized(inputs: Sequence[GraphTensor], feeds: Arrays, lengths: Mapping[str, int]) -> Arrays:
    """``feeds`` with dynamic axes of these lengths, by taking their values again from the start, or fewer of them."""
    arrays = {}
    for tensor in inputs:
        array = feeds[tensor.name]
        for index, size in enumerate(tensor.shape):
            if isinstance(size, str):
                places = np.arange(lengths[size]) % array.shape[index]
                array = np.take(array, places, axis=index)
        arrays[tensor.name] = np.ascontiguousarray(array)
    return arrays


class UnoptimizedGraph:
    """An ONNX file in ONNX Runtime as it is written, without its rewriting of graphs."""

    def __init__(self, path: Path) -> None:
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.log_severity_level = 3  # Errors; warnings are of initializers that nobody reads.
        try:
            self._session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime's exceptions have no common class but this.
            raise SourceError(f"ONNX Runtime cannot load {path.name}: {_first_line(error)}") from error
        self.outputs = tuple(output.name for output in self._session.get_outputs())

    def run(self, feeds: Arrays) -> dict[str, npt.NDArray[Any]]:
        """The outputs by name.

        Raises:
            GraphRunError: the graph does not take inputs of these shapes or values.
        """
        try:
            results = self._session.run(list(self.outputs), dict(feeds))
        except Exception as error:  # As above.
            raise GraphRunError(_first_line(error)) from error
        return dict(zip(self.outputs, results, strict=True))


class GraphRunError(Exception):
    """The graph refused its inputs; who knows what was changed about them says so."""


def difference_of(expected: Arrays, seen: Arrays) -> Difference | str:
    """How far ``seen`` is from ``expected``, or what is wrong with it beyond numbers."""
    total = Difference(0.0, 0.0)
    for name, right in expected.items():
        got = seen[name]
        if got.shape != right.shape:
            return f"output {name} has shape {list(got.shape)} where the model gives {list(right.shape)}"
        if got.dtype != right.dtype:
            return f"output {name} is {got.dtype} where the model gives {right.dtype}"
        delta = got.astype(np.float64) - right.astype(np.float64)
        scale = float(np.linalg.norm(right.astype(np.float64)))
        size = float(np.linalg.norm(delta))
        if not np.isfinite(size):
            return f"output {name} has NaN or Inf where the model has none"
        relative = size / scale if scale > 0 else size
        total = total.joined(Difference(float(np.abs(delta).max(initial=0.0)), relative))
    return total


def compare(
    graph: UnoptimizedGraph, original: Original, cases: Sequence[tuple[Probe | None, Arrays, Arrays]]
) -> Difference:
    """How far the graph is from the original over ``cases``: a probe or None for a sample batch, inputs, outputs.

    Raises:
        SourceError: an axis that is meant to be dynamic is fixed in the graph.
        StepFailedError: the graph computes something else.
    """
    total = Difference(0.0, 0.0)
    for probe, feeds, expected in cases:
        try:
            found = difference_of(expected, graph.run(feeds))
        except GraphRunError as error:
            found = str(error)
        if isinstance(found, Difference) and found.relative > TOLERANCE:
            found = f"the outputs differ from the model's by {found.relative:.2g} of their norm"
        if isinstance(found, str):
            raise _failure(probe, found, original, feeds)
        total = total.joined(found)
    return total


def _failure(probe: Probe | None, problem: str, original: Original, feeds: Arrays) -> Exception:
    lengths = lengths_of(original.inputs, feeds)
    if probe is None or probe.axis is None:
        return StepFailedError(
            f"the graph of {original.what} does not compute what the model does ({lengths}): {problem}",
            hint="the exporter translated the model wrongly; give source.onnx with a graph made otherwise",
        )
    return fixed_axis(original, probe, problem)


def fixed_axis(original: Original, probe: Probe, problem: str) -> SourceError:
    """The error for an axis that is declared dynamic, but that the model or its graph knows at one length only."""
    axis = str(probe.axis)
    names = [tensor.name for tensor in original.inputs if axis in tensor.shape]
    return SourceError(
        f"input{'s' if len(names) > 1 else ''} {', '.join(names)}: axis {axis!r} was fixed by {original.what}; with a length of "
        f"{probe.length} it fails: {problem}",
        hint="make the axis dynamic in the model (e.g. reshape by the input's own shape), or give its fixed length in the spec",
    )


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0][:400] if str(error).strip() else type(error).__name__

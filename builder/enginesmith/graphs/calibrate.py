"""Ranges of activations: the graph run on samples, its inner tensors seen batch by batch.

Two passes in bounded memory: the first keeps the largest |value| of every channel, the second (where the method needs
one) a histogram of every tensor, after smoothing. ModelOpt's histogram calibrator chooses the range, but for ``mse``. Padding counts for
nothing: it is real to the kernels but reaches no result.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx import helper

from enginesmith.errors import GateError, SourceError, ToolchainError
from enginesmith.graphs.editing import Array, EditableGraph, TensorType, save_model
from enginesmith.graphs.quantizable import GraphRecipe
from enginesmith.graphs.signature import MODEL_FILE

Progress = Callable[[float | None, str], None]

_MASK = "attention_mask"
_STRIDE = 4
"""Candidate ranges are this many of 2048 bins apart: 0.2% of the range, a quarter of the search."""
_BINS = 2048
_COUNTED_VALUES = 1 << 30
"""ModelOpt counts in 32 bits; a histogram of so many values is sharp enough."""


def load_batches(directory: Path, inputs: Sequence[str]) -> list[dict[str, Array]]:
    """The batches of a ``sample`` artifact, each with one array per graph input.

    Raises:
        SourceError: there are none, or their names are not those of the graph's inputs.
    """
    batches = []
    for path in sorted((directory / "batches").glob("*.npz")):
        with np.load(path, allow_pickle=False) as file:
            batch = {name: file[name] for name in file.files}
        if missing := sorted(set(inputs) - set(batch)):
            raise SourceError(
                f"samples {path.name} have no input {missing[0]!r}; they have: {', '.join(sorted(batch))}",
                hint=f"the graph's inputs are: {', '.join(inputs)}",
            )
        batches.append({name: batch[name] for name in inputs})
    if not batches:
        raise SourceError(f"no samples in {directory}", hint="give at least one")
    return batches


class ActivationReader:
    """Runs a graph on batches and shows the values of inner tensors, without their padding."""

    def __init__(
        self,
        graph: EditableGraph,
        tensors: Sequence[str],
        *,
        batches: Sequence[Mapping[str, Array]],
        scratch: Path,
    ) -> None:
        """``scratch``: a directory for the graph with its inner tensors as outputs."""
        self._graph = graph
        self._tensors = tuple(dict.fromkeys(tensors))
        self._batches = batches
        self._types = graph.types()
        inputs = {value.name for value in graph.graph.input}
        self._computed = [name for name in self._tensors if name not in inputs]
        self._session = _session_with_outputs(graph.model, self._computed, scratch)

    def passes(self, note: str, progress: Progress) -> Iterator[tuple[str, Array]]:
        """``(tensor, |values|)`` of every batch and tensor, float32, rows of padding left out.

        Raises:
            GateError: a value is NaN or Inf; the tensor and the node that computes it are named.
        """
        for index, batch in enumerate(self._batches):
            progress(index / len(self._batches), note)
            # Asked for no output by name, ONNX Runtime would return them all.
            computed = self._session.run(self._computed, dict(batch)) if self._computed else []
            values = dict(batch) | dict(zip(self._computed, computed, strict=True))
            for name in self._tensors:
                seen = without_padding(values[name], self._types.get(name), mask=batch.get(_MASK))
                if not np.isfinite(seen).all():
                    node = self._graph.producer(name)
                    where = "an input" if node is None else f"the output of {node.name}"
                    raise GateError(
                        f"calibration met NaN or Inf in {name}, {where}",
                        hint="the weights or the samples hold NaN or overflow; check their source",
                    )
                if seen.size:
                    yield name, np.abs(seen)


def without_padding(values: Array, kind: TensorType | None, *, mask: Array | None) -> Array:
    """``values`` [rows, channels] or as they are, without the positions where ``mask`` [batch, sequence] is 0.

    Which axis is the sequence comes from shape inference. Where that does not know, a tensor [batch, sequence, ...] or
    [batch * sequence, ...] is told by its lengths and others are kept whole.
    """
    if mask is None or mask.ndim != 2 or mask.all():
        return values
    keep = mask.astype(bool)
    batch, length = keep.shape
    kept: Array = values
    if values.shape[0] == batch and (axes := _sequence_axes(values, kind, length)):
        # One axis is enough: along the other axis of attention's products the model itself has masked.
        kept = np.moveaxis(values, axes[0], 1)[keep]
    elif values.ndim == 2 and values.shape[0] == batch * length:
        kept = values[keep.reshape(-1)]
    return kept


def _sequence_axes(values: Array, kind: TensorType | None, length: int) -> list[int]:
    lengths = [axis for axis in range(1, values.ndim) if values.shape[axis] == length]
    if kind is None or kind.shape is None or len(kind.shape) != values.ndim:
        return lengths if len(lengths) == 1 or (values.ndim <= 3 and 1 in lengths) else []
    # A layer may well be as wide as the texts of a batch are long.
    return [axis for axis in lengths if not isinstance(kind.shape[axis], int)]


def channel_maxima(
    reader: ActivationReader, progress: Progress, *, whole: frozenset[str]
) -> dict[str, Array]:
    """Of each tensor the largest |value| per channel of its last axis, float32; of those in ``whole`` one for all.

    Raises:
        GateError: a value is NaN or Inf.
    """
    maxima: dict[str, Array] = {}
    for name, values in reader.passes("looking for the largest activations", progress):
        rows = values.reshape(1, -1).max(axis=1) if name in whole else None
        seen = values.reshape(-1, values.shape[-1]).max(axis=0) if rows is None else rows
        maxima[name] = np.maximum(maxima[name], seen) if name in maxima else seen
    return maxima


def ranges(
    reader: ActivationReader,
    maxima: Mapping[str, Array],
    factors: Mapping[str, Array],
    *,
    recipe: GraphRecipe,
    progress: Progress,
) -> dict[str, float]:
    """The range (amax) of each tensor in ``maxima``, of its values times ``factors`` [channels] where it has some.

    Raises:
        GateError: a value is NaN or Inf.
        ToolchainError: the method needs ModelOpt, which is missing.
    """
    largest = {name: float((seen * factors.get(name, np.float32(1))).max()) for name, seen in maxima.items()}
    if recipe.method == "max":
        return largest
    alive = {name: amax for name, amax in largest.items() if amax > 0}
    make = _SquaredErrors if recipe.method == "mse" else _Histogram
    histograms: dict[str, _Histogram | _SquaredErrors] = {name: make(amax) for name, amax in alive.items()}
    for name, values in reader.passes("counting activations", progress):
        if name in histograms:
            histograms[name].count(values * factors[name] if name in factors else values)
    found = dict(largest)
    for index, (name, histogram) in enumerate(histograms.items()):
        progress(index / len(histograms), f"choosing ranges by {recipe.method}")
        found[name] = min(histogram.amax(recipe), largest[name])
    return found


class _Histogram:
    """ModelOpt's histogram of one tensor, whose largest value is known before."""

    def __init__(self, largest: float) -> None:
        torch, calibrator = _modelopt()
        self._tensor = torch.from_numpy
        self._calibrator = calibrator(num_bits=8, axis=None, unsigned=False)
        self._values = 0
        # The first values decide the width of the bins: the largest one alone makes them span the range.
        self._calibrator.collect(torch.tensor([largest], dtype=torch.float32))

    def count(self, values: Array) -> None:
        if self._values < _COUNTED_VALUES:
            self._values += values.size
            self._calibrator.collect(self._tensor(np.ascontiguousarray(values)))

    def amax(self, recipe: GraphRecipe) -> float:
        if recipe.method == "percentile":
            return float(self._calibrator.compute_amax("percentile", percentile=recipe.percentile))
        return float(self._calibrator.compute_amax(recipe.method, stride=_STRIDE))


class _SquaredErrors:
    """A histogram of one tensor, and the range with the smallest mean squared error of INT8.

    ModelOpt 0.47 has a method mse, but it passes the number of bits as the bias of its quantizer
    (``calib/histogram.py``: ``fake_tensor_quant(centers, amax, num_bits, unsigned)``) and so measures another error.
    """

    def __init__(self, largest: float) -> None:
        self._largest = largest
        self._counts = np.zeros(_BINS, np.int64)

    def count(self, values: Array) -> None:
        self._counts += np.histogram(values, bins=_BINS, range=(0.0, self._largest))[0]

    def amax(self, recipe: GraphRecipe) -> float:
        bound = recipe.activation_bound
        width = self._largest / _BINS
        centers = (np.arange(_BINS) + 0.5) * width

        def error(amax: float) -> float:
            rounded = np.minimum(np.rint(centers * (bound / amax)), bound) * (amax / bound)
            return float(self._counts @ (rounded - centers) ** 2)

        return min((edge * width for edge in range(_BINS, 127, -_STRIDE)), key=error)


def _modelopt() -> tuple[Any, Any]:
    """torch, and ModelOpt's histogram calibrator, whose import warns of every optional part that it lacks."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import torch
            from modelopt.torch.quantization.calib import HistogramCalibrator
    except ImportError as error:
        raise ToolchainError(
            f"nvidia-modelopt cannot be imported: {error}",
            hint="install enginesmith with the extra `build`, or use method max",
        ) from error
    return torch, HistogramCalibrator


def _session_with_outputs(
    model: onnx.ModelProto, tensors: Sequence[str], scratch: Path
) -> ort.InferenceSession:
    shown = onnx.ModelProto()
    shown.CopyFrom(model)
    present = {value.name for value in shown.graph.output}
    for name in tensors:
        if name not in present:
            shown.graph.output.append(helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
    return session_of(shown, scratch)


def session_of(
    model: onnx.ModelProto, scratch: Path, *, config: Mapping[str, str] | None = None
) -> ort.InferenceSession:
    """An ONNX Runtime session of ``model`` on this CPU, through a file in ``scratch``, which is overwritten."""
    scratch.mkdir(parents=True, exist_ok=True)
    save_model(model, scratch)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    for key, value in (config or {}).items():
        options.add_session_config_entry(key, value)
    return ort.InferenceSession(str(scratch / MODEL_FILE), options, providers=["CPUExecutionProvider"])

"""Whether an engine computes what ONNX Runtime computes from the same graph, through Polygraphy's Comparator.

Runs where a GPU can run the engine. Which runners are compared is the caller's, so the judgement itself runs anywhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from enginesmith.errors import GateError
from enginesmith.graphs.agreement import agreement

Batch = Mapping[str, npt.NDArray[Any]]

TOLERANCES: Mapping[str, float] = {
    "float32": 1e-3,
    "float16": 1e-2,
    "int8": 5e-2,
    "float8_e4m3fn": 5e-2,
}
"""Largest relative error (norm of the differences over that of the reference) by the coarsest type in the graph. Both sides
compute the same graph, so what is left is the order of sums and, with quantization, values on the edge of two codes."""
_COARSEST_FIRST = ("float8_e4m3fn", "int8", "bfloat16", "float16")
_TYPE_OF_PRECISION = {"FP8": "float8_e4m3fn", "INT8": "int8", "BF16": "bfloat16", "HALF": "float16"}


def coarsest_type(layers: Sequence[Mapping[str, Any]]) -> str:
    """The coarsest type that a layer of the network writes."""
    seen = {_TYPE_OF_PRECISION.get(part) for layer in layers for part in layer["precision"]}
    return next((name for name in _COARSEST_FIRST if name in seen), "float32")


def load_batches(samples: Path) -> list[Batch]:
    """The sample batches in ``samples``, in order."""
    batches: list[Batch] = []
    for path in sorted((samples / "batches").glob("*.npz")):
        with np.load(path) as arrays:
            batches.append({name: arrays[name] for name in arrays.files})
    return batches


def compare(
    reference: Any, candidate: Any, batches: Sequence[Batch], *, task: str, tolerance: float
) -> dict[str, Any]:
    """The figures of ``candidate`` against ``reference``, both Polygraphy runners, over ``batches``.

    Raises:
        GateError: they disagree by more than ``tolerance``.
    """
    from polygraphy.comparator import Comparator

    results = Comparator.run([reference, candidate], data_loader=[dict(batch) for batch in batches])
    wanted, seen = (_by_output(iterations) for _, iterations in results)
    figures = agreement(wanted, {name: seen[name] for name in wanted}, task=task)
    error = figures["relative_error"]
    if not error <= tolerance:  # Also when it is not a number.
        raise GateError(
            f"the engine does not compute what ONNX Runtime does: relative error {error:.3g} over {len(batches)} batches, "
            f"allowed: {tolerance:g}",
            hint="build with another optimization_level or TensorRT, or report the graph to NVIDIA: both run the same graph",
        )
    return {"batches": len(batches), "tolerance": tolerance, **figures}


def _by_output(iterations: Sequence[Mapping[str, Any]]) -> dict[str, list[npt.NDArray[Any]]]:
    return {name: [np.asarray(outputs[name]) for outputs in iterations] for name in iterations[0]}

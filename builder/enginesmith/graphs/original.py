"""A model as it came, ready to be exported and to be compared with: what all kinds of sources become."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy.typing as npt

from enginesmith.graphs.signature import AxisRange, GraphTensor

Arrays = Mapping[str, npt.NDArray[Any]]
"""Inputs or outputs of a graph by name."""


@dataclass(frozen=True)
class Original:
    """A model of a checkpoint, a module or an ONNX file."""

    inputs: tuple[GraphTensor, ...]
    outputs: tuple[str, ...]
    axes: Mapping[str, AxisRange]
    run: Callable[[Arrays], dict[str, npt.NDArray[Any]]]
    """The outputs of the original model, unchanged. Not to be called once ``exportable`` was."""
    exportable: Callable[[], Any]
    """The ``torch.nn.Module`` to trace: positional inputs in order, a tuple of outputs in order, the model as ``model``.
    Of an ONNX file the finished ``ModelProto``."""
    what: str
    """How messages call it."""
    labels: tuple[str, ...] = ()
    pad_id: int = 0
    facts: Mapping[str, Any] = field(default_factory=dict)
    longest_probe: int | None = None
    """The greatest length of an axis that is worth running; None: every one that the spec names."""
    is_graph: bool = False
    """Whether ``exportable`` gives a graph already."""


def axes_of(axes: Mapping[str, Mapping[str, Any]]) -> dict[str, AxisRange]:
    """The ranges of a spec's ``axes``; the usual length is the longest where none is given."""
    return {
        name: AxisRange(axis["min"], axis["opt"] or axis["max"], axis["max"]) for name, axis in axes.items()
    }

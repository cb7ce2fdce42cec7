"""The signature of a graph: its inputs and outputs, the same on every runtime and in every step.

Written by the ``export`` step as ``signature.json`` beside ``model.onnx``; everything later reads it instead of guessing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from enginesmith.errors import StoreError

SIGNATURE_FILE = "signature.json"
MODEL_FILE = "model.onnx"
WEIGHTS_FILE = "model.onnx.data"
"""Beside ``model.onnx`` where the weights do not fit into one protobuf (2 GiB)."""


@dataclass(frozen=True)
class GraphTensor:
    """An input or output. ``shape`` counts the batch; a name is a dynamic axis."""

    name: str
    dtype: str
    """NumPy's name: float32, int64, ..."""
    shape: tuple[int | str, ...]

    @property
    def dims(self) -> tuple[int, ...]:
        """Triton's dims: without the batch, -1 for a dynamic axis."""
        return tuple(size if isinstance(size, int) else -1 for size in self.shape[1:])


@dataclass(frozen=True)
class AxisRange:
    """The lengths that a dynamic axis may have."""

    min: int
    opt: int
    max: int


@dataclass(frozen=True)
class Signature:
    """What goes in and what comes out."""

    task: str
    inputs: tuple[GraphTensor, ...]
    outputs: tuple[GraphTensor, ...]
    axes: Mapping[str, AxisRange]
    """Of every dynamic axis but the batch, whose range the serving section has."""
    labels: tuple[str, ...] = ()
    """The names of the classes, in the order of the output (classification)."""
    pad_id: int = 0
    """What pads ``input_ids`` (tasks that read text)."""

    def write(self, directory: Path) -> None:
        """Write ``signature.json`` into ``directory``."""
        (directory / SIGNATURE_FILE).write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")


def read_signature(directory: Path) -> Signature:
    """The signature in ``directory``.

    Raises:
        StoreError: it is missing or not one.
    """
    path = directory / SIGNATURE_FILE
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        return Signature(
            task=document["task"],
            inputs=tuple(_tensor(entry) for entry in document["inputs"]),
            outputs=tuple(_tensor(entry) for entry in document["outputs"]),
            axes={name: AxisRange(**entry) for name, entry in document["axes"].items()},
            labels=tuple(document["labels"]),
            pad_id=document["pad_id"],
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StoreError(f"cannot read {path}: {error}", hint="build again") from error


def _tensor(entry: Mapping[str, Any]) -> GraphTensor:
    return GraphTensor(entry["name"], entry["dtype"], tuple(entry["shape"]))

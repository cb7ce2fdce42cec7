"""Recipes: where every byte of a rank's tensors comes from, without reading any.

A rank's tensor is a sequence of pieces, one after the other in memory. A piece is a rectangle of a source tensor,
possibly recoded, or numbers that no source holds. Source tensors are seen as matrices: a vector is one column.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from enginesmith.checkpoints.tensors import NUMPY_DTYPES, TensorEntry


@dataclass(frozen=True)
class Cast:
    """Values rounded to the target's dtype."""


@dataclass(frozen=True)
class Dequantize:
    """INT8 codes times the scale of their row, rounded to the target's dtype."""

    scale: str
    """The tensor that holds one scale for each row of the source."""


@dataclass(frozen=True)
class Rescale:
    """FP8 codes that mean the same under the largest of several scales, rounded to the nearest code."""

    own: str
    others: tuple[str, ...]
    """The scales that share one, the own included."""


Recode = Cast | Dequantize | Rescale


@dataclass(frozen=True)
class Rectangle:
    """Rows and columns of a source tensor seen as a matrix, row after row."""

    source: str
    rows: range
    columns: range
    recode: Recode | None = None

    @property
    def elements(self) -> int:
        """How many numbers it holds."""
        return len(self.rows) * len(self.columns)


@dataclass(frozen=True)
class Fill:
    """One number, repeated."""

    value: float
    elements: int


@dataclass(frozen=True)
class Largest:
    """The largest of some scalar tensors, and of ``floor``. One number."""

    sources: tuple[str, ...]
    floor: float = 0.0
    elements: int = 1


Piece = Rectangle | Fill | Largest


@dataclass(frozen=True)
class RankTensor:
    """A tensor of one rank's file. ``dtype`` is safetensors' spelling."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]

    def __post_init__(self) -> None:
        held = sum(piece.elements for piece in self.pieces)
        assert held == math.prod(self.shape), f"{self.name}: {held} elements for shape {self.shape}"

    @property
    def nbytes(self) -> int:
        """Size of the data in bytes."""
        return NUMPY_DTYPES[self.dtype].itemsize * math.prod(self.shape)


def matrix_shape(entry: TensorEntry) -> tuple[int, int]:
    """Rows and columns of a tensor seen as a matrix: a vector is one column, a scalar one number."""
    if len(entry.shape) < 2:
        return math.prod(entry.shape), 1
    return math.prod(entry.shape[:-1]), entry.shape[-1]

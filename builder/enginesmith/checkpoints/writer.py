"""Writing safetensors files piece by piece, so that a checkpoint of any size is converted in bounded memory."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import ml_dtypes
import numpy as np
import numpy.typing as npt

from enginesmith.checkpoints.tensors import NUMPY_DTYPES
from enginesmith.errors import SourceError

WeightDtype = Literal["bfloat16", "float16", "float32"]

SAFETENSORS_DTYPES: Mapping[str, str] = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
"""safetensors' spelling of the dtypes that a spec may ask for."""

PIECE_ELEMENTS = 8 << 20
"""Elements that a conversion holds at a time: 32 MiB as float32."""


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor whose place in the file is reserved before its data is known."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size of the data in bytes."""
        return NUMPY_DTYPES[self.dtype].itemsize * math.prod(self.shape)


def write_safetensors(
    path: Path, plan: list[PlannedTensor], *, pieces: Iterator[npt.NDArray[Any]], metadata: Mapping[str, str]
) -> None:
    """Write the tensors of ``plan``, in its order, from ``pieces``: their data, cut anywhere, in the same order.

    Each piece already has the dtype of its tensor. Only one piece is held at a time.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for tensor in plan:
        header[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [end, end := end + tensor.nbytes],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # The format wants the data aligned to 8 bytes.
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        data_begin = file.tell()
        for piece in pieces:
            file.write(np.ascontiguousarray(piece).reshape(-1).view(np.uint8).data)
        written = file.tell() - data_begin
    assert written == end, f"{path.name}: {written} bytes written, {end} planned"


def rows_per_piece(shape: tuple[int, ...], *, multiple: int = 1) -> int:
    """How many rows of a tensor make one piece: at least ``multiple``, and a multiple of it."""
    row_elements = max(1, math.prod(shape[1:]))
    return max(1, PIECE_ELEMENTS // (row_elements * multiple)) * multiple


def converted(piece: npt.NDArray[Any], dtype: str, *, name: str) -> npt.NDArray[Any]:
    """``piece`` rounded to the nearest value of ``dtype`` (safetensors' spelling), ties to even.

    Raises:
        SourceError: a finite value of tensor ``name`` is too large for ``dtype``.
    """
    target = NUMPY_DTYPES[dtype]
    if piece.dtype == target:
        return piece
    with np.errstate(over="ignore"):
        result = piece.astype(target)
    lost = np.isfinite(piece) & ~np.isfinite(result)
    if lost.any():
        largest = np.abs(piece[lost].astype(np.float32)).max()
        raise SourceError(
            f"tensor {name} reaches {largest:g}, more than {dtype} can hold ({float(ml_dtypes.finfo(target).max):g})",
            hint="ask for dtype bfloat16 or float32",
        )
    return result

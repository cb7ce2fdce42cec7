"""Arithmetic on blocks of weights: what changes when a tensor is not simply copied."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from enginesmith.checkpoints.tensors import NUMPY_DTYPES, CheckpointTensors
from enginesmith.checkpoints.writer import converted
from enginesmith.engines.tensorrt_llm.layout import Cast, Dequantize, Recode, Rescale


@dataclass(frozen=True)
class Scales:
    """Scalar scales by tensor name, and where scales of rows are read."""

    scalars: Mapping[str, float]
    tensors: CheckpointTensors


def recoded(
    block: npt.NDArray[Any], recode: Recode, dtype: str, *, scales: Scales, rows: range, name: str
) -> npt.NDArray[Any]:
    """``block`` [rows, columns] in ``dtype`` (safetensors' spelling); ``rows`` are its rows in the source tensor.

    Raises:
        SourceError: a value is too large for ``dtype``.
    """
    match recode:
        case Cast():
            return converted(block, dtype, name=name)
        case Dequantize(scale):
            of_rows = scales.tensors.read_rows(scale, rows.start, rows.stop).astype(np.float32)
            return converted(block.astype(np.float32) * of_rows.reshape(-1, 1), dtype, name=name)
        case Rescale(own, others):
            largest = max(scales.scalars[other] for other in others)
            return rescaled_fp8(block, scales.scalars[own], largest)


def rescaled_fp8(codes: npt.NDArray[Any], own: float, largest: float) -> npt.NDArray[Any]:
    """FP8 (E4M3) codes under scale ``largest`` nearest to what ``codes`` mean under ``own``."""
    if own == largest:
        return codes
    # 256 codes: a table is exact and faster than arithmetic on every element.
    table = np.arange(256, dtype=np.uint8).view(NUMPY_DTYPES["F8_E4M3"]).astype(np.float32)
    with np.errstate(invalid="ignore"):
        values = (table * np.float32(own)) / np.float32(largest)
        fresh = values.astype(NUMPY_DTYPES["F8_E4M3"]).view(np.uint8)
    return fresh[codes.view(np.uint8)].view(NUMPY_DTYPES["F8_E4M3"])

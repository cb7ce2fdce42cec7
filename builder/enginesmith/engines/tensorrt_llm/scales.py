"""Values that must be known before a byte is written: scales, and vectors that several layers must share.

A few kilobytes for each layer. Finds what headers cannot show.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from enginesmith.checkpoints.tensors import CheckpointTensors
from enginesmith.engines.tensorrt_llm.layout import Largest, Rectangle, Rescale
from enginesmith.engines.tensorrt_llm.plan import ConversionPlan
from enginesmith.errors import SourceError

_HINT = "quantize the checkpoint again with ModelOpt, which gives fused layers one vector"


def scalar_scales(tensors: CheckpointTensors, plan: ConversionPlan) -> Mapping[str, float]:
    """The value of every scalar scale that the plan refers to, by tensor name.

    Raises:
        SourceError: one is missing, or no finite number above 0; or layers that become one have different vectors.
    """
    _check_shared_vectors(tensors, plan)
    names: set[str] = set()
    for rank in plan.ranks:
        for piece in (piece for tensor in rank for piece in tensor.pieces):
            if isinstance(piece, Largest):
                names.update(piece.sources)
            elif isinstance(piece, Rectangle) and isinstance(piece.recode, Rescale):
                names.update(piece.recode.others)
    return {name: _scalar(tensors, name) for name in sorted(names)}


def _scalar(tensors: CheckpointTensors, name: str) -> float:
    values = tensors.read(name).astype(np.float32).reshape(-1)
    if values.size != 1 or not np.isfinite(values[0]) or not values[0] > 0:
        seen = f"shape {list(tensors.shape(name))}" if values.size != 1 else f"{float(values[0])}"
        raise SourceError(
            f"{tensors.entry(name).file}: {name} must hold one finite number above 0, seen: {seen}",
            hint="quantize the checkpoint again, or fetch it again if it came quantized",
        )
    return float(values[0])


def _check_shared_vectors(tensors: CheckpointTensors, plan: ConversionPlan) -> None:
    for names in sorted(plan.shared_vectors):
        first = tensors.read(names[0])
        for name in names[1:]:
            if not np.array_equal(first, tensors.read(name)):
                raise SourceError(
                    f"{names[0]} and {name} differ, but TensorRT-LLM fuses their layers into one with one vector",
                    hint=_HINT,
                )

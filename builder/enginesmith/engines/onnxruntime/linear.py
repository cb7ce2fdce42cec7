"""Linear layers of a quantized checkpoint, read with the very same integers that ``linear_writer`` makes nodes of.

ModelOpt's unified checkpoint stores one linear layer as ``weight`` plus scales; their dtypes say how it was
quantized, so checkpoints that others quantized are read the same way:

=========  =======================  =========================================================================
kind       weight                   beside it
=========  =======================  =========================================================================
plain      BF16/F16/F32 [N, K]
int8_wo    I8 [N, K]                weight_scale [N]
int8_sq    I8 [N, K]                weight_scale [N], input_scale [], pre_quant_scale [K]
int4_awq   U8 [N/2, K]              weight_scale [N, K/group], pre_quant_scale [K] unless folded into a norm.
                                    Low nibble: even row, high nibble: odd row, two's complement.
w4a8_awq   U8 [N/2, K]              as int4_awq, and weight_scale_2 [], input_scale []. Becomes fp8 with a smoothed
                                    input: the target multiplies FP8 values, so an INT4 code stands for
                                    FP8(code * weight_scale / weight_scale_2) * weight_scale_2.
fp8        F8_E4M3 [N, K]           weight_scale [], input_scale []
=========  =======================  =========================================================================

Layers that share their input (q, k, v) become one node when they agree in everything but the rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import ml_dtypes
import numpy as np
import numpy.typing as npt

from enginesmith.checkpoints.tensors import CheckpointTensors
from enginesmith.engines.onnxruntime.graph import Array
from enginesmith.errors import SourceError

Kind = Literal["plain", "int8_wo", "int8_sq", "int4_awq", "fp8"]
FLOAT_DTYPES = ("BF16", "F16", "F32")
"""Safetensors dtypes of tensors that are not quantized, and of scales."""
_QUANTIZED_DTYPES = ("I8", "U8", "F8_E4M3")
_SCALES_HINT = "quantize the checkpoint again, or fetch it again if it came quantized"
FP8_BOUND = 448.0
_INT4_BOUND = 7.0


@dataclass(frozen=True)
class Linear:
    """One linear layer, or several stacked along their rows. Shapes: N rows (outputs), K columns (inputs)."""

    kind: Kind
    weight: Array
    """plain, fp8: as stored [N, K]; int8_*: int8 [N, K]; int4_awq: int8 [N, K] with values in [-8, 7]."""
    bias: npt.NDArray[np.float32] | None
    weight_scale: npt.NDArray[np.float32] | None = None
    """int8_*: [N]; int4_awq: [N, K / group]; fp8: [N]."""
    input_scale: float | None = None
    pre_quant_scale: npt.NDArray[np.float32] | None = None

    @property
    def rows(self) -> int:
        """Outputs of the layer."""
        return int(self.weight.shape[0])


def read_linear(tensors: CheckpointTensors, name: str) -> Linear:
    """The linear layer at module path ``name``.

    Raises:
        SourceError: tensors are missing or their dtypes do not belong to a supported scheme.
    """
    weight_name = f"{name}.weight"
    dtype = tensors.dtype(weight_name)
    if dtype not in (*FLOAT_DTYPES, *_QUANTIZED_DTYPES):
        raise SourceError(
            f"tensor {weight_name} has dtype {dtype}, which cannot be lowered to ONNX Runtime; "
            f"supported: {', '.join((*FLOAT_DTYPES, *_QUANTIZED_DTYPES))}"
        )
    bias = read_float(tensors, f"{name}.bias").astype(np.float32) if f"{name}.bias" in tensors else None
    if dtype in FLOAT_DTYPES:
        return Linear("plain", tensors.read(weight_name), bias)
    return replace(_read_quantized(tensors, name, dtype), bias=bias)


def _read_quantized(tensors: CheckpointTensors, name: str, dtype: str) -> Linear:
    """The layer without its bias; the dtypes and shapes beside the weight say what it is."""
    if f"{name}.weight_scale" not in tensors:
        raise SourceError(f"layer {name} has {dtype} weights but no {name}.weight_scale", hint=_SCALES_HINT)
    scale = read_scale(tensors, f"{name}.weight_scale")
    smoothing = (
        read_scale(tensors, f"{name}.pre_quant_scale") if f"{name}.pre_quant_scale" in tensors else None
    )
    input_scale = (
        read_scalar_scale(tensors, f"{name}.input_scale") if f"{name}.input_scale" in tensors else None
    )
    weight = tensors.read(f"{name}.weight")
    if dtype == "I8" and scale.shape == weight.shape[:1]:
        kind: Kind = "int8_wo" if input_scale is None else "int8_sq"
        return Linear(kind, weight, None, scale, input_scale, smoothing)
    if dtype == "U8" and scale.ndim == 2 and input_scale is None:
        return Linear("int4_awq", _unpack_int4(weight), None, scale, None, smoothing)
    if dtype == "U8" and scale.ndim == 2 and input_scale is not None and f"{name}.weight_scale_2" in tensors:
        second = np.float32(read_scalar_scale(tensors, f"{name}.weight_scale_2"))
        weight = fp8_from_int4(_unpack_int4(weight), scale, second)
        return Linear("fp8", weight, None, np.full(weight.shape[0], second), input_scale, smoothing)
    if dtype == "F8_E4M3" and scale.size == 1 and input_scale is not None:
        of_rows = np.full(weight.shape[0], scale.reshape(()), np.float32)
        return Linear("fp8", weight, None, of_rows, input_scale, smoothing)
    raise SourceError(
        f"layer {name} is quantized in a way that cannot be lowered to ONNX Runtime: weight {dtype} {weight.shape}, "
        f"weight_scale {scale.shape}, input_scale {'present' if input_scale is not None else 'absent'}"
    )


def fp8_from_int4(
    codes: npt.NDArray[np.int8], scale: npt.NDArray[np.float32], second: np.float32
) -> npt.NDArray[Any]:
    """The FP8 codes [N, K] of INT4 ``codes`` [N, K] under group scales [N, K / group] and one ``second`` scale.

    In the order of ModelOpt's fake quantization, so that each value falls on the same side of a rounding boundary:
    it divides by ``7 / amax``, which is not the inverse of the scale to the last bit.
    """
    seven = np.float32(_INT4_BOUND)
    steps_per_unit = np.divide(seven, scale * seven, out=np.ones_like(scale), where=scale > 0)
    values = codes / np.repeat(steps_per_unit, codes.shape[1] // scale.shape[1], axis=1)
    bound = np.float32(FP8_BOUND)
    scaled = values * factor_of(float(second), FP8_BOUND)
    rounded: npt.NDArray[Any] = np.clip(scaled, -bound, bound).astype(ml_dtypes.float8_e4m3fn)
    return rounded


def read_float(tensors: CheckpointTensors, name: str) -> Array:
    """Tensor ``name`` as it is stored.

    Raises:
        SourceError: it is missing or no floating-point tensor of a supported width.
    """
    dtype = tensors.dtype(name)
    if dtype not in FLOAT_DTYPES:
        raise SourceError(f"tensor {name} has dtype {dtype}; supported: {', '.join(FLOAT_DTYPES)}")
    return tensors.read(name)


def read_scale(tensors: CheckpointTensors, name: str) -> npt.NDArray[np.float32]:
    """The scales in tensor ``name``.

    Raises:
        SourceError: they are missing, or one is NaN or Inf.
    """
    scale = read_float(tensors, name).astype(np.float32)
    if not np.all(np.isfinite(scale)):
        raise SourceError(f"{name} holds NaN or Inf", hint=_SCALES_HINT)
    return scale


def read_scalar_scale(tensors: CheckpointTensors, name: str) -> float:
    """The one scale in tensor ``name``.

    Raises:
        SourceError: it is missing, or not one finite number above 0.
    """
    scale = read_scale(tensors, name)
    if scale.size != 1 or not scale.reshape(()) > 0:
        seen = f"shape {list(scale.shape)}" if scale.size != 1 else f"{float(scale.reshape(()))}"
        raise SourceError(f"{name} must hold one number above 0, seen: {seen}", hint=_SCALES_HINT)
    return float(scale.reshape(()))


def _unpack_int4(packed: Array) -> npt.NDArray[np.int8]:
    """int8 [N, K] with values in [-8, 7] from uint8 [N / 2, K]."""
    rows = np.empty((2 * packed.shape[0], packed.shape[1]), np.int8)
    signed = packed.view(np.int8)
    rows[0::2] = (signed << 4) >> 4
    rows[1::2] = signed >> 4
    return rows


def stack(layers: Sequence[Linear]) -> Linear | None:
    """``layers`` as one layer, or None when they do not read the same quantized input."""
    first = layers[0]
    for other in layers[1:]:
        same_input = other.input_scale == first.input_scale and _same(
            other.pre_quant_scale, first.pre_quant_scale
        )
        if not same_input or _storage(other) != _storage(first):
            return None
    has_bias = any(layer.bias is not None for layer in layers)
    bias = np.concatenate([_bias_or_zero(layer) for layer in layers]) if has_bias else None
    scales = [layer.weight_scale for layer in layers if layer.weight_scale is not None]
    return replace(
        first,
        weight=np.concatenate([layer.weight for layer in layers]),
        bias=bias,
        weight_scale=np.concatenate(scales) if scales else None,
    )


def _same(left: Array | None, right: Array | None) -> bool:
    if left is None or right is None:
        return left is right
    return np.array_equal(left, right)


def _bias_or_zero(layer: Linear) -> npt.NDArray[np.float32]:
    return layer.bias if layer.bias is not None else np.zeros(layer.rows, np.float32)


def _storage(layer: Linear) -> tuple[object, ...]:
    """What must be equal for rows of two layers to lie in one tensor."""
    groups = () if layer.weight_scale is None else layer.weight_scale.shape[1:]
    return layer.kind, layer.weight.dtype, groups


def factor_of(scale: float, bound: float) -> np.float32:
    """What ModelOpt multiplies a value by before it rounds to codes up to ``bound``: ``bound / amax``, to the last bit.

    Its FP8 code divides a Python number by a tensor, which PyTorch computes as the reciprocal times the number.
    """
    amax = np.float32(scale) * np.float32(bound)
    if bound == FP8_BOUND:
        return np.float32(np.float32(1) / amax * np.float32(bound))
    return np.float32(np.float32(bound) / amax)

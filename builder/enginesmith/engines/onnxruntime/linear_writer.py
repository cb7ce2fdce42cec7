"""Linear layers as ONNX nodes that compute with the very same integers as the quantized checkpoint.

Knows the kinds of ``linear.Linear`` and the operators of ONNX Runtime that run them; reads no checkpoint.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
import numpy.typing as npt
from onnx import TensorProto

from enginesmith.engines.onnxruntime.graph import MICROSOFT, Array, Graph
from enginesmith.engines.onnxruntime.linear import FP8_BOUND, Linear, factor_of

INT8_BLOCK = 64
"""Columns per scale when per-row INT8 weights run as MatMulNBits; the scale of a row is repeated."""
_ZERO_POINT_8 = 128
_INT8_BOUND = 127.0


class LinearWriter:
    """Writes linear layers into a graph.

    ``accuracy_level`` is MatMulNBits': 1 computes with FP32 activations, 4 quantizes them to INT8 inside the kernel.
    """

    def __init__(self, graph: Graph, accuracy_level: int) -> None:
        self._graph = graph
        self._accuracy_level = accuracy_level
        self._quantized_inputs: dict[tuple[str, float, str], str] = {}
        self._dequantized_inputs: dict[str, str] = {}
        self._smoothed_inputs: dict[tuple[str, bytes], str] = {}

    def write(self, layer: Linear, value: str, name: str) -> str:
        """The output of ``layer`` applied to ``value`` (float32 [..., K]): float32 [..., N]."""
        value = self._smooth(layer, value, name)
        product = {
            "plain": self._plain,
            "int8_wo": self._int8_weight_only,
            "int8_sq": self._int8,
            "int4_awq": self._int4,
            "fp8": self._fp8,
        }[layer.kind](layer, value, name)
        if layer.bias is None:
            return product
        return self._graph.node(
            "Add", [product, self._graph.weight(f"{name}/bias", layer.bias)], f"{name}/with_bias"
        )

    def _smooth(self, layer: Linear, value: str, name: str) -> str:
        if layer.pre_quant_scale is None:
            return value
        key = (value, layer.pre_quant_scale.tobytes())
        if key not in self._smoothed_inputs:
            scale = self._graph.weight(f"{name}/pre_quant_scale", layer.pre_quant_scale)
            self._smoothed_inputs[key] = self._graph.node("Mul", [value, scale], f"{name}/smoothed")
        return self._smoothed_inputs[key]

    def _plain(self, layer: Linear, value: str, name: str) -> str:
        # Stored in the checkpoint's dtype; onnxruntime folds the cast when it loads the graph.
        weight = self._as_float(
            self._graph.weight(f"{name}/weight", np.ascontiguousarray(layer.weight.T)), layer.weight, name
        )
        return self._graph.node("MatMul", [value, weight], f"{name}/output")

    def _as_float(self, stored: str, array: Array, name: str) -> str:
        if array.dtype == np.float32:
            return stored
        return self._graph.node("Cast", [stored], f"{name}/weight_f32", to=TensorProto.FLOAT)

    def _int8_weight_only(self, layer: Linear, value: str, name: str) -> str:
        assert layer.weight_scale is not None
        blocks = -(-layer.weight.shape[1] // INT8_BLOCK)
        codes = _padded(layer.weight.astype(np.int16) + _ZERO_POINT_8, blocks * INT8_BLOCK, _ZERO_POINT_8)
        scales = np.repeat(layer.weight_scale[:, None], blocks, axis=1)
        return self.matmul_nbits(
            codes.astype(np.uint8),
            scales,
            value,
            name,
            bits=8,
            block=INT8_BLOCK,
            columns=layer.weight.shape[1],
        )

    def _int4(self, layer: Linear, value: str, name: str) -> str:
        assert layer.weight_scale is not None
        codes = (layer.weight + 8).astype(np.uint8)
        packed = np.bitwise_or(codes[:, 0::2], codes[:, 1::2] << 4, dtype=np.uint8)
        return self.matmul_nbits(
            packed,
            layer.weight_scale,
            value,
            name,
            bits=4,
            block=layer.weight.shape[1] // layer.weight_scale.shape[1],
            columns=layer.weight.shape[1],
        )

    def matmul_nbits(
        self,
        packed: npt.NDArray[np.uint8],
        scales: npt.NDArray[np.float32],
        value: str,
        name: str,
        *,
        bits: int,
        block: int,
        columns: int,
    ) -> str:
        """MatMulNBits with symmetric codes: ``packed`` uint8 [N, bytes per row], ``scales`` float32 [N, blocks]."""
        rows, blocks = scales.shape
        weight = self._graph.weight(
            f"{name}/weight_int{bits}", packed.reshape(rows, blocks, block * bits // 8)
        )
        scale = self._graph.weight(f"{name}/weight_scale", np.ascontiguousarray(scales, np.float32))
        return self._graph.node(
            "MatMulNBits",
            [value, weight, scale],
            f"{name}/output",
            domain=MICROSOFT,
            K=columns,
            N=rows,
            bits=bits,
            block_size=block,
            accuracy_level=self._accuracy_level,
        )

    def _int8(self, layer: Linear, value: str, name: str) -> str:
        # Both sides as uint8 around 128: onnxruntime's u8 x s8 kernel adds pairs of products in 16 bits and
        # saturates on x86 without VNNI, its u8 x u8 kernel does not. The integers are the same.
        assert layer.weight_scale is not None
        assert layer.input_scale is not None
        codes = (layer.weight.T.astype(np.int16) + _ZERO_POINT_8).astype(np.uint8)
        zero_point = self._graph.scalar(_ZERO_POINT_8, np.uint8)
        quantized = self._quantize_input(value, layer.input_scale, zero_point, name, bound=_INT8_BOUND)
        weight_zero_points = self._graph.weight(
            f"zero_points/{layer.rows}", np.full(layer.rows, _ZERO_POINT_8, np.uint8)
        )
        return self._graph.node(
            "MatMulIntegerToFloat",
            [
                quantized,
                self._graph.weight(f"{name}/weight_uint8", np.ascontiguousarray(codes)),
                self._graph.scalar(float(np.float32(layer.input_scale)), np.float32),
                self._graph.weight(f"{name}/weight_scale", layer.weight_scale),
                zero_point,
                weight_zero_points,
            ],
            f"{name}/output",
            domain=MICROSOFT,
        )

    def _fp8(self, layer: Linear, value: str, name: str) -> str:
        assert layer.weight_scale is not None
        assert layer.input_scale is not None
        quantized = self._quantize_input(value, layer.input_scale, self.fp8_zero(), name, bound=FP8_BOUND)
        scale = self._graph.scalar(float(np.float32(layer.input_scale)), np.float32)
        if quantized not in self._dequantized_inputs:
            inputs = [quantized, scale, self.fp8_zero()]
            self._dequantized_inputs[quantized] = self._graph.node(
                "DequantizeLinear", inputs, f"{quantized}/dequantized"
            )
        restored = self._dequantized_inputs[quantized]
        weight = self._graph.node(
            "DequantizeLinear",
            [
                self._graph.weight(f"{name}/weight_fp8", np.ascontiguousarray(layer.weight.T)),
                self._graph.weight(f"{name}/weight_scale", layer.weight_scale),
            ],
            f"{name}/weight_f32",
            axis=1,
        )
        return self._graph.node("MatMul", [restored, weight], f"{name}/output")

    def round_trip(self, value: str, scale: float, name: str, *, int8: bool) -> str:
        """``value`` rounded to INT8 or FP8 codes of one ``scale`` and back, as a quantized KV cache stores it."""
        zero = self._graph.scalar(0, np.int8) if int8 else self.fp8_zero()
        bound = _INT8_BOUND if int8 else FP8_BOUND
        quantized = self._quantize_input(value, scale, zero, name, bound=bound)
        inputs = [quantized, self._graph.scalar(float(np.float32(scale)), np.float32), zero]
        return self._graph.node("DequantizeLinear", inputs, f"{name}/dequantized")

    def fp8_zero(self) -> str:
        """The zero point that makes QuantizeLinear produce FP8 (E4M3)."""
        return self._graph.weight("zero/fp8", np.zeros((), ml_dtypes.float8_e4m3fn))

    def _quantize_input(self, value: str, scale: float, zero_point: str, name: str, *, bound: float) -> str:
        """``value`` quantized per tensor; layers that read the same value with the same scale share the node.

        ModelOpt multiplies by ``bound / amax`` where ONNX divides by the scale; the results differ in the last bit and
        now and then round to another integer. Exact mode does as ModelOpt does.
        """
        key = (value, scale, zero_point)
        if key not in self._quantized_inputs:
            divisor = scale
            if self._accuracy_level == 1:
                factor = factor_of(scale, bound)
                value = self._graph.node(
                    "Mul", [value, self._graph.scalar(float(factor), np.float32)], f"{name}/scaled_input"
                )
                divisor = 1.0
            inputs = [value, self._graph.scalar(float(np.float32(divisor)), np.float32), zero_point]
            self._quantized_inputs[key] = self._graph.node(
                "QuantizeLinear", inputs, f"{name}/quantized_input"
            )
        return self._quantized_inputs[key]


def quantize_rows(weight: Array, block: int) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float32]]:
    """Symmetric 8-bit codes [N, padded K] around 128 and scales [N, blocks], rounded to nearest: amax / 127 per block."""
    rows, columns = weight.shape
    blocks = -(-columns // block)
    padded = np.zeros((rows, blocks * block), np.float32)
    padded[:, :columns] = weight
    grouped = padded.reshape(rows, blocks, block)
    scales = np.maximum(np.abs(grouped).max(axis=2), np.finfo(np.float32).tiny) / 127
    codes = np.rint(grouped / scales[:, :, None]) + _ZERO_POINT_8
    return codes.astype(np.uint8).reshape(rows, -1), scales.astype(np.float32)


def _padded(codes: Array, columns: int, fill: int) -> Array:
    return np.pad(codes, ((0, 0), (0, columns - codes.shape[1])), constant_values=fill)

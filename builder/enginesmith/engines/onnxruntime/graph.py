"""An ONNX graph under construction whose weights stream to one file beside it.

Large tensors go to ``weights.bin`` as soon as they are made and are referenced by offset (ONNX external
data), so at most one of them is in memory. Small ones stay in the graph. Two graphs may share one file.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

OPSET = 21
IR_VERSION = 10
MICROSOFT = "com.microsoft"
_INLINE_BYTES = 1024
_ALIGNMENT = 4096  # a page, so that onnxruntime can map the file instead of reading it

_ELEMENT_TYPES: dict[Any, int] = {
    np.dtype(np.float32): TensorProto.FLOAT,
    np.dtype(np.float16): TensorProto.FLOAT16,
    np.dtype(np.int64): TensorProto.INT64,
    np.dtype(np.int32): TensorProto.INT32,
    np.dtype(np.int8): TensorProto.INT8,
    np.dtype(np.uint8): TensorProto.UINT8,
    np.dtype(ml_dtypes.bfloat16): TensorProto.BFLOAT16,
    np.dtype(ml_dtypes.float8_e4m3fn): TensorProto.FLOAT8E4M3FN,
}

Array = npt.NDArray[Any]


class WeightsFile:
    """Append-only file of tensors; identical tensors are stored once. Leaving the ``with`` block closes it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("wb")
        self._known: dict[bytes, tuple[int, int]] = {}

    @property
    def name(self) -> str:
        """The file's name, as graphs refer to it."""
        return self._path.name

    def append(self, array: Array) -> tuple[int, int]:
        """Offset and length in bytes of ``array`` in the file."""
        raw = np.ascontiguousarray(array).view(np.uint8).reshape(-1)
        digest = hashlib.sha256(raw.data).digest()
        if digest not in self._known:
            self._file.write(b"\0" * (-self._file.tell() % _ALIGNMENT))
            offset = self._file.tell()
            self._file.write(raw.data)
            self._known[digest] = (offset, raw.nbytes)
        return self._known[digest]

    def __enter__(self) -> WeightsFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


class Graph:
    """Nodes, weights, inputs and outputs of one ONNX graph."""

    def __init__(self, name: str, weights: WeightsFile) -> None:
        self._name = name
        self._weights = weights
        self._nodes: list[onnx.NodeProto] = []
        self._initializers: dict[str, onnx.TensorProto] = {}
        self._inputs: list[onnx.ValueInfoProto] = []
        self._outputs: list[onnx.ValueInfoProto] = []

    def input(self, name: str, element_type: int, shape: Sequence[int | str]) -> str:
        """Declare a graph input."""
        self._inputs.append(helper.make_tensor_value_info(name, element_type, shape))
        return name

    def output(self, name: str, element_type: int, shape: Sequence[int | str]) -> None:
        """Declare a graph output."""
        self._outputs.append(helper.make_tensor_value_info(name, element_type, shape))

    def weight(self, name: str, array: Array) -> str:
        """A constant tensor; stored once per name."""
        if name in self._initializers:
            return name
        tensor = TensorProto(name=name, data_type=_ELEMENT_TYPES[array.dtype], dims=array.shape)
        if array.nbytes <= _INLINE_BYTES and array.dtype not in (ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn):
            tensor = numpy_helper.from_array(np.asarray(array), name)
        else:
            offset, length = self._weights.append(array)
            tensor.data_location = TensorProto.EXTERNAL
            for key, value in (("location", self._weights.name), ("offset", offset), ("length", length)):
                tensor.external_data.add(key=key, value=str(value))
        self._initializers[name] = tensor
        return name

    def scalar(self, value: float | int, dtype: Any) -> str:
        """A constant scalar, named after its value."""
        return self.weight(f"scalar/{np.dtype(dtype).name}/{value!r}", np.array(value, dtype=dtype))

    def vector(self, values: Sequence[int]) -> str:
        """A constant int64 vector, named after its values."""
        return self.weight("vector/" + ",".join(map(str, values)), np.array(values, dtype=np.int64))

    def node(
        self, op: str, inputs: Sequence[str], output: str, *, domain: str = "", **attributes: Any
    ) -> str:
        """Add a node with one output and return the output's name."""
        return self.nodes(op, inputs, [output], domain=domain, **attributes)[0]

    def nodes(
        self, op: str, inputs: Sequence[str], outputs: Sequence[str], *, domain: str = "", **attributes: Any
    ) -> Sequence[str]:
        """Add a node with several outputs and return their names. Attributes are ONNX's own."""
        name = next(output for output in outputs if output)
        self._nodes.append(
            helper.make_node(op, list(inputs), list(outputs), name=name, domain=domain, **attributes)
        )
        return outputs

    def save(self, path: Path) -> None:
        """Write the graph; the weights file is not touched."""
        graph = helper.make_graph(
            self._nodes, self._name, self._inputs, self._outputs, list(self._initializers.values())
        )
        opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(MICROSOFT, 1)]
        model = helper.make_model(
            graph, producer_name="enginesmith", opset_imports=opsets, ir_version=IR_VERSION
        )
        path.write_bytes(model.SerializeToString())

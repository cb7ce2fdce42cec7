"""INT8 Q/DQ to ONNX Runtime's integer kernels: com.microsoft MatMulIntegerToFloat with the same integers and scales.

ONNX Runtime's own fusion leaves out products that share a DequantizeLinear, and its kernels for signed activations are
slow: activations become uint8 with zero point 128, the same integers plus 128. Weights become uint8 too, unless they
are small enough for the fast signed kernel: on x86 without VNNI it adds pairs of products in 16 bits, which
overflow beyond 2 * 255 * 64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import helper

from enginesmith.graphs.editing import Array, EditableGraph, attribute, names_read

_DOMAIN = "com.microsoft"
_OFFSET = 128
_LARGEST_SAFE_CODE = 64


@dataclass(frozen=True)
class _Product:
    """A matrix product of quantized operands."""

    node: onnx.NodeProto
    left: onnx.NodeProto
    """The QuantizeLinear of the left operand."""
    right: onnx.NodeProto | None
    """That of the right one; None: a weight."""
    codes: Array | None
    """The weight's, int8 [input channels, output channels]."""
    scale: str
    """Of the right operand: one, or one per output channel."""
    bias: str | None
    output: str
    absorbed: str | None
    """The name of the Add that the bias comes from."""


def with_integer_products(model: onnx.ModelProto) -> tuple[onnx.ModelProto, int]:
    """A copy of the INT8 Q/DQ graph ``model`` with integer kernels, and how many products became one.

    What has no such kernel (Conv, an unusual Gemm) stays Q/DQ.
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    graph = EditableGraph(copy)
    products = _products(graph)
    if not products:
        return copy, 0
    offset = graph.add_constant("uint8_offset", np.array(_OFFSET, np.uint8))
    replaced = {product.node.name: _integer_node(graph, product, offset) for product in products}
    absorbed = {product.absorbed for product in products}
    nodes = [replaced.get(node.name, node) for node in graph.nodes if node.name not in absorbed]
    for product in products:
        for quantize in filter(None, (product.left, product.right)):
            quantize.input[2] = offset
    graph.set_nodes(_live(nodes, graph.output_names))
    if all(entry.domain != _DOMAIN for entry in copy.opset_import):
        copy.opset_import.append(helper.make_opsetid(_DOMAIN, 1))
    return copy, len(products)


def _products(graph: EditableGraph) -> list[_Product]:
    """The products whose operands are all quantized, without those that share an operand with something else."""
    found = [product for node in graph.nodes if (product := _product(graph, node)) is not None]
    while True:
        names = {product.node.name for product in found}
        kept = [
            product
            for product in found
            if all(
                _only_read_by(graph, quantize, names)
                for quantize in (product.left, product.right)
                if quantize
            )
        ]
        if len(kept) == len(found):
            return kept
        found = kept


def _only_read_by(graph: EditableGraph, quantize: onnx.NodeProto, names: set[str]) -> bool:
    dequantizers = graph.consumers(quantize.output[0])
    return all(
        node.op_type == "DequantizeLinear"
        and all(reader.name in names for reader in graph.consumers(node.output[0]))
        for node in dequantizers
    )


def _product(graph: EditableGraph, node: onnx.NodeProto) -> _Product | None:
    if node.op_type not in ("MatMul", "Gemm") or node.domain not in ("", "ai.onnx"):
        return None
    left, right = (graph.producer(name) for name in node.input[:2])
    quantize = _quantizer(graph, left)
    if quantize is None or right is None or right.op_type != "DequantizeLinear":
        return None
    codes, other = None, None
    if graph.is_constant(right.input[0]):
        codes = graph.constant(right.input[0])
        transposed = node.op_type == "Gemm" and attribute(node, "transB", 0)
        codes = codes.T if transposed else codes
        if codes.ndim != 2 or codes.dtype != np.int8:
            return None
    elif (other := _quantizer(graph, right)) is None or node.op_type != "MatMul":
        return None
    bias, absorbed, output = _bias(graph, node, channels=None if codes is None else codes.shape[1])
    if node.op_type == "Gemm" and not (_is_plain(node, bias) and _has_a_bias_per_channel(graph, node)):
        return None
    return _Product(node, quantize, other, codes, right.input[1], bias, output, absorbed)


def _quantizer(graph: EditableGraph, dequantize: onnx.NodeProto | None) -> onnx.NodeProto | None:
    """The QuantizeLinear to INT8 with one scale before a DequantizeLinear."""
    if dequantize is None or dequantize.op_type != "DequantizeLinear":
        return None
    node = graph.producer(dequantize.input[0])
    if node is None or node.op_type != "QuantizeLinear" or len(node.input) < 3:
        return None
    is_int8 = (
        graph.is_constant(node.input[2]) and graph.constant_type(node.input[2]).dtype == onnx.TensorProto.INT8
    )
    return node if is_int8 and not graph.constant_type(node.input[1]).shape else None


def _bias(
    graph: EditableGraph, node: onnx.NodeProto, *, channels: int | None
) -> tuple[str | None, str | None, str]:
    """The bias that is added to a product, the Add that it is taken from, and the tensor with the result."""
    output = node.output[0]
    if node.op_type == "Gemm":
        return (node.input[2] or None) if len(node.input) > 2 else None, None, output
    readers = graph.consumers(output)
    if channels is None or output in graph.output_names or len(readers) != 1 or readers[0].op_type != "Add":
        return None, None, output
    add = readers[0]
    constants = [name for name in add.input if graph.is_constant(name)]
    if len(constants) == 1 and graph.constant_type(constants[0]).shape == (channels,):
        return constants[0], add.name, add.output[0]
    return None, None, output


def _is_plain(node: onnx.NodeProto, bias: str | None) -> bool:
    factors = attribute(node, "alpha", 1.0), attribute(node, "beta", 1.0) if bias else 1.0
    return factors == (1.0, 1.0) and not attribute(node, "transA", 0)


def _has_a_bias_per_channel(graph: EditableGraph, node: onnx.NodeProto) -> bool:
    """Whether the kernel takes the Gemm's bias: it broadcasts nothing, where Gemm broadcasts a scalar or a column."""
    bias = node.input[2] if len(node.input) > 2 else ""
    if not bias:
        return True
    if not graph.is_constant(bias):
        return False
    shape = graph.constant_type(bias).shape or ()
    scales = graph.producer(node.input[1])
    assert scales is not None, "the weight is dequantized"
    stored = graph.constant_type(scales.input[0]).shape or ()
    channels = stored[0 if attribute(node, "transB", 0) else 1]
    return shape in ((channels,), (1, channels))


def _integer_node(graph: EditableGraph, product: _Product, offset: str) -> onnx.NodeProto:
    node, left = product.node, product.left
    if product.codes is None:
        assert product.right is not None, "a product has a weight or a second activation"
        weight, zero_point = product.right.output[0], offset
    else:
        weight, zero_point = _weight(graph, product.codes, f"{node.name}_codes", offset)
    inputs = [left.output[0], weight, left.input[1], product.scale, offset, zero_point]
    inputs += [product.bias] if product.bias else []
    return helper.make_node("MatMulIntegerToFloat", inputs, [product.output], name=node.name, domain=_DOMAIN)


def _weight(graph: EditableGraph, codes: Array, name: str, offset: str) -> tuple[str, str]:
    """The weight's codes as a constant and its zero point, in the type whose kernel is exact on every CPU."""
    if np.abs(codes.astype(np.int16)).max(initial=0) <= _LARGEST_SAFE_CODE:
        return graph.add_constant(name, codes), graph.add_constant(
            f"{name}_zero_point", np.zeros((), np.int8)
        )
    return graph.add_constant(name, (codes.astype(np.int16) + _OFFSET).astype(np.uint8)), offset


def _live(nodes: Sequence[onnx.NodeProto], outputs: set[str]) -> list[onnx.NodeProto]:
    """The nodes whose results are read, in their order."""
    used, kept = set(outputs), []
    for node in reversed(nodes):
        if any(name in used for name in node.output):
            kept.append(node)
            used |= names_read(node)
    return kept[::-1]

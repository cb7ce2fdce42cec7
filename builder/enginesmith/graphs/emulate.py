"""A BF16 graph for runtimes that have no BF16 kernels: float32 that rounds to BF16 at the same places.

For its numbers, not for speed. Products and sums inside an operator are float32, as on GPUs.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from enginesmith.graphs.editing import EditableGraph

_EXACT = frozenset(
    (
        *(
            "Concat",
            "Expand",
            "Flatten",
            "Gather",
            "GatherElements",
            "GatherND",
            "Identity",
            "Max",
            "Min",
            "Neg",
        ),
        *("Pad", "Reshape", "Slice", "Split", "Squeeze", "Tile", "Transpose", "Unsqueeze", "Where"),
    )
)
"""What they make of BF16 values are BF16 values."""


def float32_that_rounds(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy of the BF16 graph ``model`` in float32 with the same roundings; its inputs and outputs are not BF16."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    graph = EditableGraph(copy)
    bf16 = {name for name, kind in graph.types().items() if kind.dtype == TensorProto.BFLOAT16}
    constants = {
        name: graph.add_constant(f"{name}_float32", graph.constant(name).astype(np.float32))
        for name in graph.constants()
        if name in bf16
    }
    nodes: list[onnx.NodeProto] = []
    for node in graph.nodes:
        for index, name in enumerate(node.input):
            node.input[index] = constants.get(name, name)
        _retype_attributes(node)
        nodes.append(node)
        if node.op_type in _EXACT:
            continue
        for index, name in enumerate(node.output):
            if name in bf16:
                node.output[index] = graph.fresh(f"{name}_exact")
                nodes += _rounding(graph, node.output[index], name)
    graph.set_nodes(nodes)
    del graph.graph.value_info[:]
    return copy


def _rounding(graph: EditableGraph, exact: str, rounded: str) -> list[onnx.NodeProto]:
    narrow = graph.fresh(f"{rounded}_bf16")
    down, up = (graph.fresh_node(f"{rounded}/{name}") for name in ("RoundToBf16", "BackToFloat32"))
    return [
        helper.make_node("Cast", [exact], [narrow], name=down, to=TensorProto.BFLOAT16),
        helper.make_node("Cast", [narrow], [rounded], name=up, to=TensorProto.FLOAT),
    ]


def _retype_attributes(node: onnx.NodeProto) -> None:
    for entry in node.attribute:
        if node.op_type == "Cast" and entry.name == "to" and entry.i == TensorProto.BFLOAT16:
            entry.i = TensorProto.FLOAT
        elif entry.type == onnx.AttributeProto.TENSOR and entry.t.data_type == TensorProto.BFLOAT16:
            entry.t.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(entry.t).astype(np.float32)))

"""Strongly typed 16-bit graphs: weights and computation in FP16 or BF16, inputs and outputs as they were.

Every operator computes in 16 bits where the ONNX standard lets it and where that is safe: sums, powers and angles stay in
float32, and so does what lies between them. The graph says all of it itself, so that every runtime computes the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import ml_dtypes
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from enginesmith.errors import SourceError, SpecError
from enginesmith.graphs.editing import Array, EditableGraph, has_subgraphs
from enginesmith.graphs.quantizable import matched_by

TypedScheme = Literal["fp16", "bf16"]

_DTYPES: Mapping[str, Any] = {"fp16": np.float16, "bf16": ml_dtypes.bfloat16}
_ONNX_DTYPES: Mapping[str, int] = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}
_TYPE_STRINGS: Mapping[str, str] = {"fp16": "tensor(float16)", "bf16": "tensor(bfloat16)"}

_SENSITIVE: Mapping[str, str] = {
    **dict.fromkeys(
        ("ReduceMean", "ReduceSum", "ReduceL1", "ReduceL2", "ReduceSumSquare", "ReduceLogSum", "CumSum"),
        "a sum over many values",
    ),
    **dict.fromkeys(
        ("ReduceLogSumExp", "ReduceProd", "LpNormalization"), "a sum or product over many values"
    ),
    **dict.fromkeys(("Pow", "Exp", "Log"), "its values leave the range of 16 bits"),
    **dict.fromkeys(("Sin", "Cos", "Range"), "positions and angles need more digits"),
    **dict.fromkeys(("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear"), "scales of integers"),
    **dict.fromkeys(
        ("RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "EyeLike", "Multinomial"),
        "its type is an attribute",
    ),
}
_LIGHT = frozenset(
    (
        *(
            "Abs",
            "Add",
            "Cast",
            "Clip",
            "Div",
            "Expand",
            "Identity",
            "Max",
            "Min",
            "Mul",
            "Neg",
            "Reciprocal",
        ),
        *("Reshape", "Sqrt", "Squeeze", "Sub", "Transpose", "Unsqueeze", "Where"),
    )
)
"""Cheap operators that stay in float32 between others that do, rather than casting twice."""
_ANY_TYPE = frozenset(("Shape", "Size"))
_BOUNDING = frozenset(("Clip", "Min", "Max"))
_STANDS_FOR_INFINITY = 1e8
"""A constant beyond it is a mask or an open bound, not a number that is computed with."""
_LARGEST_FP16 = 65504.0
_SMALLEST_NORMAL_FP16 = 2.0**-14


def convert(
    model: onnx.ModelProto, *, scheme: TypedScheme, exclude: Sequence[str]
) -> tuple[onnx.ModelProto, dict[str, Any]]:
    """``model`` in 16 bits, and what became of each floating-point node and of constants that did not fit.

    ``exclude``: patterns of nodes that stay in float32.

    Raises:
        SpecError: a pattern matches nothing, or everything stays in float32.
        SourceError: a weight does not fit FP16, or the graph has control flow or a tensor of unknown type.
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    graph = EditableGraph(copy)
    if control := next((node for node in graph.nodes if has_subgraphs(node)), None):
        raise SourceError(
            f"{control.name} is control flow ({control.op_type}), which scheme {scheme} cannot convert",
            hint="export the model without If, Loop and Scan, or use scheme none",
        )
    plan = _plan(graph, scheme, exclude)
    rewriter = _Rewriter(graph, plan, scheme)
    rewriter.rewrite()
    nodes = [
        {
            "name": node.name,
            "op": node.op_type,
            "quantized": node.name not in plan.kept,
            "reason": plan.kept.get(node.name),
            "weight_bits": 16 if node.name not in plan.kept and _weights(node, graph) else None,
        }
        for node in plan.floating
    ]
    return copy, {"nodes": nodes, "constants": rewriter.adjusted, "casts": rewriter.casts}


@dataclass
class _Plan:
    """Which tensors and positions are float32 in the source, and what stays so."""

    floating: list[onnx.NodeProto]
    """The nodes that read or make float32."""
    float_tensors: frozenset[str]
    kept: dict[str, str]
    """Why a node stays in float32, by its name."""
    positions: dict[str, tuple[frozenset[int], frozenset[int]]] = field(default_factory=dict)
    """By node name: the inputs and outputs that become 16 bits."""


def _plan(graph: EditableGraph, scheme: TypedScheme, exclude: Sequence[str]) -> _Plan:
    types = graph.types()
    unknown = [name for node in graph.nodes for name in node.output if name and name not in types]
    if unknown:
        producer = graph.producer(unknown[0])
        where = "" if producer is None else f", made by {producer.name} ({producer.op_type})"
        raise SourceError(
            f"the type of {unknown[0]}{where} is not known, so the graph cannot be given types",
            hint="scheme none runs it; a custom operator needs a shape inference of its own",
        )
    floats = frozenset(name for name, kind in types.items() if kind.dtype == TensorProto.FLOAT)
    floating = [node for node in graph.nodes if any(name in floats for name in (*node.input, *node.output))]
    excluded = matched_by(exclude, {node.name: node.op_type for node in floating})
    plan = _Plan(floating, floats, {})
    for node in floating:
        inputs, outputs = _convertible(node, floats, scheme, graph.opset())
        if node.name in excluded:
            plan.kept[node.name] = f"excluded by {excluded[node.name]!r}"
        elif node.op_type in _SENSITIVE:
            plan.kept[node.name] = _SENSITIVE[node.op_type]
        elif not inputs and not outputs:
            plan.kept[node.name] = f"the standard has no {node.op_type} in {scheme}"
        plan.positions[node.name] = (inputs, outputs)
    _keep_between(graph, plan)
    if len(plan.kept) == len(floating):
        raise SpecError(
            f"scheme {scheme}: no operator is left to compute in 16 bits",
            hint="exclude leaves out everything, or the graph computes no floating-point numbers; use scheme none",
        )
    return plan


def _keep_between(graph: EditableGraph, plan: _Plan) -> None:
    """Keep cheap operators in float32 where all that they read, or all that reads them, stays so."""
    reason = "between operators in float32"
    for node in plan.floating:
        sources = [graph.producer(name) for name in node.input if name in plan.float_tensors]
        computed = [source for source in sources if source is not None]
        if node.op_type in _LIGHT and computed and all(source.name in plan.kept for source in computed):
            plan.kept.setdefault(node.name, reason)
    for node in reversed(plan.floating):
        outputs = [name for name in node.output if name in plan.float_tensors]
        readers = [reader for name in outputs for reader in graph.consumers(name)]
        inner = not any(name in graph.output_names for name in outputs)
        if (
            node.op_type in _LIGHT
            and inner
            and readers
            and all(reader.name in plan.kept for reader in readers)
        ):
            plan.kept.setdefault(node.name, reason)


def _convertible(
    node: onnx.NodeProto, floats: frozenset[str], scheme: TypedScheme, opset: int
) -> tuple[frozenset[int], frozenset[int]]:
    """The positions of float32 inputs and outputs that the standard also knows in the 16-bit type."""
    if node.domain not in ("", "ai.onnx"):
        return frozenset(), frozenset()
    schema = onnx.defs.get_schema(node.op_type, opset, "")
    allowed = {
        constraint.type_param_str: _TYPE_STRINGS[scheme] in constraint.allowed_type_strs
        for constraint in schema.type_constraints
    }

    def positions(names: Sequence[str], formals: Sequence[Any]) -> frozenset[int]:
        return frozenset(
            index
            for index, name in enumerate(names)
            if name in floats and allowed.get(formals[min(index, len(formals) - 1)].type_str, False)
        )

    return positions(node.input, schema.inputs), positions(node.output, schema.outputs)


class _Rewriter:
    """Gives every tensor its type and puts casts where two types meet."""

    def __init__(self, graph: EditableGraph, plan: _Plan, scheme: TypedScheme) -> None:
        self._graph = graph
        self._plan = plan
        self._scheme = scheme
        self._narrow: set[str] = set()
        """Tensors of the source that are 16 bits now."""
        self._versions: dict[tuple[str, bool], str] = {}
        """A tensor in the other type, by its name and whether that is narrow."""
        self._nodes: list[onnx.NodeProto] = []
        self.casts = 0
        self.adjusted: list[dict[str, Any]] = []

    def rewrite(self) -> None:
        graph = self._graph
        for node in graph.nodes:
            inputs, outputs = self._plan.positions.get(node.name, (frozenset[int](), frozenset[int]()))
            if node.name in self._plan.kept:
                inputs = outputs = frozenset()
            for index, name in enumerate(node.input):
                if name in self._plan.float_tensors:
                    node.input[index] = self._as(name, index in inputs, node)
            self._narrow.update(node.output[index] for index in outputs)
            if outputs:
                self._retype_attributes(node)
            self._nodes.append(node)
        self._restore_outputs()
        graph.set_nodes(self._nodes)
        del graph.graph.value_info[:]

    def _as(self, name: str, narrow: bool, reader: onnx.NodeProto) -> str:
        """The name under which ``reader`` finds the tensor in the type that it wants."""
        if reader.op_type in _ANY_TYPE or (name in self._narrow) == narrow:
            return name
        if (name, narrow) not in self._versions:
            if self._graph.is_constant(name):
                self._versions[name, narrow] = self._narrow_constant(name)
            else:
                self._versions[name, narrow] = self._cast(name, narrow)
        return self._versions[name, narrow]

    def _cast(self, name: str, narrow: bool) -> str:
        self.casts += 1
        dtype = _ONNX_DTYPES[self._scheme] if narrow else TensorProto.FLOAT
        output = self._graph.fresh(f"{name}_{self._scheme if narrow else 'float32'}")
        self._nodes.append(
            helper.make_node(
                "Cast", [name], [output], name=self._graph.fresh_node(f"{output}/Cast"), to=dtype
            )
        )
        return output

    def _restore_outputs(self) -> None:
        """Give the graph's outputs their float32 back: the inner tensor gets another name."""
        renamed = {
            value.name: self._graph.fresh(f"{value.name}_{self._scheme}")
            for value in self._graph.graph.output
            if value.name in self._narrow
        }
        for node in self._nodes:
            for names in (node.input, node.output):
                for index, name in enumerate(names):
                    names[index] = renamed.get(name, name)
        for name, inner in renamed.items():
            self.casts += 1
            node_name = self._graph.fresh_node(f"{name}/Cast")
            self._nodes.append(
                helper.make_node("Cast", [inner], [name], name=node_name, to=TensorProto.FLOAT)
            )

    def _retype_attributes(self, node: onnx.NodeProto) -> None:
        """The type that an operator without a typed input makes is an attribute."""
        for entry in node.attribute:
            if node.op_type == "Cast" and entry.name == "to":
                entry.i = _ONNX_DTYPES[self._scheme]
            elif node.op_type == "ConstantOfShape" and entry.name == "value":
                values = self._narrowed(numpy_helper.to_array(entry.t), node.name, bounding=False)
                entry.t.CopyFrom(numpy_helper.from_array(values))
        if node.op_type == "ConstantOfShape" and not node.attribute:
            zero = np.zeros(1, _DTYPES[self._scheme])
            node.attribute.append(helper.make_attribute("value", numpy_helper.from_array(zero)))

    def _narrow_constant(self, name: str) -> str:
        bounding = any(reader.op_type in _BOUNDING for reader in self._graph.consumers(name))
        values = self._narrowed(self._graph.constant(name), name, bounding=bounding)
        return self._graph.add_constant(f"{name}_{self._scheme}", values)

    def _narrowed(self, values: Array, name: str, *, bounding: bool) -> Array:
        """``values`` in 16 bits. What stands for infinity is put within the range, on record; a number is not.

        Raises:
            SourceError: a number does not fit FP16, or is NaN.
        """
        if np.isnan(values).any():
            raise SourceError(f"the constant {name} holds NaN", hint="check the source of the model")
        if self._scheme == "bf16":
            return values.astype(ml_dtypes.bfloat16)
        fitted = values.astype(np.float32)
        too_large = np.isfinite(fitted) & (np.abs(fitted) > _LARGEST_FP16)
        if too_large.any():
            largest = fitted.flat[np.argmax(np.abs(np.where(too_large, fitted, 0)))]
            if (np.abs(fitted[too_large]) < _STANDS_FOR_INFINITY).any():
                raise SourceError(
                    f"the constant {name} holds {largest:g}, which does not fit FP16 (largest: {_LARGEST_FP16:g})",
                    hint="use scheme bf16, or keep the node that reads it in float32 with exclude",
                )
            # Half the range: a score that is added to a mask must not make it infinite, of which softmax makes NaN.
            bound = _LARGEST_FP16 if bounding else _LARGEST_FP16 / 2
            fitted = np.where(too_large, np.copysign(np.float32(bound), fitted), fitted)
            self.adjusted.append(
                {"name": name, "from": float(largest), "to": float(np.copysign(bound, largest))}
            )
        narrow = fitted.astype(np.float16)
        if narrow.size == 1 and narrow.flat[0] == 0 and fitted.flat[0] != 0:
            # An epsilon keeps a division finite; as 0 it would not.
            narrow = (
                np.copysign(np.float16(_SMALLEST_NORMAL_FP16), fitted)
                .astype(np.float16)
                .reshape(values.shape)
            )
            self.adjusted.append({"name": name, "from": float(fitted.flat[0]), "to": float(narrow.flat[0])})
        return narrow


def _weights(node: onnx.NodeProto, graph: EditableGraph) -> bool:
    """Whether the node reads a constant of more than one value."""
    return any(graph.is_constant(name) and graph.constant_size(name) > 1 for name in node.input)

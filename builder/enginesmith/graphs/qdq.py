"""Explicit quantization: QuantizeLinear and DequantizeLinear around the nodes of a recipe.

Standard operators only, all scales symmetric, zero points 0: the form that TensorRT takes as its precision and ONNX
Runtime fuses. Weights are stored as INT8 or FP8; every node has DequantizeLinear nodes of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
from onnx import helper

from enginesmith.errors import GateError, SpecError
from enginesmith.graphs.calibrate import ActivationReader, Progress, channel_maxima, ranges
from enginesmith.graphs.editing import Array, EditableGraph
from enginesmith.graphs.quantizable import Candidate, GraphRecipe, Selection, Unit, units
from enginesmith.graphs.smoothing import SmoothingKind, follows_norm, smooth, smoothing_factors

DEAD = "its activation was 0 on every calibration sample: it has no range"


@dataclass(frozen=True)
class CalibratedUnit:
    """A unit with what calibration found."""

    unit: Unit
    amax: tuple[float, ...]
    """The range of each of the unit's activations, after smoothing."""
    factors: Array | None
    """SmoothQuant's, [channels]; None: no smoothing."""


@dataclass(frozen=True)
class Calibration:
    """Everything that is measured once, whatever is quantized of it."""

    units: tuple[CalibratedUnit, ...]
    reasons: Mapping[str, str]
    """By name, why the other nodes of quantizable operators stay in float."""


@dataclass(frozen=True)
class NodeRecord:
    """What became of one node of a quantizable operator."""

    name: str
    op: str
    quantized: bool
    reason: str | None = None
    """Why it is not quantized."""
    weight_bits: int | None = None
    weight_scales: int | None = None
    """How many scales the weight has."""
    activation_scales: tuple[float, ...] = ()
    smoothing: SmoothingKind = "none"

    def document(self) -> dict[str, Any]:
        return asdict(self) | {"activation_scales": list(self.activation_scales)}


def calibrate(
    model: onnx.ModelProto,
    selection: Selection,
    recipe: GraphRecipe,
    *,
    batches: Sequence[Mapping[str, Array]],
    scratch: Path,
    progress: Progress,
) -> Calibration:
    """The ranges and smoothing of all nodes in ``selection``, measured on ``batches``.

    Raises:
        GateError: an activation or a weight holds NaN or Inf; it is named.
        SpecError: no activation has a range.
    """
    graph = EditableGraph(model)
    _check_weights(graph, selection)
    grouped = units(selection)
    tensors = [name for unit in grouped for name in unit.activations]
    reader = ActivationReader(graph, tensors, batches=batches, scratch=scratch)
    smoothed = [unit for unit in grouped if recipe.smoothing is not None and follows_norm(graph, unit)]
    whole = frozenset(tensors) - {unit.activations[0] for unit in smoothed}
    maxima = channel_maxima(reader, progress, whole=whole)
    factors = {unit.name: _factors(graph, unit, maxima, recipe) for unit in smoothed}
    # A tensor that a product reads beside smoothed layers has two ranges, each under its own key.
    plain = {name for unit in grouped if unit.name not in factors for name in unit.activations}
    found = ranges(reader, {name: maxima[name] for name in plain}, {}, recipe=recipe, progress=progress)
    inverse = {unit.activations[0]: 1 / factors[unit.name] for unit in smoothed}
    after = ranges(
        reader, {name: maxima[name] for name in inverse}, inverse, recipe=recipe, progress=progress
    )
    calibrated, reasons = [], dict(selection.reasons)
    for unit in grouped:
        own = after if unit.name in factors else found
        amax = tuple(own[name] for name in unit.activations)
        if min(amax) > 0:
            calibrated.append(CalibratedUnit(unit, amax, factors.get(unit.name)))
        else:
            reasons |= {member.name: DEAD for member in unit.members}
    if not calibrated:
        raise SpecError(
            "no activation has a range: all were 0 on every calibration sample",
            hint="calibrate with samples like those that will be served",
        )
    return Calibration(tuple(calibrated), reasons)


def with_qdq(
    model: onnx.ModelProto, calibrated: Sequence[CalibratedUnit], recipe: GraphRecipe
) -> tuple[onnx.ModelProto, tuple[NodeRecord, ...]]:
    """A quantized copy of ``model``, and the record of each node that is quantized in it."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    graph = EditableGraph(copy)
    by_name = {node.name: node for node in graph.nodes}
    before: dict[str, list[onnx.NodeProto]] = {}
    records: list[NodeRecord] = []
    for entry in calibrated:
        added, made = _quantize_unit(graph, entry, recipe, by_name)
        for name, nodes in added.items():
            before.setdefault(name, []).extend(nodes)
        records.extend(made)
    if recipe.scheme == "fp8":
        _write_relus_as_max(graph)
    graph.set_nodes([new for node in graph.nodes for new in (*before.get(node.name, ()), node)])
    return copy, tuple(records)


def _quantize_unit(
    graph: EditableGraph, entry: CalibratedUnit, recipe: GraphRecipe, by_name: Mapping[str, onnx.NodeProto]
) -> tuple[dict[str, list[onnx.NodeProto]], list[NodeRecord]]:
    """The nodes to put before the unit's nodes, by their name, and the records; the unit's nodes are rewired."""
    unit = entry.unit
    first = unit.members[0].name
    added: dict[str, list[onnx.NodeProto]] = {first: []}
    tensors = list(unit.activations)
    kind: SmoothingKind = "none"
    if entry.factors is not None:
        smoothed = smooth(graph, unit, entry.factors)
        tensors, kind = [smoothed.tensor], smoothed.kind
        added[first] += [smoothed.node] if smoothed.node is not None else []
    writer = _QdqWriter(graph, recipe)
    codes = []
    for tensor, amax in zip(tensors, entry.amax, strict=True):
        node, stored = writer.quantized_activation(tensor, amax)
        added[first].append(node)
        codes.append(stored)
    records = []
    for member in unit.members:
        node, own = by_name[member.name], added.setdefault(member.name, [])
        for index, stored in enumerate(codes):
            dequantized = writer.dequantized(stored, f"{member.name}_input{index}")
            own.append(dequantized)
            node.input[index] = dequantized.output[0]
        scales = None
        if member.weight is not None:
            weight = writer.quantized_weight(member, entry.factors)
            own.append(weight)
            node.input[1] = weight.output[0]
            scales = graph.constant_size(weight.input[1])
        records.append(
            NodeRecord(
                name=member.name,
                op=member.op,
                quantized=True,
                weight_bits=None if member.weight is None else recipe.weight_bits,
                weight_scales=scales,
                activation_scales=tuple(amax / recipe.activation_bound for amax in entry.amax),
                smoothing=kind,
            )
        )
    return added, records


def _write_relus_as_max(graph: EditableGraph) -> None:
    """ONNX Runtime (seen with 1.32) drops a Relu before a QuantizeLinear to FP8, as if its codes had no sign.

    The same mistake with 16-bit integers was https://github.com/microsoft/onnxruntime/pull/20187; this can go when
    ``ReluQuantFusion`` leaves FP8 alone.
    """
    relus = [node for node in graph.nodes if node.op_type == "Relu" and node.domain in ("", "ai.onnx")]
    zero = graph.add_constant("relu_zero", np.zeros((), np.float32)) if relus else ""
    for node in relus:
        node.op_type = "Max"
        node.input.append(zero)


@dataclass(frozen=True)
class _Codes:
    """A quantized tensor with its scale and zero point, by name."""

    tensor: str
    scale: str
    zero_point: str


class _QdqWriter:
    """Makes the nodes and constants of one unit."""

    def __init__(self, graph: EditableGraph, recipe: GraphRecipe) -> None:
        self._graph = graph
        self._recipe = recipe
        self._dtype: Any = ml_dtypes.float8_e4m3fn if recipe.scheme == "fp8" else np.int8

    def quantized_activation(self, tensor: str, amax: float) -> tuple[onnx.NodeProto, _Codes]:
        graph = self._graph
        scale = graph.add_constant(
            f"{tensor}_scale", _scales(np.float64(amax), self._recipe.activation_bound)
        )
        zero_point = graph.add_constant(f"{tensor}_zero_point", np.zeros((), self._dtype))
        output = graph.fresh(f"{tensor}_quantized")
        name = graph.fresh_node(f"{tensor}_QuantizeLinear")
        node = helper.make_node("QuantizeLinear", [tensor, scale, zero_point], [output], name=name)
        return node, _Codes(output, scale, zero_point)

    def dequantized(self, codes: _Codes, name: str) -> onnx.NodeProto:
        return helper.make_node(
            "DequantizeLinear",
            [codes.tensor, codes.scale, codes.zero_point],
            [self._graph.fresh(f"{name}_dequantized")],
            name=self._graph.fresh_node(f"{name}_DequantizeLinear"),
        )

    def quantized_weight(self, member: Candidate, factors: Array | None) -> onnx.NodeProto:
        """The DequantizeLinear of the member's weight, which is stored quantized."""
        assert member.weight is not None, "a product of activations has no weight"
        graph, recipe = self._graph, self._recipe
        values = graph.constant(member.weight).astype(np.float64)
        if factors is not None:
            shape = [1] * values.ndim
            shape[member.input_axis] = -1
            values = values * factors.astype(np.float64).reshape(shape)
        others = tuple(axis for axis in range(values.ndim) if axis != member.output_axis)
        amax = np.abs(values).max(axis=others if recipe.per_channel else None)
        scale = _scales(amax, recipe.weight_bound)
        along = [1] * values.ndim
        along[member.output_axis] = -1
        codes = np.clip(
            values / scale.reshape(along if recipe.per_channel else []),
            -recipe.weight_bound,
            recipe.weight_bound,
        )
        if recipe.scheme == "int8":
            codes = np.rint(codes)
        names = (
            graph.add_constant(f"{member.weight}_quantized", codes.astype(np.float32).astype(self._dtype)),
            graph.add_constant(f"{member.weight}_scale", scale),
            graph.add_constant(f"{member.weight}_zero_point", np.zeros(scale.shape, self._dtype)),
        )
        node = self.dequantized(_Codes(*names), f"{member.name}_weight")
        if recipe.per_channel:
            node.attribute.append(helper.make_attribute("axis", member.output_axis))
        return node


def _scales(amax: Any, bound: float) -> Array:
    """amax / bound as float32 that divides; 1 where there is nothing to scale."""
    scale = np.where(amax > 0, np.asarray(amax) / bound, 1.0)
    return np.maximum(scale, np.finfo(np.float32).tiny).astype(np.float32)


def _factors(graph: EditableGraph, unit: Unit, maxima: Mapping[str, Array], recipe: GraphRecipe) -> Array:
    assert recipe.smoothing is not None, "only a recipe with smoothing has factors"
    weights = []
    for member in unit.members:
        assert member.weight is not None, "only weights are smoothed"
        weight = graph.constant(member.weight)
        weights.append(weight if member.input_axis == 0 else weight.T)
    return smoothing_factors(maxima[unit.activations[0]], weights, alpha=recipe.smoothing)


def _check_weights(graph: EditableGraph, selection: Selection) -> None:
    for candidate in selection.chosen:
        if candidate.weight is not None and not np.isfinite(graph.constant(candidate.weight)).all():
            raise GateError(
                f"the weight {candidate.weight} of {candidate.name} holds NaN or Inf: it has no range",
                hint="check the source of the model",
            )

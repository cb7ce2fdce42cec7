"""Which nodes of a graph a scheme quantizes, which stay in float, and why.

Owns the recipe of a variant, the operators that can be quantized, and exclusion patterns. Changes nothing.
"""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import onnx

from enginesmith.errors import SpecError
from enginesmith.graphs.editing import EditableGraph, attribute

OPERATORS = ("MatMul", "Gemm", "Conv")


@dataclass(frozen=True)
class GraphRecipe:
    """What a variant's part of the spec says about quantization."""

    scheme: Literal["int8", "fp8"]
    method: Literal["entropy", "max", "percentile", "mse"] = "max"
    percentile: float | None = None
    smoothing: float | None = None
    """SmoothQuant's alpha."""
    per_channel: bool = True
    reduce_range: bool = False
    attention: bool = False
    operators: tuple[str, ...] = OPERATORS
    exclude: tuple[str, ...] = ()

    @classmethod
    def from_params(cls, params: Mapping[str, Any], *, exclude: Sequence[str]) -> GraphRecipe:
        """The recipe in a step's parameters; ``exclude`` are the patterns that hold."""
        return cls(
            scheme=params["scheme"],
            method=params["method"],
            percentile=params["percentile"],
            smoothing=params["smoothing"],
            per_channel=params["weights"] == "per_channel",
            reduce_range=params["reduce_range"],
            attention=params["attention"],
            operators=tuple(params["operators"]),
            exclude=tuple(exclude),
        )

    @property
    def activation_bound(self) -> float:
        """The largest code of an activation: the scale of a range is amax / bound."""
        return 448.0 if self.scheme == "fp8" else 127.0

    @property
    def weight_bound(self) -> float:
        """The largest code of a weight."""
        return 63.0 if self.reduce_range else self.activation_bound

    @property
    def weight_bits(self) -> int:
        return 7 if self.reduce_range else 8


@dataclass(frozen=True)
class Candidate:
    """A node that can be quantized."""

    name: str
    op: str
    activations: tuple[str, ...]
    """The tensors that get a range: one beside a weight, two of a product of activations."""
    weight: str | None
    input_axis: int = 0
    """The weight's axis of input channels, along which smoothing scales (MatMul, Gemm)."""
    output_axis: int = 1
    """The weight's axis of output channels, each with a scale of its own."""


@dataclass(frozen=True)
class Selection:
    """The nodes to quantize, and why the others are not."""

    chosen: tuple[Candidate, ...]
    reasons: Mapping[str, str]
    """By node name, for every node of a quantizable operator that is not chosen."""


@dataclass(frozen=True)
class Unit:
    """What is quantized or left out together: the nodes that read one activation, as runtimes fuse them, or one product."""

    name: str
    """That of its first node."""
    members: tuple[Candidate, ...]

    @property
    def activations(self) -> tuple[str, ...]:
        return self.members[0].activations

    @property
    def has_weights(self) -> bool:
        return self.members[0].weight is not None

    @property
    def can_smooth(self) -> bool:
        """Whether input channels can be scaled: those of a matrix product with weights."""
        return self.has_weights and all(member.op != "Conv" for member in self.members)


def select(graph: EditableGraph, recipe: GraphRecipe) -> Selection:
    """The nodes of ``graph`` that ``recipe`` quantizes.

    Raises:
        SpecError: nothing can be quantized, an exclude pattern matches nothing, or the patterns leave nothing.
    """
    candidates, reasons = _candidates(graph)
    if not candidates:
        raise SpecError(
            f"scheme {recipe.scheme}: the graph has no operator that can be quantized",
            hint=f"quantizable are {', '.join(OPERATORS)} with constant float32 weights; use scheme fp16, bf16 or none",
        )
    named = {candidate.name: candidate.op for candidate in candidates}
    named |= {node.name: node.op_type for node in graph.nodes if node.name in reasons}
    excluded = matched_by(recipe.exclude, named)
    chosen = []
    for candidate in candidates:
        if (reason := _reason(candidate, recipe, excluded)) is None:
            chosen.append(candidate)
        else:
            reasons[candidate.name] = reason
    if not chosen:
        raise SpecError(
            f"scheme {recipe.scheme}: no node is left to quantize",
            hint=f"exclude and operators leave out all {len(candidates)}; quantize something, or use scheme none",
        )
    return Selection(tuple(chosen), reasons)


def units(selection: Selection) -> tuple[Unit, ...]:
    """The chosen nodes, grouped where they read the same activation with weights."""
    groups: dict[tuple[str, ...], list[Candidate]] = {}
    for candidate in selection.chosen:
        # A Conv's activation keeps its channels; it shares no smoothing and so no unit with a matrix product.
        kind = "product" if candidate.weight is None else "Conv" if candidate.op == "Conv" else "linear"
        key = (kind, candidate.name) if candidate.weight is None else (kind, *candidate.activations)
        groups.setdefault(key, []).append(candidate)
    return tuple(Unit(members[0].name, tuple(members)) for members in groups.values())


def matched_by(patterns: Collection[str], named: Mapping[str, str]) -> dict[str, str]:
    """The names that a pattern matches, with the pattern; ``named`` has the operator of each name.

    A pattern matches a whole name, the module part of one (before the last '/'), or an operator.

    Raises:
        SpecError: a pattern matches nothing.
    """
    matched: dict[str, str] = {}
    for pattern in patterns:
        hits = [
            name
            for name, op in named.items()
            if any(fnmatch.fnmatchcase(text, pattern) for text in (name, name.rpartition("/")[0], op))
        ]
        if not hits:
            raise SpecError(
                f"exclude {pattern!r} matches no node that could be quantized",
                hint=_near_matches(pattern, named),
            )
        for name in hits:
            matched.setdefault(name, pattern)
    return matched


def _near_matches(pattern: str, named: Mapping[str, str]) -> str:
    names = list(named)
    wider = fnmatch.filter(names, f"*{pattern}*")
    bare = pattern.replace("*", "")
    close = wider[:3] or difflib.get_close_matches(bare, names, n=3, cutoff=0.3) or names[:3]
    return f"patterns match whole names, or operators ({', '.join(sorted(set(named.values())))}); near: {', '.join(close)}"


def _reason(candidate: Candidate, recipe: GraphRecipe, excluded: Mapping[str, str]) -> str | None:
    if candidate.name in excluded:
        return f"excluded by {excluded[candidate.name]!r}"
    if candidate.op not in recipe.operators:
        return f"operators leaves out {candidate.op}"
    if candidate.weight is None and not recipe.attention:
        return "a product of two activations (attention: false)"
    return None


def _candidates(graph: EditableGraph) -> tuple[list[Candidate], dict[str, str]]:
    """What can be quantized, and by name why a node of a quantizable operator cannot."""
    types = graph.types()
    found: list[Candidate] = []
    reasons: dict[str, str] = {}
    for node in graph.nodes:
        if node.op_type not in OPERATORS or node.domain not in ("", "ai.onnx"):
            continue
        seen = types.get(node.input[0])
        weight = node.input[1]
        if seen is not None and seen.dtype not in (onnx.TensorProto.FLOAT, onnx.TensorProto.UNDEFINED):
            reasons[node.name] = (
                f"its values are {onnx.TensorProto.DataType.Name(seen.dtype).lower()}, not float32"
            )
        elif graph.is_constant(node.input[0]):
            reasons[node.name] = "its left operand is a constant"
        elif graph.is_constant(weight):
            if (reason := _weight_problem(graph, node)) is None:
                found.append(_with_weight(node))
            else:
                reasons[node.name] = reason
        elif node.op_type == "MatMul":
            found.append(Candidate(node.name, node.op_type, (node.input[0], weight), None))
        else:
            reasons[node.name] = "its weight is computed, not constant"
    return found, reasons


def _weight_problem(graph: EditableGraph, node: onnx.NodeProto) -> str | None:
    kind = graph.constant_type(node.input[1])
    assert kind.shape is not None, "a constant has a shape"
    if kind.dtype != onnx.TensorProto.FLOAT:
        return f"its weight is {onnx.TensorProto.DataType.Name(kind.dtype).lower()}, not float32"
    if node.op_type != "Conv" and len(kind.shape) != 2:
        return f"its weight has {len(kind.shape)} axes, not 2"
    if node.op_type == "Gemm" and attribute(node, "transA", 0):
        return "it transposes its input"
    return None


def _with_weight(node: onnx.NodeProto) -> Candidate:
    activation, weight = node.input[0], node.input[1]
    if node.op_type == "Conv":
        return Candidate(node.name, node.op_type, (activation,), weight, input_axis=1, output_axis=0)
    transposed = node.op_type == "Gemm" and attribute(node, "transB", 0)
    axes = (1, 0) if transposed else (0, 1)
    return Candidate(node.name, node.op_type, (activation,), weight, input_axis=axes[0], output_axis=axes[1])

"""Optimization profiles: the shapes that an engine accepts, from the signature and the limits of serving.

One profile for all inputs, because Triton batches all requests of a model into the same shapes. Pure.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from enginesmith.errors import SourceError, SpecError
from enginesmith.graph_spec import BATCH_AXIS, SEQUENCE_AXIS
from enginesmith.graphs.signature import AxisRange, GraphTensor, Signature

Shape = tuple[int, ...]


@dataclass(frozen=True)
class ShapeRange:
    """The shapes of one input: the smallest, the one that kernels are chosen for, the largest."""

    min: Shape
    opt: Shape
    max: Shape

    def covers(self, other: ShapeRange) -> bool:
        """Whether every shape of ``other`` is one of this range."""
        lower = all(mine <= theirs for mine, theirs in zip(self.min, other.min, strict=True))
        return lower and all(mine >= theirs for mine, theirs in zip(self.max, other.max, strict=True))


@dataclass(frozen=True)
class ServingLimits:
    """What is served, and what it is tuned for."""

    max_batch_size: int
    opt_batch_size: int | None
    """None: ``max_batch_size``."""
    max_sequence_length: int | None
    """None where the model reads no text."""
    opt_sequence_length: int | None
    """None: a quarter of ``max_sequence_length``."""

    @staticmethod
    def from_params(params: Mapping[str, Any]) -> ServingLimits:
        """The limits in the parameters of the step."""
        return ServingLimits(
            max_batch_size=params["max_batch_size"],
            opt_batch_size=params["opt_batch_size"],
            max_sequence_length=params["max_sequence_length"],
            opt_sequence_length=params["opt_sequence_length"],
        )


def profile_from_signature(signature: Signature, limits: ServingLimits) -> dict[str, ShapeRange]:
    """The shapes of every input, by name.

    Raises:
        SpecError: the limits are outside of what the graph takes.
        SourceError: an axis that must vary is fixed in the graph, or one has no range.
    """
    ranges = _axis_ranges(signature, limits)
    return {tensor.name: _shape_range(tensor, ranges, limits) for tensor in signature.inputs}


def _axis_ranges(signature: Signature, limits: ServingLimits) -> dict[str, AxisRange]:
    ranges = dict(signature.axes)
    opt_batch = limits.opt_batch_size or limits.max_batch_size
    if opt_batch > limits.max_batch_size:
        raise SpecError(
            f"opt_batch_size {opt_batch} is above serving.max_batch_size {limits.max_batch_size}",
            hint=f"set opt_batch_size to {limits.max_batch_size} or less",
        )
    ranges[BATCH_AXIS] = AxisRange(1, opt_batch, limits.max_batch_size)
    if limits.max_sequence_length is not None:
        if SEQUENCE_AXIS not in signature.axes:
            raise SourceError(
                f"the graph takes one sequence length only: its dynamic axes are {', '.join(signature.axes) or 'none'}, "
                f"and {SEQUENCE_AXIS!r} is needed",
                hint="export it with a dynamic sequence axis",
            )
        ranges[SEQUENCE_AXIS] = _sequence_range(signature.axes[SEQUENCE_AXIS], limits)
    return ranges


def _sequence_range(known: AxisRange, limits: ServingLimits) -> AxisRange:
    longest = limits.max_sequence_length
    assert longest is not None
    if not known.min <= longest <= known.max:
        raise SpecError(
            f"serving.max_sequence_length {longest} is outside of the graph's range {known.min} to {known.max}",
            hint=f"set it to {known.max} or less",
        )
    usual = limits.opt_sequence_length or max(known.min, longest // 4)
    if not known.min <= usual <= longest:
        raise SpecError(
            f"opt_sequence_length {usual} is outside of what is served, {known.min} to {longest}",
            hint="choose the usual length of a text in tokens",
        )
    return AxisRange(known.min, usual, longest)


def _shape_range(tensor: GraphTensor, ranges: Mapping[str, AxisRange], limits: ServingLimits) -> ShapeRange:
    if isinstance(tensor.shape[0], int):
        raise SourceError(
            f"input {tensor.name} has the fixed batch size {tensor.shape[0]}, but 1 to {limits.max_batch_size} are served",
            hint=f"export the graph with a dynamic first axis {BATCH_AXIS!r}",
        )
    sizes = []
    for size in tensor.shape:
        if isinstance(size, int):
            sizes.append(AxisRange(size, size, size))
        elif size in ranges:
            sizes.append(ranges[size])
        else:
            raise SourceError(
                f"the lengths of axis {size!r} of input {tensor.name} are not known; known: {', '.join(ranges)}",
                hint="give them under axes in the spec",
            )
    return ShapeRange(
        min=tuple(size.min for size in sizes),
        opt=tuple(size.opt for size in sizes),
        max=tuple(size.max for size in sizes),
    )

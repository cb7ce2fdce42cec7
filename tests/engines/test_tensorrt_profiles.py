"""Optimization profiles: from the signature and the limits of serving; what an engine must cover."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tensorrt_cases import params, signature

from enginesmith.engines.tensorrt.inspection import check_profiles
from enginesmith.engines.tensorrt.profiles import ServingLimits, ShapeRange, profile_from_signature
from enginesmith.errors import SourceError, SpecError
from enginesmith.graphs.signature import AxisRange, GraphTensor, Signature

LIMITS = ServingLimits.from_params(params())
IDS = (GraphTensor("input_ids", "int64", ("batch", "sequence")),)


def ids_of(**changes: int | None) -> ShapeRange:
    return profile_from_signature(signature(), replace(LIMITS, **changes))["input_ids"]


def test_usual_shape_is_the_largest_batch_and_a_quarter_of_the_longest_text() -> None:
    assert ids_of() == ShapeRange((1, 1), (8, 12), (8, 48))


def test_usual_shape_of_the_target_is_taken() -> None:
    assert ids_of(opt_batch_size=2, opt_sequence_length=40) == ShapeRange((1, 1), (2, 40), (8, 48))


def test_quarter_never_falls_below_the_shortest_text() -> None:
    wanted = Signature("embedding", IDS, (), {"sequence": AxisRange(20, 30, 64)})
    assert profile_from_signature(wanted, LIMITS)["input_ids"] == ShapeRange((1, 20), (8, 20), (8, 48))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"opt_batch_size": 9}, "opt_batch_size 9 is above serving.max_batch_size 8"),
        ({"opt_sequence_length": 49}, "opt_sequence_length 49 is outside of what is served, 1 to 48"),
        ({"max_sequence_length": 65}, "max_sequence_length 65 is outside of the graph's range 1 to 64"),
    ],
)
def test_limits_outside_of_the_graph_are_refused(changes: dict[str, int], message: str) -> None:
    with pytest.raises(SpecError, match=re.escape(message)):
        ids_of(**changes)


def test_graph_with_a_fixed_sequence_or_batch_cannot_be_served() -> None:
    fixed = Signature("embedding", (GraphTensor("input_ids", "int64", ("batch", 64)),), (), {})
    with pytest.raises(SourceError, match="takes one sequence length only"):
        profile_from_signature(fixed, LIMITS)
    single = Signature("tensors", (GraphTensor("image", "float32", (1, 3)),), (), {})
    with pytest.raises(SourceError, match="image has the fixed batch size 1, but 1 to 8 are served"):
        profile_from_signature(single, replace(LIMITS, max_sequence_length=None))


def test_axis_without_a_range_is_named() -> None:
    unknown = Signature("tensors", (GraphTensor("image", "float32", ("batch", "height")),), (), {})
    with pytest.raises(SourceError, match="lengths of axis 'height' of input image are not known"):
        profile_from_signature(unknown, replace(LIMITS, max_sequence_length=None))


@given(batch=st.integers(1, 512), length=st.integers(4, 4096), data=st.data())
def test_profile_is_ordered_and_covers_everything_served(
    batch: int, length: int, data: st.DataObject
) -> None:
    limits = ServingLimits(
        max_batch_size=batch,
        opt_batch_size=data.draw(st.none() | st.integers(1, batch)),
        max_sequence_length=length,
        opt_sequence_length=data.draw(st.none() | st.integers(2, length)),
    )
    wanted = Signature("embedding", IDS, (), {"sequence": AxisRange(2, 2, 4096)})
    profile = profile_from_signature(wanted, limits)
    shapes = profile["input_ids"]
    assert all(
        low <= usual <= high for low, usual, high in zip(shapes.min, shapes.opt, shapes.max, strict=True)
    )
    assert (shapes.min, shapes.max) == ((1, 2), (batch, length))
    check_profiles([profile], profile)


def test_engine_built_for_less_than_what_is_served_is_refused() -> None:
    served = {"input_ids": ShapeRange((1, 1), (8, 12), (8, 48))}
    narrow = {"input_ids": ShapeRange((1, 1), (8, 12), (8, 32))}
    large_only = {"input_ids": ShapeRange((2, 1), (8, 12), (8, 48))}
    for profiles in ([narrow], [large_only], [narrow, large_only]):
        with pytest.raises(SpecError, match=r"input_ids is served in shapes \[1, 1\] to \[8, 48\]"):
            check_profiles(profiles, served)
    check_profiles([narrow, served], served)

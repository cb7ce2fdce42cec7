"""Sensitivity: the ranking finds what hurts, and the proposal is met, small and applied."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from encoder_factory import Context, tiny_encoder
from hypothesis import given
from hypothesis import strategies as st
from small_graphs import PARAMS, constants_of, graph_of, node, random, write_export, write_samples

from enginesmith import cli
from enginesmith.errors import GateError
from enginesmith.graphs import quantize, sensitivity
from enginesmith.graphs.editing import load_model
from enginesmith.graphs.exclusion import broken_limits, smallest_exclusion

LAYERS = 5
BAD = (1, 3)
"""The layers whose input has an outlier, so that 8 bits leave little for the rest."""


def chain() -> onnx.ModelProto:
    """``y`` [batch, 16]: five products of ``x`` of which two read an input with one very wide channel."""
    nodes, constants = [], {}
    for index in range(LAYERS):
        wide = np.ones(16, np.float32)
        weight = random(16, 16, seed=index)
        if index in BAD:
            # The channel is large and its weights are small: nothing in float, everything in 8 bits.
            wide[0], weight[0] = 400.0 * (1 + index), weight[0] * 1e-6
        constants |= {f"wide_{index}": wide, f"w_{index}": weight}
        nodes += [
            node("Mul", ["x", f"wide_{index}"], f"read_{index}"),
            node("MatMul", [f"read_{index}", f"w_{index}"], f"made_{index}"),
        ]
    nodes.append(node("Sum", [f"made_{index}" for index in range(LAYERS)], "y"))
    return graph_of(nodes, constants, inputs={"x": ["batch", 16]}, outputs={"y": ["batch", 16]})


def run(root: Path, limits: Mapping[str, float], **params: Any) -> dict[str, Any]:
    """The ``sensitivity.json`` of the chain, in ``root``/out."""
    inputs = {
        "graph": write_export(root / "export", chain()),
        "calibration": write_samples(root / "calibration", [{"x": random(32, 16, seed=20)}]),
        "samples": write_samples(root / "samples", [{"x": random(32, 16, seed=seed)} for seed in (21, 22)]),
    }
    (root / "out").mkdir()
    given_params = PARAMS | {"exclude": "auto", "task": "tensors", "limits": limits} | params
    context = Context(given_params, inputs, root / "out", root / "scratch")
    facts = sensitivity.run(context)
    document: dict[str, Any] = json.loads((root / "out" / "sensitivity.json").read_text())
    assert facts["proposal"] == document["proposal"]
    assert any("of 5" in note for _, note in context.reports)
    return document


def test_the_ranking_starts_with_the_layers_that_hurt_and_proposes_them(tmp_path: Path) -> None:
    document = run(tmp_path, {"min_mean_cosine": 0.995})
    names = [f"made_{index}/MatMul" for index in (3, 1)]
    assert [entry["nodes"] for entry in document["ranking"][:2]] == [[name] for name in names]
    losses = [entry["loss"] for entry in document["ranking"]]
    assert losses == sorted(losses, reverse=True)
    assert document["met"]
    assert set(document["proposal"]) == set(names)
    assert document["before"]["mean_cosine"] < 0.995 <= document["after"]["mean_cosine"]


def test_auto_applies_the_proposal(tmp_path: Path) -> None:
    document = run(tmp_path, {"min_mean_cosine": 0.995})
    (tmp_path / "made").mkdir()
    inputs = {
        "graph": tmp_path / "export",
        "calibration": tmp_path / "calibration",
        "sensitivity": tmp_path / "out",
    }
    params = PARAMS | {"exclude": "auto"}
    facts = quantize.run(Context(params, inputs, tmp_path / "made", tmp_path / "scratch"))
    assert facts["quantized_nodes"] == LAYERS - len(document["proposal"])
    stored = constants_of(load_model(tmp_path / "made"))
    assert {f"w_{index}" for index in BAD} <= set(stored)


def test_nothing_is_proposed_where_the_limits_hold_anyway(tmp_path: Path) -> None:
    document = run(tmp_path, {"min_mean_cosine": 0.1})
    assert (document["met"], document["proposal"]) == (True, [])
    assert document["verdict"] == "the limits hold with nothing excluded"


def test_limits_that_nothing_meets_are_said_and_stop_auto(tmp_path: Path) -> None:
    document = run(tmp_path, {"max_abs_delta": 1e-9})
    assert not document["met"]
    assert document["proposal"] == []
    assert "max_abs_delta is" in document["verdict"]
    (tmp_path / "made").mkdir()
    inputs = {"graph": tmp_path / "export", "sensitivity": tmp_path / "out"}
    with pytest.raises(GateError, match="exclude: auto found no set"):
        quantize.run(Context(PARAMS | {"exclude": "auto"}, inputs, tmp_path / "made"))


def test_excluded_layers_are_not_ranked(tmp_path: Path) -> None:
    document = run_without_third(tmp_path)
    assert all("made_3/MatMul" not in entry["nodes"] for entry in document["ranking"])


def test_the_proposal_keeps_what_the_spec_excludes_already(tmp_path: Path) -> None:
    document = run_without_third(tmp_path, min_mean_cosine=0.995)
    assert document["proposal"] == ["made_1/MatMul"]
    assert document["exclude"] == ["made_3", "made_1/MatMul"]
    assert document["verdict"] == "the limits hold with 1 node in float, beside those that exclude names"


def run_without_third(root: Path, *, min_mean_cosine: float = 0.9) -> dict[str, Any]:
    inputs = {
        "graph": write_export(root / "export", chain()),
        "calibration": write_samples(root / "calibration", [{"x": random(32, 16, seed=20)}]),
        "samples": write_samples(root / "samples", [{"x": random(32, 16, seed=21)}]),
    }
    (root / "out").mkdir()
    limits = {"min_mean_cosine": min_mean_cosine}
    params = PARAMS | {"exclude": ["made_3"], "task": "tensors", "limits": limits}
    sensitivity.run(Context(params, inputs, root / "out", root / "scratch"))
    document: dict[str, Any] = json.loads((root / "out" / "sensitivity.json").read_text())
    return document


_SPEC = """
name: tiny
task: embedding
source: {path: checkpoint}
calibration: {samples: 8, length: 16}
verify: {samples: {samples: 8, length: 16, seed: 1}, quality: {min_mean_cosine: 0.9}}
serving: {max_sequence_length: 48}
variants:
  int8: {scheme: int8, method: max}
  strict: {scheme: int8, method: max, quality: {max_relative_error: 0}}
"""


@pytest.mark.model
def test_the_verb_prints_the_ranking_and_fails_where_nothing_is_met(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_encoder(tmp_path / "checkpoint", layers=1)
    spec = tmp_path / "tiny.yaml"
    spec.write_text(_SPEC)
    command = ["--store", str(tmp_path / "store"), "sensitivity", str(spec), "--variant"]
    assert cli.run([*command, "int8", "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert (found["variant"], found["met"]) == ("int8", True)
    groups = [entry["nodes"] for entry in found["ranking"]]
    assert sorted(map(len, groups)) == [1, 1, 1, 3]
    assert cli.run([*command, "int8"]) == 0
    assert "the limits hold with nothing excluded" in capsys.readouterr().out
    assert cli.run([*command, "strict"]) == 1
    assert "no set meets the limits" in capsys.readouterr().err


@given(
    losses=st.lists(st.floats(0, 1), min_size=1, max_size=24).map(lambda found: sorted(found, reverse=True)),
    allowed=st.floats(0, 4),
)
def test_a_found_set_is_met_and_no_member_can_be_dropped(losses: list[float], allowed: float) -> None:
    calls = 0

    def measure(excluded: frozenset[int]) -> dict[str, float]:
        nonlocal calls
        calls += 1
        return {"relative_error": sum(loss for index, loss in enumerate(losses) if index not in excluded)}

    limits = {"max_relative_error": allowed, "min_cosine": None}
    found = smallest_exclusion(len(losses), measure, limits)
    if not found.met:
        assert losses[-1] > allowed
        assert not found.excluded
        return
    assert len(found.excluded) < len(losses)
    assert measure(found.excluded)["relative_error"] <= allowed
    for member in found.excluded:
        assert measure(found.excluded - {member})["relative_error"] > allowed


def test_a_figure_that_is_not_a_number_or_missing_breaks_its_limit() -> None:
    assert broken_limits({"mean_cosine": float("nan")}, {"min_mean_cosine": 0.5}) != []
    assert broken_limits({"mean_cosine": 0.9}, {"min_top1_agreement": 0.5}) == [
        "top1_agreement is not measured for this task, allowed is at least 0.5"
    ]
    assert broken_limits({"mean_cosine": 0.5}, {"min_mean_cosine": 0.5, "max_abs_delta": None}) == []

"""The gate of graphs: what passes, what stops a build, and what is said then."""

from __future__ import annotations

import json
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from enginesmith.errors import GateError, SourceError
from enginesmith.graph_spec import EXPORT_LIMITS, QUALITY_LIMITS, GraphLimits
from enginesmith.graphs.gate import run

GOOD: dict[str, Any] = {
    "export": None,
    "quality": {"mean_cosine": 0.993, "min_cosine": 0.98, "max_abs_delta": 0.03, "relative_error": 0.1},
    "outputs": {"embedding": {"non_finite": 0, "constant": False}},
    "company": {"rows": 32, "relative_error": 1e-6},
}


@dataclass
class Context:
    params: Mapping[str, Any]
    inputs: Mapping[str, Path]
    out: Path
    scratch: Path = field(default_factory=Path)

    def progress(self, fraction: float | None, note: str = "") -> None: ...


def gate(
    tmp_path: Path,
    measurements: Any,
    *,
    scheme: str = "int8",
    quality: GraphLimits = QUALITY_LIMITS,
    export: GraphLimits | None = None,
) -> dict[str, Any]:
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    text = measurements if isinstance(measurements, str) else json.dumps(measurements)
    (tmp_path / "in" / "measurements.json").write_text(text)
    limits = {
        "export": export and export.model_dump(mode="json"),
        "quality": quality.model_dump(mode="json"),
    }
    params = {"scheme": scheme, "variant": "small", "limits": limits}
    run(Context(params, {"measurements": tmp_path / "in"}, tmp_path / "out"))
    verdict: dict[str, Any] = json.loads((tmp_path / "out" / "verdict.json").read_text())
    return verdict


def with_figure(path: str, value: Any) -> dict[str, Any]:
    measurements = deepcopy(GOOD)
    *parents, name = path.split(".")
    part: Any = measurements
    for key in parents:
        part = part[key]
    part[name] = value
    return measurements


def test_good_figures_pass_and_the_verdict_lists_every_check(tmp_path: Path) -> None:
    verdict = gate(tmp_path, GOOD)
    assert verdict["passed"] is True
    assert {check["name"]: (check["measured"], check["limit"]) for check in verdict["checks"]} == {
        "quality.mean_cosine": (0.993, 0.98),
        "output embedding values that are not finite": (0, 0),
        "output embedding is the same for all samples": (False, False),
        "company.relative_error": (1e-6, 0.05),
    }


@pytest.mark.parametrize(
    ("limits", "figure"),
    [
        (GraphLimits(min_mean_cosine=0.994), "mean_cosine"),
        (GraphLimits(min_cosine=0.99), "min_cosine"),
        (GraphLimits(max_abs_delta=0.02), "max_abs_delta"),
        (GraphLimits(max_relative_error=0.09), "relative_error"),
        (GraphLimits(min_top1_agreement=0.5), "top1_agreement"),
        (GraphLimits(min_rank_correlation=0.5), "rank_correlation"),
    ],
)
def test_each_limit_stops_what_breaks_it(tmp_path: Path, limits: GraphLimits, figure: str) -> None:
    with pytest.raises(GateError, match=rf"failed 1 of 4 checks.*\n.*quality\.{figure}"):
        gate(tmp_path, GOOD, quality=limits)
    assert json.loads((tmp_path / "out" / "verdict.json").read_text())["passed"] is False


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("outputs.embedding.non_finite", 3, "embedding values that are not finite: measured 3"),
        ("outputs.embedding.constant", True, "embedding is the same for all samples: measured true"),
        ("outputs", {}, "outputs: not measured"),
        ("company.relative_error", 0.3, "company.relative_error: measured 0.3, limit at most 0.05"),
        ("company.relative_error", None, "company.relative_error: not measured"),
        ("quality.mean_cosine", None, "quality.mean_cosine: not measured"),
        ("quality.mean_cosine", float("nan"), "quality.mean_cosine: not measured"),
        ("quality", None, "quality.mean_cosine: not measured"),
    ],
)
def test_what_no_limit_allows_never_passes(tmp_path: Path, path: str, value: Any, said: str) -> None:
    with pytest.raises(GateError) as raised:
        gate(tmp_path, with_figure(path, value))
    assert said in raised.value.message


def test_every_broken_check_is_listed(tmp_path: Path) -> None:
    limits = GraphLimits(min_mean_cosine=0.999, min_cosine=0.999, max_abs_delta=0.001)
    with pytest.raises(GateError) as raised:
        gate(tmp_path, GOOD, quality=limits)
    assert "failed 3 of 6 checks" in raised.value.message
    assert len(raised.value.message.splitlines()) == 4


@pytest.mark.parametrize("scheme", ["int8", "fp8"])
def test_a_calibrated_scheme_is_told_how_to_do_better(tmp_path: Path, scheme: str) -> None:
    with pytest.raises(GateError) as raised:
        gate(tmp_path, with_figure("quality.mean_cosine", 0.76), scheme=scheme)
    hint = raised.value.hint or ""
    for advice in ("enginesmith sensitivity SPEC --variant small", "exclude: auto", "weights: per_channel"):
        assert advice in hint
    assert ("smoothing" in hint) == (scheme == "int8")


def test_other_schemes_are_not_told_to_calibrate(tmp_path: Path) -> None:
    with pytest.raises(GateError) as raised:
        gate(tmp_path, with_figure("quality.mean_cosine", 0.9), scheme="fp16")
    assert "sensitivity" not in (raised.value.hint or "")


def test_a_wrong_export_is_told_from_a_lossy_scheme(tmp_path: Path) -> None:
    measurements = with_figure("export", {"relative_error": 0.5})
    with pytest.raises(GateError) as raised:
        gate(tmp_path, measurements, scheme="none", export=EXPORT_LIMITS)
    assert "export.relative_error: measured 0.5, limit at most 0.0001" in raised.value.message
    assert "FP32 graph does not compute" in (raised.value.hint or "")
    assert "choose another scheme" not in (raised.value.hint or "")


@pytest.mark.parametrize(("text", "said"), [("{", "not valid JSON"), ("[]", "must hold a JSON object")])
def test_damaged_measurements_are_refused(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(SourceError, match=said):
        gate(tmp_path, text)

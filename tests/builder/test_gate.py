"""The gate: what passes, what stops a build, and what is said then."""

from __future__ import annotations

import json
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from enginesmith.errors import GateError, SourceError
from enginesmith.spec import BASELINE_LIMITS, LOWERING_LIMITS, QUALITY_LIMITS, Limits
from enginesmith.verify.gate import run

GOOD: dict[str, Any] = {
    "quant_algo": "W4A16_AWQ",
    "exact": {"positions": 2550, "top1_agreement": 0.999, "mean_logprob_delta": 0.0005, "max_logit_delta": 0.2},
    "quality": {"top1_agreement": 0.8, "mean_logprob_delta": 0.1, "perplexity": 22.0, "baseline_perplexity": 20.0, "perplexity_increase": 0.1},
    "fast_cost": None,
    "probes": [{"prompt": "Hi", "tokens": 48, "finite": True, "longest_repeated_run": 2, "text": "Hello."}],
}  # fmt: skip


@dataclass
class Context:
    params: Mapping[str, Any]
    inputs: Mapping[str, Path]
    out: Path
    scratch: Path = field(default_factory=Path)

    def progress(self, fraction: float | None, note: str = "") -> None: ...


def limits(limits: Limits) -> dict[str, Any]:
    return limits.model_dump(mode="json")


def gate(tmp_path: Path, measurements: Any, *, scheme: str = "int4_awq", **changes: Any) -> dict[str, Any]:
    """Run the step on ``measurements``; the verdict it wrote, whether or not it failed is up to the caller."""
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    text = measurements if isinstance(measurements, str) else json.dumps(measurements)
    (tmp_path / "in" / "measurements.json").write_text(text)
    params = {
        "scheme": scheme,
        "limits": {
            "lowering": limits(LOWERING_LIMITS),
            "baseline": limits(BASELINE_LIMITS),
            "quality": limits(QUALITY_LIMITS),
        },
        "max_repeated_run": 24,
    } | changes
    run(Context(params, {"measurements": tmp_path / "in"}, tmp_path / "out"))
    verdict: dict[str, Any] = json.loads((tmp_path / "out" / "verdict.json").read_text())
    return verdict


def with_figure(path: str, value: Any) -> dict[str, Any]:
    measurements = deepcopy(GOOD)
    *parents, name = path.split(".")
    part: Any = measurements
    for key in parents:
        part = part[int(key) if key.isdigit() else key]
    part[name] = value
    return measurements


def test_good_figures_pass_and_the_verdict_lists_every_check(tmp_path: Path) -> None:
    verdict = gate(tmp_path, GOOD)
    assert verdict["passed"] is True
    assert {check["name"]: (check["measured"], check["limit"]) for check in verdict["checks"]} == {
        "lowering.top1_agreement": (0.999, 0.995),
        "lowering.mean_logprob_delta": (0.0005, 0.01),
        "quality.top1_agreement": (0.8, 0.6),
        "quality.perplexity_increase": (0.1, 0.5),
        "probe 1 finite ('Hi')": (True, True),
        "probe 1 longest repeated run": (2, 24),
    }


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("exact.top1_agreement", 0.99, "lowering.top1_agreement: measured 0.99, limit at least 0.995"),
        ("exact.mean_logprob_delta", 0.5, "lowering.mean_logprob_delta: measured 0.5, limit at most 0.01"),
        ("quality.perplexity_increase", 2.0, "quality.perplexity_increase: measured 2, limit at most 0.5"),
        ("quality.top1_agreement", float("nan"), "quality.top1_agreement: not measured, limit at least 0.6"),
        ("quality.perplexity_increase", float("inf"), "quality.perplexity_increase: not measured"),
        ("quality.top1_agreement", None, "quality.top1_agreement: not measured"),
        ("quality.top1_agreement", True, "quality.top1_agreement: not measured"),
        ("exact", None, "lowering.top1_agreement: not measured"),
        ("probes", [], "probes: not measured"),
        ("probes.0.finite", False, "probe 1 finite ('Hi'): measured false, limit is true"),
        ("probes.0.longest_repeated_run", 25, "probe 1 longest repeated run: measured 25, limit at most 24"),
    ],
)
def test_a_broken_or_unmeasured_limit_stops_the_build(
    tmp_path: Path, path: str, value: Any, said: str
) -> None:
    with pytest.raises(GateError) as caught:
        gate(tmp_path, with_figure(path, value))
    assert said in caught.value.message
    assert caught.value.hint


def test_every_failed_check_is_listed_and_the_verdict_is_written(tmp_path: Path) -> None:
    measurements = with_figure("exact.top1_agreement", 0.5)
    measurements["quality"]["top1_agreement"] = 0.1
    with pytest.raises(GateError, match="failed 2 of 6 checks") as caught:
        gate(tmp_path, measurements)
    assert "lowering.top1_agreement" in str(caught.value)
    assert "quality.top1_agreement" in str(caught.value)
    assert json.loads((tmp_path / "out" / "verdict.json").read_text())["passed"] is False


def test_the_baseline_is_held_to_its_own_limits(tmp_path: Path) -> None:
    with pytest.raises(GateError, match=r"baseline\.max_logit_delta: measured 0\.2, limit at most 0\.01"):
        gate(tmp_path, with_figure("quant_algo", None), scheme="none")


def test_a_checkpoint_that_came_quantized_is_held_to_the_limits_of_lowering(tmp_path: Path) -> None:
    assert gate(tmp_path, GOOD, scheme="none")["passed"]


def test_a_limit_left_out_is_not_enforced(tmp_path: Path) -> None:
    open_limits = {"lowering": None, "baseline": None, "quality": limits(Limits())}
    verdict = gate(tmp_path, with_figure("quality.top1_agreement", 0.0), limits=open_limits)
    assert [check["name"] for check in verdict["checks"]] == [
        "probe 1 finite ('Hi')",
        "probe 1 longest repeated run",
    ]


def test_figures_exactly_at_the_limit_pass(tmp_path: Path) -> None:
    assert gate(tmp_path, with_figure("exact.top1_agreement", 0.995))["passed"]


@pytest.mark.parametrize("text", ["", "[]", "{"])
def test_damaged_measurements_are_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(SourceError, match=r"measurements\.json"):
        gate(tmp_path, text)


NOISE = {"positions": 765, "top1_agreement": 0.96, "mean_logprob_delta": 0.06, "max_logit_delta": 3.0}


def test_an_engine_may_differ_from_pytorch_as_pytorch_differs_from_itself(tmp_path: Path) -> None:
    noisy = with_figure("exact.top1_agreement", 0.95)
    noisy["exact"]["mean_logprob_delta"] = 0.08
    verdict = gate(tmp_path, noisy | {"noise": NOISE}, scheme="int8_sq")
    limits = {check["name"]: check["limit"] for check in verdict["checks"]}
    assert limits["lowering.top1_agreement"] == pytest.approx(0.94)
    assert limits["lowering.mean_logprob_delta"] == pytest.approx(0.09)


@pytest.mark.parametrize("figure", ["top1_agreement", "mean_logprob_delta"])
def test_an_engine_beyond_the_noise_is_stopped(tmp_path: Path, figure: str) -> None:
    worse = {"top1_agreement": 0.93, "mean_logprob_delta": 0.1}[figure]
    with pytest.raises(GateError, match=figure):
        gate(tmp_path, with_figure(f"exact.{figure}", worse) | {"noise": NOISE}, scheme="int8_sq")


def test_noise_never_tightens_a_limit(tmp_path: Path) -> None:
    quiet = {"positions": 765, "top1_agreement": 1.0, "mean_logprob_delta": 1e-6, "max_logit_delta": 1e-4}
    verdict = gate(tmp_path, with_figure("exact.top1_agreement", 0.996) | {"noise": quiet}, scheme="fp8")
    assert verdict["passed"]

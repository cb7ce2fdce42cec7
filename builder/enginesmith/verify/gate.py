"""The gate: applies the spec's limits to what was measured, and stops the build where one is broken.

The ``verify`` step. It reads ``measurements.json`` and nothing else, so a limit can be edited without
measuring again. What was not measured, or is not a finite number, does not pass: inconclusive is a failure.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from enginesmith.errors import GateError
from enginesmith.steps import StepContext
from enginesmith.verify.verdict import (
    Check,
    Side,
    check_flag,
    check_number,
    failure_text,
    finite,
    limit_checks,
    read_measurements,
    write_verdict,
)

NOISE_FACTOR = 1.5
"""An engine may differ from PyTorch this many times as much as PyTorch differs from itself under rounding noise."""

_SIDES: Mapping[str, tuple[str, Side]] = {
    "min_top1_agreement": ("top1_agreement", "at least"),
    "max_mean_logprob_delta": ("mean_logprob_delta", "at most"),
    "max_logit_delta": ("max_logit_delta", "at most"),
    "max_perplexity_increase": ("perplexity_increase", "at most"),
}
"""For each limit of ``enginesmith.spec.Limits``: the figure it applies to, and the side it allows."""


def run(context: StepContext) -> Mapping[str, Any]:
    """Write ``verdict.json``; facts: how many checks there were.

    Raises:
        GateError: a check failed. The message lists every failed check: a failed step keeps no artifact.
    """
    measurements = read_measurements(context.inputs["measurements"], step="measure")
    checks = list(checks_of(measurements, context.params))
    if failed := write_verdict(checks, context.out):
        raise GateError(failure_text(context.params["scheme"], checks), hint=_advice(failed))
    return {"passed": True, "checks": len(checks)}


def checks_of(measurements: Mapping[str, Any], params: Mapping[str, Any]) -> Iterator[Check]:
    """Every check that ``params`` (the step's) asks for, applied to ``measurements``."""
    limits = params["limits"]
    # A checkpoint may come quantized: then it is its integers that must be computed with exactly.
    exactness = "lowering" if measurements.get("quant_algo") else "baseline"
    yield from limit_checks(
        exactness,
        limits.get(exactness),
        figures=measurements.get("exact"),
        sides=_SIDES,
        adjusted=partial(_beyond_noise, noise=measurements.get("noise")),
    )
    yield from limit_checks(
        "quality", limits.get("quality"), figures=measurements.get("quality"), sides=_SIDES
    )
    yield from _probe_checks(measurements.get("probes") or (), max_repeated_run=params["max_repeated_run"])


def _beyond_noise(limit: float, figure: str, relation: Side, *, noise: Mapping[str, Any] | None) -> float:
    """``limit``, or what PyTorch's agreement with itself allows where that is worse than the limit."""
    own = finite((noise or {}).get(figure))
    if own is None:
        return limit
    if relation == "at least":
        return min(limit, 1 - NOISE_FACTOR * (1 - own))
    return max(limit, NOISE_FACTOR * own)


def _probe_checks(probes: Any, *, max_repeated_run: int) -> Iterator[Check]:
    if not probes:
        yield Check("probes", None, True, "is", passed=False)
    for index, probe in enumerate(probes, start=1):
        yield check_flag(
            f"probe {index} finite ({probe.get('prompt', '')!r})", probe.get("finite"), wanted=True
        )
        longest = probe.get("longest_repeated_run")
        name = f"probe {index} longest repeated run"
        yield check_number(name, longest, relation="at most", limit=max_repeated_run)


def _advice(failed: list[Check]) -> str:
    names = " ".join(check.name for check in failed)
    advice = []
    if "lowering." in names or "baseline." in names:
        advice.append(
            "the engine does not compute what PyTorch computes from the same weights: this is a defect of the lowering or "
            "of the runtime, not of the scheme; report it with the build's log"
        )
    if "quality." in names or "probe" in names:
        advice.append(
            "exclude sensitive layers (`exclude: ['*.down_proj']`), choose another scheme, calibrate with more or more "
            "fitting text (`calibration:`), or raise the limit knowingly (`verify.quality`, or `quality` of the variant)"
        )
    return "; ".join(advice)

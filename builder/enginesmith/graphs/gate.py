"""The ``verify_graph`` step: applies the spec's limits to what was measured of a graph, and stops the build where one is broken.

It reads ``measurements.json`` and nothing else, so a limit can be edited without measuring again. What was not measured,
or is not a finite number, does not pass: inconclusive is a failure.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from enginesmith.errors import GateError
from enginesmith.steps import StepContext
from enginesmith.verify.verdict import (
    Check,
    Side,
    check_flag,
    check_number,
    failure_text,
    limit_checks,
    read_measurements,
    write_verdict,
)

_SIDES: Mapping[str, tuple[str, Side]] = {
    "min_mean_cosine": ("mean_cosine", "at least"),
    "min_cosine": ("min_cosine", "at least"),
    "max_abs_delta": ("max_abs_delta", "at most"),
    "max_relative_error": ("relative_error", "at most"),
    "min_top1_agreement": ("top1_agreement", "at least"),
    "min_rank_correlation": ("rank_correlation", "at least"),
}
"""For each limit of ``enginesmith.graph_spec.GraphLimits``: the figure it applies to, and the side it allows."""

COMPANY_LIMIT = 0.05
"""How much neighbours in a batch may change a row, relatively: far above rounding, far below another result."""
_CALIBRATED = ("int8", "fp8")


def run(context: StepContext) -> Mapping[str, Any]:
    """Write ``verdict.json``; facts: how many checks there were.

    Raises:
        GateError: a check failed. The message lists every failed check: a failed step keeps no artifact.
    """
    measurements = read_measurements(context.inputs["measurements"], step="measure_graph")
    checks = list(checks_of(measurements, context.params["limits"]))
    if failed := write_verdict(checks, context.out):
        params = context.params
        raise GateError(
            failure_text(params["scheme"], checks),
            hint=_advice(failed, scheme=params["scheme"], variant=params["variant"]),
        )
    return {"passed": True, "checks": len(checks)}


def checks_of(measurements: Mapping[str, Any], limits: Mapping[str, Any]) -> Iterator[Check]:
    """Every check that ``limits`` (groups ``export`` and ``quality``) asks for, and those that none can turn off."""
    for group in ("export", "quality"):
        figures = measurements.get(group)
        yield from limit_checks(group, limits.get(group), figures=figures, sides=_SIDES)
    outputs = measurements.get("outputs") or {}
    if not outputs:
        yield check_flag("outputs", None, wanted=True)
    for name, health in outputs.items():
        count = health.get("non_finite")
        yield check_number(f"output {name} values that are not finite", count, relation="at most", limit=0)
        yield check_flag(f"output {name} is the same for all samples", health.get("constant"), wanted=False)
    company = (measurements.get("company") or {}).get("relative_error")
    yield check_number("company.relative_error", company, relation="at most", limit=COMPANY_LIMIT)


def _advice(failed: Sequence[Check], *, scheme: str, variant: str) -> str:
    names = [check.name for check in failed]
    advice = []
    if any(name.startswith("export.") for name in names):
        advice.append(
            "the FP32 graph does not compute what the original model computes, so nothing made of it can be right: see "
            "export.json of the export step and report it"
        )
    if "company.relative_error" in names:
        advice.append(
            "a row's result depends on the rows that share its batch: the graph mixes samples, ignores its attention_mask "
            "or has a fixed axis; such a model cannot be batched"
        )
    if unmeasured := [check.name for check in failed if check.measured is None]:
        advice.append(
            f"{', '.join(unmeasured)} could not be measured: top1_agreement is of classification, rank_correlation of "
            "reranking with different scores, and no figure is of outputs that are not finite"
        )
    if any(not name.startswith(("export.", "company.")) for name in names):
        advice.append(_advice_on_scheme(scheme, variant))
    return "; ".join(advice)


def _advice_on_scheme(scheme: str, variant: str) -> str:
    allowed = "or raise the limit knowingly (`verify.quality`, or `quality` of the variant)"
    if scheme not in _CALIBRATED:
        return f"choose another scheme, {allowed}"
    ranges = "`method: percentile`, `smoothing: 0.5`, " if scheme == "int8" else ""
    return (
        f"`enginesmith sensitivity SPEC --variant {variant}` ranks the layers that hurt most, `exclude: auto` leaves the "
        f"fewest of them in float that suffice; {ranges}`weights: per_channel`, "
        f"`attention: false` and more calibration samples also help; {allowed}"
    )

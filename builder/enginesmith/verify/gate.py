"""The gate: applies the spec's limits to what was measured, and stops the build where one is broken.

The ``verify`` step. It reads ``measurements.json`` and nothing else, so a limit can be edited without
measuring again. What was not measured, or is not a finite number, does not pass: inconclusive is a failure.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from enginesmith.errors import GateError, SourceError
from enginesmith.steps import StepContext

MEASUREMENTS_FILE = "measurements.json"
VERDICT_FILE = "verdict.json"

NOISE_FACTOR = 1.5
"""An engine may differ from PyTorch this many times as much as PyTorch differs from itself under rounding noise."""

_LIMITS: Mapping[str, tuple[str, Literal["at least", "at most"]]] = {
    "min_top1_agreement": ("top1_agreement", "at least"),
    "max_mean_logprob_delta": ("mean_logprob_delta", "at most"),
    "max_logit_delta": ("max_logit_delta", "at most"),
    "max_perplexity_increase": ("perplexity_increase", "at most"),
}
"""For each limit of ``enginesmith.spec.Limits``: the figure it applies to, and the side it allows."""


@dataclass(frozen=True)
class Check:
    """One limit applied to one figure. ``measured`` is None where there is no finite figure."""

    name: str
    measured: float | bool | None
    limit: float | bool
    relation: Literal["at least", "at most", "is"]
    passed: bool

    def __str__(self) -> str:
        measured = "not measured" if self.measured is None else f"measured {_shown(self.measured)}"
        return f"{self.name}: {measured}, limit {self.relation} {_shown(self.limit)}"


def run(context: StepContext) -> Mapping[str, Any]:
    """Write ``verdict.json``; facts: how many checks there were.

    Raises:
        GateError: a check failed. The message lists every failed check: a failed step keeps no artifact.
    """
    measurements = _read_measurements(context.inputs["measurements"] / MEASUREMENTS_FILE)
    checks = list(checks_of(measurements, context.params))
    failed = [check for check in checks if not check.passed]
    verdict = {"passed": not failed, "checks": [asdict(check) for check in checks]}
    (context.out / VERDICT_FILE).write_text(json.dumps(verdict, indent=2) + "\n", encoding="utf-8")
    if failed:
        scheme = context.params["scheme"]
        raise GateError(
            f"scheme {scheme} failed {len(failed)} of {len(checks)} checks; it will not be packaged:\n"
            + "\n".join(f"  {check}" for check in failed),
            hint=_advice(failed),
        )
    return {"passed": True, "checks": len(checks)}


def checks_of(measurements: Mapping[str, Any], params: Mapping[str, Any]) -> Iterator[Check]:
    """Every check that ``params`` (the step's) asks for, applied to ``measurements``."""
    limits = params["limits"]
    # A checkpoint may come quantized: then it is its integers that must be computed with exactly.
    exactness = "lowering" if measurements.get("quant_algo") else "baseline"
    noise = measurements.get("noise")
    yield from _limit_checks(exactness, limits.get(exactness), measurements.get("exact"), noise=noise)
    yield from _limit_checks("quality", limits.get("quality"), measurements.get("quality"))
    yield from _probe_checks(measurements.get("probes") or (), max_repeated_run=params["max_repeated_run"])


def _limit_checks(
    group: str,
    limits: Mapping[str, Any] | None,
    figures: Mapping[str, Any] | None,
    *,
    noise: Mapping[str, Any] | None = None,
) -> Iterator[Check]:
    for key, wanted in (limits or {}).items():
        if wanted is None:
            continue
        figure, relation = _LIMITS[key]
        limit = _beyond_noise(wanted, figure, relation, noise)
        measured = _finite((figures or {}).get(figure))
        passed = measured is not None and (measured >= limit if relation == "at least" else measured <= limit)
        yield Check(f"{group}.{figure}", measured, limit, relation, passed)


def _beyond_noise(
    limit: float, figure: str, relation: Literal["at least", "at most"], noise: Mapping[str, Any] | None
) -> float:
    """``limit``, or what PyTorch's agreement with itself allows where that is worse than the limit."""
    own = _finite((noise or {}).get(figure))
    if own is None:
        return limit
    if relation == "at least":
        return min(limit, 1 - NOISE_FACTOR * (1 - own))
    return max(limit, NOISE_FACTOR * own)


def _probe_checks(probes: Any, *, max_repeated_run: int) -> Iterator[Check]:
    if not probes:
        yield Check("probes", None, True, "is", passed=False)
    for index, probe in enumerate(probes, start=1):
        finite = probe.get("finite")
        yield Check(
            f"probe {index} finite ({probe.get('prompt', '')!r})", finite, True, "is", passed=finite is True
        )
        longest = _finite(probe.get("longest_repeated_run"))
        passed = longest is not None and longest <= max_repeated_run
        yield Check(f"probe {index} longest repeated run", longest, max_repeated_run, "at most", passed)


def _read_measurements(path: Path) -> Mapping[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SourceError(
            f"cannot read {path}: {error.strerror}", hint="run the measure step again"
        ) from error
    except ValueError as error:
        raise SourceError(f"{path} is not valid JSON: {error}", hint="run the measure step again") from error
    if not isinstance(document, dict):
        raise SourceError(f"{path} must hold a JSON object, seen: {type(document).__name__}")
    return document


def _finite(value: Any) -> float | None:
    """``value`` as a number; None for what is absent, not a number, NaN or infinite."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return value


def _shown(value: float | bool) -> str:
    return str(value).lower() if isinstance(value, bool) else f"{value:.6g}"


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

"""A verdict: limits applied to measured figures, as every gate does it, and the files that it is read from and written to.

Owns the shapes of a check and of ``verdict.json``. Which limits there are, and what to do about a broken one, is the
gate's business.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from enginesmith.errors import SourceError

MEASUREMENTS_FILE = "measurements.json"
VERDICT_FILE = "verdict.json"

Side = Literal["at least", "at most"]


@dataclass(frozen=True)
class Check:
    """One limit applied to one figure. ``measured`` is None where there is no finite figure."""

    name: str
    measured: float | bool | None
    limit: float | bool
    relation: Side | Literal["is"]
    passed: bool

    def __str__(self) -> str:
        measured = "not measured" if self.measured is None else f"measured {_shown(self.measured)}"
        return f"{self.name}: {measured}, limit {self.relation} {_shown(self.limit)}"


def limit_checks(
    group: str,
    limits: Mapping[str, float | None] | None,
    *,
    figures: Mapping[str, Any] | None,
    sides: Mapping[str, tuple[str, Side]],
    adjusted: Callable[[float, str, Side], float] = lambda limit, _figure, _side: limit,
) -> Iterator[Check]:
    """A check named ``group.figure`` for every limit of a part of the spec that is set (not None).

    ``sides`` has for each limit the figure it applies to and the side it allows; ``adjusted`` may move a limit.
    """
    for key, wanted in (limits or {}).items():
        if wanted is None:
            continue
        figure, side = sides[key]
        limit = adjusted(wanted, figure, side)
        yield check_number(f"{group}.{figure}", (figures or {}).get(figure), relation=side, limit=limit)


def check_number(name: str, measured: Any, *, relation: Side, limit: float) -> Check:
    """The check of a number; what is not a finite one does not pass."""
    figure = finite(measured)
    passed = figure is not None and (figure >= limit if relation == "at least" else figure <= limit)
    return Check(name, figure, limit, relation, passed)


def check_flag(name: str, measured: Any, *, wanted: bool) -> Check:
    """The check of a yes or no; neither of them does not pass."""
    return Check(name, measured, wanted, "is", passed=measured is wanted)


def finite(value: Any) -> float | None:
    """``value`` as a number; None for what is absent, not a number, NaN or infinite."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return value


def write_verdict(checks: Sequence[Check], directory: Path) -> list[Check]:
    """Write ``verdict.json`` into ``directory``; the checks that failed."""
    failed = [check for check in checks if not check.passed]
    verdict = {"passed": not failed, "checks": [asdict(check) for check in checks]}
    (directory / VERDICT_FILE).write_text(json.dumps(verdict, indent=2) + "\n", encoding="utf-8")
    return failed


def failure_text(scheme: str, checks: Sequence[Check]) -> str:
    """What to say of checks of which some failed: every one of those."""
    failed = [check for check in checks if not check.passed]
    return (
        f"scheme {scheme} failed {len(failed)} of {len(checks)} checks; it will not be packaged:\n"
        + "\n".join(f"  {check}" for check in failed)
    )


def read_measurements(directory: Path, *, step: str) -> Mapping[str, Any]:
    """``measurements.json`` in ``directory``, which ``step`` wrote.

    Raises:
        SourceError: it cannot be read or is no JSON object.
    """
    path = directory / MEASUREMENTS_FILE
    hint = f"run the {step} step again"
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SourceError(f"cannot read {path}: {error.strerror}", hint=hint) from error
    except ValueError as error:
        raise SourceError(f"{path} is not valid JSON: {error}", hint=hint) from error
    if not isinstance(document, dict):
        raise SourceError(f"{path} must hold a JSON object, seen: {type(document).__name__}", hint=hint)
    return document


def _shown(value: float | bool) -> str:
    return str(value).lower() if isinstance(value, bool) else f"{value:.6g}"

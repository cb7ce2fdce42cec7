"""What the reports of all models share: the fate of a variant's steps, figures out of facts, and how both are shown.

A figure that no step measured is None, and shown as such.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from enginesmith.plan import Plan
from enginesmith.plan_steps import Step
from enginesmith.steps import REHEARSALS, StepName
from enginesmith.store import Artifact

if TYPE_CHECKING:
    from rich.table import Table

NOT_MEASURED = "not measured"
_TEXT_COLUMNS = ("variant", "scheme", "verdict")

Row = TypeVar("Row")
Columns = Sequence[tuple[str, Callable[[Row], str | None]]]


@dataclass(frozen=True, kw_only=True)
class BuiltVariant:
    """What is known of every variant, whatever model it is of. None means that it was not measured."""

    variant: str
    scheme: str
    passed: bool | None
    """The gate's verdict; a variant that the gate stopped has none, because a failed step leaves nothing."""
    measured: bool
    """Whether everything that the gate reads is there."""
    rehearsed: bool
    """On every target."""
    duration_s: float | None
    """Of this variant's own steps, whenever they ran."""
    peak_rss_bytes: int | None
    keys: Mapping[str, str]
    """The artifact of each of its steps, as ``kind`` or ``kind@target``."""

    @property
    def verdict(self) -> str | None:
        """For people: what the gate and the rehearsals said."""
        if self.passed is None:
            return "not passed" if self.measured else None
        return ("passed" if self.rehearsed else "passed, not rehearsed") if self.passed else "failed"


def built_variant(
    plan: Plan, name: str, artifacts: Mapping[str, Artifact], *, gate: StepName
) -> BuiltVariant:
    """The fate of variant ``name``, as far as its artifacts are there. ``gate`` is the kind of step that judges it."""
    own = [step for step in plan.steps if step.variant == name]
    made = [artifacts[step.key] for step in own if step.key in artifacts]
    rehearsals = [step for step in own if step.kind in REHEARSALS]
    passed = facts_of(own, artifacts).get(gate, {}).get("passed")
    judged = [key for step in own if step.kind == gate for key in step.inputs.values()]
    return BuiltVariant(
        variant=name,
        scheme=plan.spec.variants[name].scheme,
        passed=None if passed is None else bool(passed),
        measured=bool(judged) and all(key in artifacts for key in judged),
        rehearsed=bool(rehearsals) and all(step.key in artifacts for step in rehearsals),
        duration_s=sum(artifact.duration_s for artifact in made) if len(made) == len(own) else None,
        peak_rss_bytes=max((artifact.peak_rss_bytes for artifact in made), default=None),
        keys={step.kind + (f"@{step.target}" if step.target else ""): step.key for step in own},
    )


def facts_of(
    steps: Sequence[Step], artifacts: Mapping[str, Artifact]
) -> Mapping[StepName, Mapping[str, Any]]:
    """The facts by kind of those of ``steps`` that belong to no target, as far as they were made."""
    return {
        step.kind: artifacts[step.key].facts
        for step in steps
        if step.target is None and step.key in artifacts
    }


def number(facts: Mapping[str, Any], *path: str) -> float | None:
    """The number at ``path`` in ``facts``, or None."""
    node: Any = facts
    for name in path:
        node = node.get(name) if isinstance(node, Mapping) else None
    return node if isinstance(node, (int, float)) and not isinstance(node, bool) else None


def ratio(part: float | None, whole: float | None) -> float | None:
    """``part`` of ``whole``, where both are known."""
    return part / whole if part is not None and whole else None


def bytes_text(size: float | None) -> str | None:
    """A size in binary units, for people."""
    if size is None:
        return None
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1024 or unit == "GiB":
            return f"{size:.0f} {unit}" if unit == "B" or size >= 100 else f"{size:.1f} {unit}"
        size /= 1024
    return None


def formatted(value: float | None, form: str) -> str | None:
    """A number as ``format`` writes it, or None."""
    return None if value is None else format(value, form)


def seconds_text(value: float | None) -> str | None:
    """A duration for people."""
    return None if value is None else f"{value:.0f} s"


def table_of(title: str, rows: Sequence[Row], *, columns: Columns[Row]) -> Table:
    """A table for people: one row for each of ``rows``; numbers to the right."""
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for heading, _ in columns:
        table.add_column(heading, justify="left" if heading in _TEXT_COLUMNS else "right")
    for row in rows:
        cells = (cell(row) for _, cell in columns)
        table.add_row(*(NOT_MEASURED if text is None else text for text in cells))
    return table

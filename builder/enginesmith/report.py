"""What a build gained and cost, per variant, from the facts that its steps measured.

Owns the shape of the report as JSON and as a table. A figure that no step measured is None, and shown as such.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from enginesmith.plan import Plan
from enginesmith.plan_steps import Step
from enginesmith.steps import REHEARSALS
from enginesmith.store import Artifact

if TYPE_CHECKING:
    from rich.table import Table

NOT_MEASURED = "not measured"


@dataclass(frozen=True)
class VariantReport:
    """One variant's figures. Shares are fractions of 1; None means that it was not measured."""

    variant: str
    scheme: str
    engine_bytes: int | None
    share_of_bf16: float | None
    share_of_fp32: float | None
    perplexity: float | None
    perplexity_increase: float | None
    """Relative to the unquantized model."""
    top1_agreement: float | None
    """As served, with the unquantized model."""
    lowering_top1_agreement: float | None
    """In exact mode, with PyTorch running the same integers."""
    lowering_mean_logprob_delta: float | None
    fast_cost_top1_agreement: float | None
    """As served, with exact mode: what the runtime's fast mode costs."""
    fast_cost_mean_logprob_delta: float | None
    passed: bool | None
    """The gate's verdict."""
    rehearsed: bool
    """On every target."""
    duration_s: float | None
    """Of this variant's own steps, whenever they ran."""
    peak_rss_bytes: int | None
    keys: Mapping[str, str]
    """The artifact of each of its steps, as ``kind`` or ``kind@target``."""


@dataclass(frozen=True)
class BuildReport:
    """The figures of every variant of one plan."""

    name: str
    variants: tuple[VariantReport, ...]

    def as_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"name": self.name, "variants": [asdict(variant) for variant in self.variants]}

    def as_table(self) -> Table:
        """A table for people."""
        from rich.table import Table

        table = Table(title=self.name, title_justify="left")
        for heading, _ in _COLUMNS:
            table.add_column(
                heading, justify="left" if heading in ("variant", "scheme", "verdict") else "right"
            )
        for variant in self.variants:
            table.add_row(*(_shown(cell(variant)) for _, cell in _COLUMNS))
        return table


def build_report(plan: Plan, artifacts: Mapping[str, Artifact]) -> BuildReport:
    """The report on ``plan``, as far as its artifacts are there."""
    return BuildReport(
        plan.spec.name, tuple(_variant_report(plan, name, artifacts) for name in plan.variants)
    )


def _variant_report(plan: Plan, name: str, artifacts: Mapping[str, Artifact]) -> VariantReport:
    own: dict[str, Step] = {step.kind: step for step in plan.steps_of(name, None) if step.variant}
    everywhere = [step for step in plan.steps if step.variant == name]
    made = [artifacts[step.key] for step in everywhere if step.key in artifacts]
    facts = {kind: artifacts[step.key].facts for kind, step in own.items() if step.key in artifacts}
    rehearsals = [step for step in everywhere if step.kind in REHEARSALS]
    lowered, measured = facts.get("lower", {}), facts.get("measure", {})
    engine_bytes = _number(lowered, "engine_bytes")
    return VariantReport(
        variant=name,
        scheme=plan.spec.variants[name].scheme,
        engine_bytes=None if engine_bytes is None else int(engine_bytes),
        share_of_bf16=_ratio(engine_bytes, _number(lowered, "bf16_bytes")),
        share_of_fp32=_ratio(engine_bytes, _number(lowered, "fp32_bytes")),
        perplexity=_number(measured, "perplexity"),
        perplexity_increase=_number(measured, "quality", "perplexity_increase"),
        top1_agreement=_number(measured, "quality", "top1_agreement"),
        lowering_top1_agreement=_number(measured, "exact", "top1_agreement"),
        lowering_mean_logprob_delta=_number(measured, "exact", "mean_logprob_delta"),
        fast_cost_top1_agreement=_number(measured, "fast_cost", "top1_agreement"),
        fast_cost_mean_logprob_delta=_number(measured, "fast_cost", "mean_logprob_delta"),
        passed=bool(facts["verify"]["passed"]) if "passed" in facts.get("verify", {}) else None,
        rehearsed=bool(rehearsals) and all(step.key in artifacts for step in rehearsals),
        duration_s=sum(artifact.duration_s for artifact in made) if len(made) == len(everywhere) else None,
        peak_rss_bytes=max((artifact.peak_rss_bytes for artifact in made), default=None),
        keys={step.kind + (f"@{step.target}" if step.target else ""): step.key for step in everywhere},
    )


def _number(facts: Mapping[str, Any], *path: str) -> float | None:
    node: Any = facts
    for name in path:
        node = node.get(name) if isinstance(node, Mapping) else None
    return node if isinstance(node, (int, float)) and not isinstance(node, bool) else None


def _ratio(part: float | None, whole: float | None) -> float | None:
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


def _percent(share: float | None, *, signed: bool = False) -> str | None:
    return None if share is None else f"{share:+.1%}" if signed else f"{share:.1%}"


def _verdict(variant: VariantReport) -> str | None:
    if variant.passed is None:
        return None
    return ("passed" if variant.rehearsed else "passed, not rehearsed") if variant.passed else "failed"


def _shown(text: str | None) -> str:
    return NOT_MEASURED if text is None else text


_COLUMNS = (
    ("variant", lambda v: v.variant),
    ("scheme", lambda v: v.scheme),
    ("size", lambda v: bytes_text(v.engine_bytes)),
    ("of BF16", lambda v: _percent(v.share_of_bf16)),
    ("of FP32", lambda v: _percent(v.share_of_fp32)),
    ("perplexity", lambda v: None if v.perplexity is None else f"{v.perplexity:.2f}"),
    ("change", lambda v: _percent(v.perplexity_increase, signed=True)),
    ("top-1", lambda v: _percent(v.top1_agreement)),
    ("lowering", lambda v: _percent(v.lowering_top1_agreement)),
    ("fast mode", lambda v: _percent(v.fast_cost_top1_agreement)),
    ("verdict", _verdict),
    ("time", lambda v: None if v.duration_s is None else f"{v.duration_s:.0f} s"),
    ("peak memory", lambda v: bytes_text(v.peak_rss_bytes)),
)

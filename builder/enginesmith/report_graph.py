"""What a build of a graph model gained and cost, per variant, from the facts that its steps measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from enginesmith.graph_spec import GraphSpec
from enginesmith.plan import Plan
from enginesmith.report_parts import (
    BuiltVariant,
    Columns,
    built_variant,
    bytes_text,
    facts_of,
    formatted,
    number,
    ratio,
    seconds_text,
    table_of,
)
from enginesmith.store import Artifact

if TYPE_CHECKING:
    from rich.table import Table

EMULATED = "emulated"


@dataclass(frozen=True, kw_only=True)
class GraphVariantReport(BuiltVariant):
    """One variant's figures, as the engine for this CPU. None means that it was not measured."""

    engine_bytes: int | None
    share_of_fp32: float | None
    mean_cosine: float | None
    """As served, with the original model; likewise below."""
    min_cosine: float | None
    relative_error: float | None
    top1_agreement: float | None
    """Classification only."""
    rank_correlation: float | None
    """Reranking only."""
    emulated: bool | None
    """This CPU only imitates the precision: the figures of quality hold, those of speed say nothing."""
    threads: int | None
    batch_size: int | None
    samples_per_s_single: float | None
    """With one sample at a time."""
    samples_per_s_batched: float | None
    """With ``batch_size`` samples at a time."""
    speedup_single: float | None
    """Over the FP32 engine in the same run; likewise below."""
    speedup_batched: float | None


@dataclass(frozen=True)
class GraphReport:
    """The figures of every variant of one plan."""

    name: str
    task: str
    variants: tuple[GraphVariantReport, ...]

    def as_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "name": self.name,
            "task": self.task,
            "variants": [asdict(variant) for variant in self.variants],
        }

    def as_table(self) -> Table:
        """A table for people."""
        return table_of(f"{self.name} ({self.task})", self.variants, columns=_columns(self))


def graph_report(plan: Plan, artifacts: Mapping[str, Artifact]) -> GraphReport:
    """The report on ``plan``, as far as its artifacts are there."""
    assert isinstance(plan.spec, GraphSpec), plan.spec
    variants = tuple(_variant(plan, name, artifacts) for name in plan.variants)
    return GraphReport(plan.spec.name, plan.spec.task, variants)


def _variant(plan: Plan, name: str, artifacts: Mapping[str, Artifact]) -> GraphVariantReport:
    own = [step for step in plan.steps if step.variant == name]
    measured = facts_of(own, artifacts).get("measure_graph", {})
    engine_bytes = number(measured, "engine_bytes")
    return GraphVariantReport(
        **vars(built_variant(plan, name, artifacts, gate="verify_graph")),
        engine_bytes=_whole(engine_bytes),
        share_of_fp32=ratio(engine_bytes, number(measured, "fp32_bytes")),
        mean_cosine=number(measured, "quality", "mean_cosine"),
        min_cosine=number(measured, "quality", "min_cosine"),
        relative_error=number(measured, "quality", "relative_error"),
        top1_agreement=number(measured, "quality", "top1_agreement"),
        rank_correlation=number(measured, "quality", "rank_correlation"),
        emulated=measured.get("emulated"),
        threads=_whole(number(measured, "throughput", "threads")),
        batch_size=_whole(number(measured, "throughput", "batched", "batch_size")),
        samples_per_s_single=number(measured, "throughput", "single", "samples_per_s"),
        samples_per_s_batched=number(measured, "throughput", "batched", "samples_per_s"),
        speedup_single=number(measured, "throughput", "single", "speedup"),
        speedup_batched=number(measured, "throughput", "batched", "speedup"),
    )


def _whole(value: float | None) -> int | None:
    return None if value is None else int(value)


def _speed(variant: GraphVariantReport, value: float | None) -> str | None:
    if variant.emulated:
        return EMULATED
    return None if value is None else f"{value:.2f}x"


def _columns(report: GraphReport) -> Columns[GraphVariantReport]:
    batch_size = next((v.batch_size for v in report.variants if v.batch_size), "n")
    own: dict[str, Columns[GraphVariantReport]] = {
        "classification": (("top-1", lambda v: formatted(v.top1_agreement, ".1%")),),
        "reranking": (("rank correlation", lambda v: formatted(v.rank_correlation, ".4f")),),
        "tensors": (("relative error", lambda v: formatted(v.relative_error, ".1e")),),
    }
    return (
        ("variant", lambda v: v.variant),
        ("scheme", lambda v: v.scheme),
        ("size", lambda v: bytes_text(v.engine_bytes)),
        ("of FP32", lambda v: formatted(v.share_of_fp32, ".1%")),
        ("mean cosine", lambda v: formatted(v.mean_cosine, ".4f")),
        ("worst cosine", lambda v: formatted(v.min_cosine, ".4f")),
        *own.get(report.task, ()),
        ("speed at batch 1", lambda v: _speed(v, v.speedup_single)),
        (f"at batch {batch_size}", lambda v: _speed(v, v.speedup_batched)),
        ("verdict", lambda v: v.verdict),
        ("time", lambda v: seconds_text(v.duration_s)),
        ("peak memory", lambda v: bytes_text(v.peak_rss_bytes)),
    )

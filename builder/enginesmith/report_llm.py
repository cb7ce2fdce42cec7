"""What a build of a text-generation model gained and cost, per variant, from the facts that its steps measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

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


@dataclass(frozen=True, kw_only=True)
class LlmVariantReport(BuiltVariant):
    """One variant's figures. Shares are fractions of 1; None means that it was not measured."""

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
    kv_cache_bytes: int | None
    """Key/value memory of each instance on ONNX Runtime, when all of it is in use."""


@dataclass(frozen=True)
class LlmReport:
    """The figures of every variant of one plan."""

    name: str
    variants: tuple[LlmVariantReport, ...]

    def as_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"name": self.name, "variants": [asdict(variant) for variant in self.variants]}

    def as_table(self) -> Table:
        """A table for people."""
        return table_of(self.name, self.variants, columns=_COLUMNS)


def llm_report(plan: Plan, artifacts: Mapping[str, Artifact]) -> LlmReport:
    """The report on ``plan``, as far as its artifacts are there."""
    return LlmReport(plan.spec.name, tuple(_variant(plan, name, artifacts) for name in plan.variants))


def _variant(plan: Plan, name: str, artifacts: Mapping[str, Artifact]) -> LlmVariantReport:
    facts = facts_of([step for step in plan.steps if step.variant == name], artifacts)
    lowered, measured = facts.get("lower", {}), facts.get("measure", {})
    engine_bytes = number(lowered, "engine_bytes")
    kv_cache_bytes = number(facts.get("package", {}), "kv_cache_bytes")
    return LlmVariantReport(
        **vars(built_variant(plan, name, artifacts, gate="verify")),
        engine_bytes=None if engine_bytes is None else int(engine_bytes),
        share_of_bf16=ratio(engine_bytes, number(lowered, "bf16_bytes")),
        share_of_fp32=ratio(engine_bytes, number(lowered, "fp32_bytes")),
        perplexity=number(measured, "perplexity"),
        perplexity_increase=number(measured, "quality", "perplexity_increase"),
        top1_agreement=number(measured, "quality", "top1_agreement"),
        lowering_top1_agreement=number(measured, "exact", "top1_agreement"),
        lowering_mean_logprob_delta=number(measured, "exact", "mean_logprob_delta"),
        fast_cost_top1_agreement=number(measured, "fast_cost", "top1_agreement"),
        fast_cost_mean_logprob_delta=number(measured, "fast_cost", "mean_logprob_delta"),
        kv_cache_bytes=None if kv_cache_bytes is None else int(kv_cache_bytes),
    )


_COLUMNS: Columns[LlmVariantReport] = (
    ("variant", lambda v: v.variant),
    ("scheme", lambda v: v.scheme),
    ("size", lambda v: bytes_text(v.engine_bytes)),
    ("of BF16", lambda v: formatted(v.share_of_bf16, ".1%")),
    ("of FP32", lambda v: formatted(v.share_of_fp32, ".1%")),
    ("KV cache", lambda v: bytes_text(v.kv_cache_bytes)),
    ("perplexity", lambda v: formatted(v.perplexity, ".2f")),
    ("change", lambda v: formatted(v.perplexity_increase, "+.1%")),
    ("top-1", lambda v: formatted(v.top1_agreement, ".1%")),
    ("lowering", lambda v: formatted(v.lowering_top1_agreement, ".1%")),
    ("fast mode", lambda v: formatted(v.fast_cost_top1_agreement, ".1%")),
    ("verdict", lambda v: v.verdict),
    ("time", lambda v: seconds_text(v.duration_s)),
    ("peak memory", lambda v: bytes_text(v.peak_rss_bytes)),
)

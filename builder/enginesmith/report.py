"""The report on a build, of whatever model it is: figures per variant, as JSON and as a table."""

from __future__ import annotations

from collections.abc import Mapping

from enginesmith.graph_spec import GraphSpec
from enginesmith.plan import Plan
from enginesmith.report_graph import GraphReport, graph_report
from enginesmith.report_llm import LlmReport, llm_report
from enginesmith.store import Artifact

BuildReport = LlmReport | GraphReport


def build_report(plan: Plan, artifacts: Mapping[str, Artifact]) -> BuildReport:
    """The report on ``plan``, as far as its artifacts are there."""
    if isinstance(plan.spec, GraphSpec):
        return graph_report(plan, artifacts)
    return llm_report(plan, artifacts)

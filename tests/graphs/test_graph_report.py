"""The report on a build of graph models: what was measured, what was not, and what only imitates a precision."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from rich.table import Table

from enginesmith.plan import Plan, make_plan
from enginesmith.report import build_report
from enginesmith.report_graph import GraphReport
from enginesmith.spec_file import load_spec
from enginesmith.steps import REHEARSALS
from enginesmith.store import Artifact, ArtifactStore

SPEC = """
name: tiny
task: {task}
source: {{path: checkpoint}}
variants:
  fp32: {{scheme: none}}
  int8: {{scheme: int8}}
  bf16: {{scheme: bf16}}
"""
MEASURED: dict[str, Any] = {
    "quality": {"mean_cosine": 0.9941, "min_cosine": 0.981, "relative_error": 0.1},
    "engine_bytes": 25 << 20,
    "fp32_bytes": 100 << 20,
    "emulated": False,
    "throughput": {
        "threads": 2,
        "single": {"batch_size": 1, "samples_per_s": 180.0, "speedup": 1.5},
        "batched": {"batch_size": 8, "samples_per_s": 420.0, "speedup": 1.4},
    },
}
ARCHITECTURES = {
    "embedding": "BertModel",
    "classification": "BertForSequenceClassification",
    "reranking": "BertForSequenceClassification",
}


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    return ArtifactStore(tmp_path / "store")


def plan_of(tmp_path: Path, store: ArtifactStore, task: str = "embedding") -> Plan:
    (tmp_path / "checkpoint").mkdir()
    config = {
        "architectures": [ARCHITECTURES[task]],
        "model_type": "bert",
        "vocab_size": 100,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "max_position_embeddings": 512,
        "id2label": {"0": "score"} if task == "reranking" else {"0": "calm", "1": "cross"},
    }
    (tmp_path / "checkpoint" / "config.json").write_text(json.dumps(config))
    (tmp_path / "tiny.yaml").write_text(SPEC.format(task=task))
    return make_plan(load_spec(tmp_path / "tiny.yaml"), store)


def artifacts_of(plan: Plan, variant: str, measured: dict[str, Any]) -> dict[str, Artifact]:
    """Artifacts of all steps of ``variant``, as if it had been built."""
    facts = {"measure_graph": measured, "verify_graph": {"passed": True}}
    return {
        step.key: Artifact(
            key=step.key, kind=step.kind, path=Path(), parts={}, facts=facts.get(step.kind, {}), files={},
            created_unix_s=0.0, duration_s=2.0, peak_rss_bytes=300 << 20,
        )
        for step in plan.steps
        if step.variant == variant
    }  # fmt: skip


def cells(table: Table) -> dict[str, list[str]]:
    """The table's columns, without the tags that rich keeps out of sight."""
    return {str(column.header): [str(cell) for cell in column.cells] for column in table.columns}


def test_figures_are_reported_and_what_was_not_built_says_so(tmp_path: Path, store: ArtifactStore) -> None:
    plan = plan_of(tmp_path, store)
    report = build_report(plan, artifacts_of(plan, "int8", MEASURED))
    assert isinstance(report, GraphReport)
    by_name = {variant.variant: variant for variant in report.variants}
    row = by_name["int8"]
    assert (row.share_of_fp32, row.mean_cosine, row.min_cosine) == (0.25, 0.9941, 0.981)
    assert (row.speedup_single, row.speedup_batched, row.batch_size, row.threads) == (1.5, 1.4, 8, 2)
    own = [step for step in plan.steps if step.variant == "int8"]
    assert row.duration_s == 2.0 * len(own)
    assert (row.passed, row.rehearsed, row.verdict) == (True, True, "passed")
    assert by_name["fp32"].mean_cosine is None
    assert json.loads(json.dumps(report.as_json()))["variants"][1]["speedup_batched"] == 1.4
    shown = cells(report.as_table())
    assert shown["mean cosine"] == ["not measured", "0.9941", "not measured"]
    assert shown["speed at batch 1"][1] == "1.50x"
    assert shown["at batch 8"][1] == "1.40x"
    assert shown["of FP32"][1] == "25.0%"


def test_a_variant_that_was_judged_but_not_rehearsed_says_so(tmp_path: Path, store: ArtifactStore) -> None:
    plan = plan_of(tmp_path, store)
    kept = {
        key: artifact
        for key, artifact in artifacts_of(plan, "int8", MEASURED).items()
        if artifact.kind not in REHEARSALS
    }
    assert cells(build_report(plan, kept).as_table())["verdict"][1] == "passed, not rehearsed"


def test_the_speed_of_an_emulation_is_not_shown_as_speed(tmp_path: Path, store: ArtifactStore) -> None:
    plan = plan_of(tmp_path, store)
    report = build_report(plan, artifacts_of(plan, "bf16", MEASURED | {"emulated": True}))
    assert cells(report.as_table())["speed at batch 1"] == ["not measured", "not measured", "emulated"]


@pytest.mark.parametrize(
    ("task", "figure", "heading", "shown"),
    [
        ("classification", "top1_agreement", "top-1", "98.4%"),
        ("reranking", "rank_correlation", "rank correlation", "0.9840"),
    ],
)
def test_each_task_has_its_own_figure(
    tmp_path: Path, store: ArtifactStore, task: str, figure: str, heading: str, shown: str
) -> None:
    plan = plan_of(tmp_path, store, task)
    measured = MEASURED | {"quality": MEASURED["quality"] | {figure: 0.984}}
    report = build_report(plan, artifacts_of(plan, "int8", measured))
    assert cells(report.as_table())[heading][1] == shown

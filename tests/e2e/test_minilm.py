"""The spec that the project ships, models/minilm-l6.yaml, with the real weights: what it promises of accuracy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from test_encoder_pipeline import served
from tiny_project import Project

pytestmark = [pytest.mark.model, pytest.mark.server, pytest.mark.timeout(1200)]

SPEC: dict[str, Any] = yaml.safe_load(
    (Path(__file__).parents[2] / "models" / "minilm-l6.yaml").read_text(encoding="utf-8")
)
TEXTS = (
    "A man is eating food.",
    "A man is eating a piece of bread.",
    "The girl is carrying a baby.",
    "",
    "🦜 ünïcode, and a word of many pieces: antidisestablishmentarianism",
    "A cheetah is running behind its prey. " * 60,
)


@pytest.fixture(scope="module")
def minilm(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """FP32 and INT8, built and published."""
    project = Project.create(tmp_path_factory.mktemp("minilm") / "project")
    project.spec.write_text(yaml.safe_dump(SPEC, sort_keys=False))
    options = ("--variant", "fp32", "--variant", "int8", "--publish", project.repository)
    project.build(*options).assert_ok()
    return project


def test_text_through_the_ensemble_equals_sentence_transformers(minilm: Project) -> None:
    from sentence_transformers import SentenceTransformer

    plan = json.loads(minilm.run("plan", minilm.spec, "--json").assert_ok().out)
    (fetch,) = [step["key"] for step in plan["steps"] if step["kind"] == "fetch"]
    checkpoint = next(minilm.entry(fetch).rglob("modules.json")).parent
    original = SentenceTransformer(str(checkpoint), device="cpu")
    original.max_seq_length = SPEC["serving"]["max_sequence_length"]
    wanted = original.encode(list(TEXTS))
    with served(minilm) as client:
        seen = {variant: client.embed(f"minilm-l6-{variant}", TEXTS) for variant in ("fp32", "int8")}
    np.testing.assert_allclose(seen["fp32"], wanted, atol=1e-4)
    assert (seen["int8"] * wanted).sum(axis=1).mean() >= 0.98


def test_naive_int8_is_stopped(minilm: Project) -> None:
    naive = {"scheme": "int8", "method": "max", "smoothing": None, "weights": "per_tensor", "attention": True}
    project = minilm.edited({"variants": {"naive": naive}})
    project.build().assert_one_error(1, "naive", "quality.mean_cosine", "limit at least 0.98")

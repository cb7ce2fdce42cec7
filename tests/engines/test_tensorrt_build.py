"""From an ONNX file and a spec to an engine, and to the same engine again without work."""

from __future__ import annotations

import json
from pathlib import Path

import onnx
import pytest
import yaml
from tensorrt_cases import WIDTH, tiny_graph

from enginesmith.build import build
from enginesmith.plan import make_plan
from enginesmith.spec_file import parse_spec
from enginesmith.store import ArtifactStore

SPEC = {
    "name": "tiny",
    "task": "tensors",
    "source": {"onnx": "model.onnx"},
    "inputs": [
        {"name": "input_ids", "dtype": "int64", "shape": ["batch", "sequence"], "high": 3},
        {"name": "features", "shape": ["batch", "sequence", WIDTH]},
    ],
    "axes": {"sequence": {"min": 2, "opt": 8, "max": 16}},
    "variants": {"fp32": {"scheme": "none"}},
    "targets": [{"runtime": "tensorrt_rtx", "compute_capabilities": ["8.6", "12.0"]}],
    "serving": {"max_batch_size": 4},
    "verify": {"samples": {"samples": 4}},
}


@pytest.mark.model
def test_engine_is_built_once_and_then_taken_from_the_store(tmp_path: Path) -> None:
    onnx.save(tiny_graph("fp32"), tmp_path / "model.onnx")
    spec = parse_spec(yaml.safe_dump(SPEC), origin="test", base_dir=tmp_path)
    store = ArtifactStore(tmp_path / "store")
    try:
        plan = make_plan(spec, store, goals=("compile_tensorrt",))
        step = plan.step("compile_tensorrt", "fp32", "tensorrt-rtx")
        first = build([plan], store)
        assert first.outcomes[step.key].state == "built"
        again = build([make_plan(spec, store, goals=("compile_tensorrt",))], store)
        assert {outcome.state for outcome in again.outcomes.values()} == {"cached"}
        artifact = again.artifacts[step.key]
        engine = json.loads((artifact.path / "engine.json").read_text())
        assert engine["profiles"][0]["input_ids"] == {"min": [1, 2], "opt": [4, 8], "max": [4, 16]}
        assert (artifact.path / "model.plan").stat().st_size == engine["plan_bytes"]
    finally:
        store.digests.close()

"""Plans of graph specs: which steps there are, what they read, and what leaves them as they are."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from enginesmith.errors import SourceError, SpecError
from enginesmith.plan import Plan, make_plan
from enginesmith.spec_file import parse_spec
from enginesmith.steps import STEP_KINDS
from enginesmith.store import ArtifactStore

ENCODER: dict[str, Any] = {
    "name": "tiny",
    "task": "embedding",
    "source": {"wheel": "some-model==1", "sha256": "0" * 64},
    "variants": {"fp32": {"scheme": "none"}, "int8": {"scheme": "int8"}},
}
MODULE: dict[str, Any] = {
    "name": "tiny",
    "task": "tensors",
    "source": {"module": "net.py:make", "files": ["weights", "layers.py"]},
    "inputs": [{"name": "image", "shape": ["batch", 3]}],
    "outputs": ["scores"],
    "variants": {"fp32": {"scheme": "none"}},
}
# Without tools and code: here it is the spec that decides.
KINDS = {name: replace(kind, tools=(), code=()) for name, kind in STEP_KINDS.items()}


@pytest.fixture
def planned(tmp_path: Path) -> Iterator[Callable[..., Plan]]:
    (tmp_path / "net.py").write_text("first")
    (tmp_path / "layers.py").write_text("first")
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "part").write_text("first")
    store = ArtifactStore(tmp_path / "store")

    def make(document: dict[str, Any], **options: Any) -> Plan:
        spec = parse_spec(yaml.safe_dump(document), origin="test", base_dir=tmp_path)
        return make_plan(spec, store, kinds=KINDS, **options)

    yield make
    store.digests.close()


def kinds_of(plan: Plan, place: str) -> list[str]:
    return [step.kind for step in plan.steps if step.place == place]


def keys_of(plan: Plan) -> dict[tuple[str, str], str]:
    return {(step.kind, step.place): step.key for step in plan.steps}


def test_an_encoder_is_exported_once_and_quantized_per_variant(planned: Callable[..., Plan]) -> None:
    plan = planned(ENCODER)
    assert kinds_of(plan, "") == ["fetch", "sample", "export", "lower_graph"]
    assert kinds_of(plan, "fp32") == ["measure_graph", "verify_graph"]
    assert kinds_of(plan, "int8") == [
        "sample",
        "quantize_graph",
        "lower_graph",
        "measure_graph",
        "verify_graph",
    ]
    assert kinds_of(plan, "int8@onnxruntime") == ["package_graph", "rehearse_graph"]
    assert plan.deployments == (("fp32", "onnxruntime"), ("int8", "onnxruntime"))


def test_a_module_needs_no_checkpoint_and_its_files_are_in_the_key(
    planned: Callable[..., Plan], tmp_path: Path
) -> None:
    before = planned(MODULE)
    assert kinds_of(before, "") == ["sample", "export", "lower_graph"]
    for path in (tmp_path / "net.py", tmp_path / "layers.py", tmp_path / "weights" / "part"):
        path.write_text("another")
        after = planned(MODULE)
        changed = [step for step in after.steps if step.key not in keys_of(before).values()]
        assert changed[0].kind == "export"
        before = after


@pytest.mark.parametrize("missing", ["net.py", "layers.py", "weights"])
def test_a_file_that_is_missing_is_named(planned: Callable[..., Plan], tmp_path: Path, missing: str) -> None:
    (tmp_path / missing).rename(tmp_path / "elsewhere")
    with pytest.raises(SourceError, match=f"{missing} does not exist"):
        planned(MODULE)


def test_tensorrt_is_compiled_from_the_same_graph_that_the_twin_is_lowered_from(
    planned: Callable[..., Plan],
) -> None:
    plan = planned({**ENCODER, "targets": [{"runtime": "onnxruntime"}, {"runtime": "tensorrt_rtx"}]})
    place = ("int8", "tensorrt-rtx")
    assert kinds_of(plan, "int8@tensorrt-rtx") == [
        "assemble_tensorrt",
        "rehearse_tensorrt",
        "compile_tensorrt",
        "package_tensorrt",
    ]
    graph = plan.step("quantize_graph", "int8").key
    assert plan.step("compile_tensorrt", *place).inputs["graph"] == graph
    assert plan.step("lower_graph", "int8").inputs["graph"] == graph
    assert plan.step("rehearse_tensorrt", *place).inputs["engine"] == plan.step("lower_graph", "int8").key
    assert plan.step("package_tensorrt", *place).inputs["verdict"] == plan.step("verify_graph", "int8").key


def test_a_gpus_provider_gets_the_portable_graph_and_the_cpu_the_lowered_one(
    planned: Callable[..., Plan],
) -> None:
    targets = [{"runtime": "onnxruntime"}, {"runtime": "onnxruntime", "name": "gpu", "provider": "cuda"}]
    plan = planned({**ENCODER, "targets": targets})
    packages = [
        plan.step("package_graph", "int8", target).inputs["engine"] for target in ("onnxruntime", "gpu")
    ]
    assert packages == [plan.step("lower_graph", "int8").key, plan.step("quantize_graph", "int8").key]


def test_sensitivity_is_measured_where_it_is_applied_or_asked_for(planned: Callable[..., Plan]) -> None:
    assert not any(step.kind == "sensitivity" for step in planned(ENCODER).steps)
    asked = planned(ENCODER, goals={"sensitivity"})
    assert [step.place for step in asked.steps if step.kind == "sensitivity"] == ["int8"]
    applied = planned({**ENCODER, "variants": {"int8": {"scheme": "int8", "exclude": "auto"}}})
    ranking = applied.step("sensitivity", "int8").key
    assert applied.step("quantize_graph", "int8").inputs["sensitivity"] == ranking


def test_parameters_without_a_meaning_for_a_scheme_are_in_no_key(planned: Callable[..., Plan]) -> None:
    for scheme, meaningless in (
        ("fp16", {"method": "mse", "smoothing": 0.1, "weights": "per_tensor", "attention": True}),
        ("fp8", {"method": "mse", "smoothing": 0.1, "reduce_range": True, "percentile": 90}),
    ):
        plain, other = (
            planned({**ENCODER, "variants": {"some": {"scheme": scheme, **extra}}})
            for extra in ({}, meaningless)
        )
        assert keys_of(plain) == keys_of(other), scheme


def test_a_limit_judges_again_and_measures_nothing(planned: Callable[..., Plan]) -> None:
    before = keys_of(planned(ENCODER))
    after = keys_of(planned({**ENCODER, "verify": {"quality": {"min_mean_cosine": 0.5}}}))
    changed = [kind for (kind, place), key in after.items() if key != before[kind, place] and place == "int8"]
    assert changed == ["verify_graph"]


def test_unknown_names_are_refused(planned: Callable[..., Plan]) -> None:
    with pytest.raises(SpecError, match="tiny has no variant int4; it has: fp32, int8"):
        planned(ENCODER, variants=["int4"])
    with pytest.raises(SpecError, match="tiny has no target gpu; it has: onnxruntime"):
        planned(ENCODER, targets=["gpu"])

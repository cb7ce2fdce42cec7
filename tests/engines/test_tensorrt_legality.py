"""What `plan` refuses about the targets of graphs: one message for each combination, with what is allowed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from enginesmith.errors import SpecError
from enginesmith.graph_legality import check_graph_targets
from enginesmith.graph_spec import GraphSpec
from enginesmith.graph_targets import RtxCapability
from enginesmith.platforms import GPUS, GRAPH_EXECUTIONS, TRITON_IMAGES, graph_schemes_on
from enginesmith.schemes import GRAPH_SCHEMES
from enginesmith.spec_file import parse_spec

ENCODER: dict[str, Any] = {
    "name": "tiny",
    "task": "embedding",
    "source": {"wheel": "some-model==1", "sha256": "0" * 64},
    "variants": {name: {"scheme": name} for name in ("fp16", "int8", "fp8")} | {"fp32": {"scheme": "none"}},
    "serving": {"max_batch_size": 8, "max_sequence_length": 128},
}
MODELS = Path(__file__).parents[2] / "models"


def check(*targets: dict[str, Any], **changes: Any) -> None:
    """One target more, because every variant must be built by one."""
    rest = {"runtime": "onnxruntime", "name": "rest"}
    document = {**ENCODER, "targets": [*targets, rest], **changes}
    spec = parse_spec(yaml.safe_dump(document), origin="test", base_dir=Path.cwd())
    assert isinstance(spec, GraphSpec)
    check_graph_targets(spec)


TRT: dict[str, Any] = {"runtime": "tensorrt"}
RTX: dict[str, Any] = {"runtime": "tensorrt_rtx"}
ORT: dict[str, Any] = {"runtime": "onnxruntime"}


@pytest.mark.parametrize(
    ("target", "message", "hint"),
    [
        ({**TRT, "toolchain": "26.70"}, "'26.70' is not a known tag", "26.07"),
        (
            {**TRT, "gpu": "a100"},
            "TensorRT has no FP8 (E4M3), explicit Q/DQ (variant fp8) on a100, SM80",
            "on a100: none, fp16, bf16, int8; fp8 runs on l4, l40, l40s, rtx-4090, h100",
        ),
        (
            {**RTX, "compute_capabilities": ["8.6", "8.9"]},
            "does not build FP8 (E4M3), explicit Q/DQ (variant fp8) for compute capability 8.6",
            "fp8 with compute_capabilities ['8.9']",
        ),
        (
            {**RTX, "compute_capabilities": ["7.5"], "variants": ["int8"]},
            "(variant int8) for compute capability 7.5",
            "for 7.5: fp16;",
        ),
        (
            {**RTX, "compute_capabilities": ["8.9", "8.9"], "variants": ["fp16"]},
            "compute capability 8.9 is named twice",
            "once",
        ),
        ({**TRT, "opt_batch_size": 9}, "opt_batch_size 9 is above serving.max_batch_size 8", "1 to 8"),
        (
            {**TRT, "opt_sequence_length": 129},
            "opt_sequence_length 129 is above serving.max_sequence_length 128",
            "1 to 128",
        ),
        (
            {**ORT, "backend": "onnxruntime"},
            "cannot run scheme fp8 (variant fp8) on a CPU as it was measured",
            "backend: python",
        ),
        (
            {**ORT, "provider": "tensorrt"},
            "TensorRT provider has no precision for scheme fp8 (variant fp8)",
            "runtime: tensorrt",
        ),
        (
            {**ORT, "provider": "cuda", "provider_options": {"trt_fp16_enable": "1"}},
            "provider_options trt_fp16_enable is no option of provider cuda",
            "provider: tensorrt",
        ),
        (
            {**ORT, "provider": "tensorrt", "provider_options": {"gpu_mem_limit": "1"}},
            "provider_options gpu_mem_limit is no option of provider tensorrt",
            "provider: cuda",
        ),
    ],
)
def test_what_cannot_work_is_refused_with_what_can(target: dict[str, Any], message: str, hint: str) -> None:
    with pytest.raises(SpecError, match=re.escape(message)) as caught:
        check(target)
    assert hint in str(caught.value)
    assert "target " in caught.value.message


def test_usual_length_of_a_model_without_text_belongs_to_its_axis() -> None:
    with pytest.raises(SpecError, match="is for tasks that read text") as caught:
        check(
            {**TRT, "opt_sequence_length": 4},
            task="tensors",
            source={"onnx": "model.onnx"},
            inputs=[{"name": "x", "shape": ["batch", 3]}],
            variants={"fp32": {"scheme": "none"}},
            serving={},
        )
    assert "axes.<name>.opt" in (caught.value.hint or "")


@pytest.mark.parametrize(
    "target",
    [
        {**TRT, "gpu": "h100", "opt_batch_size": 8, "opt_sequence_length": 128},
        {**TRT, "gpu": "a100", "variants": ["fp16", "int8", "fp32"]},
        {**RTX, "compute_capabilities": ["8.9", "12.0"]},
        {**RTX, "compute_capabilities": ["7.5"], "variants": ["fp16"]},
        {
            **ORT,
            "provider": "tensorrt",
            "provider_options": {"trt_fp16_enable": "1", "device_id": "0"},
            "variants": ["fp32", "fp16", "int8"],
        },
        {**ORT, "backend": "onnxruntime", "variants": ["fp32", "fp16"]},
        {**ORT, "provider": "cuda", "provider_options": {"gpu_mem_limit": "1073741824"}},
    ],
)
def test_what_works_is_planned(target: dict[str, Any]) -> None:
    check(target)


def test_every_gpu_and_capability_that_can_be_named_has_a_row() -> None:
    for gpu in GPUS.values():
        assert graph_schemes_on("tensorrt", gpu.compute_capability), gpu
    for text in RtxCapability.__args__:
        assert graph_schemes_on("tensorrt_rtx", int(text.replace(".", ""))), text
    assert graph_schemes_on("tensorrt_rtx", 90) == ()
    every = {
        scheme for gpu in GPUS.values() for scheme in graph_schemes_on("tensorrt", gpu.compute_capability)
    }
    assert every == set(GRAPH_SCHEMES)


def test_images_are_the_servers_and_newest_first() -> None:
    assert list(TRITON_IMAGES) == sorted(TRITON_IMAGES, reverse=True)
    assert TRITON_IMAGES["26.07"].image == "nvcr.io/nvidia/tritonserver:26.07-py3"


def test_document_has_the_tables() -> None:
    document = (MODELS.parent / "docs" / "tensorrt.md").read_text(encoding="utf-8")
    rows = {
        cells[0]: cells[1:]
        for line in document.splitlines()
        if (cells := [cell.strip() for cell in line.strip("|").split("|")])
        and re.fullmatch(r"\d\d\.\d\d", cells[0])
    }
    assert rows == {
        row.tag: [
            value or "not known"
            for value in (row.tensorrt, row.cuda, row.driver, row.python, row.onnxruntime)
        ]
        for row in TRITON_IMAGES.values()
    }
    schemes = [
        line for line in document.splitlines() if line.startswith(("| TensorRT, SM", "| TensorRT for RTX, "))
    ]
    assert len(schemes) == len(GRAPH_EXECUTIONS)
    for line, row in zip(schemes, GRAPH_EXECUTIONS, strict=True):
        place, allowed = (cell.strip() for cell in line.strip("|").split("|"))
        named = [int(number.replace(".", "")) for number in re.findall(r"\d+\.\d|(?<=SM)\d+", place)]
        assert named == list(row.capabilities), line
        assert allowed.split(" (")[0].split(", ") == list(row.schemes), line


def test_shipped_spec_for_tensorrt_has_the_variants_of_the_cpu_spec() -> None:
    specs = []
    for name in ("minilm-l6.yaml", "minilm-l6-tensorrt.yaml"):
        spec = parse_spec((MODELS / name).read_text(), origin=name, base_dir=MODELS)
        assert isinstance(spec, GraphSpec)
        check_graph_targets(spec)
        specs.append(spec)
    assert specs[0].variants == specs[1].variants
    assert {target.runtime for target in specs[1].targets} == {"tensorrt", "tensorrt_rtx"}

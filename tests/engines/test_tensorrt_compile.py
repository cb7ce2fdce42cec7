"""The ``compile_tensorrt`` step with the real TensorRT for RTX, which builds engines for GPUs that are not here."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from onnx import TensorProto, helper
from tensorrt_cases import SEQUENCE, WIDTH, Precision, compile_graph, signature, tiny_graph

from enginesmith.errors import SourceError, SpecError, ToolchainError
from enginesmith.graphs.signature import AxisRange, GraphTensor, Signature

CAPABILITIES: dict[Precision, list[int]] = {
    "fp32": [80, 86, 89, 120],
    "fp16": [75, 80, 86, 89, 120, 121],
    "bf16": [80, 86, 89, 120],
    "int8": [80, 86, 89, 120],
    "fp8": [89, 120],
}
TYPES = {"fp32": "FLOAT", "fp16": "HALF", "bf16": "BF16", "int8": "INT8", "fp8": "FP8"}


@pytest.mark.parametrize("precision", CAPABILITIES)
def test_graph_of_every_precision_becomes_an_engine(precision: Precision, tmp_path: Path) -> None:
    capabilities = CAPABILITIES[precision]
    compiled = compile_graph(tmp_path, tiny_graph(precision), compute_capabilities=capabilities)
    engine = compiled.engine
    plan = compiled.out / "model.plan"
    assert plan.read_bytes()[:4] == b"vtrt"
    assert engine["plan_bytes"] == plan.stat().st_size == compiled.facts["plan_bytes"]
    assert (engine["runtime"], engine["compute_capabilities"]) == ("tensorrt_rtx", capabilities)
    by_name = {layer["name"]: layer for layer in engine["layers"]}
    product = by_name["encoder.layer.0.dense/MatMul"]
    assert product["type"] == "MATRIX_MULTIPLY"
    expected = TYPES[precision] if precision in ("fp16", "bf16") else "FLOAT"
    assert product["precision"] == [expected]
    written = {part for layer in engine["layers"] for part in layer["precision"]}
    assert TYPES[precision] in written


def test_engine_json_says_what_the_engine_takes_and_how_far_it_was_looked_into(tmp_path: Path) -> None:
    compiled = compile_graph(tmp_path, tiny_graph("fp32"), opt_batch_size=4)
    engine = compiled.engine
    assert [(one["name"], one["mode"], one["dtype"], one["shape"]) for one in engine["bindings"]] == [
        ("input_ids", "input", "int64", [-1, -1]),
        ("features", "input", "float32", [-1, -1, WIDTH]),
        ("vectors", "output", "float32", [-1, -1, WIDTH]),
    ]
    assert engine["profiles"] == [
        {
            "input_ids": {"min": [1, 1], "opt": [4, 12], "max": [8, 48]},
            "features": {"min": [1, 1, WIDTH], "opt": [4, 12, WIDTH], "max": [8, 48, WIDTH]},
        }
    ]
    assert (engine["layers_of"], engine["read_on"], engine["device_memory_bytes"]) == ("network", None, None)
    assert engine["compared"] is None
    assert engine["compared_reason"] == "no GPU of SM86, SM89, SM120 on the machine that built it"
    assert engine["timing_cache"]["used"] is False


def test_build_reports_how_far_it_is_and_keeps_what_tensorrt_says(tmp_path: Path) -> None:
    compiled = compile_graph(tmp_path, tiny_graph("fp32"))
    fractions = [fraction for fraction, _ in compiled.progress if fraction is not None]
    assert fractions == sorted(fractions)
    assert 0.5 < fractions[-1] <= 1
    assert "STRONGLY_TYPED" in compiled.log
    assert "TF32" not in compiled.log.split("Flags", 1)[1].splitlines()[0]


def test_builder_options_reach_the_builder(tmp_path: Path) -> None:
    compiled = compile_graph(tmp_path, tiny_graph("fp32"), optimization_level=1, workspace_bytes=64 << 20)
    assert "WORKSPACE: 64.00 MiB" in compiled.log


def test_operator_that_tensorrt_lacks_is_named_with_its_place_in_the_model(tmp_path: Path) -> None:
    extra = (
        helper.make_node(
            "FastGelu", ["relu"], ["tail"], name="encoder.layer.3.act/FastGelu", domain="com.microsoft"
        ),
    )
    with pytest.raises(SourceError) as caught:
        compile_graph(tmp_path, tiny_graph("fp32", extra=extra))
    assert "FastGelu at node encoder.layer.3.act/FastGelu (module encoder.layer.3.act of the model)" in str(
        caught.value
    )
    assert "neither a standard one" in caught.value.message


def test_standard_operator_that_tensorrt_lacks_is_named(tmp_path: Path) -> None:
    extra = (helper.make_node("Unique", ["relu"], ["tail"], name="pooler/Unique"),)
    with pytest.raises(SourceError, match=r"Unique at node pooler/Unique .*: the operator is not supported"):
        compile_graph(tmp_path, tiny_graph("fp32", extra=extra))


def test_file_that_is_no_graph_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="Failed to parse the ONNX model"):
        compile_graph(tmp_path, b"not a graph")


def test_gpu_that_lacks_the_type_is_said_in_tensorrts_words(tmp_path: Path) -> None:
    with pytest.raises(ToolchainError, match=r"Cannot compile for target.*sm86.*fp8") as caught:
        compile_graph(tmp_path, tiny_graph("fp8"), compute_capabilities=[86])
    assert "cudaError 35" not in caught.value.message


def test_capability_that_the_library_lacks_is_named(tmp_path: Path) -> None:
    with pytest.raises(ToolchainError, match=r"9\.0 \(SM90\) not supported"):
        compile_graph(tmp_path, tiny_graph("fp32"), compute_capabilities=[90])


def test_axis_that_the_graph_fixed_is_named(tmp_path: Path) -> None:
    model = tiny_graph("fp32")
    for tensor in model.graph.input:
        tensor.type.tensor_type.shape.dim[1].dim_value = 16
    with pytest.raises(SourceError) as caught:
        compile_graph(tmp_path, model)
    assert "input input_ids has the fixed length 16 on axis 1, which is dynamic (sequence)" in str(
        caught.value
    )


def test_binding_of_another_name_dtype_or_width_is_named(tmp_path: Path) -> None:
    right = signature()
    wrong = Signature(
        right.task,
        (GraphTensor("input_ids", "int32", ("batch", "sequence")), GraphTensor("mask", "int64", ("batch",))),
        (GraphTensor("vectors", "float32", ("batch", "sequence")),),
        right.axes,
    )
    with pytest.raises(SourceError) as caught:
        compile_graph(tmp_path, tiny_graph("fp32"), wrong)
    for problem in (
        "input mask is missing",
        "input features is not in the signature",
        "input input_ids is int64, not int32",
        "output vectors has 3 axes, not 2",
    ):
        assert problem in caught.value.message


def test_serving_longer_than_the_graph_takes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=rf"max_sequence_length 65 is outside .* 1 to {SEQUENCE.max}"):
        compile_graph(tmp_path, tiny_graph("fp32"), max_sequence_length=65)


def test_other_version_than_the_planned_one_does_not_build(tmp_path: Path) -> None:
    with pytest.raises(ToolchainError, match=r"but the plan was made with 1\.2\.0\.54"):
        compile_graph(tmp_path, tiny_graph("fp32"), version="1.2.0.54")


def test_two_builders_at_once_both_finish(tmp_path: Path) -> None:
    def build(name: str) -> int:
        return compile_graph(
            tmp_path / name, tiny_graph("fp32"), timing_cache=tmp_path / "shared.cache"
        ).engine["plan_bytes"]

    with ThreadPoolExecutor(2) as pool:
        assert all(size > 0 for size in pool.map(build, ("first", "second")))


def test_tensor_model_with_an_axis_of_its_own(tmp_path: Path) -> None:
    """No text, no sequence: ranges come from the signature alone."""
    graph = helper.make_graph(
        [helper.make_node("GlobalAveragePool", ["image"], ["pooled"], name="pool/GlobalAveragePool")],
        "vision",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 3, "height", 16])],
        [helper.make_tensor_value_info("pooled", TensorProto.FLOAT, ["batch", 3, 1, 1])],
    )
    wanted = Signature(
        "tensors",
        (GraphTensor("image", "float32", ("batch", 3, "height", 16)),),
        (GraphTensor("pooled", "float32", ("batch", 3, 1, 1)),),
        {"height": AxisRange(8, 16, 32)},
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    engine = compile_graph(tmp_path, model, wanted, max_sequence_length=None).engine
    assert engine["profiles"] == [
        {"image": {"min": [1, 3, 8, 16], "opt": [8, 3, 16, 16], "max": [8, 3, 32, 16]}}
    ]

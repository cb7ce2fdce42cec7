"""Export of ready ONNX files: axes named, opset raised, weights beside the file, and every file that is refused."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from encoder_factory import Context
from onnx import helper, numpy_helper

from enginesmith.digests import file_digest
from enginesmith.errors import EnginesmithError, SourceError, SpecError
from enginesmith.graphs.export import read_references, run
from enginesmith.graphs.signature import AxisRange, read_signature

FLOAT, FLOAT16 = onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16
AXES = {"width": {"min": 2, "opt": 4, "max": 9}}


def value(name: str, shape: Sequence[Any], dtype: int = FLOAT) -> Any:
    return helper.make_tensor_value_info(name, dtype, shape)


def constant(name: str, array: Any) -> Any:
    return numpy_helper.from_array(np.asarray(array), name)


def weight(*shape: int) -> Any:
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def projection(
    path: Path, *, shape: Sequence[Any] = ("N", "width", 8), opset: int = 20, nodes: Any = None, **model: Any
) -> Path:
    """``path``, written as x [N, width, 8] times w [8, 5], then what ``nodes`` make of h; softmax if there are none."""
    matmul = helper.make_node("MatMul", ["x", "w"], ["h"], name="projection/MatMul")
    rest = nodes or [helper.make_node("Softmax", ["h"], ["y"])]
    weights = [constant("w", weight(8, 5)), *model.pop("weights", [])]
    output = model.pop("output", value("y", ["N", "width", 5]))
    graph = helper.make_graph([matmul, *rest], "projection", [value("x", shape)], [output], weights)
    imports = [helper.make_opsetid("", opset), *model.pop("imports", [])]
    onnx.save_model(
        helper.make_model(graph, opset_imports=imports, ir_version=8, functions=model.pop("functions", [])),
        path,
        **model,
    )
    return path


def exported(tmp_path: Path, path: Path, **params: Any) -> Path:
    """The ``export`` artifact of the file."""
    samples = params.pop("samples", [weight(3, 4, 8), weight(2, 6, 8)])
    (tmp_path / "samples" / "batches").mkdir(parents=True)
    for number, batch in enumerate(samples):
        np.savez(tmp_path / "samples" / "batches" / f"{number:03d}.npz", x=batch)
    out = tmp_path / "out"
    out.mkdir()
    beside = {entry.name: file_digest(entry) for entry in path.parent.glob(f"{path.name}?*")}
    keyed = {"task": "tensors", "inputs": [], "outputs": [], "axes": AXES, "onnx_data": beside}
    run(
        Context(
            keyed | params | {"location": {"onnx": str(path)}},
            {"samples": tmp_path / "samples"},
            out,
            tmp_path,
        )
    )
    return out


def outputs_of(path: Path, x: Any) -> Any:
    return ort.InferenceSession(str(path), providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]


def refused(tmp_path: Path, path: Path, kind: type[EnginesmithError] = SourceError, **params: Any) -> str:
    with pytest.raises(kind) as caught:
        exported(tmp_path, path, **params)
    return str(caught.value)


def test_axes_are_named_and_values_are_kept(tmp_path: Path) -> None:
    path = projection(tmp_path / "model.onnx")
    out = exported(tmp_path, path)
    signature = read_signature(out)
    assert signature.inputs[0].shape == ("batch", "width", 8)
    assert signature.outputs[0].shape == ("batch", "width", 5)
    assert signature.axes == {"width": AxisRange(2, 4, 9)}
    model = onnx.load(out / "model.onnx")
    dims = [dim.dim_param for dim in model.graph.input[0].type.tensor_type.shape.dim]
    assert dims == ["batch", "width", ""]
    assert [node.name for node in model.graph.node] == ["projection/MatMul", "Softmax"]
    x = weight(5, 7, 8)
    np.testing.assert_array_equal(outputs_of(out / "model.onnx", x), outputs_of(path, x))


def test_references_are_the_files_own_outputs(tmp_path: Path) -> None:
    path = projection(tmp_path / "model.onnx")
    references = read_references(exported(tmp_path, path))
    assert [reference["y"].shape for reference in references] == [(3, 4, 5), (2, 6, 5)]
    np.testing.assert_allclose(references[0]["y"], outputs_of(path, weight(3, 4, 8)), rtol=1e-6)


def test_an_older_opset_is_raised(tmp_path: Path) -> None:
    # Until opset 13 Softmax flattened its input; here the axis is written out, so both mean the same.
    path = projection(
        tmp_path / "model.onnx", opset=13, nodes=[helper.make_node("Softmax", ["h"], ["y"], axis=-1)]
    )
    out = exported(tmp_path, path)
    assert onnx.load(out / "model.onnx").opset_import[0].version == 20
    x = weight(2, 3, 8)
    np.testing.assert_array_equal(outputs_of(out / "model.onnx", x), outputs_of(path, x))


def test_weights_beside_the_file_are_taken_in(tmp_path: Path) -> None:
    path = projection(
        tmp_path / "model.onnx", save_as_external_data=True, location="model.onnx.data", size_threshold=0
    )
    out = exported(tmp_path, path)
    assert not (out / "model.onnx.data").exists()
    x = weight(2, 3, 8)
    np.testing.assert_array_equal(outputs_of(out / "model.onnx", x), outputs_of(path, x))


def test_weights_in_a_file_of_another_name_are_refused(tmp_path: Path) -> None:
    path = projection(
        tmp_path / "model.onnx", save_as_external_data=True, location="weights.bin", size_threshold=0
    )
    assert "keeps w in 'weights.bin'" in refused(tmp_path, path)


@pytest.mark.parametrize("changed", ["model.onnx", "model.onnx.data"])
def test_a_file_that_changed_after_the_plan_is_refused(tmp_path: Path, changed: str) -> None:
    path = projection(
        tmp_path / "model.onnx",
        save_as_external_data=True,
        location="model.onnx.data",
        size_threshold=0,
    )
    planned = {
        "onnx_sha256": file_digest(path),
        "onnx_data": {"model.onnx.data": file_digest(tmp_path / "model.onnx.data")},
    }
    with (tmp_path / changed).open("ab") as file:
        file.write(b"\n")
    assert f"{changed} changed after the build was planned" in refused(tmp_path, path, **planned)


def test_a_constant_in_a_file_of_another_name_is_refused(tmp_path: Path) -> None:
    stored = constant("k", np.ones(5, np.float32))
    (tmp_path / "other.bin").write_bytes(stored.raw_data)
    stored.ClearField("raw_data")
    stored.data_location = onnx.TensorProto.EXTERNAL
    stored.external_data.add(key="location", value="other.bin")
    nodes = [
        helper.make_node("Constant", [], ["k"], value=stored),
        helper.make_node("Mul", ["h", "k"], ["y"]),
    ]
    path = projection(tmp_path / "model.onnx", nodes=nodes)
    assert "model.onnx keeps k in 'other.bin'" in refused(tmp_path, path)


def test_missing_weights_are_refused(tmp_path: Path) -> None:
    path = projection(
        tmp_path / "model.onnx", save_as_external_data=True, location="model.onnx.data", size_threshold=0
    )
    (tmp_path / "model.onnx.data").unlink()
    assert "keeps w in 'model.onnx.data', which is missing" in refused(tmp_path, path)


def test_unnamed_axes_are_named_by_input_and_position(tmp_path: Path) -> None:
    path = projection(tmp_path / "model.onnx", shape=(None, None, 8), output=value("y", [None, None, 5]))
    message = refused(tmp_path, path, SpecError, axes={})
    assert "dynamic axis 'x_1' (input x), whose lengths are missing" in message


def test_the_specs_inputs_name_the_axes(tmp_path: Path) -> None:
    path = projection(tmp_path / "model.onnx", shape=(None, None, 8), output=value("y", [None, None, 5]))
    inputs = [{"name": "x", "dtype": "float32", "shape": ["batch", "width", 8]}]
    signature = read_signature(exported(tmp_path, path, inputs=inputs))
    assert signature.inputs[0].shape == ("batch", "width", 8)
    assert signature.outputs[0].shape == ("batch", "width", 5)


def test_the_spec_may_fix_an_axis(tmp_path: Path) -> None:
    path = projection(tmp_path / "model.onnx")
    inputs = [{"name": "x", "dtype": "float32", "shape": ["batch", 4, 8]}]
    out = exported(tmp_path, path, inputs=inputs, axes={}, samples=[weight(3, 4, 8)])
    assert read_signature(out).outputs[0].shape == ("batch", 4, 5)


def test_functions_of_the_file_are_inlined(tmp_path: Path) -> None:
    function = helper.make_function(
        "local",
        "Twice",
        ["a"],
        ["b"],
        [helper.make_node("Add", ["a", "a"], ["b"])],
        [helper.make_opsetid("", 20)],
    )
    node = helper.make_node("Twice", ["h"], ["y"], domain="local")
    path = projection(
        tmp_path / "model.onnx", nodes=[node], functions=[function], imports=[helper.make_opsetid("local", 1)]
    )
    model = onnx.load(exported(tmp_path, path) / "model.onnx")
    assert [node.op_type for node in model.graph.node] == ["MatMul", "Add"]
    assert not model.functions


def test_nodes_without_names_get_some_that_are_free(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Neg", ["h"], ["r"]),
        helper.make_node("Neg", ["r"], ["s"]),
        helper.make_node("Abs", ["s"], ["y"], name="Neg"),
    ]
    model = onnx.load(exported(tmp_path, projection(tmp_path / "model.onnx", nodes=nodes)) / "model.onnx")
    assert [node.name for node in model.graph.node] == ["projection/MatMul", "Neg_2", "Neg_3", "Neg"]


def test_an_axis_that_a_reshape_fixes_is_named(tmp_path: Path) -> None:
    nodes = [helper.make_node("Reshape", ["h", "shape"], ["y"])]
    weights = [constant("shape", np.array([-1, 20], np.int64))]
    path = projection(tmp_path / "model.onnx", nodes=nodes, weights=weights, output=value("y", ["N", 20]))
    samples = [weight(3, 4, 8)]
    message = refused(tmp_path, path, samples=samples)
    assert "input x: axis 'width' was fixed by model.onnx; with a length of 2 it fails" in message


def test_a_batch_that_a_reshape_fixes_is_named(tmp_path: Path) -> None:
    nodes = [helper.make_node("Reshape", ["h", "shape"], ["y"])]
    weights = [constant("shape", np.array([3, -1, 5], np.int64))]
    path = projection(tmp_path / "model.onnx", nodes=nodes, weights=weights)
    message = refused(tmp_path, path, samples=[weight(3, 6, 8)])
    # A reshape to a batch of 3 also takes one sample: what it makes of it is no batch of one.
    assert "output y of model.onnx has shape [3, 2, 5] for a batch of 1" in message


def test_a_fixed_batch_is_refused(tmp_path: Path) -> None:
    path = projection(tmp_path / "model.onnx", shape=(1, "width", 8), output=value("y", [1, "width", 5]))
    assert "input x of model.onnx: axis 'batch' was fixed to 1 by the graph" in refused(tmp_path, path)


def test_a_fixed_axis_that_the_spec_calls_dynamic_is_refused(tmp_path: Path) -> None:
    path = projection(tmp_path / "model.onnx", shape=("N", 4, 8), output=value("y", ["N", 4, 5]))
    inputs = [{"name": "x", "dtype": "float32", "shape": ["batch", "width", 8]}]
    assert "input x: axis 'width' was fixed to 4 by the graph" in refused(tmp_path, path, inputs=inputs)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"axes": {}}, "dynamic axis 'width' (input x), whose lengths are missing"),
        ({"axes": AXES | {"height": AXES["width"]}}, "has a dynamic axis 'height'; it has width"),
        ({"outputs": ["z"]}, "outputs names z; model.onnx has y"),
        (
            {"inputs": [{"name": "a", "dtype": "float32", "shape": ["batch", "width", 8]}]},
            "inputs names a; model.onnx has x",
        ),
        (
            {"inputs": [{"name": "x", "dtype": "int64", "shape": ["batch", "width", 8]}]},
            "input x is int64 ['batch', 'width', 8] in the spec, float32",
        ),
    ],
)
def test_a_spec_that_does_not_fit_the_file_is_refused(
    tmp_path: Path, params: dict[str, Any], message: str
) -> None:
    assert message in refused(tmp_path, projection(tmp_path / "model.onnx"), SpecError, **params)


def test_an_operator_outside_of_the_standard_is_named(tmp_path: Path) -> None:
    node = helper.make_node("FastGelu", ["h"], ["y"], domain="com.microsoft", name="act/FastGelu")
    imports = [helper.make_opsetid("com.microsoft", 1)]
    message = refused(tmp_path, projection(tmp_path / "model.onnx", nodes=[node], imports=imports))
    assert "operator FastGelu of domain 'com.microsoft' (node 'act/FastGelu')" in message


def test_a_quantized_file_is_refused(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("QuantizeLinear", ["h", "s"], ["q"], name="q1"),
        helper.make_node("DequantizeLinear", ["q", "s"], ["y"]),
    ]
    path = projection(tmp_path / "model.onnx", nodes=nodes, weights=[constant("s", np.float32(0.1))])
    assert "quantized already (node 'q1' is QuantizeLinear)" in refused(tmp_path, path)


def test_a_half_precision_file_is_refused(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Cast", ["h"], ["c"], to=FLOAT16),
        helper.make_node("Mul", ["c", "scale"], ["m"]),
        helper.make_node("Cast", ["m"], ["y"], to=FLOAT),
    ]
    path = projection(tmp_path / "model.onnx", nodes=nodes, weights=[constant("scale", np.float16(2))])
    assert "weight scale is float16" in refused(tmp_path, path)


@pytest.mark.parametrize("content", [b"", b"not a graph", b"\x08\x08\x12\x04abcd"])
def test_what_is_no_onnx_file_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    assert "model.onnx" in refused(tmp_path, path)


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    path = projection(tmp_path / "model.onnx")
    path.write_bytes(path.read_bytes()[:-40])
    assert "is not an ONNX file that can be read" in refused(tmp_path, path)


def test_an_output_without_a_batch_is_refused(tmp_path: Path) -> None:
    node = helper.make_node("ReduceSum", ["h"], ["y"], keepdims=0)
    path = projection(tmp_path / "model.onnx", nodes=[node], output=value("y", []))
    assert "output y of model.onnx has shape [] for a batch of 3" in refused(tmp_path, path)


@pytest.mark.parametrize("opset", [13, 20])
def test_the_standard_domain_may_be_written_out(tmp_path: Path, opset: int) -> None:
    path = projection(tmp_path / "model.onnx", opset=opset)
    model = onnx.load(path)
    for entry in (*model.opset_import, *model.graph.node):
        entry.domain = "ai.onnx"
    onnx.save_model(model, path)
    made = onnx.load(exported(tmp_path, path) / "model.onnx")
    assert [(entry.domain, entry.version) for entry in made.opset_import] == [("", 20)]


@pytest.mark.parametrize(
    ("node", "output", "seen"),
    [
        (
            helper.make_node("SequenceConstruct", ["h"], ["y"]),
            helper.make_tensor_sequence_value_info("y", FLOAT, None),
            "a list",
        ),
        (
            helper.make_node("Cast", ["h"], ["y"], to=onnx.TensorProto.DOUBLE),
            value("y", ["N", "width", 5], onnx.TensorProto.DOUBLE),
            "float64",
        ),
    ],
    ids=["sequence", "float64"],
)
def test_an_output_that_cannot_be_served_is_refused(
    tmp_path: Path, node: Any, output: Any, seen: str
) -> None:
    path = projection(tmp_path / "model.onnx", nodes=[node], output=output)
    assert f"output y of model.onnx is {seen}; allowed: float32" in refused(tmp_path, path)


def test_outputs_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    node = helper.make_node("Log", ["h"], ["y"])
    assert "output y of model.onnx has NaN or Inf" in refused(
        tmp_path, projection(tmp_path / "model.onnx", nodes=[node])
    )


def test_samples_that_the_graph_does_not_take_are_refused(tmp_path: Path) -> None:
    path = projection(tmp_path / "model.onnx")
    assert "model.onnx does not take the samples" in refused(tmp_path, path, samples=[weight(3, 4, 7)])

"""Lowering for ONNX Runtime on a CPU: the same integers, kernels that do not saturate, emulation that says so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from encoder_factory import Context
from onnx import TensorProto, helper
from small_graphs import (
    PARAMS,
    constants_of,
    graph_of,
    node,
    operators,
    outputs_of,
    perceptron,
    random,
    write_export,
    write_samples,
)

from enginesmith.errors import ToolchainError
from enginesmith.graphs import lower, quantize
from enginesmith.graphs.editing import load_model
from enginesmith.graphs.integer import with_integer_products
from enginesmith.triton.models.graph_onnxruntime.graph_runtime import GraphRuntime

BATCHES = [{"x": random(2, 5, 16, seed=seed)} for seed in (10, 11, 12)]


def engine_of(root: Path, model: onnx.ModelProto, batches: Any = None, **params: Any) -> tuple[Path, Path]:
    """The directories of the quantized graph and of its engine."""
    export = write_export(root / "export", model)
    samples = write_samples(root / "samples", BATCHES if batches is None else batches)
    made, engine = root / "quantized", root / "engine"
    made.mkdir()
    engine.mkdir()
    inputs = {"graph": export, "calibration": samples}
    quantize.run(Context(PARAMS | params, inputs, made, root / "scratch"))
    lower.run(Context({"scheme": (PARAMS | params)["scheme"]}, {"graph": made}, engine))
    return made, engine


def linear(weight: np.ndarray[Any, Any], bias: bool = False) -> onnx.ModelProto:
    width, channels = weight.shape
    nodes = [node("MatMul", ["x", "w"], "product" if bias else "y")]
    nodes += [node("Add", ["b", "product"], "y")] if bias else []
    constants = {"w": weight} | ({"b": random(channels, seed=8)} if bias else {})
    return graph_of(nodes, constants, inputs={"x": ["n", "s", width]}, outputs={"y": ["n", "s", channels]})


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("reduce_range", [False, True])
def test_an_integer_product_equals_its_qdq_form(tmp_path: Path, bias: bool, reduce_range: bool) -> None:
    made, engine = engine_of(tmp_path, linear(random(16, 8), bias), reduce_range=reduce_range)
    assert operators(load_model(engine)) == ["QuantizeLinear", "MatMulIntegerToFloat"]
    exact = {"session.x64quantprecision": "1"}
    for batch, wanted in zip(BATCHES, outputs_of(made, BATCHES, config=exact), strict=True):
        np.testing.assert_allclose(GraphRuntime(engine).run(batch)["y"], wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("reduce_range", "dtype"), [(False, np.uint8), (True, np.int8)])
def test_the_largest_codes_do_not_saturate(tmp_path: Path, reduce_range: bool, dtype: type) -> None:
    """Every activation and weight at its largest code: signed 8-bit weights would overflow the kernel's 16-bit sums."""
    rows = np.ones((1, 3, 64), np.float32)
    made, engine = engine_of(
        tmp_path, linear(np.ones((64, 8), np.float32)), [{"x": rows}], reduce_range=reduce_range
    )
    codes = [array for name, array in constants_of(load_model(engine)).items() if name.endswith("_codes")]
    assert [array.dtype for array in codes] == [dtype]
    stored = constants_of(load_model(made))["w_quantized"].astype(np.int16)
    assert (codes[0].astype(np.int16) - (128 if dtype is np.uint8 else 0) == stored).all()
    np.testing.assert_allclose(GraphRuntime(engine).run({"x": rows})["y"], 64, rtol=1e-5)


@pytest.mark.parametrize("params", [{}, {"smoothing": 0.5}, {"weights": "per_tensor"}], ids=str)
def test_a_network_keeps_its_numbers(tmp_path: Path, params: dict[str, Any]) -> None:
    made, engine = engine_of(tmp_path, perceptron(norm_is_shared=True), **params)
    document = json.loads((engine / "engine.json").read_text())
    assert document["integer_products"] == 3
    assert "DequantizeLinear" not in document["operators"]
    for batch, wanted in zip(BATCHES, outputs_of(made, BATCHES), strict=True):
        seen = GraphRuntime(engine).run(batch)["y"]
        # A value on the edge between two codes may fall to either side.
        assert np.linalg.norm(seen - wanted) < 0.02 * np.linalg.norm(wanted)


def test_products_of_activations_and_gemms_run_on_integers_and_conv_stays(tmp_path: Path) -> None:
    nodes = [
        node("Conv", ["x", "kernel"], "features", pads=[1, 1]),
        node("Transpose", ["features"], "turned", perm=[0, 2, 1]),
        node("MatMul", ["features", "turned"], "scores"),
        node("ReduceMean", ["scores", "last"], "mean", keepdims=0),
        node("Gemm", ["mean", "w", "b"], "hidden", transB=1),
        node("Gemm", ["hidden", "w", "b"], "y", transB=1, alpha=0.5),
    ]
    constants = {"kernel": random(6, 3, 3), "w": random(6, 6), "b": random(6), "last": np.array([-1])}
    model = graph_of(nodes, constants, inputs={"x": ["n", 3, 20]}, outputs={"y": ["n", 6]})
    batches = [{"x": random(4, 3, 20, seed=seed)} for seed in (5, 6)]
    made, engine = engine_of(tmp_path, model, batches, attention=True)
    seen = operators(load_model(engine))
    assert seen.count("MatMulIntegerToFloat") == 2
    assert [seen.count(op) for op in ("Conv", "Gemm", "MatMul")] == [1, 1, 0]
    for batch, wanted in zip(batches, outputs_of(made, batches), strict=True):
        answer = GraphRuntime(engine).run(batch)["y"]
        assert np.linalg.norm(answer - wanted) < 0.02 * np.linalg.norm(wanted)


@pytest.mark.parametrize(("shape", "products"), [((8,), 1), ((1, 8), 1), ((), 0), ((1,), 0), ((1, 1), 0)])
def test_a_gemm_whose_bias_is_broadcast_stays_qdq(
    tmp_path: Path, shape: tuple[int, ...], products: int
) -> None:
    constants = {"w": random(16, 8), "b": random(*shape, seed=8).reshape(shape)}
    gemm = [node("Gemm", ["x", "w", "b"], "y")]
    model = graph_of(gemm, constants, inputs={"x": ["n", 16]}, outputs={"y": ["n", 8]})
    batch = {"x": random(4, 16, seed=5)}
    made, engine = engine_of(tmp_path, model, [batch])
    assert operators(load_model(engine)).count("MatMulIntegerToFloat") == products
    (wanted,) = outputs_of(made, [batch])
    np.testing.assert_allclose(GraphRuntime(engine).run(batch)["y"], wanted, rtol=1e-5, atol=1e-5)


def test_what_a_branch_reads_is_kept_as_it_was(tmp_path: Path) -> None:
    """A norm and a product whose results an If reads: nothing is folded into them, nothing of them is dropped."""

    def branch(name: str, nodes: list[onnx.NodeProto]) -> onnx.GraphProto:
        return helper.make_graph(
            nodes, name, [], [helper.make_tensor_value_info(nodes[-1].output[0], TensorProto.FLOAT, None)]
        )

    branches = {
        "then_branch": branch("then", [node("Add", ["product", "normed"], "both")]),
        "else_branch": branch("else", [node("Identity", ["normed"], "one")]),
    }
    nodes = [
        node("LayerNormalization", ["x", "gamma"], "normed", axis=-1),
        node("MatMul", ["normed", "w"], "product"),
        node("Add", ["product", "b"], "biased"),
        node("If", ["yes"], "chosen", **branches),
        node("Add", ["chosen", "biased"], "y"),
    ]
    constants = {"gamma": random(16), "w": random(16, 16), "b": random(16, seed=8), "yes": np.array(True)}
    shape = ["n", "s", 16]
    model = graph_of(nodes, constants, inputs={"x": shape}, outputs={"y": shape})
    made, engine = engine_of(tmp_path, model, smoothing=0.5)
    exact, lowered = outputs_of(model, BATCHES), outputs_of(made, BATCHES)
    for batch, wanted, quantized in zip(BATCHES, exact, lowered, strict=True):
        assert np.linalg.norm(quantized - wanted) < 0.02 * np.linalg.norm(wanted)
        np.testing.assert_allclose(GraphRuntime(engine).run(batch)["y"], quantized, rtol=1e-4, atol=1e-4)


def test_an_activation_that_something_else_reads_as_codes_stays_qdq(tmp_path: Path) -> None:
    made, _ = engine_of(tmp_path, linear(random(16, 8)))
    model = load_model(made)
    dequantized = next(entry for entry in model.graph.node if entry.op_type == "DequantizeLinear")
    model.graph.node.append(node("Identity", [dequantized.output[0]], "seen"))
    model.graph.output.append(helper.make_tensor_value_info("seen", TensorProto.FLOAT, None))
    lowered, products = with_integer_products(model)
    assert products == 0
    assert "MatMul" in operators(lowered)


@pytest.mark.parametrize("scheme", ["none", "fp8", "fp16"])
def test_other_schemes_run_as_they_are(tmp_path: Path, scheme: str) -> None:
    source = perceptron()
    if scheme == "none":
        made, engine = write_export(tmp_path / "export", source), tmp_path / "engine"
        engine.mkdir()
        lower.run(Context({"scheme": "none"}, {"graph": made}, engine))
    else:
        made, engine = engine_of(tmp_path, source, scheme=scheme)
    assert load_model(engine) == load_model(made)
    document = json.loads((engine / "engine.json").read_text())
    assert (document["provider"], document["emulated"]) == ("cpu", False)
    wanted = outputs_of(source, BATCHES)[0]
    seen = GraphRuntime(engine).run(BATCHES[0])["y"]
    assert np.linalg.norm(seen - wanted) < {"none": 1e-6, "fp8": 0.2, "fp16": 5e-3}[scheme] * np.linalg.norm(
        wanted
    )


def test_bf16_rounds_where_the_graph_does_and_says_that_it_is_emulated(tmp_path: Path) -> None:
    model = linear(random(16, 8), bias=True)
    _, engine = engine_of(tmp_path, model, scheme="bf16")
    assert json.loads((engine / "engine.json").read_text())["emulated"] is True
    assert {array.dtype for array in constants_of(load_model(engine)).values()} == {np.dtype(np.float32)}

    def rounded(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        return values.astype(ml_dtypes.bfloat16).astype(np.float32)

    stored = constants_of(model)
    for batch in BATCHES:
        product = rounded(rounded(batch["x"]) @ rounded(stored["w"]))
        wanted = rounded(product + rounded(stored["b"]))
        # float32 sums in another order may round to the next BF16.
        np.testing.assert_allclose(GraphRuntime(engine).run(batch)["y"], wanted, rtol=2**-7)
        assert (GraphRuntime(engine).run(batch)["y"] == wanted).mean() > 0.95


def test_an_operator_without_a_kernel_is_named(tmp_path: Path) -> None:
    model = linear(random(16, 8))
    model.graph.node[0].op_type, model.graph.node[0].domain = "Fancy", "our.ops"
    model.opset_import.append(helper.make_opsetid("our.ops", 1))
    export = write_export(tmp_path / "export", model)
    (tmp_path / "engine").mkdir()
    with pytest.raises(ToolchainError, match="Fancy"):
        lower.run(Context({"scheme": "none"}, {"graph": export}, tmp_path / "engine"))


@pytest.mark.parametrize("params", [{"smoothing": 0.5}, {"attention": True}, {"scheme": "fp8"}], ids=str)
def test_tensorrt_accepts_the_quantized_graph(
    tmp_path: Path, params: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorrt_rtx")
    made, _ = engine_of(tmp_path, perceptron(), **params)
    assert _built_for_ada((made / "model.onnx").read_bytes()) > 1000


def _built_for_ada(model: bytes) -> int:
    """The bytes of an engine that TensorRT for RTX builds of ``model`` for SM89, strongly typed."""
    import tensorrt_rtx as trt

    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    assert parser.parse(model), [str(parser.get_error(index)) for index in range(parser.num_errors)]
    config = builder.create_builder_config()
    profile = builder.create_optimization_profile()
    profile.set_shape("x", (1, 1, 16), (2, 5, 16), (4, 8, 16))
    config.add_optimization_profile(profile)
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM89, 0)
    engine = builder.build_serialized_network(network, config)
    assert engine is not None
    return int(engine.nbytes)

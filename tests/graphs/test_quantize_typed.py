"""Strongly typed FP16 and BF16 graphs: what is 16 bits, what stays float32, and constants that do not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from encoder_factory import Context, TinyArtifacts, tiny_artifacts
from onnx import TensorProto, helper
from small_graphs import PARAMS, constants_of, graph_of, node, operators, outputs_of, perceptron, random

from enginesmith.errors import SourceError, SpecError
from enginesmith.graphs import lower, quantize
from enginesmith.graphs.editing import EditableGraph, load_model
from enginesmith.graphs.typed import convert

BATCHES = [{"x": random(2, 5, 16, seed=seed)} for seed in (10, 11, 12)]


def scalar(value: float) -> np.ndarray[Any, Any]:
    return np.array(value, np.float32)


def records(document: dict[str, Any]) -> dict[str, str | None]:
    """By node, why it stays in float32."""
    return {entry["name"]: entry["reason"] for entry in document["nodes"]}


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> TinyArtifacts:
    return tiny_artifacts(tmp_path_factory.mktemp("bert"))


@pytest.mark.model
@pytest.mark.parametrize(("scheme", "tolerance"), [("fp16", 4e-3), ("bf16", 3e-2)])
def test_an_encoder_computes_in_16_bits_between_its_borders(
    bert: TinyArtifacts, tmp_path: Path, scheme: str, tolerance: float
) -> None:
    made, engine = tmp_path / "made", tmp_path / "engine"
    made.mkdir()
    engine.mkdir()
    facts = quantize.run(Context(PARAMS | {"scheme": scheme}, {"graph": bert.export}, made))
    lower.run(Context({"scheme": scheme}, {"graph": made}, engine))
    model, source = load_model(made), load_model(bert.export)
    assert list(model.graph.input) == list(source.graph.input)
    assert list(model.graph.output) == list(source.graph.output)
    assert facts["graph_bytes"] < 0.7 * facts["source_bytes"]
    types = EditableGraph(model).types()
    narrow = TensorProto.FLOAT16 if scheme == "fp16" else TensorProto.BFLOAT16
    for entry in model.graph.node:
        if entry.op_type in ("MatMul", "LayerNormalization", "Softmax", "Gelu"):
            assert types[entry.output[0]].dtype == narrow, entry.name
    # At the end of the encoder and around what pools in float32, nowhere inside a layer.
    assert operators(model).count("Cast") - operators(source).count("Cast") <= 3
    batches = [dict(np.load(path)) for path in sorted((bert.samples / "batches").glob("*.npz"))]
    for wanted, seen in zip(outputs_of(bert.export, batches), outputs_of(engine, batches), strict=True):
        assert np.isfinite(seen).all()
        assert np.linalg.norm(seen - wanted) < tolerance * np.linalg.norm(wanted)


def test_weights_are_rounded_to_nearest_and_borders_are_cast() -> None:
    source = perceptron()
    for scheme, dtype in (("fp16", np.float16), ("bf16", ml_dtypes.bfloat16)):
        model, document = convert(source, scheme=scheme, exclude=())
        stored = constants_of(model)
        assert (stored[f"w_first_{scheme}"] == constants_of(source)["w_first"].astype(dtype)).all()
        assert operators(model).count("Cast") == document["casts"] == 2
        assert all(reason is None for reason in records(document).values())
        onnx.checker.check_model(model, full_check=True)


def test_sums_stay_in_float32_with_what_lies_between_them() -> None:
    nodes = [
        node("MatMul", ["x", "w"], "rows"),
        node("Mul", ["rows", "scale"], "scaled"),
        node("ReduceL1", ["scaled", "axes"], "total", keepdims=1),
        node("Clip", ["total", "least"], "bounded"),
        node("Div", ["total", "bounded"], "y"),
    ]
    constants = {"w": random(16, 16), "scale": scalar(1000.0), "axes": np.array([1]), "least": scalar(1e-9)}
    model = graph_of(nodes, constants, inputs={"x": ["b", 16]}, outputs={"y": ["b", 1]})
    made, document = convert(model, scheme="fp16", exclude=())
    kept = {name for name, reason in records(document).items() if reason}
    assert kept == {"scaled/Mul", "total/ReduceL1", "bounded/Clip", "y/Div"}
    assert document["constants"] == []
    batch = [{"x": random(3, 16)}]
    np.testing.assert_allclose(outputs_of(made, batch)[0], 1, rtol=1e-6)


@pytest.mark.parametrize(
    ("value", "kept_as"),
    [(-3.4028234663852886e38, -32752.0), (-1e9, -32752.0), (-10000.0, -10000.0), (-np.inf, -np.inf)],
)
def test_a_mask_keeps_its_meaning(value: float, kept_as: float) -> None:
    nodes = [node("Where", ["m", "x", "masked"], "scores"), node("Softmax", ["scores"], "y", axis=-1)]
    model = graph_of(
        nodes,
        {"masked": scalar(value)},
        inputs={"x": ["b", 8], "m": ["b", 8]},
        outputs={"y": ["b", 8]},
        dtypes={"m": TensorProto.BOOL},
    )
    made, document = convert(model, scheme="fp16", exclude=())
    assert constants_of(made)["masked_fp16"] == np.float16(kept_as)
    assert [entry["to"] for entry in document["constants"]] == ([kept_as] if kept_as == -32752 else [])
    batch = {"x": random(2, 8), "m": np.array([[True] * 5 + [False] * 3] * 2)}
    np.testing.assert_allclose(outputs_of(made, [batch])[0], outputs_of(model, [batch])[0], atol=2e-3)


def test_an_epsilon_does_not_become_zero() -> None:
    nodes = [node("Max", ["x", "least"], "bounded"), node("Div", ["x", "bounded"], "y")]
    model = graph_of(nodes, {"least": scalar(1e-12)}, inputs={"x": ["b", 8]}, outputs={"y": ["b", 8]})
    made, document = convert(model, scheme="fp16", exclude=())
    assert document["constants"] == [{"name": "least", "from": pytest.approx(1e-12), "to": 2.0**-14}]
    assert (outputs_of(made, [{"x": np.zeros((1, 8), np.float32)}])[0] == 0).all()


def test_a_weight_that_overflows_fp16_is_named_and_fits_bf16() -> None:
    weight = random(16, 4)
    weight[2, 1] = 1e6
    model = graph_of(
        [node("MatMul", ["x", "w_large"], "y")],
        {"w_large": weight},
        inputs={"x": ["b", 16]},
        outputs={"y": ["b", 4]},
    )
    with pytest.raises(SourceError, match=r"w_large holds 1e\+06, which does not fit FP16"):
        convert(model, scheme="fp16", exclude=())
    made, _ = convert(model, scheme="bf16", exclude=())
    assert constants_of(made)["w_large_bf16"].dtype == ml_dtypes.bfloat16


def test_types_in_attributes_follow() -> None:
    nodes = [
        node("Cast", ["ids"], "numbers", to=TensorProto.FLOAT),
        node("Shape", ["x"], "shape"),
        node(
            "ConstantOfShape", ["shape"], "twos", value=helper.make_tensor("v", TensorProto.FLOAT, [1], [2.0])
        ),
        node("Mul", ["x", "twos"], "doubled"),
        node("Add", ["doubled", "numbers"], "y"),
    ]
    model = graph_of(
        nodes,
        {},
        inputs={"x": ["b", 8], "ids": ["b", 8]},
        outputs={"y": ["b", 8]},
        dtypes={"ids": TensorProto.INT64},
    )
    made, _ = convert(model, scheme="fp16", exclude=())
    onnx.checker.check_model(made, full_check=True)
    batch = {"x": random(2, 8), "ids": np.arange(16).reshape(2, 8)}
    np.testing.assert_allclose(
        outputs_of(made, [batch])[0], 2 * batch["x"] + batch["ids"], rtol=2e-3, atol=2e-3
    )


def test_an_excluded_node_stays_in_float32() -> None:
    model, document = convert(perceptron(), scheme="fp16", exclude=["second"])
    assert records(document)["second/MatMul"] == "excluded by 'second'"
    assert constants_of(model)["w_second"].dtype == np.float32
    outputs_of(model, BATCHES)
    with pytest.raises(SpecError, match="no operator is left to compute in 16 bits"):
        convert(perceptron(), scheme="fp16", exclude=["*"])
    with pytest.raises(SpecError, match="'third' matches no node"):
        convert(perceptron(), scheme="fp16", exclude=["third"])


def test_control_flow_is_refused_by_name() -> None:
    branch = helper.make_graph(
        [helper.make_node("Neg", ["x"], ["negative"])],
        "branch",
        [],
        [helper.make_tensor_value_info("negative", TensorProto.FLOAT, None)],
    )
    model = graph_of(
        [node("If", ["flag"], "y", then_branch=branch, else_branch=branch)],
        {},
        inputs={"x": ["b", 8], "flag": []},
        outputs={"y": ["b", 8]},
        dtypes={"flag": TensorProto.BOOL},
    )
    with pytest.raises(SourceError, match=r"y/If is control flow"):
        convert(model, scheme="fp16", exclude=())


def test_a_tensor_of_unknown_type_is_refused() -> None:
    model = perceptron()
    model.graph.node[1].domain = "our.ops"
    model.opset_import.append(helper.make_opsetid("our.ops", 1))
    with pytest.raises(SourceError, match=r"the type of first, made by first/MatMul"):
        convert(model, scheme="fp16", exclude=())

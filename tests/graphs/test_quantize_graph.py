"""Quantizing graphs to Q/DQ: what is quantized, with which numbers, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from encoder_factory import Context, TinyArtifacts, tiny_artifacts
from onnx import TensorProto
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

from enginesmith.errors import GateError, SourceError, SpecError
from enginesmith.graphs import quantize
from enginesmith.graphs.calibrate import without_padding
from enginesmith.graphs.editing import EditableGraph, TensorType, load_model
from enginesmith.graphs.quantizable import GraphRecipe, select, units
from enginesmith.graphs.smoothing import smooth, smoothing_factors

BATCHES = [{"x": random(2, 5, 16, seed=seed)} for seed in (10, 11, 12)]


def quantized(
    root: Path, model: onnx.ModelProto, batches: Any = None, **params: Any
) -> tuple[onnx.ModelProto, dict[str, Any]]:
    """The quantized model and its ``quantization.json``."""
    export = write_export(root / "export", model)
    samples = write_samples(root / "samples", BATCHES if batches is None else batches)
    out = root / "out"
    out.mkdir()
    quantize.run(Context(PARAMS | params, {"graph": export, "calibration": samples}, out, root / "scratch"))
    return load_model(out), json.loads((out / "quantization.json").read_text())


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> TinyArtifacts:
    return tiny_artifacts(tmp_path_factory.mktemp("bert"))


@pytest.mark.model
@pytest.mark.parametrize(
    ("params", "least_cosine"),
    [
        ({"method": "percentile", "percentile": 99.99, "smoothing": 0.5}, 0.99),
        ({"method": "entropy", "smoothing": 0.5}, 0.99),
        ({"method": "mse"}, 0.99),
        ({"scheme": "fp8"}, 0.998),
        ({"attention": True}, 0.99),
    ],
    ids=["percentile", "entropy", "mse", "fp8", "attention"],
)
def test_an_encoder_stays_close_in_standard_operators_and_shrinks(
    bert: TinyArtifacts, tmp_path: Path, params: dict[str, Any], least_cosine: float
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    inputs = {"graph": bert.export, "calibration": bert.samples}
    facts = quantize.run(Context(PARAMS | params, inputs, out, tmp_path / "scratch"))
    model = load_model(out)
    assert {entry.domain for entry in model.graph.node} <= {"", "ai.onnx"}
    batches = [dict(np.load(path)) for path in sorted((bert.samples / "batches").glob("*.npz"))]
    wanted, seen = (np.concatenate(outputs_of(path, batches)) for path in (bert.export, out))
    cosine = (wanted * seen).sum(1) / np.linalg.norm(wanted, axis=1) / np.linalg.norm(seen, axis=1)
    assert cosine.mean() > least_cosine
    assert (wanted != seen).any()
    assert facts["graph_bytes"] < facts["source_bytes"]
    assert facts["quantized_nodes"] == (16 if params.get("attention") else 12)


def test_weights_are_stored_as_codes_within_half_a_step(tmp_path: Path) -> None:
    source = perceptron()
    model, _ = quantized(tmp_path, source)
    stored, before = constants_of(model), constants_of(source)
    for name in ("w_first", "w_second", "w_third"):
        codes, scale = stored[f"{name}_quantized"], stored[f"{name}_scale"]
        assert codes.dtype == np.int8
        assert scale.shape == (before[name].shape[1],)
        assert np.abs(codes.astype(int)).max(axis=0).tolist() == [127] * len(scale)
        assert (np.abs(codes * scale - before[name]) <= 0.5001 * scale).all()
        assert not stored[f"{name}_zero_point"].any()
        assert name not in stored


@pytest.mark.parametrize(
    ("params", "largest", "scales"),
    [({"reduce_range": True}, 63, 16), ({"weights": "per_tensor"}, 127, 1)],
    ids=["reduce_range", "per_tensor"],
)
def test_codes_follow_the_recipe(tmp_path: Path, params: dict[str, Any], largest: int, scales: int) -> None:
    model, document = quantized(tmp_path, perceptron(), **params)
    codes = constants_of(model)["w_first_quantized"].astype(int)
    assert np.abs(codes).max() == largest
    record = next(entry for entry in document["nodes"] if entry["name"] == "first/MatMul")
    assert record["weight_scales"] == scales
    assert record["weight_bits"] == (7 if largest == 63 else 8)


def test_an_activation_range_is_the_largest_value_that_was_seen(tmp_path: Path) -> None:
    weights = {"w": random(16, 4)}
    model = graph_of(
        [node("MatMul", ["x", "w"], "y")], weights, inputs={"x": ["b", "s", 16]}, outputs={"y": ["b", "s", 4]}
    )
    largest = max(np.abs(batch["x"]).max() for batch in BATCHES)
    for scheme, bound in (("int8", 127), ("fp8", 448)):
        made, document = quantized(tmp_path / scheme, model, scheme=scheme)
        assert constants_of(made)["x_scale"] == np.float32(largest / bound)
        assert document["nodes"][0]["activation_scales"] == pytest.approx([largest / bound])
    assert constants_of(made)["w_quantized"].dtype == ml_dtypes.float8_e4m3fn


def test_methods_clip_outliers_and_max_does_not(tmp_path: Path) -> None:
    values = random(8, 64, 16, seed=3)
    values[0, 0, 0] = 40.0
    model = graph_of(
        [node("MatMul", ["x", "w"], "y")],
        {"w": random(16, 4)},
        inputs={"x": ["b", "s", 16]},
        outputs={"y": ["b", "s", 4]},
    )

    def amax(method: str, **params: Any) -> float:
        made, _ = quantized(tmp_path / method, model, [{"x": values}], method=method, **params)
        return 127 * float(constants_of(made)["x_scale"])

    assert amax("max") == pytest.approx(40)
    assert amax("percentile", percentile=99.0) == pytest.approx(np.percentile(np.abs(values), 99), abs=0.05)
    assert 2 < amax("entropy") < 40


def test_method_mse_finds_the_smallest_squared_error(tmp_path: Path) -> None:
    values = np.random.default_rng(0).standard_t(4, size=(8, 128, 16)).astype(np.float32)
    model = graph_of(
        [node("MatMul", ["x", "w"], "y")],
        {"w": random(16, 4)},
        inputs={"x": ["b", "s", 16]},
        outputs={"y": ["b", "s", 4]},
    )
    made, _ = quantized(tmp_path, model, [{"x": values[:4]}, {"x": values[4:]}], method="mse")

    def error(scale: float) -> float:
        return float(((np.clip(np.rint(values / scale), -127, 127) * scale - values) ** 2).sum())

    largest = np.abs(values).max() / 127
    best = min(error(largest * share) for share in np.linspace(0.1, 1, 200))
    assert error(float(constants_of(made)["x_scale"])) < 1.01 * best < 0.95 * error(largest)


def test_every_product_has_dequantizers_of_its_own_and_one_quantizer_per_activation(tmp_path: Path) -> None:
    model, _ = quantized(tmp_path, perceptron())
    assert operators(model).count("QuantizeLinear") == 2
    products = [entry for entry in model.graph.node if entry.op_type == "MatMul"]
    operands = [name for entry in products for name in entry.input]
    assert len(set(operands)) == 6
    made_by = {name: entry.op_type for entry in model.graph.node for name in entry.output}
    assert {made_by[name] for name in operands} == {"DequantizeLinear"}


def test_gemm_conv_and_a_shared_weight_are_quantized(tmp_path: Path) -> None:
    nodes = [
        node("Conv", ["x", "kernel"], "features", pads=[1, 1]),
        node("GlobalAveragePool", ["features"], "pooled"),
        node("Flatten", ["pooled"], "flat"),
        node("Gemm", ["flat", "w", "b"], "hidden", transB=1),
        node("Gemm", ["hidden", "w", "b"], "y", transB=1, alpha=0.5),
    ]
    constants = {"kernel": random(6, 3, 3), "w": random(6, 6, seed=1), "b": random(6, seed=2)}
    model = graph_of(nodes, constants, inputs={"x": ["batch", 3, 20]}, outputs={"y": ["batch", 6]})
    batches = [{"x": random(4, 3, 20, seed=seed)} for seed in (5, 6)]
    made, document = quantized(tmp_path, model, batches)
    assert [entry["weight_scales"] for entry in document["nodes"]] == [6, 6, 6]
    attributes = {entry.name: entry for entry in made.graph.node}
    assert attributes["features/Conv_weight_DequantizeLinear"].attribute[0].i == 0
    wanted, seen = outputs_of(model, batches), outputs_of(made, batches)
    assert np.abs(wanted[0] - seen[0]).max() < 0.05 * np.abs(wanted[0]).max()


@pytest.mark.parametrize("norm_is_shared", [False, True])
def test_smoothing_changes_no_number_before_rounding(norm_is_shared: bool) -> None:
    model = perceptron(norm_is_shared=norm_is_shared)
    wanted = outputs_of(model, BATCHES)
    graph = EditableGraph(model)
    unit = units(select(graph, GraphRecipe("int8")))[0]
    weights = [graph.constant(str(member.weight)) for member in unit.members]
    factors = smoothing_factors(random(16, seed=9) ** 2 + 0.1, weights, alpha=0.5)
    smoothed = smooth(graph, unit, factors)
    assert smoothed.kind == ("mul" if norm_is_shared else "norm")
    nodes = list(graph.nodes)
    for entry in nodes:
        if entry.name in {member.name for member in unit.members}:
            entry.input[0] = smoothed.tensor
            scaled = graph.constant(entry.input[1]) * factors[:, None]
            entry.input[1] = graph.add_constant(f"{entry.input[1]}_scaled", scaled)
    position = next(index for index, entry in enumerate(nodes) if smoothed.tensor in entry.input)
    graph.set_nodes([*nodes[:position], *([smoothed.node] if smoothed.node else []), *nodes[position:]])
    for before, after in zip(wanted, outputs_of(model, BATCHES), strict=True):
        np.testing.assert_allclose(after, before, rtol=1e-4, atol=1e-4)


def test_smoothing_helps_where_a_channel_is_wide(tmp_path: Path) -> None:
    source = perceptron()
    wanted = np.concatenate(outputs_of(source, BATCHES))
    errors = {}
    for alpha in (None, 0.5):
        made, document = quantized(tmp_path / str(alpha), source, smoothing=alpha, exclude=["y/MatMul"])
        errors[alpha] = np.linalg.norm(np.concatenate(outputs_of(made, BATCHES)) - wanted)
        kinds = [entry["smoothing"] for entry in document["nodes"]]
        assert kinds == (["none"] * 3 if alpha is None else ["norm", "norm", "none"])
    assert errors[0.5] < 0.5 * errors[None]


def test_factors_are_those_of_the_paper() -> None:
    seen, weight = np.array([1.0, 4.0, 16.0]), np.array([[1.0], [-2.0], [4.0]])
    factors = smoothing_factors(seen, [weight], alpha=0.75)
    wanted = seen**0.75 / np.abs(weight[:, 0]) ** 0.25
    np.testing.assert_allclose(factors / factors[0], wanted / wanted[0], rtol=1e-6)


def test_a_channel_that_calibration_never_saw_keeps_a_usable_factor() -> None:
    factors = smoothing_factors(np.array([0.0, 1.0]), [np.ones((2, 2))], alpha=1.0)
    assert 1e-5 < factors[0] / factors[1] < 1


def test_padding_does_not_widen_a_range(tmp_path: Path) -> None:
    nodes = [
        node("Unsqueeze", ["attention_mask", "last"], "column"),
        node("MatMul", ["x", "w"], "rows"),
        node("Cast", ["column"], "kept", to=TensorProto.FLOAT),
        node("Mul", ["rows", "kept"], "y"),
    ]
    model = graph_of(
        nodes,
        {"w": random(16, 4), "last": np.array([-1])},
        inputs={"x": ["batch", "sequence", 16], "attention_mask": ["batch", "sequence"]},
        outputs={"y": ["batch", "sequence", 4]},
        dtypes={"attention_mask": TensorProto.INT64},
    )
    values, mask = random(2, 5, 16), np.ones((2, 5), np.int64)
    mask[1, 3:] = 0
    values[1, 3:] = 1000.0
    made, _ = quantized(tmp_path, model, [{"x": values, "attention_mask": mask}])
    assert constants_of(made)["x_scale"] == np.float32(np.abs(values[mask == 1]).max() / 127)


@pytest.mark.parametrize(
    ("shape", "names", "rows"),
    [
        ((2, 5, 7), None, 8),
        ((10, 7), None, 8),
        ((2, 3, 5, 7), (None, 3, "sequence", 7), 8),
        ((2, 5, 5, 7), ("batch", 5, "sequence", 7), 8),
        ((2, 4, 6, 5), None, 8),
        ((4, 7), None, 4),
        ((2, 5), ("batch", 5), 2),
    ],
    ids=[
        "tokens",
        "flattened",
        "heads",
        "as many heads as tokens",
        "transposed keys",
        "no sequence",
        "as wide as long",
    ],
)
def test_padded_positions_are_found_along_the_sequence(
    shape: tuple[int, ...], names: tuple[Any, ...] | None, rows: int
) -> None:
    mask = np.array([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    kind = None if names is None else TensorType(TensorProto.FLOAT, names)
    assert len(without_padding(np.ones(shape), kind, mask=mask)) == rows


def test_padding_of_a_tensor_with_as_many_channels_as_tokens_lies_along_its_sequence() -> None:
    mask = np.array([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    values = np.where(mask[:, None, :], 1.0, 9.0) * np.ones((2, 5, 5))
    kind = TensorType(TensorProto.FLOAT, ("batch", 5, "sequence"))
    assert without_padding(values, kind, mask=mask).max() == 1


def test_a_relu_before_fp8_codes_is_computed(tmp_path: Path) -> None:
    nodes = [node("Relu", ["x"], "active"), node("MatMul", ["active", "w"], "y")]
    constants = {"w": np.eye(16, dtype=np.float32)}
    model = graph_of(nodes, constants, inputs={"x": ["b", "s", 16]}, outputs={"y": ["b", "s", 16]})
    made, _ = quantized(tmp_path, model, scheme="fp8")
    for config in ({}, {"session.disable_quant_qdq": "1"}):
        assert min(values.min() for values in outputs_of(made, BATCHES, config=config)) == 0


@pytest.mark.parametrize("pattern", ["first/MatMul", "first", "f*", "*irst/*"])
def test_exclude_matches_names_and_modules(tmp_path: Path, pattern: str) -> None:
    model, document = quantized(tmp_path, perceptron(), exclude=[pattern])
    records = {entry["name"]: entry for entry in document["nodes"]}
    assert records["first/MatMul"]["reason"] == f"excluded by {pattern!r}"
    assert records["second/MatMul"]["quantized"]
    assert "w_first" in constants_of(model)


def test_exclude_matches_an_operator(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="no node is left to quantize"):
        quantized(tmp_path, perceptron(), exclude=["MatMul"])


def test_a_pattern_that_matches_nothing_is_refused_with_near_names(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="'firts/MatMul' matches no node") as caught:
        quantized(tmp_path, perceptron(), exclude=["firts/MatMul"])
    assert "first/MatMul" in str(caught.value.hint)


def test_a_graph_without_products_is_refused(tmp_path: Path) -> None:
    model = graph_of([node("Relu", ["x"], "y")], {}, inputs={"x": ["b", 16]}, outputs={"y": ["b", 16]})
    with pytest.raises(SpecError, match="no operator that can be quantized"):
        quantized(tmp_path, model)


def test_nan_in_a_weight_is_named(tmp_path: Path) -> None:
    model = perceptron()
    broken = constants_of(model)["w_second"].copy()
    broken[1, 2] = np.nan
    tensor = next(entry for entry in model.graph.initializer if entry.name == "w_second")
    tensor.CopyFrom(onnx.numpy_helper.from_array(broken, "w_second"))
    with pytest.raises(GateError, match=r"w_second of second/MatMul holds NaN"):
        quantized(tmp_path, model)


def test_nan_in_an_activation_is_named(tmp_path: Path) -> None:
    nodes = [node("Log", ["x"], "logs"), node("MatMul", ["logs", "w"], "y")]
    model = graph_of(nodes, {"w": random(16, 4)}, inputs={"x": ["b", 16]}, outputs={"y": ["b", 4]})
    with pytest.raises(GateError, match="NaN or Inf in logs, the output of logs/Log"):
        quantized(tmp_path, model, [{"x": random(3, 16)}])


def test_a_dead_activation_stays_in_float_on_record(tmp_path: Path) -> None:
    nodes = [
        node("Clip", ["x", "low", "high"], "never"),
        node("MatMul", ["never", "w"], "first"),
        node("MatMul", ["x", "w"], "second"),
        node("Add", ["first", "second"], "y"),
    ]
    constants = {"w": random(16, 4), "low": np.float32(0).reshape(()), "high": np.float32(9).reshape(())}
    model = graph_of(nodes, constants, inputs={"x": ["b", 16]}, outputs={"y": ["b", 4]})
    batches = [{"x": -np.abs(random(3, 16)) - 1}]
    made, document = quantized(tmp_path / "some", model, batches, smoothing=0.5)
    records = {entry["name"]: entry for entry in document["nodes"]}
    assert "was 0 on every calibration sample" in records["first/MatMul"]["reason"]
    assert records["second/MatMul"]["quantized"]
    assert np.isfinite(outputs_of(made, batches)[0]).all()
    with pytest.raises(SpecError, match="no activation has a range"):
        quantized(tmp_path / "all", model, [{"x": np.zeros((3, 16), np.float32)}])


def test_samples_for_another_graph_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="have no input 'x'; they have: pixels"):
        quantized(tmp_path, perceptron(), [{"pixels": random(2, 5, 16)}])


def test_a_damaged_graph_is_refused(tmp_path: Path) -> None:
    from enginesmith.errors import StoreError

    write_export(tmp_path / "export", perceptron())
    path = tmp_path / "export" / "model.onnx"
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(StoreError, match="cannot read"):
        load_model(tmp_path / "export")

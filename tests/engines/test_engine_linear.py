"""Linear layers as nodes: ONNX Runtime computes what the stored integers and scales say, to the last code."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto

from enginesmith.engines.onnxruntime.graph import Graph, WeightsFile
from enginesmith.engines.onnxruntime.linear import (
    Kind,
    Linear,
    fp8_from_int4,
    read_linear,
    stack,
)
from enginesmith.engines.onnxruntime.linear_writer import LinearWriter, quantize_rows

Float = npt.NDArray[np.float32]
Outputs = dict[str, Float]
EXACT, FAST = 1, 4


def computed(
    directory: Path, value: Float, write: Callable[[LinearWriter], list[str]], *, accuracy_level: int = EXACT
) -> Outputs:
    """ONNX Runtime's values of the tensors that ``write`` returns, for input ``x``."""
    with WeightsFile(directory / "weights.bin") as weights:
        graph = Graph("test", weights)
        graph.input("x", TensorProto.FLOAT, ["rows", value.shape[1]])
        names = write(LinearWriter(graph, accuracy_level))
        for name in names:
            graph.output(name, TensorProto.FLOAT, ["rows", "columns"])
        graph.save(directory / "graph.onnx")
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    session = ort.InferenceSession(str(directory / "graph.onnx"), options, providers=["CPUExecutionProvider"])
    return dict(zip(names, session.run(names, {"x": value}), strict=True))


def output_of(directory: Path, layer: Linear, value: Float, *, accuracy_level: int = EXACT) -> Float:
    outputs = computed(
        directory,
        value,
        lambda writer: [writer.write(layer, "x", "layer")],
        accuracy_level=accuracy_level,
    )
    return next(iter(outputs.values()))


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("columns", [64, 1000])
def test_int8_product_is_exact_at_its_extremes(columns: int, sign: int, tmp_path: Path) -> None:
    # Every pair of products is 2 x 127 x 127: more than the 16 bits that a saturating kernel sums it in.
    weight = np.full((8, columns), sign * 127, np.int8)
    weight[1::2] = -128
    value = np.concatenate([np.full((1, columns), 127.0), np.full((1, columns), -128.0)]).astype(np.float32)
    layer = Linear("int8_sq", weight, None, np.ones(8, np.float32), input_scale=1.0)

    seen = output_of(tmp_path, layer, value)

    np.testing.assert_array_equal(seen, value.astype(np.int64) @ weight.T.astype(np.int64))


def test_int8_product_is_integer_arithmetic_times_both_scales(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    weight = random.integers(-128, 128, (48, 96)).astype(np.int8)
    scales = random.uniform(0.5, 2, 48).astype(np.float32)
    bias = random.normal(size=48).astype(np.float32)
    codes = random.integers(-128, 128, (5, 96))
    layer = Linear("int8_sq", weight, bias, scales, input_scale=0.25)

    seen = output_of(tmp_path, layer, (codes * 0.25).astype(np.float32))

    integers = codes @ weight.T.astype(np.int64)
    np.testing.assert_allclose(seen, integers * 0.25 * scales + bias, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("accuracy_level", [EXACT, FAST])
def test_activations_beyond_the_calibrated_range_are_clipped(accuracy_level: int, tmp_path: Path) -> None:
    weight = np.eye(16, dtype=np.int8)
    layer = Linear("int8_sq", weight, None, np.ones(16, np.float32), input_scale=0.5)
    value = np.tile(np.array([1000.0, -1000.0], np.float32), (1, 8))

    seen = output_of(tmp_path, layer, value, accuracy_level=accuracy_level)

    np.testing.assert_array_equal(seen, np.clip(value, -64, 63.5))


@pytest.mark.parametrize("columns", [64, 96, 200])
def test_int8_weights_only_equal_dequantized_arithmetic(columns: int, tmp_path: Path) -> None:
    random = np.random.default_rng(1)
    weight = random.integers(-128, 128, (32, columns)).astype(np.int8)
    scales = random.uniform(0.001, 0.01, 32).astype(np.float32)
    value = random.normal(size=(7, columns)).astype(np.float32)

    seen = output_of(tmp_path, Linear("int8_wo", weight, None, scales), value)

    np.testing.assert_allclose(seen, value @ (weight * scales[:, None]).T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("group", [32, 64, 128])
def test_int4_equals_dequantized_arithmetic_of_the_smoothed_input(group: int, tmp_path: Path) -> None:
    random = np.random.default_rng(2)
    weight = random.integers(-8, 8, (32, 256)).astype(np.int8)
    scales = random.uniform(0.01, 0.1, (32, 256 // group)).astype(np.float32)
    smoothing = random.uniform(0.5, 2, 256).astype(np.float32)
    value = random.normal(size=(7, 256)).astype(np.float32)

    seen = output_of(tmp_path, Linear("int4_awq", weight, None, scales, None, smoothing), value)

    dequantized = weight * np.repeat(scales, group, axis=1)
    np.testing.assert_allclose(seen, (value * smoothing) @ dequantized.T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("accuracy_level", [EXACT, FAST])
def test_fp8_equals_products_of_fp8_values(accuracy_level: int, tmp_path: Path) -> None:
    random = np.random.default_rng(3)
    weight = random.normal(size=(24, 40)).astype(ml_dtypes.float8_e4m3fn)
    scales = np.full(24, 0.5, np.float32)
    value = random.normal(size=(6, 40)).astype(np.float32)
    value[0, :2] = [1000, -1000]  # Beyond 448 x 0.25: FP8 has no Inf, so both must clip.

    seen = output_of(
        tmp_path, Linear("fp8", weight, None, scales, 0.25), value, accuracy_level=accuracy_level
    )

    codes = np.clip(value / 0.25, -448, 448).astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
    np.testing.assert_allclose(
        seen, (codes * 0.25) @ (weight.astype(np.float32) * 0.5).T, rtol=1e-5, atol=1e-4
    )


def test_int4_under_fp8_stands_for_the_rounded_fp8_value() -> None:
    codes = np.arange(-8, 8, dtype=np.int8).reshape(1, 16)
    scale, second = np.array([[0.5, 0.03]], np.float32), np.float32(0.01)

    seen = fp8_from_int4(codes, scale, second).astype(np.float64) * second

    exact = codes * np.repeat(scale, 8, axis=1).astype(np.float64)
    clipped = np.clip(exact, -4.48, 4.48)  # 448 times the second scale.
    assert np.abs(seen - clipped).max() <= 4.48 * 2**-4  # Half a step of three bits of mantissa.
    assert np.all(np.abs(seen - clipped) <= np.abs(clipped) * 2**-4 + 1e-6)
    assert seen[0, 0] == pytest.approx(-3.84)  # -400 lies between the FP8 values -384 and -416.
    assert not np.array_equal(seen, exact)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_plain_weights_are_multiplied_in_float32(dtype: Any, tmp_path: Path) -> None:
    random = np.random.default_rng(4)
    weight = random.normal(size=(24, 40)).astype(dtype)
    value = random.normal(size=(6, 40)).astype(np.float32)

    seen = output_of(tmp_path, Linear("plain", weight, None), value)

    np.testing.assert_allclose(seen, value @ weight.astype(np.float32).T, rtol=1e-5, atol=1e-5)


def test_int8_and_fp8_layers_do_not_share_a_quantized_input(tmp_path: Path) -> None:
    value = np.linspace(-4, 4, 16, dtype=np.float32)[None]
    ones = np.ones(16, np.float32)
    integers = Linear("int8_sq", np.eye(16, dtype=np.int8), None, ones, 0.5)
    floats = Linear("fp8", np.eye(16).astype(ml_dtypes.float8_e4m3fn), None, ones, 0.5)

    outputs = computed(
        tmp_path, value, lambda writer: [writer.write(integers, "x", "a"), writer.write(floats, "x", "b")]
    )

    np.testing.assert_array_equal(outputs["a/output"], np.rint(value / 0.5) * 0.5)
    expected = (value / 0.5).astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * 0.5
    np.testing.assert_array_equal(outputs["b/output"], expected)


def small_layer(kind: Kind, *, rows: int = 8, **changes: Any) -> Linear:
    random = np.random.default_rng(rows)
    dtypes = {"plain": np.float32, "fp8": ml_dtypes.float8_e4m3fn}
    weight = random.integers(-8, 8, (rows, 64)).astype(dtypes.get(kind, np.int8))
    scale_shape = (rows, 2) if kind == "int4_awq" else rows
    fields: dict[str, Any] = {
        "weight_scale": None if kind == "plain" else random.uniform(0.5, 1, scale_shape).astype(np.float32),
        "input_scale": 0.5 if kind in ("int8_sq", "fp8") else None,
    }
    return Linear(kind, weight, **{"bias": None, **fields, **changes})


@pytest.mark.parametrize("kind", ["plain", "int8_wo", "int8_sq", "int4_awq", "fp8"])
def test_stacked_layers_compute_what_each_computes(kind: Kind, tmp_path: Path) -> None:
    value = np.random.default_rng(5).normal(size=(3, 64)).astype(np.float32)
    bias = np.arange(16, dtype=np.float32)
    layers = [small_layer(kind), small_layer(kind, rows=16, bias=bias)]
    stacked = stack(layers)
    assert stacked is not None

    def write(writer: LinearWriter) -> list[str]:
        return [
            writer.write(layer, "x", name)
            for layer, name in ((stacked, "ab"), (layers[0], "a"), (layers[1], "b"))
        ]

    together, *apart = computed(tmp_path, value, write).values()

    np.testing.assert_allclose(together, np.concatenate(apart, axis=1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("left", "right"),
    [
        (small_layer("plain"), small_layer("int8_wo")),
        (small_layer("int8_wo"), small_layer("int4_awq")),
        (small_layer("int8_sq"), small_layer("int8_sq", input_scale=0.25)),
        (small_layer("int8_sq"), small_layer("int8_sq", pre_quant_scale=np.ones(64, np.float32))),
        (
            small_layer("int4_awq", pre_quant_scale=np.ones(64, np.float32)),
            small_layer("int4_awq", pre_quant_scale=np.full(64, 2, np.float32)),
        ),
        (small_layer("int4_awq"), small_layer("int4_awq", weight_scale=np.ones((8, 1), np.float32))),
        (small_layer("plain"), Linear("plain", np.ones((8, 64), np.float16), None)),
    ],
)
def test_layers_that_read_other_inputs_are_not_stacked(left: Linear, right: Linear) -> None:
    assert stack([left, right]) is None


@given(pairs=st.integers(1, 6), columns=st.integers(1, 9), random=st.randoms(use_true_random=False))
@settings(max_examples=50)
def test_int4_read_from_a_checkpoint_is_what_was_packed(
    pairs: int, columns: int, random: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    import torch
    from safetensors.torch import save_file

    from enginesmith.checkpoints.tensors import CheckpointTensors

    values = np.array(
        [[random.randint(-8, 7) for _ in range(columns)] for _ in range(2 * pairs)], dtype=np.int8
    )
    packed = (values[0::2] & 0x0F).astype(np.uint8) | ((values[1::2] & 0x0F).astype(np.uint8) << 4)
    directory = tmp_path_factory.mktemp("packed")
    tensors = {"l.weight": torch.from_numpy(packed), "l.weight_scale": torch.ones(2 * pairs, 1)}
    save_file(tensors, directory / "model.safetensors")

    layer = read_linear(CheckpointTensors(directory), "l")

    assert layer.kind == "int4_awq"
    np.testing.assert_array_equal(layer.weight, values)


@given(
    st.lists(st.lists(st.floats(-1e6, 1e6, width=32), min_size=5, max_size=5), min_size=1, max_size=4),
    st.sampled_from([2, 4, 8]),
)
def test_quantized_rows_are_off_by_half_a_step_at_most(rows: list[list[float]], block: int) -> None:
    weight = np.array(rows, np.float32)

    codes, scales = quantize_rows(weight, block)

    assert codes.min() >= 1  # Symmetric: -127 to 127.
    steps = np.repeat(scales, block, axis=1).astype(np.float64)
    restored = (codes.astype(np.float64) - 128) * steps
    columns = weight.shape[1]
    assert np.all(np.abs(restored[:, :columns] - weight) <= 0.5001 * steps[:, :columns])
    assert not restored[:, columns:].any()  # Padding stands for zero.

"""What is said of an engine, and whether it computes the same: inspector documents, bindings, the Comparator."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from tensorrt_cases import WIDTH, signature, tiny_graph

from enginesmith.engines.tensorrt.build import PhaseProgress
from enginesmith.engines.tensorrt.comparison import TOLERANCES, coarsest_type, compare, load_batches
from enginesmith.engines.tensorrt.inspection import layers_from_inspector
from enginesmith.engines.tensorrt.network import Binding, check_bindings
from enginesmith.errors import GateError, SourceError

BINDINGS = (
    Binding("input_ids", "input", "int64", (-1, -1)),
    Binding("features", "input", "float32", (-1, -1, WIDTH)),
    Binding("vectors", "output", "float32", (-1, -1, WIDTH)),
)


def test_layers_are_read_from_the_inspectors_of_tensorrt_10_and_11() -> None:
    """The two forms as NVIDIA's migration guide describes them."""
    ten = {
        "Layers": [
            {
                "Name": "fc",
                "LayerType": "gemm",
                "Outputs": [{"Name": "y", "Format/Datatype": "Row major Half"}],
            }
        ],
        "Bindings": ["x", "y"],
    }
    eleven = {
        "Layers": [
            {
                "Name": "fc",
                "LayerType": "gemm",
                "Outputs": [{"Name": "y", "Format": "Row major", "DataType": "Half"}],
            }
        ],
        "I/O Tensors": [{"Name": "x"}, {"Name": "y"}],
    }
    assert layers_from_inspector(ten) == ({"name": "fc", "type": "gemm", "precision": ["Row major Half"]},)
    assert layers_from_inspector(eleven) == (
        {"name": "fc", "type": "gemm", "precision": ["Half, Row major"]},
    )


def test_engine_without_details_has_names_only() -> None:
    assert layers_from_inspector({"Layers": ["fc"]}) == ({"name": "fc", "type": None, "precision": []},)


def test_output_whose_length_tensorrt_cannot_prove_is_accepted() -> None:
    check_bindings(BINDINGS, signature())
    check_bindings((*BINDINGS[:2], Binding("vectors", "output", "float32", (-1, -1, -1))), signature())


@pytest.mark.parametrize(
    ("binding", "problem"),
    [
        (Binding("features", "input", "float16", (-1, -1, WIDTH)), "features is float16, not float32"),
        (
            Binding("features", "input", "float32", (-1, -1, 16)),
            f"features has length 16 on axis 2, not {WIDTH}",
        ),
        (Binding("features", "input", "float32", (-1, -1, -1)), "features has length dynamic on axis 2"),
        (
            Binding("features", "input", "float32", (4, -1, WIDTH)),
            "features has the fixed length 4 on axis 0",
        ),
    ],
)
def test_wrong_binding_is_said(binding: Binding, problem: str) -> None:
    with pytest.raises(SourceError, match=problem):
        check_bindings((BINDINGS[0], binding, BINDINGS[2]), signature())


def test_coarsest_type_decides_the_tolerance() -> None:
    layers = [{"precision": ["FLOAT"]}, {"precision": ["HALF", "INT8"]}, {"precision": []}]
    assert coarsest_type(layers) == "int8"
    assert coarsest_type(layers[:1]) == "float32"
    assert TOLERANCES["float32"] < TOLERANCES["float16"] < TOLERANCES["int8"]
    assert coarsest_type([{"precision": ["BF16"]}]) == "bfloat16"


@pytest.fixture
def samples(tmp_path: Path) -> Path:
    """Two batches of different lengths."""
    generator = np.random.default_rng(1)
    (tmp_path / "batches").mkdir()
    for index, (rows, length) in enumerate([(3, 7), (2, 12)]):
        np.savez(
            tmp_path / "batches" / f"{index:03}.npz",
            input_ids=generator.integers(0, 3, (rows, length)),
            features=generator.standard_normal((rows, length, WIDTH)).astype(np.float32),
        )
    return tmp_path


def runner_of(model: onnx.ModelProto, name: str) -> Any:
    from polygraphy.backend.onnxrt import OnnxrtRunner, SessionFromOnnx

    return OnnxrtRunner(SessionFromOnnx(model.SerializeToString(), providers=["cpu"]), name=name)


def test_comparator_reports_figures_over_all_batches(samples: Path) -> None:
    """Both sides are ONNX Runtime here: what differs on a GPU is one runner."""
    first, second = runner_of(tiny_graph("fp32"), "first"), runner_of(tiny_graph("fp16"), "second")
    figures = compare(first, second, load_batches(samples), task="embedding", tolerance=1e-2)
    assert (figures["batches"], figures["tolerance"]) == (2, 1e-2)
    assert 0 < figures["relative_error"] < 1e-2
    assert figures["mean_cosine"] > 0.999


def test_engine_that_computes_something_else_does_not_pass(samples: Path) -> None:
    other = tiny_graph("fp32")
    weight = other.graph.initializer[0]
    changed = numpy_helper.to_array(weight) * 1.01
    weight.CopyFrom(numpy_helper.from_array(changed.astype(np.float32), weight.name))
    first, second = runner_of(tiny_graph("fp32"), "first"), runner_of(other, "second")
    with pytest.raises(GateError, match=r"relative error 0\.01 over 2 batches, allowed: 0\.001"):
        compare(first, second, load_batches(samples), task="embedding", tolerance=1e-3)


def test_engine_that_is_not_finite_does_not_pass(samples: Path) -> None:
    other = tiny_graph("fp32")
    weight = other.graph.initializer[0]
    weight.CopyFrom(numpy_helper.from_array(np.full((WIDTH, WIDTH), np.nan, np.float32), weight.name))
    first, second = runner_of(tiny_graph("fp32"), "first"), runner_of(other, "second")
    with pytest.raises(GateError, match="relative error nan"):
        compare(first, second, load_batches(samples), task="embedding", tolerance=1e-3)


def test_progress_of_nested_phases_only_grows() -> None:
    seen: list[float | None] = []
    progress = PhaseProgress(lambda fraction, _: seen.append(fraction))
    progress.start("build", None, 2)
    progress.start("optimize", "build", 4)
    for index in range(4):
        progress.step("optimize", index)
    progress.finish("optimize")
    progress.step("build", 0)
    progress.start("time", "build", 2)
    progress.start("side", "build", 100)
    progress.step("time", 1)
    progress.step("build", 1)
    values = [value for value in seen if value is not None]
    assert values == sorted(values)
    assert values[-1] == 1.0
    assert 0.5 in values

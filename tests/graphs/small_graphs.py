"""Small ONNX graphs with known weights, as export artifacts, and sample artifacts for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

from enginesmith.graphs.editing import save_model
from enginesmith.graphs.signature import GraphTensor, Signature

Array = npt.NDArray[Any]
Node = onnx.NodeProto

PARAMS: dict[str, Any] = {
    "scheme": "int8",
    "method": "max",
    "percentile": None,
    "smoothing": None,
    "weights": "per_channel",
    "reduce_range": False,
    "attention": False,
    "operators": ["Conv", "Gemm", "MatMul"],
    "exclude": [],
}


def node(op: str, inputs: Sequence[str], output: str, **attributes: Any) -> Node:
    """A node that is named after its output."""
    return helper.make_node(op, list(inputs), [output], name=f"{output}/{op}", **attributes)


def graph_of(
    nodes: Sequence[Node],
    constants: Mapping[str, Array],
    *,
    inputs: Mapping[str, Sequence[int | str]],
    outputs: Mapping[str, Sequence[int | str]],
    dtypes: Mapping[str, int] | None = None,
) -> onnx.ModelProto:
    """A checked model of opset 20."""

    def values(shapes: Mapping[str, Sequence[int | str]]) -> list[onnx.ValueInfoProto]:
        kinds = dtypes or {}
        return [
            helper.make_tensor_value_info(name, kinds.get(name, TensorProto.FLOAT), list(shape))
            for name, shape in shapes.items()
        ]

    stored = [numpy_helper.from_array(array, name) for name, array in constants.items()]
    graph = helper.make_graph(list(nodes), "small", values(inputs), values(outputs), stored)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    return model


def random(*shape: int, seed: int = 0, scale: float = 1.0) -> Array:
    return (scale * np.random.default_rng(seed).normal(size=shape)).astype(np.float32)


def perceptron(*, width: int = 16, norm_is_shared: bool = False) -> onnx.ModelProto:
    """A norm, two products that read it (one wide channel each), and a third after a Relu; ``y`` [batch, sequence, 4].

    ``norm_is_shared``: the norm's output is also added at the end, as in a network with post-norm residuals.
    """
    scale = np.ones(width, np.float32)
    scale[3] = 30.0
    nodes = [
        node("LayerNormalization", ["x", "gamma", "beta"], "normed", axis=-1, epsilon=1e-5),
        node("MatMul", ["normed", "w_first"], "first"),
        node("MatMul", ["normed", "w_second"], "second"),
        node("Add", ["first", "b_first"], "first_biased"),
        node("Mul", ["first_biased", "second"], "gated"),
        node("Relu", ["gated"], "active"),
        node("Add", ["active", "normed"], "residual")
        if norm_is_shared
        else node("Identity", ["active"], "residual"),
        node("MatMul", ["residual", "w_third"], "y"),
    ]
    constants = {
        "gamma": scale,
        "beta": random(width, seed=1, scale=0.1),
        "w_first": random(width, width, seed=2, scale=0.2),
        "w_second": random(width, width, seed=3, scale=0.2),
        "b_first": random(width, seed=4, scale=0.1),
        "w_third": random(width, 4, seed=5),
    }
    shape = ["batch", "sequence", width]
    return graph_of(nodes, constants, inputs={"x": shape}, outputs={"y": ["batch", "sequence", 4]})


def write_export(directory: Path, model: onnx.ModelProto, *, task: str = "tensors") -> Path:
    """``directory`` as the ``export`` step writes it, as far as later steps of quantization read it."""
    directory.mkdir(parents=True)
    save_model(model, directory)

    def tensors(values: Sequence[onnx.ValueInfoProto]) -> tuple[GraphTensor, ...]:
        return tuple(
            GraphTensor(
                value.name,
                np.dtype(helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)).name,
                tuple(dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim),
            )
            for value in values
        )

    Signature(task, tensors(model.graph.input), tensors(model.graph.output), {}).write(directory)
    return directory


def write_samples(directory: Path, batches: Sequence[Mapping[str, Array]]) -> Path:
    """``directory`` as the ``sample`` step writes it."""
    (directory / "batches").mkdir(parents=True)
    for index, batch in enumerate(batches):
        np.savez(directory / "batches" / f"{index:03d}.npz", **batch)
    return directory


def outputs_of(
    path_or_model: Path | onnx.ModelProto,
    batches: Sequence[Mapping[str, Array]],
    *,
    config: Mapping[str, str] | None = None,
) -> list[Array]:
    """The first output of each batch in ONNX Runtime; Q/DQ is computed as written unless ``config`` says otherwise.

    Its signed 8-bit kernels saturate on x86 without VNNI, which would be mistaken for an error of quantization.
    """
    options = ort.SessionOptions()
    options.log_severity_level = 3
    for key, value in ({"session.disable_quant_qdq": "1"} if config is None else config).items():
        options.add_session_config_entry(key, value)
    is_model = isinstance(path_or_model, onnx.ModelProto)
    source = path_or_model.SerializeToString() if is_model else str(path_or_model / "model.onnx")
    session = ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    return [session.run(None, dict(batch))[0] for batch in batches]


def operators(model: onnx.ModelProto) -> list[str]:
    return [entry.op_type for entry in model.graph.node]


def constants_of(model: onnx.ModelProto) -> dict[str, Array]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}

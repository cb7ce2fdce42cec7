"""Tiny graphs in every precision, and the ``compile_tensorrt`` step in a worker process, as a build runs it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import ml_dtypes
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from enginesmith.engines.tensorrt.library import LIBRARIES
from enginesmith.graphs.signature import AxisRange, GraphTensor, Signature
from enginesmith.runner import Runner, StepRequest
from enginesmith.steps import STEP_KINDS

Precision = Literal["fp32", "fp16", "bf16", "int8", "fp8"]
WIDTH = 32
SEQUENCE = AxisRange(1, 16, 64)
_FLOATS = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}
_CODES = {"int8": TensorProto.INT8, "fp8": TensorProto.FLOAT8E4M3FN}


def signature(*, task: str = "embedding", width: int = WIDTH) -> Signature:
    """Of ``tiny_graph``: ids and a mask in, vectors out."""
    return Signature(
        task=task,
        inputs=(
            GraphTensor("input_ids", "int64", ("batch", "sequence")),
            GraphTensor("features", "float32", ("batch", "sequence", WIDTH)),
        ),
        outputs=(GraphTensor("vectors", "float32", ("batch", "sequence", width)),),
        axes={"sequence": SEQUENCE},
    )


def tiny_graph(precision: Precision, *, extra: tuple[onnx.NodeProto, ...] = ()) -> onnx.ModelProto:
    """vectors = relu((features + ids) @ w), typed or with Q/DQ; ``extra`` nodes lead from ``relu`` to ``tail``."""
    inner = _FLOATS.get(precision, TensorProto.FLOAT)
    weights = np.random.default_rng(0).standard_normal((WIDTH, WIDTH)) * 0.1
    constants = [_constant("encoder.layer.0.dense.weight", weights, inner)]
    nodes = [
        helper.make_node("Cast", ["input_ids"], ["ids"], name="embeddings/Cast", to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["ids", "last"], ["column"], name="embeddings/Unsqueeze"),
        helper.make_node("Add", ["features", "column"], ["sum"], name="embeddings/Add"),
        helper.make_node("Cast", ["sum"], ["typed"], name="encoder/Cast", to=inner),
    ]
    left, right = "typed", "encoder.layer.0.dense.weight"
    if precision in _CODES:
        quantized, more = _quantized({left: None, right: 1}, _CODES[precision])
        nodes, constants = nodes + quantized, constants + more
        left, right = f"{left}.dq", f"{right}.dq"
    constants.append(numpy_helper.from_array(np.array([-1]), "last"))
    nodes += [
        helper.make_node("MatMul", [left, right], ["product"], name="encoder.layer.0.dense/MatMul"),
        helper.make_node("Relu", ["product"], ["relu"], name="encoder.layer.0.act/Relu"),
        *extra,
        helper.make_node(
            "Cast",
            ["tail" if extra else "relu"],
            ["vectors"],
            name="pooler/Cast",
            to=TensorProto.FLOAT,
        ),
    ]
    graph = helper.make_graph(
        nodes,
        "tiny",
        [
            helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "sequence"]),
            helper.make_tensor_value_info("features", TensorProto.FLOAT, ["batch", "sequence", WIDTH]),
        ],
        [helper.make_tensor_value_info("vectors", TensorProto.FLOAT, ["batch", "sequence", WIDTH])],
        constants,
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def _constant(name: str, values: np.ndarray[Any, Any], dtype: int) -> onnx.TensorProto:
    types = {
        TensorProto.FLOAT: np.float32,
        TensorProto.FLOAT16: np.float16,
        TensorProto.BFLOAT16: ml_dtypes.bfloat16,
        TensorProto.INT8: np.int8,
        TensorProto.FLOAT8E4M3FN: ml_dtypes.float8_e4m3fn,
    }
    stored = np.asarray(values, types[dtype])
    return helper.make_tensor(name, dtype, stored.shape, stored.tobytes(), raw=True)


def _quantized(
    axes: Mapping[str, int | None], codes: int
) -> tuple[list[onnx.NodeProto], list[onnx.TensorProto]]:
    """Q/DQ of tensors, per tensor or along an axis."""
    nodes, constants = [], []
    for name, axis in axes.items():
        shape = () if axis is None else (WIDTH,)
        constants.append(_constant(f"{name}.scale", np.full(shape, 0.01), TensorProto.FLOAT))
        constants.append(_constant(f"{name}.zero", np.zeros(shape), codes))
        scales = [f"{name}.scale", f"{name}.zero"]
        options = {} if axis is None else {"axis": axis}
        nodes += [
            helper.make_node(
                "QuantizeLinear", [name, *scales], [f"{name}.q"], name=f"{name}/QuantizeLinear", **options
            ),
            helper.make_node(
                "DequantizeLinear",
                [f"{name}.q", *scales],
                [f"{name}.dq"],
                name=f"{name}/DequantizeLinear",
                **options,
            ),
        ]
    return nodes, constants


@dataclass(frozen=True)
class Compiled:
    """What the step left."""

    out: Path
    facts: Mapping[str, Any]
    log: str
    progress: tuple[tuple[float | None, str], ...]

    @property
    def engine(self) -> dict[str, Any]:
        document: dict[str, Any] = json.loads((self.out / "engine.json").read_text())
        return document


def params(**changes: Any) -> dict[str, Any]:
    """Parameters of the step, as ``graph_params.tensorrt_params`` makes them."""
    return {
        "runtime": "tensorrt_rtx",
        "version": LIBRARIES["tensorrt_rtx"].installed_version(),
        "compute_capabilities": [86, 89, 120],
        "optimization_level": None,
        "workspace_bytes": None,
        "opt_batch_size": None,
        "opt_sequence_length": None,
        "max_batch_size": 8,
        "max_sequence_length": 48,
        **changes,
    }


def compile_graph(
    directory: Path, model: onnx.ModelProto | bytes, wanted: Signature | None = None, **changes: Any
) -> Compiled:
    """Run the step on ``model`` in a worker.

    Raises:
        EnginesmithError: what the step raised.
    """
    parts = {name: directory / name for name in ("graph", "signature", "samples", "out", "scratch")}
    for part in parts.values():
        part.mkdir(parents=True)
    content = model if isinstance(model, bytes) else model.SerializeToString()
    (parts["graph"] / "model.onnx").write_bytes(content)
    (wanted or signature()).write(parts["signature"])
    location = changes.pop("timing_cache", directory / "timing.cache")
    progress: list[tuple[float | None, str]] = []
    request = StepRequest(
        title="compile_tensorrt tiny",
        function=STEP_KINDS["compile_tensorrt"].function,
        params={**params(**changes), "location": {"timing_cache": str(location)}},
        inputs={role: parts[role] for role in ("graph", "signature", "samples")},
        out=parts["out"],
        scratch=parts["scratch"],
        file=directory / "request.json",
        log=directory / "log",
        online=False,
    )
    run = Runner().run(request, lambda fraction, note: progress.append((fraction, note)))
    return Compiled(parts["out"], run.facts, request.log.read_text(), tuple(progress))

"""Tiny engines as the step ``lower_graph`` writes them, and the samples and references that they are measured on.

The graph is a text encoder of three operators: embeddings of the tokens that the mask keeps, their mean, a projection.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from enginesmith.graphs.signature import AxisRange, GraphTensor, Signature

VOCAB, HIDDEN, WIDTH = 50, 8, 6
NAN_TOKEN = 7
"""The token whose embedding is NaN in an engine with that fault."""
Fault = Literal["none", "nan", "constant", "mixes rows", "ignores the mask"]
Array = npt.NDArray[Any]


def write_engine(
    directory: Path,
    *,
    output: str = "embedding",
    width: int = WIDTH,
    noise: float = 0.0,
    fault: Fault = "none",
    task: str = "embedding",
    **engine_keys: Any,
) -> Path:
    """``directory`` with ``model.onnx``, ``signature.json`` and ``engine.json``; ``noise`` disturbs the weights."""
    directory.mkdir(parents=True)
    random = np.random.default_rng(0)
    table = random.normal(size=(VOCAB, HIDDEN)).astype(np.float32)
    weight = random.normal(size=(HIDDEN, width)).astype(np.float32)
    weight += noise * np.random.default_rng(1).normal(size=weight.shape).astype(np.float32)
    if fault == "nan":
        table[NAN_TOKEN] = np.nan
    if fault == "constant":
        table[:] = 1.0
    onnx.save(_model(table, weight, output=output, fault=fault), directory / "model.onnx")
    signature_of(output, width, task=task).write(directory)
    document = {"provider": "cpu", "session": {"session.intra_op.allow_spinning": "0"}} | engine_keys
    (directory / "engine.json").write_text(json.dumps(document))
    return directory


def signature_of(output: str = "embedding", width: int = WIDTH, *, task: str = "embedding") -> Signature:
    """The engine's signature: sequences of 1 to 16 tokens."""
    shape = ("batch", "sequence")
    return Signature(
        task,
        (GraphTensor("input_ids", "int64", shape), GraphTensor("attention_mask", "int64", shape)),
        (GraphTensor(output, "float32", ("batch", width)),),
        {"sequence": AxisRange(1, 8, 16)},
    )


def tokens(*lengths: int, seed: int = 0) -> dict[str, Array]:
    """A batch with a row of each length, padded to the longest."""
    random = np.random.default_rng(seed)
    ids = np.zeros((len(lengths), max(lengths)), np.int64)
    mask = np.zeros_like(ids)
    for row, length in enumerate(lengths):
        ids[row, :length] = random.integers(1, VOCAB, length)
        mask[row, :length] = 1
    return {"input_ids": ids, "attention_mask": mask}


def write_batches(directory: Path, batches: Sequence[Mapping[str, Array]]) -> None:
    """``000.npz``, ``001.npz``, ... in ``directory``."""
    directory.mkdir(parents=True)
    for index, batch in enumerate(batches):
        np.savez(directory / f"{index:03}.npz", **batch)  # type: ignore[arg-type]


def _model(table: Array, weight: Array, *, output: str, fault: Fault) -> onnx.ModelProto:
    masked = "constant_one" if fault == "ignores the mask" else "mask"
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["tokens"], name="embeddings/Gather"),
        helper.make_node("Cast", ["attention_mask"], ["mask_2d"], to=TensorProto.FLOAT, name="Cast"),
        helper.make_node("Unsqueeze", ["mask_2d", "last"], ["mask"], name="Unsqueeze"),
        helper.make_node("Mul", ["tokens", masked], ["kept"], name="pooling/Mul"),
        helper.make_node("ReduceSum", ["kept", "second"], ["sum"], keepdims=0, name="pooling/ReduceSum"),
        helper.make_node("ReduceSum", ["mask", "second"], ["count"], keepdims=0, name="pooling/ReduceSum_2"),
        helper.make_node("Div", ["sum", "count"], ["mean"], name="pooling/Div"),
        helper.make_node("MatMul", ["mean", "weight"], ["projected"], name="head/MatMul"),
    ]
    if fault == "mixes rows":
        nodes += [
            helper.make_node("ReduceMean", ["projected", "batch_axis"], ["centre"], keepdims=1, name="Mix"),
            helper.make_node("Sub", ["projected", "centre"], ["apart"], name="Sub"),
            helper.make_node("Add", ["apart", "projected"], [output], name="Add"),
        ]
    else:
        nodes.append(helper.make_node("Identity", ["projected"], [output], name="Identity"))
    constants = {
        "table": table,
        "weight": weight,
        "last": np.array([2]),
        "second": np.array([1]),
        "batch_axis": np.array([0]),
        "constant_one": np.ones(1, np.float32),
    }
    used = {name for node in nodes for name in node.input}
    graph = helper.make_graph(
        nodes,
        "tiny",
        [
            helper.make_tensor_value_info(name, TensorProto.INT64, ["batch", "sequence"])
            for name in ("input_ids", "attention_mask")
        ],
        [helper.make_tensor_value_info(output, TensorProto.FLOAT, ["batch", weight.shape[1]])],
        [numpy_helper.from_array(value, name) for name, value in constants.items() if name in used],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], producer_name="tests")
    model.ir_version = 10
    onnx.checker.check_model(model)
    return model

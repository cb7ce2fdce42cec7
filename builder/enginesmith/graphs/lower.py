"""The ``lower_graph`` step: a graph to the form that ONNX Runtime on a CPU executes, with its session's settings.

FP32 and FP16 stay as they are, INT8 gets integer kernels, FP8 keeps its Q/DQ, BF16 becomes float32 that rounds. Writes
``model.onnx``, ``signature.json`` and ``engine.json``.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx
import onnxruntime as ort
from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors

from enginesmith.errors import ToolchainError
from enginesmith.graphs.editing import load_model, save_model
from enginesmith.graphs.emulate import float32_that_rounds
from enginesmith.graphs.integer import with_integer_products
from enginesmith.graphs.signature import MODEL_FILE, read_signature
from enginesmith.steps import StepContext

ENGINE_FILE = "engine.json"

_SESSIONS: Mapping[str, Mapping[str, str]] = {
    # What is left as Q/DQ computes exactly what it says, and weights are dequantized once instead of in every run.
    "int8": {"session.disable_quant_qdq": "1"},
    "fp8": {"session.disable_quant_qdq": "1"},
}
_LOAD_ERRORS = (
    ort_errors.Fail,
    ort_errors.InvalidArgument,
    ort_errors.InvalidGraph,
    ort_errors.NotImplemented,
    ort_errors.RuntimeException,
)


def run(context: StepContext) -> Mapping[str, Any]:
    """Write the engine; facts: scheme, bytes, operators, integer products, whether it only emulates the scheme.

    Raises:
        ToolchainError: ONNX Runtime has no kernel for an operator; it is named.
    """
    source, scheme = context.inputs["graph"], context.params["scheme"]
    signature = read_signature(source)
    model, integer_products = lowered(load_model(source), scheme)
    written = save_model(model, context.out)
    signature.write(context.out)
    engine = {
        "provider": "cpu",
        "scheme": scheme,
        "session": dict(_SESSIONS.get(scheme, {})),
        "emulated": scheme == "bf16",
        "operators": dict(sorted(Counter(node.op_type for node in model.graph.node).items())),
        "integer_products": integer_products,
        "graph_bytes": written,
    }
    (context.out / ENGINE_FILE).write_text(json.dumps(engine, indent=2) + "\n", encoding="utf-8")
    context.progress(None, "loading it in ONNX Runtime")
    check_loads(context.out, engine["session"])
    return {
        key: engine[key] for key in ("scheme", "emulated", "operators", "integer_products", "graph_bytes")
    }


def lowered(model: onnx.ModelProto, scheme: str) -> tuple[onnx.ModelProto, int]:
    """``model`` of ``scheme`` for this runtime, and how many products run on integer kernels."""
    if scheme == "int8":
        return with_integer_products(model)
    if scheme == "bf16":
        return float32_that_rounds(model), 0
    return model, 0


def check_loads(directory: Path, session: Mapping[str, str]) -> None:
    """Return if ONNX Runtime has kernels for all of the model in ``directory``.

    Raises:
        ToolchainError: it has not.
    """
    options = ort.SessionOptions()
    options.log_severity_level = 3
    for key, value in session.items():
        options.add_session_config_entry(key, value)
    try:
        ort.InferenceSession(str(directory / MODEL_FILE), options, providers=["CPUExecutionProvider"])
    except _LOAD_ERRORS as error:
        raise ToolchainError(
            f"ONNX Runtime {ort.__version__} cannot run this graph: {error}",
            hint="the message names the node; leave it in float with exclude, or choose another scheme",
        ) from error

"""The ``quantize_graph`` step: an FP32 graph to one that says in itself in which precision it computes.

int8 and fp8 become explicit Q/DQ (``qdq``) with calibrated ranges, fp16 and bf16 a strongly typed graph (``typed``).
Writes ``model.onnx``, ``signature.json`` and ``quantization.json``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx

from enginesmith.errors import GateError, SpecError
from enginesmith.graphs.calibrate import load_batches
from enginesmith.graphs.editing import EditableGraph, load_model, save_model
from enginesmith.graphs.qdq import NodeRecord, calibrate, with_qdq
from enginesmith.graphs.quantizable import GraphRecipe, select
from enginesmith.graphs.signature import MODEL_FILE, Signature, read_signature
from enginesmith.graphs.typed import convert
from enginesmith.steps import StepContext

QUANTIZATION_FILE = "quantization.json"
SENSITIVITY_FILE = "sensitivity.json"

_OPSETS = {"int8": 13, "fp8": 19, "fp16": 13, "bf16": 13}
"""The standard operators that first had the scheme's types where it needs them."""


def run(context: StepContext) -> Mapping[str, Any]:
    """Write the quantized graph; facts: nodes quantized and not, bytes before and after.

    Raises:
        SpecError: an exclude matches nothing, or nothing is left to quantize.
        SourceError: the samples do not fit the graph, or a constant does not fit the type.
        GateError: NaN or Inf in weights or activations, or no exclusion meets the limits (exclude: auto).
        ToolchainError: ModelOpt is missing and the method needs it.
    """
    source = context.inputs["graph"]
    model, signature = load_model(source), read_signature(source)
    params = context.params
    check_opset(model, params["scheme"])
    exclude = excluded_patterns(context)
    if params["scheme"] in ("int8", "fp8"):
        recipe = GraphRecipe.from_params(params, exclude=exclude)
        made, document = _quantized(context, model, signature, recipe)
    else:
        made, document = convert(model, scheme=params["scheme"], exclude=exclude)
    return _write(context, made, signature, document, source_bytes=model.ByteSize(), exclude=exclude)


def check_opset(model: onnx.ModelProto, scheme: str) -> None:
    """Return if the graph's operators know the scheme's types.

    Raises:
        SpecError: its opset is too old.
    """
    opset = next((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), 0)
    if opset < _OPSETS[scheme]:
        raise SpecError(
            f"scheme {scheme} needs opset {_OPSETS[scheme]}; the graph has {opset}",
            hint="convert the model to a newer opset with onnx.version_converter",
        )


def excluded_patterns(context: StepContext) -> tuple[str, ...]:
    """The patterns of ``exclude``, or the set that the ``sensitivity`` step proposes.

    Raises:
        GateError: no set that it tried keeps the limits.
    """
    exclude = context.params["exclude"]
    if exclude != "auto":
        return tuple(exclude)
    document = json.loads((context.inputs["sensitivity"] / SENSITIVITY_FILE).read_text(encoding="utf-8"))
    if not document["met"]:
        raise GateError(
            f"exclude: auto found no set of nodes with which the limits hold: {document['verdict']}",
            hint="loosen verify.quality, or change method, smoothing or calibration of the variant",
        )
    return tuple(glob_of(name) for name in document["proposal"])


def glob_of(name: str) -> str:
    """The pattern that matches ``name`` and nothing else."""
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)


def _quantized(
    context: StepContext, model: onnx.ModelProto, signature: Signature, recipe: GraphRecipe
) -> tuple[onnx.ModelProto, dict[str, Any]]:
    selection = select(EditableGraph(model), recipe)
    names = [tensor.name for tensor in signature.inputs]
    calibration = calibrate(
        model,
        selection,
        recipe,
        batches=load_batches(context.inputs["calibration"], names),
        scratch=context.scratch / "calibration",
        progress=context.progress,
    )
    context.progress(None, "writing the quantized graph")
    made, records = with_qdq(model, calibration.units, recipe)
    return made, {"nodes": _nodes(model, records, calibration.reasons)}


def _nodes(
    model: onnx.ModelProto, records: Sequence[NodeRecord], reasons: Mapping[str, str]
) -> list[dict[str, Any]]:
    """The record of every node of a quantizable operator, in the order of execution."""
    found = {record.name: record for record in records}
    listed = []
    for node in model.graph.node:
        if node.name in found:
            listed.append(found[node.name].document())
        elif node.name in reasons:
            record = NodeRecord(node.name, node.op_type, quantized=False, reason=reasons[node.name])
            listed.append(record.document())
    return listed


def _write(
    context: StepContext,
    made: onnx.ModelProto,
    signature: Signature,
    document: Mapping[str, Any],
    *,
    source_bytes: int,
    exclude: Sequence[str],
) -> Mapping[str, Any]:
    nodes = document["nodes"]
    written = save_model(made, context.out)
    # By path: what is in memory may be too large for the checker.
    onnx.checker.check_model(str(Path(context.out) / MODEL_FILE))
    signature.write(context.out)
    totals = {
        "quantized_nodes": sum(node["quantized"] for node in nodes),
        "float_nodes": sum(not node["quantized"] for node in nodes),
        "graph_bytes": written,
        "source_bytes": source_bytes,
    }
    full = {"scheme": context.params["scheme"], "exclude": list(exclude), **document, "totals": totals}
    path = Path(context.out) / QUANTIZATION_FILE
    path.write_text(json.dumps(full, indent=2) + "\n", encoding="utf-8")
    return {"scheme": context.params["scheme"], **totals, "exclude": list(exclude)}

"""The ``lower`` step: a canonical or quantized checkpoint becomes an ONNX Runtime engine.

Writes ``model.onnx`` (as the spec wants it served), ``exact.onnx`` (FP32 activations, for verification), the
``weights.bin`` that both refer to, and ``engine.json``, which tells a runtime everything it must know.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from enginesmith.checkpoints.tensors import CheckpointTensors, read_json_object
from enginesmith.engines.onnxruntime.architecture import Architecture, architecture_from_config
from enginesmith.engines.onnxruntime.decoder import EXACT, FAST, DecoderWriter, Numerics
from enginesmith.engines.onnxruntime.graph import Graph, WeightsFile
from enginesmith.steps import StepContext

ENGINE_FORMAT = 1


def run(context: StepContext) -> Mapping[str, Any]:
    """Lower ``inputs["checkpoint"]``; ``params["mode"]`` is ``fast`` or ``exact``."""
    tensors = CheckpointTensors(context.inputs["checkpoint"])
    architecture = architecture_from_config(tensors.config)
    numerics = served_numerics(tensors, context.params["mode"])
    graphs = {"model.onnx": numerics, "exact.onnx": EXACT}
    with WeightsFile(context.out / "weights.bin") as weights:
        for index, (file, choice) in enumerate(graphs.items()):
            graph = Graph(file.removesuffix(".onnx"), weights)
            _write(
                graph,
                tensors,
                architecture,
                choice,
                context,
                first=index / len(graphs),
                share=1 / len(graphs),
            )
            graph.save(context.out / file)
    engine = _engine_description(tensors, architecture, numerics)
    (context.out / "engine.json").write_text(json.dumps(engine, indent=2, sort_keys=True) + "\n")
    return _facts(tensors, context.out)


def served_numerics(tensors: CheckpointTensors, mode: str) -> Numerics:
    """The numerics of the served engine. An unquantized checkpoint is never approximated by the runtime."""
    return FAST if mode == "fast" and tensors.quantization is not None else EXACT


def _write(
    graph: Graph,
    tensors: CheckpointTensors,
    architecture: Architecture,
    numerics: Numerics,
    context: StepContext,
    *,
    first: float,
    share: float,
) -> None:
    writer = DecoderWriter(graph, tensors, architecture, numerics)
    hidden = writer.write_inputs()
    delta: str | None = None
    for layer in range(architecture.layers):
        hidden, delta = writer.write_layer(layer, hidden, delta)
        context.progress(
            first + share * (layer + 1) / (architecture.layers + 1),
            f"layer {layer + 1}/{architecture.layers}",
        )
    assert delta is not None
    writer.write_head(hidden, delta)


def _engine_description(
    tensors: CheckpointTensors, architecture: Architecture, numerics: Numerics
) -> dict[str, Any]:
    quantization = tensors.quantization or {}
    return {
        "format": ENGINE_FORMAT,
        "runtime": "onnxruntime",
        "architecture": architecture.name,
        "layers": architecture.layers,
        "kv_heads": architecture.kv_heads,
        "head_dim": architecture.head_dim,
        "vocab_size": architecture.vocab_size,
        "max_positions": architecture.max_positions,
        "eos_token_ids": eos_token_ids(tensors.directory, tensors.config),
        "quant_algo": quantization.get("quant_algo"),
        "kv_cache_quant_algo": quantization.get("kv_cache_quant_algo"),
        "accuracy_level": numerics.accuracy_level,
        "int8_head": numerics.int8_head,
        # FP8 weights are dequantized once, when the graph is loaded, and not for every token.
        "session_config": {"session.disable_quant_qdq": "1"} if _has_fp8(tensors) else {},
    }


def _has_fp8(tensors: CheckpointTensors) -> bool:
    return any(tensors.dtype(name) == "F8_E4M3" for name in tensors.names())


def eos_token_ids(directory: Path, config: Mapping[str, Any]) -> list[int]:
    """Token ids that end an answer, from ``generation_config.json``, else ``config.json``."""
    path = directory / "generation_config.json"
    generation = read_json_object(path) if path.exists() else {}
    value = generation.get("eos_token_id")
    if value is None:
        value = config.get("eos_token_id")
    if value is None:
        return []
    return [int(token) for token in value] if isinstance(value, list) else [int(value)]


def _facts(tensors: CheckpointTensors, out: Path) -> dict[str, Any]:
    sizes = {path.name: path.stat().st_size for path in out.iterdir()}
    parameters = _parameters(tensors)
    return {
        "weight_bytes": sum(tensors.nbytes(name) for name in tensors.names()),
        "engine_bytes": sizes["model.onnx"] + sizes["weights.bin"],
        "parameters": parameters,
        "bf16_bytes": 2 * parameters,
        "fp32_bytes": 4 * parameters,
    }


def _parameters(tensors: CheckpointTensors) -> int:
    """Parameters of the model, counting each packed 4-bit pair as two and leaving scales out."""
    scales = ("_scale", "_scale_2")
    counted = [name for name in tensors.names() if not name.endswith(scales)]
    return sum(math.prod(tensors.shape(name)) * (2 if tensors.dtype(name) == "U8" else 1) for name in counted)

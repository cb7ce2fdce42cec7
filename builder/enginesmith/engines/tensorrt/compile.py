"""The ``compile_tensorrt`` step: a typed ONNX graph becomes a TensorRT engine, and what is in it becomes ``engine.json``.

Reads ``graph`` (model.onnx), ``signature`` and ``samples``. Flow: profiles from the signature, the network through
Polygraphy's parser, bindings against the signature, the build, the engine's own word and a comparison with ONNX Runtime
where a GPU of this machine runs it. See docs/tensorrt.md.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from enginesmith.engines.tensorrt.build import BuilderOptions, BuiltEngine, build_engine
from enginesmith.engines.tensorrt.library import LIBRARIES, device_for, load
from enginesmith.engines.tensorrt.network import ParsedNetwork, check_bindings, parse_network
from enginesmith.engines.tensorrt.profiles import ServingLimits, ShapeRange, profile_from_signature
from enginesmith.graphs.signature import MODEL_FILE, Signature, read_signature
from enginesmith.steps import StepContext

PLAN_FILE = "model.plan"
ENGINE_FILE = "engine.json"


def run(context: StepContext) -> Mapping[str, Any]:
    """Write ``model.plan`` and ``engine.json``. Facts: version, sizes, layers, seconds, what was compared.

    Raises:
        ToolchainError: this machine cannot build it, or TensorRT does not.
        SourceError: TensorRT does not take the graph, or the graph is not what the signature says.
        SpecError: the limits of serving are outside of what the graph takes.
        GateError: the engine does not compute what ONNX Runtime computes.
    """
    params = context.params
    library, capabilities = LIBRARIES[params["runtime"]], tuple(params["compute_capabilities"])
    library.require(params["version"], capabilities)
    signature = read_signature(context.inputs["signature"])
    profile = profile_from_signature(signature, ServingLimits.from_params(params))
    context.progress(None, "reading the graph")
    trt = load(library, params["version"])
    _log_messages_of_tensorrt()
    parsed = parse_network(trt, context.inputs["graph"] / MODEL_FILE)
    check_bindings(parsed.bindings, signature)
    built = build_engine(
        trt,
        library,
        parsed,
        profile=profile,
        capabilities=capabilities,
        options=BuilderOptions(params["optimization_level"], params["workspace_bytes"]),
        timing_cache=Path(params["location"]["timing_cache"]),
        on_progress=context.progress,
    )
    (context.out / PLAN_FILE).write_bytes(built.plan)
    document: dict[str, Any] = {
        "runtime": params["runtime"],
        "version": trt.__version__,
        "compute_capabilities": list(capabilities),
        **_contents(trt, context, parsed=parsed, built=built, profile=profile, signature=signature),
        "plan_bytes": (context.out / PLAN_FILE).stat().st_size,
        "timing_cache": built.timing_cache,
        "build_seconds": round(built.seconds, 3),
    }
    (context.out / ENGINE_FILE).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    kept = ("version", "plan_bytes", "build_seconds", "layers_of", "compared", "compared_reason")
    return {**{name: document[name] for name in kept}, "layers": len(document["layers"])}


def _log_messages_of_tensorrt() -> None:
    """Polygraphy shows them at this level; it writes to the step's log."""
    from polygraphy.logger import G_LOGGER

    G_LOGGER.module_severity = G_LOGGER.VERBOSE


def _contents(
    trt: Any,
    context: StepContext,
    *,
    parsed: ParsedNetwork,
    built: BuiltEngine,
    profile: Mapping[str, ShapeRange],
    signature: Signature,
) -> dict[str, Any]:
    """What the engine says where a GPU can read it, else what the network says that it was built from."""
    from enginesmith.engines.tensorrt.inspection import check_profiles, inspect_engine

    device = device_for(context.params["compute_capabilities"])
    profiles: Sequence[Mapping[str, ShapeRange]] = (profile,)
    bindings, layers, memory = parsed.bindings, parsed.layers, None
    if device is not None:
        engine = inspect_engine(trt, built.plan)
        check_bindings(engine.bindings, signature)
        bindings, profiles, layers = engine.bindings, engine.profiles, engine.layers
        memory = engine.device_memory_bytes
    check_profiles(profiles, profile)
    return {
        "read_on": device.name if device else None,
        "bindings": [asdict(binding) for binding in bindings],
        "profiles": [{name: asdict(shapes) for name, shapes in one.items()} for one in profiles],
        "layers_of": "engine" if device else "network",
        "layers": list(layers),
        "device_memory_bytes": memory,
        **_compared(context, parsed=parsed, built=built, task=signature.task, on_gpu=device is not None),
    }


def _compared(
    context: StepContext, *, parsed: ParsedNetwork, built: BuiltEngine, task: str, on_gpu: bool
) -> dict[str, Any]:
    """``compared``: the figures, or None and ``compared_reason``."""
    from enginesmith.engines.tensorrt.comparison import TOLERANCES, coarsest_type, compare, load_batches

    coarsest, batches = coarsest_type(parsed.layers), load_batches(context.inputs["samples"])
    reason = None
    if not on_gpu:
        names = ", ".join(f"SM{capability}" for capability in context.params["compute_capabilities"])
        reason = f"no GPU of {names} on the machine that built it"
    elif coarsest == "bfloat16":
        reason = "ONNX Runtime has no bfloat16 products on a CPU"
    elif not batches:
        reason = "there are no samples"
    if reason is not None:
        return {"compared": None, "compared_reason": reason}
    from polygraphy.backend.onnxrt import OnnxrtRunner, SessionFromOnnx
    from polygraphy.backend.trt import EngineFromBytes, TrtRunner

    context.progress(None, "comparing with ONNX Runtime")
    figures = compare(
        OnnxrtRunner(SessionFromOnnx(str(context.inputs["graph"] / MODEL_FILE), providers=["cpu"])),
        TrtRunner(EngineFromBytes(built.plan)),
        batches,
        task=task,
        tolerance=TOLERANCES[coarsest],
    )
    return {"compared": figures, "compared_reason": None}

"""What is inside an engine: bindings, profiles and layers, as far as this machine can tell.

An engine is read only where a GPU can run it. Uses the library that ``library.load`` chose; worker only.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from enginesmith.engines.tensorrt.network import Binding, binding_of
from enginesmith.engines.tensorrt.profiles import ShapeRange
from enginesmith.errors import SpecError, ToolchainError


@dataclass(frozen=True)
class InspectedEngine:
    """What a deserialized engine says of itself."""

    bindings: tuple[Binding, ...]
    profiles: tuple[Mapping[str, ShapeRange], ...]
    layers: tuple[dict[str, Any], ...]
    device_memory_bytes: int | None


def inspect_engine(trt: Any, plan: Any) -> InspectedEngine:
    """Read the engine in ``plan`` on this machine's GPU.

    Raises:
        ToolchainError: it cannot be read here.
    """
    from polygraphy.backend.trt import engine_from_bytes
    from polygraphy.exception import PolygraphyException

    try:
        engine = engine_from_bytes(plan)
    except PolygraphyException as error:
        raise ToolchainError(
            f"the engine that was just built cannot be read on this GPU: {error}",
            hint="see the step's log; driver and CUDA must fit the TensorRT that is installed",
        ) from error
    names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
    inputs = [name for name in names if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT]
    bindings = tuple(
        binding_of(
            trt,
            name,
            is_input=name in inputs,
            dtype=engine.get_tensor_dtype(name),
            shape=engine.get_tensor_shape(name),
        )
        for name in names
    )
    profiles = tuple(
        {name: _shape_range(engine.get_tensor_profile_shape(name, index)) for name in inputs}
        for index in range(engine.num_optimization_profiles)
    )
    document = engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON)
    memory = getattr(engine, "device_memory_size_v2", None)  # TensorRT 10.1 and newer.
    return InspectedEngine(bindings, profiles, layers_from_inspector(json.loads(document)), memory)


def _shape_range(shapes: Sequence[Sequence[int]]) -> ShapeRange:
    low, usual, high = shapes
    return ShapeRange(tuple(low), tuple(usual), tuple(high))


def layers_from_inspector(document: Mapping[str, Any]) -> tuple[dict[str, Any], ...]:
    """The layers in the engine inspector's JSON: ``name``, ``type``, ``precision`` of each output.

    TensorRT 10 writes type and layout into ``Format/Datatype``, 11 into ``DataType`` and ``Format``; a layer is only its
    name where the engine was built without details.
    """
    return tuple(
        {"name": layer, "type": None, "precision": []}
        if isinstance(layer, str)
        else {
            "name": layer["Name"],
            "type": layer.get("LayerType"),
            "precision": [_precision(tensor) for tensor in layer.get("Outputs", ())],
        }
        for layer in document.get("Layers", ())
    )


def _precision(tensor: Mapping[str, Any]) -> str:
    parts = [tensor.get("DataType"), tensor.get("Format"), tensor.get("Format/Datatype")]
    return ", ".join(str(part) for part in parts if part) or "not said"


def check_profiles(profiles: Sequence[Mapping[str, ShapeRange]], served: Mapping[str, ShapeRange]) -> None:
    """Return if one of an engine's profiles covers all shapes that are ``served``.

    Raises:
        SpecError: none does.
    """
    for profile in profiles:
        if all(profile[name].covers(shapes) for name, shapes in served.items() if name in profile):
            return
    name, shapes = next(
        (name, shapes)
        for name, shapes in served.items()
        if not any(profile[name].covers(shapes) for profile in profiles if name in profile)
    )
    ranges = "; ".join(f"{list(one[name].min)} to {list(one[name].max)}" for one in profiles if name in one)
    raise SpecError(
        f"input {name} is served in shapes {list(shapes.min)} to {list(shapes.max)}, but the engine takes {ranges or 'none'}",
        hint="lower serving.max_batch_size or max_sequence_length, or build the engine for more",
    )

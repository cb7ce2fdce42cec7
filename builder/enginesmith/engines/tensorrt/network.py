"""An ONNX graph as a TensorRT network: parsed, described, and held against the signature.

Always strongly typed: the graph alone decides what is computed in which type. Uses the library that ``library.load``
chose, so it is imported in the worker only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from enginesmith.engines.tensorrt.profiles import Shape
from enginesmith.errors import SourceError
from enginesmith.graphs.signature import GraphTensor, Signature

_DYNAMIC = -1
_PLUGIN_NOT_FOUND = "Plugin not found"


@dataclass(frozen=True)
class Binding:
    """An input or output of a network or an engine."""

    name: str
    mode: Literal["input", "output"]
    dtype: str
    """NumPy's name, as in the signature."""
    shape: Shape
    """-1: a dynamic axis."""


@dataclass(frozen=True)
class ParsedNetwork:
    """What the parser made of a graph. Keeps the objects alive that TensorRT needs together."""

    builder: Any
    network: Any
    parser: Any
    bindings: tuple[Binding, ...]
    layers: tuple[dict[str, Any], ...]
    """As they are in the graph: ``name``, ``type``, ``precision`` (of each output)."""


def parse_network(trt: Any, model: Path) -> ParsedNetwork:
    """The network of the ONNX file ``model``.

    Raises:
        SourceError: TensorRT cannot take it; names node, operator and place in the model of everything it refuses.
    """
    from polygraphy.backend.trt import network_from_onnx_path
    from polygraphy.exception import PolygraphyException

    try:
        builder, network, parser = network_from_onnx_path(str(model), strongly_typed=True)
    except PolygraphyException as error:
        raise _parser_error(trt, model) from error
    bindings = (
        *(_binding(trt, network.get_input(index), "input") for index in range(network.num_inputs)),
        *(_binding(trt, network.get_output(index), "output") for index in range(network.num_outputs)),
    )
    layers = tuple(_layer(network.get_layer(index)) for index in range(network.num_layers))
    return ParsedNetwork(builder, network, parser, bindings, layers)


def _parser_error(trt: Any, model: Path) -> SourceError:
    """What the parser has against ``model``. Polygraphy only logs it, so the file is parsed once more."""
    from polygraphy.backend.trt import create_network, get_trt_logger

    _builder, network = create_network(strongly_typed=True)
    parser = trt.OnnxParser(network, get_trt_logger())
    parser.parse_from_file(str(model))
    found = [_refusal(parser.get_error(index)) for index in range(parser.num_errors)]
    return SourceError(
        f"TensorRT {trt.__version__} cannot take the graph: " + ("; ".join(found) or "it does not say why"),
        hint="express that part of the model with other operators, or build it for runtime onnxruntime; all that the parser "
        "says is in the step's log",
    )


def _refusal(error: Any) -> str:
    name, operator, text = error.node_name(), error.node_operator(), error.desc()
    if not operator:
        return str(text)
    if error.code().name == "UNSUPPORTED_NODE":
        reason = "the operator is not supported"
    elif _PLUGIN_NOT_FOUND in text:
        reason = "the operator is neither a standard one that it knows nor a plugin"
    else:
        reason = f"{error.code().name}: {text}"
    return f"{operator} at node {name or '(without a name)'}{_place(name)}: {reason}"


def _place(node: str) -> str:
    """Nodes are named ``<module path>/<operator>``."""
    module, _, _ = node.rpartition("/")
    return f" (module {module} of the model)" if module else ""


def binding_of(trt: Any, name: str, *, is_input: bool, dtype: Any, shape: Sequence[int]) -> Binding:
    """A binding in the signature's words."""
    return Binding(name, "input" if is_input else "output", dtype_name(trt, dtype), tuple(shape))


def dtype_name(trt: Any, dtype: Any) -> str:
    """NumPy's name of a TensorRT type; for those that NumPy lacks, ml_dtypes' (bfloat16, float8_e4m3fn, int4)."""
    names = {
        trt.DataType.FLOAT: "float32",
        trt.DataType.HALF: "float16",
        trt.DataType.BF16: "bfloat16",
        trt.DataType.FP8: "float8_e4m3fn",
        trt.DataType.INT64: "int64",
        trt.DataType.INT32: "int32",
        trt.DataType.INT8: "int8",
        trt.DataType.UINT8: "uint8",
        trt.DataType.INT4: "int4",
        trt.DataType.BOOL: "bool",
    }
    return names.get(dtype) or str(dtype.name).lower()


def _binding(trt: Any, tensor: Any, mode: Literal["input", "output"]) -> Binding:
    return binding_of(trt, tensor.name, is_input=mode == "input", dtype=tensor.dtype, shape=tensor.shape)


def _layer(layer: Any) -> dict[str, Any]:
    outputs = (layer.get_output(index) for index in range(layer.num_outputs))
    precision = [tensor.dtype.name for tensor in outputs if tensor is not None]
    return {"name": layer.name, "type": layer.type.name, "precision": precision}


def check_bindings(bindings: Sequence[Binding], signature: Signature) -> None:
    """Return if ``bindings`` are the inputs and outputs of ``signature``.

    Raises:
        SourceError: a name, a dtype, a length or a dynamic axis differs; says all that does.
    """
    problems = [
        *_differences("input", bindings, signature.inputs),
        *_differences("output", bindings, signature.outputs),
    ]
    if problems:
        raise SourceError(
            f"the graph is not what {signature.task} promises to its clients: {'; '.join(problems)}",
            hint="an axis that must vary has to stay dynamic in the export; names and dtypes are those of signature.json",
        )


def _differences(
    mode: Literal["input", "output"], bindings: Sequence[Binding], wanted: Sequence[GraphTensor]
) -> list[str]:
    seen = {binding.name: binding for binding in bindings if binding.mode == mode}
    missing = [tensor.name for tensor in wanted if tensor.name not in seen]
    extra = [name for name in seen if name not in {tensor.name for tensor in wanted}]
    problems = [f"{mode} {name} is missing" for name in missing]
    problems += [f"{mode} {name} is not in the signature" for name in extra]
    for tensor in wanted:
        if tensor.name in seen and (problem := _difference(mode, seen[tensor.name], tensor)):
            problems.append(f"{mode} {tensor.name} {problem}")
    return problems


def _difference(mode: str, binding: Binding, tensor: GraphTensor) -> str | None:
    if binding.dtype != tensor.dtype:
        return f"is {binding.dtype}, not {tensor.dtype}"
    if len(binding.shape) != len(tensor.shape):
        return f"has {len(binding.shape)} axes, not {len(tensor.shape)}"
    for axis, (seen, wanted) in enumerate(zip(binding.shape, tensor.shape, strict=True)):
        if isinstance(wanted, str) and seen != _DYNAMIC:
            return f"has the fixed length {seen} on axis {axis}, which is dynamic ({wanted})"
        # TensorRT need not find out an output's length before it runs.
        unknown = seen == _DYNAMIC and mode == "output"
        if isinstance(wanted, int) and seen != wanted and not unknown:
            return f"has length {'dynamic' if seen == _DYNAMIC else seen} on axis {axis}, not {wanted}"
    return None

"""An ONNX graph traced from a PyTorch module, with failures told in the words of the user's model.

``torch.export`` traces, ``torch.onnx`` translates. The two steps are separate here, because what fails in the first
is the model's own code (an axis that it fixes, a branch on values), in the second an operator.
"""

from __future__ import annotations

import logging
import re
import traceback
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from enginesmith.errors import SourceError
from enginesmith.graphs.naming import WRAPPED, name_nodes, name_weights, rename_values, strip_metadata
from enginesmith.graphs.original import Arrays, Original
from enginesmith.graphs.signature import GraphTensor

OPSET = 20
_EXAMPLE_BATCH = 3
_LARGEST_BATCH = 4096
_SPECIALIZED = re.compile(r"marked (\w+) as dynamic but your code specialized it to be a constant \((\d+)\)")
_NOT_ALL = re.compile(r"[Nn]ot all values of (\w+) = .* satisfy the generated guard (.*)")
_FAILED_NODE = re.compile(r"translating node %(\w+)")
_FAILED_OPERATOR = re.compile(r"No ONNX function found for <OpOverload\(op='([^']+)', overload='([^']+)'\)>")


def graph_of_original(original: Original, feeds: Arrays) -> Any:
    """The ``ModelProto`` of ``original``, named as the signature says. ``feeds``: any inputs of it, at least 2 long.

    Raises:
        SourceError: an axis is fixed by the code, the code branches on values, or an operator has no ONNX form.
    """
    module = original.exportable()
    example = tuple(torch.from_numpy(feeds[tensor.name]) for tensor in original.inputs)
    with _quiet(), torch.no_grad():
        program = _traced(module, example, original)
        model = _translated(program, original)
    graph = model.graph
    _restore_axes(graph, original.inputs)
    rename_values(graph, _outer_names(graph, original))
    name_nodes(graph)
    name_weights(graph)
    strip_metadata(graph)
    model.producer_name, model.producer_version = "enginesmith", ""
    return model


def example_lengths(original: Original) -> dict[str, int]:
    """Lengths to trace with: at least 2, because PyTorch takes 0 and 1 for constants."""
    lengths = {name: max(2, axis.opt) for name, axis in original.axes.items() if axis.min < axis.max}
    return {"batch": _EXAMPLE_BATCH} | lengths


def _traced(module: Any, example: tuple[Any, ...], original: Original) -> Any:
    try:
        return torch.export.export(module, example, dynamic_shapes=(_dynamic_shapes(original),), strict=False)
    except Exception as error:  # The user's code and PyTorch's tracer raise whatever they like.
        raise _trace_failure(error, original) from error


def _dynamic_shapes(original: Original) -> tuple[dict[int, Any], ...]:
    dims = {"batch": torch.export.Dim("batch", min=1, max=_LARGEST_BATCH)}
    for name, axis in original.axes.items():
        if axis.min < axis.max:
            dims[name] = torch.export.Dim(name, min=axis.min, max=axis.max)
    return tuple(
        {index: dims[size] for index, size in enumerate(tensor.shape) if size in dims}
        for tensor in original.inputs
    )


def _trace_failure(error: Exception, original: Original) -> SourceError:
    text = str(error)
    if match := _SPECIALIZED.search(text):
        axis, length = match.groups()
        return SourceError(
            f"{inputs_with(original.inputs, axis)}: axis {axis!r} was fixed to {length} by {original.what}",
            hint=f"give the axis as {length} in the spec, or write the model so that its length is not a constant "
            "(x.shape instead of a number, no loop over it)",
        )
    if match := _NOT_ALL.search(text):
        axis, guard = match.groups()
        return SourceError(
            f"{inputs_with(original.inputs, axis)}: {original.what} does not take every length of axis {axis!r}: {guard}",
            hint="narrow axes in the spec to the lengths that the model takes",
        )
    where = _frame_of(error) or _first_lines(text)
    return SourceError(
        f"{original.what} cannot be traced into a graph: {_first_lines(text, count=1)}"
        + (f"\n  at {where}" if where else ""),
        hint="the graph is one for all inputs: no branch, loop or shape may depend on values",
    )


def _translated(program: Any, original: Original) -> Any:
    try:
        return torch.onnx.export(
            program, (), dynamo=True, opset_version=OPSET, optimize=True, verbose=False
        ).model_proto
    except torch.onnx.OnnxExporterError as error:
        raise _translation_failure(error, original) from error


def _translation_failure(error: BaseException, original: Original) -> SourceError:
    text = "\n".join(str(cause) for cause in _causes(error))
    operator, node = _FAILED_OPERATOR.search(text), _FAILED_NODE.search(text)
    if operator is None:
        return SourceError(f"{original.what} cannot be translated to ONNX: {_first_lines(text, count=3)}")
    name = f"{operator[1]}.{operator[2]}"
    place = _place_of(error, node[1] if node else "")
    return SourceError(
        f"operator {name} of {original.what} has no form in standard ONNX (opset {OPSET}); it comes from {place}",
        hint="write that part of the model with other operators",
    )


def _place_of(error: BaseException, node_name: str) -> str:
    """Module path and source line of the traced operation that could not be translated."""
    node = _node_in_flight(error, node_name)
    if node is None:
        return "an unknown place"
    stack = node.meta.get("nn_module_stack") or {}
    paths = [path for path, _ in stack.values()]
    kinds = [getattr(kind, "__name__", str(kind).rpartition(".")[2]) for _, kind in stack.values()]
    path = (paths[-1] if paths else "").removeprefix(WRAPPED).removeprefix(".")
    module = f"module {path!r} ({kinds[-1]})" if path and kinds else "the model's own forward"
    return f"{module}, {_source_line(node.meta.get('stack_trace') or '')}".removesuffix(", ")


def _node_in_flight(error: BaseException, name: str) -> Any:
    """The node that the exporter was translating when it raised: it tells its name, but nothing of its origin.

    The node is of a graph that the exporter has decomposed for itself, so only its own frames still have it.
    """
    for cause in _causes(error):
        for frame, _ in traceback.walk_tb(cause.__traceback__):
            for value in frame.f_locals.values():
                if isinstance(value, torch.fx.Node) and value.name == name:
                    return value
    return None


def _source_line(trace: str) -> str:
    """``file.py:12: code`` of the innermost frame of a textual stack trace."""
    frames = re.findall(r'File "([^"]+)", line (\d+), in \w+\n\s*(.*)', trace)
    if not frames:
        return ""
    path, line, code = frames[-1]
    return f"{path.rpartition('/')[2]}:{line}: {code.strip()}"


def _frame_of(error: BaseException) -> str:
    return next((line for cause in _causes(error) if (line := _source_line(str(cause)))), "")


def _restore_axes(graph: Any, inputs: tuple[GraphTensor, ...]) -> None:
    """Call the dynamic axes as the signature does, where the exporter calls them ``s21`` and ``2*s21``."""
    names: dict[str, str] = {}
    for value, tensor in zip(graph.input, inputs, strict=True):
        for dim, size in zip(value.type.tensor_type.shape.dim, tensor.shape, strict=True):
            if dim.dim_param and isinstance(size, str):
                names[dim.dim_param] = size
    for value in (*graph.input, *graph.output, *graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param:
                dim.dim_param = re.sub(
                    r"[A-Za-z_]\w*", lambda match: names.get(match[0], match[0]), dim.dim_param
                )


def _outer_names(graph: Any, original: Original) -> Mapping[str, str]:
    names = {value.name: tensor.name for value, tensor in zip(graph.input, original.inputs, strict=True)}
    outputs = {value.name: name for value, name in zip(graph.output, original.outputs, strict=True)}
    return names | outputs


def inputs_with(inputs: tuple[GraphTensor, ...], axis: str) -> str:
    """The inputs that have ``axis``, for a message."""
    names = [tensor.name for tensor in inputs if axis in tensor.shape]
    return f"input{'s' if len(names) > 1 else ''} {', '.join(names)}"


def _first_lines(text: str, *, count: int = 2) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return " ".join(lines[:count])


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter warns of its own deprecations and logs which optional parts it lacks; neither is the user's."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.fx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            for category in (FutureWarning, DeprecationWarning, UserWarning):
                warnings.filterwarnings("ignore", category=category, module=r"(torch|copyreg|onnx)")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)

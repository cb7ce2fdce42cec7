"""A ready ONNX file as a graph to build from: checked, brought to our opset, its axes named.

The file itself, in ONNX Runtime as it is written, is the original that everything later is compared with.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import onnx
import onnx.helper
import onnx.inliner
import onnx.version_converter

from enginesmith.errors import SourceError, SpecError
from enginesmith.graph_spec import TensorDtype
from enginesmith.graphs.compare import UnoptimizedGraph
from enginesmith.graphs.naming import every_node, fill_missing_names
from enginesmith.graphs.original import Original, axes_of
from enginesmith.graphs.signature import GraphTensor

LEAST_OPSET = 20
"""The oldest opset in which everything that later steps write is standard."""
_STANDARD = ("", "ai.onnx")
_QUANTIZED = ("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "MatMulInteger", "QLinearMatMul")


def original_of_file(path: Path, params: Mapping[str, Any]) -> Original:
    """The graph at ``path`` with the axes, and where given the inputs, of the spec.

    Raises:
        SourceError: the file is damaged, not float32, uses operators outside the standard, or cannot be raised to
            our opset; or an axis that should be dynamic is fixed in it.
        SpecError: the spec's inputs, outputs or axes are not those of the file.
    """
    model = load_file(path, data_files=params.get("onnx_data"))
    facts = {
        "source_opset": _opset(model),
        "producer": f"{model.producer_name} {model.producer_version}".strip(),
    }
    _refuse_reduced(model, path)
    inputs = _inputs(model, params["inputs"], params["axes"], path)
    outputs = tuple(value.name for value in model.graph.output)
    if params["outputs"] and set(params["outputs"]) != set(outputs):
        raise SpecError(
            f"outputs names {', '.join(params['outputs'])}; {path.name} has {', '.join(outputs)}",
            hint="leave outputs out: an ONNX file names its own",
        )
    model = _raised(model, path)
    _name_axes(model.graph, inputs)
    fill_missing_names(model.graph)
    return Original(
        inputs=inputs,
        outputs=outputs,
        axes=axes_of(params["axes"]),
        run=UnoptimizedGraph(path).run,
        exportable=lambda: model,
        what=path.name,
        facts=facts,
        is_graph=True,
    )


def inputs_of_file(path: Path, axes: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The inputs of the ONNX file at ``path`` as a spec would list them, for making samples.

    Raises:
        SourceError, SpecError: as ``original_of_file``.
    """
    inputs = _inputs(load_file(path, weights=False), (), axes, path)
    return [
        {"name": tensor.name, "dtype": tensor.dtype, "shape": list(tensor.shape), "low": 0.0, "high": 1.0}
        for tensor in inputs
    ]


def load_file(path: Path, *, weights: bool = True, data_files: Collection[str] | None = None) -> Any:
    """The ``ModelProto`` at ``path``: standard operators only, its own functions inlined.

    ``data_files`` are the names of the files beside it that were taken into account when the build was planned.

    Raises:
        SourceError: the file, or one that it keeps its weights in, is missing or damaged, or an operator is foreign.
    """
    try:
        model = onnx.load(path, load_external_data=False)
        if data_files is not None:
            _refuse_unplanned_data(model, path, data_files)
        if weights:
            onnx.load_external_data_for_model(model, str(path.parent))
    except (OSError, ValueError, onnx.checker.ValidationError) as error:
        raise _unreadable(path, error) from error
    except Exception as error:
        # protobuf's DecodeError has no public name that both of its implementations share.
        if type(error).__name__ != "DecodeError":
            raise
        raise _unreadable(path, error) from error
    if not model.graph.output:
        raise SourceError(
            f"{path} holds no graph with outputs", hint="give a file that a model was exported to"
        )
    if model.functions:
        model = onnx.inliner.inline_local_functions(model)
    _refuse_foreign_operators(model.graph, path)
    _call_the_standard_domain_by_one_name(model)
    return model


def _unreadable(path: Path, error: Exception) -> SourceError:
    return SourceError(
        f"{path} is not an ONNX file that can be read: {error}",
        hint="weights that it keeps in other files belong beside it; export it again if it is damaged",
    )


def _refuse_unplanned_data(model: Any, path: Path, data_files: Collection[str]) -> None:
    for tensor in _stored_tensors(model.graph):
        for entry in tensor.external_data:
            if entry.key == "location" and entry.value not in data_files:
                raise SourceError(
                    f"{path.name} keeps {tensor.name} in {entry.value!r}, which is missing beside it or has a name that does "
                    f"not begin with {path.name!r}",
                    hint=f"call the file {path.name}.data: onnx.save_model(..., save_as_external_data=True, "
                    f"location='{path.name}.data'); a change of it is seen only so",
                )


def _stored_tensors(graph: Any) -> Iterator[Any]:
    """Every constant of the graph, also those of its ``Constant`` nodes and of the graphs inside of it."""
    yield from graph.initializer
    for node in graph.node:
        for entry in node.attribute:
            yield from (*([entry.t] if entry.HasField("t") else []), *entry.tensors)
            for inner in (*([entry.g] if entry.HasField("g") else []), *entry.graphs):
                yield from _stored_tensors(inner)


def _refuse_foreign_operators(graph: Any, path: Path) -> None:
    for node in every_node(graph):
        if node.domain not in _STANDARD:
            raise SourceError(
                f"{path.name} uses operator {node.op_type} of domain {node.domain!r} (node {node.name or node.output[0]!r}); "
                "allowed: the standard operators of ONNX, which every runtime has",
                hint="export the graph without fusing it for one runtime",
            )


def _call_the_standard_domain_by_one_name(model: Any) -> None:
    """The standard operators' domain is written "" or "ai.onnx"; everything later looks for ""."""
    version = _opset(model)
    others = [entry for entry in model.opset_import if entry.domain not in _STANDARD]
    imports = [onnx.helper.make_opsetid("", version)]
    imports += [onnx.helper.make_opsetid(entry.domain, entry.version) for entry in others]
    del model.opset_import[:]
    model.opset_import.extend(imports)
    for node in every_node(model.graph):
        node.domain = ""


def _refuse_reduced(model: Any, path: Path) -> None:
    """Variants are made from float32; a graph that was reduced before has nothing left to compare with."""
    reduced = (onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16)
    for tensor in model.graph.initializer:
        if tensor.data_type in reduced:
            kind = onnx.TensorProto.DataType.Name(tensor.data_type).lower()
            raise SourceError(
                f"{path.name}: weight {tensor.name} is {kind}; graphs are built from float32",
                hint="give the float32 graph; the scheme of a variant decides what it is built in",
            )
    for node in every_node(model.graph):
        if node.op_type in _QUANTIZED:
            raise SourceError(
                f"{path.name} is quantized already (node {node.name or node.output[0]!r} is {node.op_type})",
                hint="give the float32 graph; the scheme of a variant decides how it is quantized",
            )


def _inputs(
    model: Any, declared: Sequence[Mapping[str, Any]], axes: Mapping[str, Any], path: Path
) -> tuple[GraphTensor, ...]:
    weights = {tensor.name for tensor in model.graph.initializer}
    values = [value for value in model.graph.input if value.name not in weights]
    tensors = [_tensor(value, path) for value in values]
    batch_names = {str(tensor.shape[0]) for tensor in tensors}
    tensors = [_with_batch(tensor, batch_names, path) for tensor in tensors]
    if declared:
        tensors = _as_declared(tensors, declared, path)
    named = {size for tensor in tensors for size in tensor.shape[1:] if isinstance(size, str)} - {"batch"}
    if missing := sorted(named - set(axes)):
        raise SpecError(
            f"axes: {path.name} has a dynamic axis {missing[0]!r} (input {_with_axis(tensors, missing[0])}), whose lengths are "
            "missing",
            hint=f"axes: {{{', '.join(f'{name}: {{min: ..., max: ...}}' for name in missing)}}}",
        )
    if unused := sorted(set(axes) - named):
        raise SpecError(
            f"axes: no input of {path.name} has a dynamic axis {unused[0]!r}; it has {', '.join(sorted(named)) or 'none'}"
        )
    return tuple(tensors)


def _tensor(value: Any, path: Path) -> GraphTensor:
    if not value.type.HasField("tensor_type"):
        raise SourceError(
            f"input {value.name} of {path.name} is a {value.type.WhichOneof('value')}, not a tensor"
        )
    element = value.type.tensor_type
    name = onnx.TensorProto.DataType.Name(element.elem_type).lower()
    dtype = {"float": "float32", "double": "float64"}.get(name, name)
    if dtype not in get_args(TensorDtype):
        raise SourceError(
            f"input {value.name} of {path.name} is {dtype}; allowed: {', '.join(get_args(TensorDtype))}"
        )
    if not element.HasField("shape") or not element.shape.dim:
        raise SourceError(
            f"input {value.name} of {path.name} has no batch axis: it is a scalar, or its shape is not stored",
            hint="export the graph with [batch, ...] inputs",
        )
    sizes = [
        int(dim.dim_value) if dim.HasField("dim_value") else dim.dim_param or f"{value.name}_{index}"
        for index, dim in enumerate(element.shape.dim)
    ]
    return GraphTensor(value.name, dtype, tuple(sizes))


def _with_batch(tensor: GraphTensor, batch_names: Collection[str], path: Path) -> GraphTensor:
    """The first axis is the batch, whatever the file calls it."""
    if isinstance(tensor.shape[0], int):
        raise SourceError(
            f"input {tensor.name} of {path.name}: axis 'batch' was fixed to {tensor.shape[0]} by the graph",
            hint="export the graph with a dynamic first axis; Triton batches requests along it",
        )
    return GraphTensor(
        tensor.name,
        tensor.dtype,
        ("batch", *("batch" if size in batch_names else size for size in tensor.shape[1:])),
    )


def _as_declared(
    tensors: Sequence[GraphTensor], declared: Sequence[Mapping[str, Any]], path: Path
) -> list[GraphTensor]:
    """The file's inputs with the axes that the spec gives them."""
    by_name = {entry["name"]: entry for entry in declared}
    if set(by_name) != {tensor.name for tensor in tensors}:
        raise SpecError(
            f"inputs names {', '.join(by_name)}; {path.name} has {', '.join(tensor.name for tensor in tensors)}",
            hint="leave inputs out, or list all of the file's",
        )
    result = []
    for tensor in tensors:
        entry = by_name[tensor.name]
        shape = tuple(entry["shape"])
        if entry["dtype"] != tensor.dtype or len(shape) != len(tensor.shape):
            raise SpecError(
                f"input {tensor.name} is {entry['dtype']} {list(shape)} in the spec, {tensor.dtype} {list(tensor.shape)} in "
                f"{path.name}"
            )
        for index, (wanted, stored) in enumerate(zip(shape, tensor.shape, strict=True)):
            if isinstance(stored, int) and wanted != stored:
                axis = (
                    f"axis {wanted!r}" if isinstance(wanted, str) else f"axis {index} ({wanted} in the spec)"
                )
                raise SourceError(
                    f"input {tensor.name}: {axis} was fixed to {stored} by the graph",
                    hint=f"write {stored} in the spec, or export the graph with that axis dynamic",
                )
        result.append(GraphTensor(tensor.name, tensor.dtype, shape))
    return result


def _with_axis(tensors: Sequence[GraphTensor], axis: str) -> str:
    return next(tensor.name for tensor in tensors if axis in tensor.shape)


def _raised(model: Any, path: Path) -> Any:
    """The same graph in at least ``LEAST_OPSET``."""
    weights = {tensor.name for tensor in model.graph.initializer}
    kept = [value for value in model.graph.input if value.name not in weights]
    del model.graph.input[:]  # Until IR version 4, weights were listed as inputs with defaults.
    model.graph.input.extend(kept)
    opset = _opset(model)
    if opset >= LEAST_OPSET:
        return model
    try:
        return onnx.version_converter.convert_version(model, LEAST_OPSET)
    except (RuntimeError, ValueError, onnx.checker.ValidationError) as error:
        raise SourceError(
            f"{path.name} is of opset {opset}, and onnx cannot raise it to {LEAST_OPSET}: {str(error).strip().splitlines()[0]}",
            hint=f"export it again with opset {LEAST_OPSET} or later",
        ) from error


def _opset(model: Any) -> int:
    versions = [entry.version for entry in model.opset_import if entry.domain in _STANDARD]
    return int(versions[0]) if versions else 1


def _name_axes(graph: Any, inputs: Sequence[GraphTensor]) -> None:
    """Write the axes' names into the graph; what was inferred with the old ones is forgotten."""
    shapes = {tensor.name: tensor.shape for tensor in inputs}
    renamed: dict[str, int | str] = {}
    for value in graph.input:
        for dim, size in zip(value.type.tensor_type.shape.dim, shapes[value.name], strict=True):
            if dim.dim_param:
                renamed[dim.dim_param] = size
            _set(dim, size)
    for value in graph.output:
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param in renamed:
                _set(dim, renamed[dim.dim_param])
    del graph.value_info[:]


def _set(dim: Any, size: int | str) -> None:
    if isinstance(size, int):
        dim.dim_value = size
    else:
        dim.dim_param = size

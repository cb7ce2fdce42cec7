"""Names that people can use: nodes by the module that they come from, weights by the layer that they belong to.

``torch.onnx`` numbers its nodes (``node_MatMul_85``) and the weights that it transposes (``val_86``). Patterns of
``exclude`` and reports of sensitivity need names that mean something and survive another version of the exporter:
``encoder.layer.0.attention.self.query/MatMul`` reads ``encoder.layer.0.attention.self.query.weight``.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from typing import Any

NAME_SCOPES = "pkg.torch.onnx.name_scopes"
"""The exporter's metadata of a node: a list literal, from the root module ('') to the traced operation."""
WRAPPED = "model"
"""The attribute under which the export's own wrapper holds the user's model; names do not show it."""

_NO_MODULE = "_empty_nn_module_stack"
"""What torch writes for operations on the inputs' shapes, which belong to no module."""
_WEIGHTED = ("MatMul", "Gemm", "Conv", "ConvTranspose", "Gather")


def module_path(node: Any) -> str:
    """The module of the original model that an exported node comes from: dotted, '' for the root or where unknown."""
    scopes = _list_of(node, NAME_SCOPES)
    if len(scopes) < 2 or scopes[-2].startswith(_NO_MODULE):
        return ""
    return scopes[-2].removeprefix(WRAPPED).removeprefix(".")


def name_nodes(graph: Any) -> None:
    """Name every node of an exported ``GraphProto`` ``<module path>/<OpType>``, unique by a suffix ``_2``, ``_3``, ..."""
    taken: set[str] = set()
    for node in graph.node:
        node.name = _unique(f"{module_path(node)}/{node.op_type}".lstrip("/"), taken)


def fill_missing_names(graph: Any) -> None:
    """Name the nodes of a ``GraphProto`` that have no name by their operator, unique by a suffix."""
    taken = {node.name for node in graph.node}
    for node in graph.node:
        node.name = node.name or _unique(node.op_type, taken)


def name_weights(graph: Any) -> None:
    """Name constants that the exporter numbered after the layer that reads them; other names lose the wrapper's part.

    A linear layer's ``weight`` is what its ``MatMul`` reads: [in, out], where PyTorch keeps [out, in].
    """
    taken = {tensor.name for tensor in (*graph.input, *graph.output)}
    taken |= {output for node in every_node(graph) for output in node.output}
    renamed: dict[str, str] = {}
    reads = {name: (node, index) for node, index, name in reversed(list(_constant_reads(graph)))}
    for tensor in graph.initializer:
        wanted = tensor.name.removeprefix(f"{WRAPPED}.")
        if "." not in tensor.name and tensor.name in reads:
            wanted = _name_of_constant(*reads[tensor.name])
        renamed[tensor.name] = tensor.name = _unique(wanted, taken)
    for node in every_node(graph):
        for index, name in enumerate(node.input):
            if name in renamed:
                node.input[index] = renamed[name]
    for value in graph.value_info:
        value.name = renamed.get(value.name, value.name)


def strip_metadata(graph: Any) -> None:
    """Remove what the exporter wrote down about its own process: stack traces hold paths of the machine."""
    for node in every_node(graph):
        del node.metadata_props[:]
    for value in (*graph.input, *graph.output, *graph.value_info, *graph.initializer):
        del value.metadata_props[:]
        value.doc_string = ""
    del graph.metadata_props[:]


def every_node(graph: Any) -> Iterator[Any]:
    """The nodes of a ``GraphProto`` and of the graphs inside of them (branches and loops)."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for inner in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                yield from every_node(inner)


def _name_of_constant(node: Any, index: int) -> str:
    path = node.name.rpartition("/")[0]
    if node.op_type in _WEIGHTED and index == (0 if node.op_type == "Gather" else 1) and path:
        return f"{path}.weight"
    return f"{node.name}:{index}"


def _constant_reads(graph: Any) -> Iterator[tuple[Any, int, str]]:
    constants = {tensor.name for tensor in graph.initializer}
    for node in graph.node:
        for index, name in enumerate(node.input):
            if name in constants:
                yield node, index, name


def _unique(name: str, taken: set[str]) -> str:
    unique, count = name, 1
    while unique in taken:
        count += 1
        unique = f"{name}_{count}"
    taken.add(unique)
    return unique


def _list_of(node: Any, key: str) -> list[str]:
    for entry in node.metadata_props:
        if entry.key == key:
            return [str(item) for item in ast.literal_eval(entry.value)]
    return []


def rename_values(graph: Any, names: Mapping[str, str]) -> None:
    """Rename values of a ``GraphProto`` (inputs, outputs and what lies between); others that are in the way give way.

    Two values of one name make an invalid graph, and an exporter calls its own values ``embedding`` or ``mul`` too.
    """
    taken = set(names.values())
    own = {tensor.name for tensor in (*graph.input, *graph.output, *graph.initializer, *graph.value_info)}
    own |= {output for node in every_node(graph) for output in node.output}
    reserved = own | taken
    mapping = dict(names)
    for name in sorted(own & taken):
        if name not in names:
            mapping[name] = _unique(name, reserved)
    for node in every_node(graph):
        for values in (node.input, node.output):
            for index, name in enumerate(values):
                if name in mapping:
                    values[index] = mapping[name]
    for tensor in (*graph.input, *graph.output, *graph.initializer, *graph.value_info):
        tensor.name = mapping.get(tensor.name, tensor.name)

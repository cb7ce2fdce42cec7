"""ONNX models that passes rewrite: reading, writing, and who produces and who reads a tensor.

Knows the file format and the wiring of a graph, nothing of quantization. Imports onnx, so only steps use it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper

from enginesmith.errors import StoreError
from enginesmith.graphs.signature import MODEL_FILE, WEIGHTS_FILE

Array = npt.NDArray[Any]

_PROTOBUF_LIMIT_BYTES = (1 << 31) - (1 << 20)
"""Protobuf cannot hold 2 GiB; the rest is for nodes."""
_SHAPE_LIKE_BYTES = 1 << 12
"""Constants up to this size may decide shapes; larger ones are weights."""


def load_model(directory: Path) -> onnx.ModelProto:
    """The model in ``directory``, weights included.

    Raises:
        StoreError: there is none, or it is damaged.
    """
    path = directory / MODEL_FILE
    try:
        return onnx.load(path)
    except (OSError, ValueError, onnx.checker.ValidationError) as error:
        raise StoreError(f"cannot read {path}: {error}", hint="build again") from error
    except Exception as error:
        # protobuf's DecodeError has no public name that both of its implementations share.
        if type(error).__name__ != "DecodeError":
            raise
        raise StoreError(f"cannot read {path}: it is damaged ({error})", hint="build again") from error


def save_model(model: onnx.ModelProto, directory: Path) -> int:
    """Write ``model.onnx`` (beside it ``model.onnx.data`` where it is too large for one file); its bytes."""
    path = directory / MODEL_FILE
    external = model.ByteSize() > _PROTOBUF_LIMIT_BYTES
    if external:
        onnx.save_model(model, path, save_as_external_data=True, location=WEIGHTS_FILE)
    else:
        onnx.save_model(model, path)
    return path.stat().st_size + ((directory / WEIGHTS_FILE).stat().st_size if external else 0)


@dataclass(frozen=True)
class TensorType:
    """What shape inference knows of a tensor; an unknown length is None, a dynamic one its axis' name."""

    dtype: int
    """``onnx.TensorProto``'s number."""
    shape: tuple[int | str | None, ...] | None


class EditableGraph:
    """A model's graph with its wiring. It owns and changes the model that it is given.

    Nodes ``Constant`` become initializers first, so that every constant is found in one place.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model = model
        self.graph = model.graph
        _constants_to_initializers(model.graph)
        _name_nodes(model.graph)
        self._initializers = {tensor.name: tensor for tensor in self.graph.initializer}
        self._names = set(self._initializers)
        self._names.update(value.name for value in (*self.graph.input, *self.graph.output))
        self._names.update(name for node in self.graph.node for name in (*node.input, *node.output))
        self._node_names = {node.name for node in self.graph.node}
        self.rewire()

    def rewire(self) -> None:
        """Read the wiring again, after nodes were changed."""
        self._producers = {name: node for node in self.graph.node for name in node.output}
        self._consumers: dict[str, list[onnx.NodeProto]] = {}
        for node in self.graph.node:
            for name in sorted(names_read(node)):
                self._consumers.setdefault(name, []).append(node)

    @property
    def nodes(self) -> Sequence[onnx.NodeProto]:
        """In the order of execution."""
        return tuple(self.graph.node)

    @property
    def output_names(self) -> set[str]:
        return {value.name for value in self.graph.output}

    def producer(self, tensor: str) -> onnx.NodeProto | None:
        """The node that computes ``tensor``; None for inputs and constants."""
        return self._producers.get(tensor)

    def consumers(self, tensor: str) -> Sequence[onnx.NodeProto]:
        """The nodes that read ``tensor``, each once."""
        return self._consumers.get(tensor, ())

    def is_constant(self, tensor: str) -> bool:
        return tensor in self._initializers

    def constant_type(self, tensor: str) -> TensorType:
        stored = self._initializers[tensor]
        return TensorType(stored.data_type, tuple(stored.dims))

    def constant_size(self, tensor: str) -> int:
        """How many values the constant ``tensor`` has."""
        return int(np.prod(self._initializers[tensor].dims, dtype=np.int64))

    def constant(self, tensor: str) -> Array:
        """The values of the constant ``tensor``."""
        array: Array = numpy_helper.to_array(self._initializers[tensor])
        return array

    def constants(self) -> Iterable[str]:
        return tuple(self._initializers)

    def add_constant(self, name: str, array: Array) -> str:
        """A new constant; its name is ``name``, or the next free one like it."""
        name = self.fresh(name)
        tensor = numpy_helper.from_array(np.ascontiguousarray(array).reshape(array.shape), name)
        self.graph.initializer.append(tensor)
        self._initializers[name] = self.graph.initializer[-1]
        return name

    def fresh(self, name: str) -> str:
        """``name`` or, where a tensor has it, the next free one like it; taken from now on."""
        return _fresh(name, self._names)

    def fresh_node(self, name: str) -> str:
        """As ``fresh``, for the name of a node."""
        return _fresh(name, self._node_names)

    def set_nodes(self, nodes: Sequence[onnx.NodeProto]) -> None:
        """Replace all nodes, in the order of execution, and drop the constants that nothing reads any more."""
        copies = [_copied(node) for node in nodes]
        del self.graph.node[:]
        self.graph.node.extend(copies)
        used = self.output_names.union(*map(names_read, copies))
        kept = [tensor for tensor in self.graph.initializer if tensor.name in used]
        if len(kept) != len(self.graph.initializer):
            copied = [_copied_tensor(tensor) for tensor in kept]
            del self.graph.initializer[:]
            self.graph.initializer.extend(copied)
        self._initializers = {tensor.name: tensor for tensor in self.graph.initializer}
        inner = {name for node in copies for name in node.output}
        info = [_copied_value(value) for value in self.graph.value_info if value.name in inner]
        del self.graph.value_info[:]
        self.graph.value_info.extend(info)
        self.rewire()

    def types(self) -> Mapping[str, TensorType]:
        """What is known of every tensor by shape inference."""
        return inferred_types(self.model)

    def opset(self) -> int:
        """The version of the standard operators."""
        return next(
            (entry.version for entry in self.model.opset_import if entry.domain in ("", "ai.onnx")), 0
        )


def inferred_types(model: onnx.ModelProto) -> Mapping[str, TensorType]:
    """Every tensor's type by shape inference, on a copy without the large weights, whose values decide no shape."""
    light = onnx.ModelProto()
    light.CopyFrom(_without_weights(model))
    inferred = onnx.shape_inference.infer_shapes(light, data_prop=True).graph
    types = {
        tensor.name: TensorType(tensor.data_type, tuple(tensor.dims)) for tensor in model.graph.initializer
    }
    for value in (*inferred.input, *inferred.output, *inferred.value_info):
        if value.type.HasField("tensor_type"):
            tensor = value.type.tensor_type
            shape = tuple(_length(dim) for dim in tensor.shape.dim) if tensor.HasField("shape") else None
            types.setdefault(value.name, TensorType(tensor.elem_type, shape))
    return types


def attribute(node: onnx.NodeProto, name: str, default: Any) -> Any:
    """The value of a node's attribute, or ``default``."""
    found = next((entry for entry in node.attribute if entry.name == name), None)
    return default if found is None else helper.get_attribute_value(found)


def has_subgraphs(node: onnx.NodeProto) -> bool:
    """Whether the node is control flow: If, Loop, Scan."""
    return any(
        entry.type in (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS) for entry in node.attribute
    )


def names_read(node: onnx.NodeProto) -> set[str]:
    """What the node reads, also inside of its branches and loops; some of these names are their own."""
    return {*node.input, *_captured(node)}


def _without_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    light = onnx.ModelProto(ir_version=model.ir_version)
    light.opset_import.extend(model.opset_import)
    light.functions.extend(model.functions)
    graph = light.graph
    graph.name = model.graph.name or "graph"
    graph.node.extend(model.graph.node)
    graph.input.extend(model.graph.input)
    graph.output.extend(model.graph.output)
    inputs = {value.name for value in graph.input}
    for tensor in model.graph.initializer:
        if tensor.ByteSize() <= _SHAPE_LIKE_BYTES:
            graph.initializer.append(tensor)
        elif tensor.name not in inputs:
            graph.input.append(
                helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims))
            )
    return light


def _length(dim: Any) -> int | str | None:
    if dim.HasField("dim_value"):
        return int(dim.dim_value)
    return str(dim.dim_param) if dim.dim_param else None


def _constants_to_initializers(graph: onnx.GraphProto) -> None:
    kept = []
    for node in graph.node:
        if node.op_type == "Constant" and node.domain in ("", "ai.onnx"):
            graph.initializer.append(_constant_value(node))
        else:
            kept.append(_copied(node))
    if len(kept) != len(graph.node):
        del graph.node[:]
        graph.node.extend(kept)


def _constant_value(node: onnx.NodeProto) -> onnx.TensorProto:
    entry = node.attribute[0]
    value = helper.get_attribute_value(entry)
    if entry.name == "value":
        tensor = _copied_tensor(value)
        tensor.name = node.output[0]
        return tensor
    dtype = {"value_float": np.float32, "value_floats": np.float32}.get(
        entry.name, np.int64 if entry.name.startswith("value_int") else np.object_
    )
    return numpy_helper.from_array(np.array(value, dtype), node.output[0])


def _name_nodes(graph: onnx.GraphProto) -> None:
    taken = {node.name for node in graph.node if node.name}
    for node in graph.node:
        if not node.name:
            node.name = _fresh(f"{node.output[0]}/{node.op_type}" if node.output else node.op_type, taken)


def _fresh(name: str, taken: set[str]) -> str:
    free, count = name, 1
    while free in taken:
        count += 1
        free = f"{name}_{count}"
    taken.add(free)
    return free


def _captured(node: onnx.NodeProto) -> set[str]:
    """Every name that the node's subgraphs read; some are their own."""
    names: set[str] = set()
    for entry in node.attribute:
        for graph in (*entry.graphs, *([entry.g] if entry.type == onnx.AttributeProto.GRAPH else [])):
            names.update(value.name for value in graph.output)
            for inner in graph.node:
                names.update(inner.input)
                names |= _captured(inner)
    return names


def _copied(node: onnx.NodeProto) -> onnx.NodeProto:
    """Of its own: what a protobuf list holds dies with the list."""
    copy = onnx.NodeProto()
    copy.CopyFrom(node)
    return copy


def _copied_tensor(tensor: onnx.TensorProto) -> onnx.TensorProto:
    copy = onnx.TensorProto()
    copy.CopyFrom(tensor)
    return copy


def _copied_value(value: onnx.ValueInfoProto) -> onnx.ValueInfoProto:
    copy = onnx.ValueInfoProto()
    copy.CopyFrom(value)
    return copy

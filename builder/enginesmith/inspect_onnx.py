"""What is in an ONNX graph: inputs, outputs, operators, the precision of its products, and where its bytes are."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from enginesmith.errors import SourceError
from enginesmith.inspect_onnx_file import read_onnx_headers
from enginesmith.inspect_report import Inspection, Listing

_PRODUCTS: Mapping[str, tuple[int, int]] = {
    "MatMul": (0, 1),
    "Gemm": (0, 1),
    "Conv": (0, 1),
    "MatMulInteger": (0, 1),
    "ConvInteger": (0, 1),
    "MatMulIntegerToFloat": (0, 1),
    "DynamicQuantizeMatMul": (0, 1),
    "MatMulNBits": (0, 1),
    "FusedMatMul": (0, 1),
    "QLinearMatMul": (0, 3),
    "QLinearConv": (0, 3),
}
"""Operators that multiply by weights: which inputs are the activations and the weights."""
_MOVING = frozenset({"Transpose", "Reshape", "Identity"})
"""Operators that change no value."""
_SEEN_THROUGH = _MOVING | {"QuantizeLinear", "DequantizeLinear", "Cast"}
"""Operators between stored weights and the product that uses them."""
_LARGEST = 12


def inspect_onnx(path: Path) -> Inspection:
    """What is in the ONNX file at ``path``, weights beside it included.

    Raises:
        SourceError: it is no ONNX model, damaged, or its weights are not beside it.
    """
    headers = read_onnx_headers(path)
    _check_order(path, headers.model.graph)
    graph = _Graph(headers.model)
    external = _external_bytes(path, headers.model)
    products = graph.products()
    model = headers.model
    facts = {
        "producer": " ".join(part for part in (model.producer_name, model.producer_version) if part),
        "opsets": {entry.domain or "ai.onnx": entry.version for entry in model.opset_import},
        "ir_version": model.ir_version,
        "nodes": len(model.graph.node),
        "product_count": len(products),
        "quantized_product_count": sum(row["quantized"] for row in products),
        "parameters": sum(tensor["elements"] for tensor in graph.tensors.values()),
        "weights": _by_dtype(graph.tensors),
        "file_bytes": headers.file_bytes,
        "external_bytes": external,
    }
    listings = (
        Listing("inputs and outputs", graph.interface()),
        Listing("operators", graph.operators()),
        Listing("precisions", _precisions(products)),
        Listing("products", products),
        Listing("layers", graph.layers()),
        Listing("largest tensors", graph.largest()),
    )
    return Inspection("ONNX graph", path, facts, listings)


class _Graph:
    """Who makes and who uses what in a graph."""

    def __init__(self, model: Any) -> None:
        self._graph = model.graph
        self.tensors = {tensor.name: _tensor(tensor) for tensor in model.graph.initializer}
        self._producers = {name: node for node in model.graph.node for name in node.output}
        self._users: dict[str, list[Any]] = defaultdict(list)
        for node in model.graph.node:
            for name in node.input:
                self._users[name].append(node)
        values = [*model.graph.value_info, *model.graph.input, *model.graph.output]
        self._dtypes = {value.name: _dtype_name(value.type.tensor_type.elem_type) for value in values}

    def interface(self) -> list[dict[str, Any]]:
        """Inputs and outputs; an old graph lists its weights among the inputs too."""
        return [
            {"name": value.name, "as": side, "dtype": self._dtypes[value.name], "shape": _shape(value)}
            for side, values in (("input", self._graph.input), ("output", self._graph.output))
            for value in values
            if value.name not in self.tensors
        ]

    def operators(self) -> list[dict[str, Any]]:
        counts = Counter((node.domain or "ai.onnx", node.op_type) for node in self._graph.node)
        return [
            {"operator": name, "domain": domain, "count": n} for (domain, name), n in counts.most_common()
        ]

    def products(self) -> list[dict[str, Any]]:
        """Every product with stored weights or of two activations, with the types that go in."""
        return [self._product(node) for node in self._graph.node if node.op_type in _PRODUCTS]

    def layers(self) -> list[dict[str, Any]]:
        """Bytes of the weights by the part of the model whose nodes use them first."""
        by_layer: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for name, tensor in self.tensors.items():
            by_layer[layer_of(self._user_name(name))].append(tensor)
        return [
            {
                "layer": layer or "(no name)",
                "tensors": len(tensors),
                "parameters": sum(tensor["elements"] for tensor in tensors),
                "dtypes": sorted({tensor["dtype"] for tensor in tensors}),
                "bytes": sum(tensor["bytes"] for tensor in tensors),
            }
            for layer, tensors in by_layer.items()
        ]

    def largest(self) -> list[dict[str, Any]]:
        by_size = sorted(self.tensors.items(), key=lambda item: -item[1]["bytes"])[:_LARGEST]
        return [
            {
                "name": name,
                "dtype": tensor["dtype"],
                "shape": tensor["shape"],
                "used_by": self._user_name(name),
                "bytes": tensor["bytes"],
            }
            for name, tensor in by_size
        ]

    def _product(self, node: Any) -> dict[str, Any]:
        activations, weights = (_input(node, index) for index in _PRODUCTS[node.op_type])
        stored = self._stored(weights)
        types = [self._type_into(activations), self._type_into(weights)]
        if node.op_type == "MatMulNBits":
            types[1] = f"int{next((one.i for one in node.attribute if one.name == 'bits'), 4)}"
        return {
            "node": node.name or "(no name)",
            "operator": node.op_type,
            "activations": types[0],
            "weights": types[1],
            "quantized": any(_is_quantized(dtype) for dtype in types),
            "weight_bytes": self.tensors[stored]["bytes"] if stored else 0,
        }

    def _stored(self, name: str) -> str | None:
        """The initializer behind ``name``, seen through what only changes its form."""
        while name not in self.tensors:
            node = self._producers.get(name)
            if node is None or node.op_type not in _SEEN_THROUGH:
                return None
            name = _input(node, 0)
        return name

    def _type_into(self, name: str) -> str:
        """The type that ``name`` was rounded to last: behind a DequantizeLinear that of its input."""
        node = self._producers.get(name)
        if node is None:
            return self._dtypes.get(name) or (
                self.tensors[name]["dtype"] if name in self.tensors else "not said"
            )
        if node.op_type == "DequantizeLinear" or node.op_type in _MOVING:
            return self._type_into(_input(node, 0))
        if node.op_type == "QuantizeLinear":
            zero = _input(node, 2)
            return self.tensors[zero]["dtype"] if zero in self.tensors else "uint8"
        if node.op_type == "DynamicQuantizeLinear":
            return "uint8"
        if node.op_type == "Cast":
            return _dtype_name(next((one.i for one in node.attribute if one.name == "to"), 0))
        return self._dtypes.get(name, "not said")

    def _user_name(self, name: str) -> str:
        """The node that uses a tensor, seen through what only changes its form."""
        for node in self._users.get(name, ()):
            if node.op_type in _SEEN_THROUGH and node.output and self._users.get(node.output[0]):
                return self._user_name(node.output[0])
            return str(node.name)
        return ""


def layer_of(node_name: str) -> str:
    """The part of a model that a node belongs to: its module's path, no further than its first number.

    ``encoder.layer.0.attention.self.query/MatMul`` belongs to ``encoder.layer.0``, ``embeddings.word/Gather`` to
    ``embeddings.word``.
    """
    path = node_name.strip("/").rpartition("/")[0].replace("/", ".").split(".")
    for index, part in enumerate(path):
        if part.isdecimal():
            return ".".join(path[: index + 1])
    return ".".join(path[:2])


def _check_order(path: Path, graph: Any) -> None:
    """Return if every node uses only what is there before it, as ONNX demands; so nothing goes in circles.

    Raises:
        SourceError: one does not.
    """
    known = {"", *(tensor.name for tensor in graph.initializer), *(value.name for value in graph.input)}
    known |= {tensor.values.name for tensor in graph.sparse_initializer}
    for node in graph.node:
        if missing := [name for name in node.input if name not in known]:
            raise SourceError(
                f"{path} is damaged: node {node.name!r} ({node.op_type}) uses {missing[0]!r}, which nothing before it makes",
                hint="export or fetch it again",
            )
        known |= set(node.output)


def _input(node: Any, index: int) -> str:
    """The name of an input, or nothing where the node has none."""
    return str(node.input[index]) if index < len(node.input) else ""


def _tensor(tensor: Any) -> dict[str, Any]:
    import onnx

    elements = math.prod(tensor.dims)
    dtype = _dtype_name(tensor.data_type)
    bits = 4 if dtype in ("int4", "uint4", "float4e2m1") else 8 * _item_bytes(onnx, tensor.data_type)
    return {
        "dtype": dtype,
        "shape": list(tensor.dims),
        "elements": elements,
        "bytes": (elements * bits + 7) // 8,
    }


def _item_bytes(onnx: Any, data_type: int) -> int:
    try:
        return int(onnx.helper.tensor_dtype_to_np_dtype(data_type).itemsize)
    except (KeyError, TypeError):
        return 0


def _dtype_name(data_type: int) -> str:
    import onnx

    names: Mapping[int, str] = {number: name.lower() for name, number in onnx.TensorProto.DataType.items()}
    name = names.get(data_type, f"type {data_type}")
    return {"float": "float32", "double": "float64", "undefined": "not said"}.get(name, name)


def _is_quantized(dtype: str) -> bool:
    return dtype in ("int8", "uint8", "int4", "uint4", "int2", "uint2") or dtype.startswith(
        ("float8", "float4")
    )


def _shape(value: Any) -> list[int | str]:
    dims = value.type.tensor_type.shape.dim
    return [dim.dim_value if dim.HasField("dim_value") else dim.dim_param or "?" for dim in dims]


def _by_dtype(tensors: Mapping[str, Mapping[str, Any]]) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for tensor in tensors.values():
        counts[tensor["dtype"]] += tensor["elements"]
    return dict(counts.most_common())


def _precisions(products: list[dict[str, Any]]) -> list[dict[str, Any]]:
    counts = Counter((row["operator"], row["activations"], row["weights"]) for row in products)
    sizes: Counter[tuple[str, str, str]] = Counter()
    for row in products:
        sizes[row["operator"], row["activations"], row["weights"]] += row["weight_bytes"]
    return [
        {
            "operator": key[0],
            "activations": key[1],
            "weights": key[2],
            "count": count,
            "weight_bytes": sizes[key],
        }
        for key, count in counts.most_common()
    ]


def _external_bytes(path: Path, model: Any) -> int:
    """Bytes of the files beside ``path`` that hold weights; each must be there and long enough."""
    ends: dict[str, int] = {}
    for tensor in model.graph.initializer:
        entries = {entry.key: entry.value for entry in tensor.external_data}
        if location := entries.get("location"):
            numbers = [entries.get(name, "0") for name in ("offset", "length")]
            if not all(number.isdecimal() for number in numbers):
                raise SourceError(
                    f"{path} is damaged: tensor {tensor.name!r} lies at {numbers} in {location}",
                    hint="export or fetch it again",
                )
            ends[location] = max(ends.get(location, 0), sum(map(int, numbers)))
    for location, end in ends.items():
        file = path.parent / location
        size = file.stat().st_size if file.is_file() else None
        if size is None or size < end:
            seen = "is missing" if size is None else f"has {size:,} bytes of {end:,}"
            raise SourceError(
                f"the weights of {path} are in {file}, which {seen}", hint="copy it together with the model"
            )
    return sum((path.parent / location).stat().st_size for location in ends)

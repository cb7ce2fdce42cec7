"""The methods of models that take and give arrays. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from enginesmith.client_stub.layout import ASYNC, Code, Flavour
from enginesmith.client_stub.names import docstring_text, identifiers_from_names, literal
from enginesmith.client_stub.source import StubModel
from enginesmith.errors import SourceError
from enginesmith_client import ModelMetadata, TensorMetadata

_NUMPY_TYPES = {
    "BOOL": "bool_", "UINT8": "uint8", "UINT16": "uint16", "UINT32": "uint32", "UINT64": "uint64", "INT8": "int8",
    "INT16": "int16", "INT32": "int32", "INT64": "int64", "FP16": "float16", "FP32": "float32", "FP64": "float64",
    "BF16": "float32", "BYTES": "object_",
}  # fmt: skip
_SHOWN_LABELS = 20


def write_outputs(code: Code, model: StubModel, name: str) -> None:
    tensors = model.metadata.outputs
    fields = identifiers_from_names(model.name, "output", (tensor.name for tensor in tensors))
    code.add("", "", "@dataclass(frozen=True, eq=False)", f"class {name}Outputs:", uses=("dataclass",))
    code.add(f'    """What model {docstring_text(model.name)} answers."""', "")
    for tensor in tensors:
        code.add(f"    {fields[tensor.name]}: {_array_type(model.name, tensor)}", uses=("np",))
        code.add(f'    """{_described(model, tensor, fields[tensor.name])}"""')
    code.add("", "    @classmethod", uses=("InferResult", "output_array"))
    code.define("def from_result(", ("cls", "result: InferResult"), f"{name}Outputs")
    code.add('        """The outputs of an inference; ``ServerError`` where one is missing."""')
    code.add("        return cls(")
    for tensor in tensors:
        code.exploded(
            f"{fields[tensor.name]}=output_array(", ("result", literal(tensor.name)), "),", indent=12
        )
    code.add("        )")


def write_infer(code: Code, flavour: Flavour, model: StubModel, name: str) -> None:
    metadata = model.metadata
    names = identifiers_from_names(model.name, "input", (tensor.name for tensor in metadata.inputs))
    ordered = sorted(metadata.inputs, key=lambda tensor: tensor.optional)
    parameters = ["self", "*"]
    for tensor in ordered:
        optional = " | None = None" if tensor.optional else ""
        parameters.append(f"{names[tensor.name]}: {_array_type(model.name, tensor)}{optional}")
    parameters += ["priority: int | None = None", 'request_id: str = ""', "timeout_s: float | None = None"]
    streams = metadata.decoupled
    outputs = f"{name}Outputs"
    code.uses |= {"np", "given_arrays"} | ({flavour.iterator} if streams else set())
    code.define(
        f"{flavour.define} {'infer_stream' if streams else 'infer'}(",
        parameters,
        f"{flavour.iterator}[{outputs}]" if streams else outputs,
    )
    code.add(f'        """{"The answers of the model, as they come." if streams else "One inference."}', "")
    code.add("        Args:")
    for tensor in ordered:
        parameter = names[tensor.name]
        code.add(f"            {parameter}: {_described(model, tensor, parameter)}")
    code.add("            timeout_s: seconds; None: the client's.", '        """')
    arrays = [f"{literal(tensor.name)}: {names[tensor.name]}" for tensor in ordered]
    if streams:
        awaiting = "async " if flavour is ASYNC else ""
        code.add(f"        {awaiting}with self._client.infer_stream(")
        _write_request(code, metadata, arrays, indent=12)
        code.add("        ) as answers:", f"            {awaiting}for answer in answers:")
        code.add(f"                yield {outputs}.from_result(answer)")
        return
    code.add(f"        return {outputs}.from_result(", f"            {flavour.wait}self._client.infer(")
    _write_request(code, metadata, arrays, indent=16)
    code.add("            ),", "        )")


def _write_request(code: Code, metadata: ModelMetadata, arrays: Sequence[str], *, indent: int) -> None:
    space = " " * indent
    code.add(f"{space}{literal(metadata.name)},", f"{space}given_arrays(")
    code.exploded("{", arrays, "},", indent=indent + 4)
    code.add(f"{space}),")
    code.exploded("outputs=[", (literal(tensor.name) for tensor in metadata.outputs), "],", indent=indent)
    for name in ("priority", "request_id", "timeout_s"):
        code.add(f"{space}{name}={name},")
    code.add(f"{space}version=self._version,")


def _array_type(model: str, tensor: TensorMetadata) -> str:
    if tensor.datatype not in _NUMPY_TYPES:
        raise SourceError(
            f"tensor {tensor.name!r} of model {model!r} is {tensor.datatype}, which has no numpy type; "
            f"allowed: {', '.join(_NUMPY_TYPES)}",
            hint="ask that model with a Client",
        )
    return f"npt.NDArray[np.{_NUMPY_TYPES[tensor.datatype]}]"


def _described(model: StubModel, tensor: TensorMetadata, identifier: str) -> str:
    """The tensor in a sentence, for a docstring."""
    sizes = ["any" if size == -1 else str(size) for size in tensor.shape]
    batch = model.metadata.max_batch_size
    if batch:
        sizes[0] = f"batch of at most {batch}"
    text = f"{tensor.datatype} [{', '.join(sizes)}]"
    if tensor.datatype == "BYTES":
        text += ", elements of bytes or str"
    if tensor.datatype == "BF16":
        text += ", as float32"
    labels = model.labels.get(tensor.name, ())
    if labels:
        rest = len(labels) - _SHOWN_LABELS
        shown = ", ".join(docstring_text(label) for label in labels[:_SHOWN_LABELS])
        text += f"; classes: {shown}" + (f" and {rest} more" if rest > 0 else "")
    return f"{text}." if identifier == tensor.name else f"Tensor {docstring_text(tensor.name)}, {text}."

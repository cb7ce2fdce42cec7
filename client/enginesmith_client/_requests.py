"""Checks an inference against the model's metadata and encodes it; decodes the reply. Pure.

Everything that the server would refuse for its form is refused here, with the name of the input and what to
do about it, before anything is sent.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from enginesmith_client._codec import (
    NUMPY_TYPES,
    Array,
    accepts,
    array_from_bytes,
    bytes_from_array,
    datatype_from_dtype,
    text_bytes,
)
from enginesmith_client._deadline import Deadline
from enginesmith_client._errors import InvalidInput, ServerError
from enginesmith_client._messages import (
    InferReply,
    InferRequest,
    InferResult,
    ModelMetadata,
    Parameter,
    TensorMetadata,
    WireTensor,
)


@dataclass(frozen=True)
class Sequence_:  # noqa: N801 - collections.abc.Sequence is what callers import under the plain name
    """Which sequence of requests one belongs to, for models that keep state between requests."""

    id: int | str
    """Not 0 and not empty; Triton takes these for "none"."""
    start: bool = False
    end: bool = False


@dataclass(frozen=True)
class Envelope:
    """What a request carries beside its tensors."""

    request_id: str = ""
    priority: int | None = None
    sequence: Sequence_ | None = None
    parameters: Mapping[str, Parameter] | None = None
    idempotent: bool | None = None
    """Whether the request may be run twice; None: as the client's ``Retry`` says."""


NO_ENVELOPE = Envelope()


def check_answers_once(metadata: ModelMetadata) -> None:
    """Return if one request to the model has exactly one answer.

    Raises:
        InvalidInput: it is decoupled.
    """
    if metadata.decoupled:
        raise InvalidInput(
            f"model {metadata.name!r} is decoupled: it may answer one request many times, and this call waits for exactly one answer",
            hint="use infer_stream; for a language model generate or stream",
        )


def request_from_arrays(
    metadata: ModelMetadata,
    inputs: Mapping[str, Array],
    *,
    outputs: Sequence[str] | None,
    version: str,
    envelope: Envelope,
    deadline: Deadline,
    classes: int = 0,
) -> InferRequest:
    """The request that carries ``inputs`` to the model.

    Raises:
        InvalidInput: a name, dtype, shape or batch size is not what the metadata says, or a required input is missing.
    """
    _check_names(metadata, inputs, outputs or ())
    tensors = tuple(_wire_tensor(metadata, name, array) for name, array in inputs.items())
    _check_batch(metadata, inputs)
    return InferRequest(
        model=metadata.name,
        version=version,
        id=envelope.request_id,
        inputs=tensors,
        outputs=tuple(outputs or ()),
        parameters=_parameters(envelope, deadline),
        classes=classes,
        metadata=metadata,
    )


def result_from_reply(reply: InferReply) -> InferResult:
    """The decoded outputs of a reply.

    Raises:
        ServerError: there are none, or one cannot be read.
    """
    arrays = {
        tensor.name: array_from_bytes(tensor.data, tensor.datatype, tensor.shape) for tensor in reply.outputs
    }
    if not arrays:
        raise ServerError(
            f"model {reply.model!r} gave an answer without outputs",
            hint="a server with a response cache does so when it repeats a refusal: check the request, it was refused before",
        )
    return InferResult(arrays, reply.model, reply.version, reply.id)


def _check_names(metadata: ModelMetadata, inputs: Mapping[str, Array], outputs: Iterable[str]) -> None:
    for name in inputs:
        if metadata.input(name) is None:
            raise _unknown_name(
                metadata.name, "input", name, known=[tensor.name for tensor in metadata.inputs]
            )
    for name in outputs:
        if metadata.output(name) is None:
            raise _unknown_name(
                metadata.name, "output", name, known=[tensor.name for tensor in metadata.outputs]
            )
    if not metadata.required <= inputs.keys():
        missing = [tensor for tensor in metadata.inputs if not tensor.optional and tensor.name not in inputs]
        wanted = ", ".join(f"{tensor.name} ({tensor.datatype} {list(tensor.shape)})" for tensor in missing)
        raise InvalidInput(f"model {metadata.name!r} needs inputs that were not given: {wanted}")
    if not inputs:
        raise InvalidInput(
            f"no inputs were given to model {metadata.name!r}", hint="see client.metadata(model).inputs"
        )


def _unknown_name(model: str, kind: str, name: str, *, known: list[str]) -> InvalidInput:
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"it has: {', '.join(known)}"
    return InvalidInput(f"model {model!r} has no {kind} {name!r}", hint=hint)


def _check_array(metadata: ModelMetadata, tensor: TensorMetadata, array: Array) -> None:
    name = tensor.name
    if not isinstance(array, np.ndarray):
        raise InvalidInput(
            f"input {name!r} is {type(array).__name__}; it must be a numpy array",
            hint="wrap it: np.array(value)",
        )
    if not accepts(tensor.datatype, array.dtype):
        seen = datatype_from_dtype(array.dtype) or "no Triton datatype"
        raise InvalidInput(
            f"input {name!r} of model {metadata.name!r} is {tensor.datatype}; seen: an array of {array.dtype} ({seen})",
            hint=f"convert it: {_conversion(tensor.datatype)}",
        )
    if not _fits(array.shape, tensor):
        raise InvalidInput(
            f"input {name!r} of model {metadata.name!r} has shape {list(tensor.shape)} (-1: any size); seen: {list(array.shape)}",
            hint=_shape_hint(metadata, tensor, array.shape),
        )


def _conversion(datatype: str) -> str:
    if datatype == "BYTES":
        return "np.array(texts, dtype=np.object_), with str or bytes elements"
    if datatype == "BF16":
        return "array.astype(np.float32)"
    return f"array.astype(np.{np.dtype(NUMPY_TYPES[datatype]).name})" if datatype in NUMPY_TYPES else datatype


def _fits(shape: tuple[int, ...], tensor: TensorMetadata) -> bool:
    if len(shape) != len(tensor.shape):
        return False
    for wanted, size in zip(tensor.shape, shape, strict=True):  # noqa: SIM110 - runs for every tensor of every request
        if wanted not in (-1, size):
            return False
    return True


def _shape_hint(metadata: ModelMetadata, tensor: TensorMetadata, shape: tuple[int, ...]) -> str | None:
    if metadata.max_batch_size and _fits((1, *shape), tensor):
        return (
            "the model batches, so the first dimension is the batch: array[np.newaxis] makes a batch of one"
        )
    return None


def _check_batch(metadata: ModelMetadata, inputs: Mapping[str, Array]) -> None:
    if not metadata.max_batch_size:
        return
    size = next(iter(inputs.values())).shape[0]
    if any(array.shape[0] != size for array in inputs.values()):
        seen = ", ".join(f"{name}: {array.shape[0]}" for name, array in inputs.items())
        raise InvalidInput(
            f"all inputs of one request must have the same batch size (first dimension); seen: {seen}"
        )
    if not 1 <= size <= metadata.max_batch_size:
        raise InvalidInput(
            f"model {metadata.name!r} takes batches of 1 to {metadata.max_batch_size}; seen: {size}",
            hint="split the batch over several requests; the server joins them if the model has dynamic batching",
        )


def _wire_tensor(metadata: ModelMetadata, name: str, array: Array) -> WireTensor:
    tensor = metadata.input(name)
    assert tensor is not None, "names are checked first"
    _check_array(metadata, tensor, array)
    try:
        data = bytes_from_array(array, tensor.datatype)
    except InvalidInput as error:
        raise InvalidInput(f"input {name!r}: {error.message}", hint=error.hint) from error
    return WireTensor(name, tensor.datatype, array.shape, data)


def _parameters(envelope: Envelope, deadline: Deadline) -> Mapping[str, Parameter]:
    """Triton's request parameters. ``timeout`` is what is left of the deadline, so nothing waits in a queue for nobody."""
    text_bytes(envelope.request_id, what="request_id")
    made: dict[str, Parameter] = {"timeout": int(deadline.remaining_s() * 1e6)}
    if envelope.priority is not None:
        made["priority"] = _checked_priority(envelope.priority)
    if envelope.sequence is not None:
        made |= _sequence_parameters(envelope.sequence)
    if envelope.parameters:
        made |= _checked_parameters(envelope.parameters)
    return made


def _checked_priority(priority: int) -> int:
    if isinstance(priority, bool) or not isinstance(priority, int) or not 0 <= priority < 2**31:
        raise InvalidInput(
            f"priority is {priority!r}; it must be an int from 1 (the highest) to the priority_levels of the model, or 0 for its default"
        )
    return priority


def _sequence_parameters(sequence: Sequence_) -> dict[str, Parameter]:
    if not isinstance(sequence, Sequence_):
        raise InvalidInput(f"sequence is {sequence!r}; it must be a Sequence_(id, start=..., end=...)")
    if isinstance(sequence.id, bool) or not isinstance(sequence.id, (int, str)) or not sequence.id:
        raise InvalidInput(
            f"the id of a sequence is {sequence.id!r}; it must be a positive int or a non-empty str"
        )
    if isinstance(sequence.id, int) and not 0 < sequence.id < 2**63:
        raise InvalidInput(f"the id of a sequence is {sequence.id}; it must be from 1 to {2**63 - 1}")
    if isinstance(sequence.id, str):
        text_bytes(sequence.id, what="the id of a sequence")
    return {
        "sequence_id": sequence.id,
        "sequence_start": bool(sequence.start),
        "sequence_end": bool(sequence.end),
    }


def _checked_parameters(parameters: Mapping[str, Parameter]) -> Mapping[str, Parameter]:
    for name, value in parameters.items():
        if not isinstance(value, (str, int, float, bool)) or (
            isinstance(value, float) and not math.isfinite(value)
        ):
            raise InvalidInput(
                f"request parameter {name!r} is {value!r}; allowed: str, bool, int and finite float"
            )
        text_bytes(name, what="the name of a request parameter")
        if isinstance(value, str):
            text_bytes(value, what=f"request parameter {name!r}")
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise InvalidInput(f"request parameter {name!r} is {value}, which does not fit into 64 bits")
    if "binary_data_output" in parameters:
        raise InvalidInput(
            "the request parameter 'binary_data_output' belongs to the transport and cannot be set"
        )
    return dict(parameters)

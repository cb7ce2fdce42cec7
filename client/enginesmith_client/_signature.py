"""What clients that ``enginesmith client-stub`` generates need at run time: is the served model the one they were made for. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from enginesmith_client._codec import Array
from enginesmith_client._errors import InvalidInput, ServerError
from enginesmith_client._messages import InferResult, ModelMetadata, TensorMetadata


class SignatureDrift(InvalidInput):
    """The served model is not the one that a generated client was made for."""

    def __init__(self, message: str, *, hint: str | None = None, differences: Sequence[str] = ()) -> None:
        super().__init__(message, hint=hint)
        self.differences = tuple(differences)
        """Each in one sentence."""


def check_signature(signature: ModelMetadata, served: ModelMetadata) -> None:
    """Return if a client that was made for ``signature`` can use the model as it is served.

    What such a client need not know does not matter: further optional inputs, further outputs, larger batches, other
    versions, another platform.

    Raises:
        SignatureDrift: it cannot; has every difference.
    """
    differences = list(_differences(signature, served))
    if differences:
        raise SignatureDrift(
            f"model {signature.name!r} is not the one that this client was generated for:\n  - "
            + "\n  - ".join(differences),
            hint="generate the client again (enginesmith client-stub), or serve the version that it was made for",
            differences=differences,
        )


def given_arrays(arrays: Mapping[str, Array | None]) -> dict[str, Array]:
    """``arrays`` without those that are None."""
    return {name: array for name, array in arrays.items() if array is not None}


def output_array(result: InferResult, name: str) -> Array:
    """An output of a model.

    Raises:
        ServerError: the model left it out.
    """
    if name not in result.outputs:
        raise ServerError(
            f"the answer of model {result.model!r} has no output {name!r}; it has: {', '.join(result.outputs) or 'none'}"
        )
    return result.outputs[name]


def _differences(signature: ModelMetadata, served: ModelMetadata) -> Iterator[str]:
    if signature.decoupled != served.decoupled:
        yield (
            f"one request has {'any number of answers' if served.decoupled else 'one answer'} now "
            f"(decoupled: {str(served.decoupled).lower()})"
        )
    expected, seen = signature.max_batch_size, served.max_batch_size
    if (expected > 0) != (seen > 0):
        yield f"it {'has batches' if seen else 'has no batches'} now (max_batch_size: {expected} before, {seen} now)"
    elif seen < expected:
        yield f"its batches are at most {seen} now, {expected} before"
    yield from _tensor_differences("input", signature.inputs, served.inputs)
    yield from _tensor_differences("output", signature.outputs, served.outputs)


def _tensor_differences(
    kind: str, expected: Sequence[TensorMetadata], seen: Sequence[TensorMetadata]
) -> Iterator[str]:
    served = {tensor.name: tensor for tensor in seen}
    known = {tensor.name for tensor in expected}
    added = [tensor for tensor in seen if tensor.name not in known]
    for tensor in expected:
        if tensor.name not in served:
            yield f"{kind} {tensor.name!r} is missing{_renamed(tensor, added)}"
            continue
        now = served[tensor.name]
        if now.datatype != tensor.datatype:
            yield f"{kind} {tensor.name!r} is {now.datatype} now, {tensor.datatype} before"
        if now.shape != tensor.shape:
            yield f"{kind} {tensor.name!r} has the shape {list(now.shape)} now, {list(tensor.shape)} before"
        if tensor.optional and not now.optional:
            yield f"{kind} {tensor.name!r} is required now, optional before"
    for tensor in added:
        if kind == "input" and not tensor.optional:
            yield f"input {tensor.name!r} ({tensor.datatype} {list(tensor.shape)}) is new and required"


def _renamed(missing: TensorMetadata, added: Sequence[TensorMetadata]) -> str:
    alike = [one.name for one in added if (one.datatype, one.shape) == (missing.datatype, missing.shape)]
    return f"; perhaps it is called {alike[0]!r} now" if len(alike) == 1 else ""

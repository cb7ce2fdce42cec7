"""Text generation as tensors: the prompt and its options in, a ``Generation`` out. Pure.

A model takes part by having the input ``text_input`` and the output ``text_output``; everything else is
optional and sent or read only where the metadata lists it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TypeAlias

import numpy as np

from enginesmith_client._codec import NUMPY_TYPES, Array, text_bytes
from enginesmith_client._errors import InvalidInput, ServerError
from enginesmith_client._messages import Generation, InferResult, ModelMetadata, TensorMetadata

Option: TypeAlias = "int | float | bool | str | Sequence[str] | None"

OPTION_INPUTS: Mapping[str, str] = {
    "max_tokens": "max_tokens",
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "repetition_penalty": "repetition_penalty",
    "seed": "seed",
    "stop": "stop_words",
    "chat": "apply_chat_template",
}
"""The model input that carries each option of ``Client.generate``."""

_OUTPUTS = ("text_output", "finish_reason", "num_input_tokens", "num_output_tokens")


def inputs_from_prompt(
    metadata: ModelMetadata, prompt: str, *, options: Mapping[str, Option]
) -> dict[str, Array]:
    """The input arrays for one prompt; options that are None are left out.

    Raises:
        InvalidInput: the model does not generate text, lacks an option that was asked for, or a value is not sendable.
    """
    text_input = metadata.input("text_input")
    if text_input is None or metadata.output("text_output") is None:
        names = ", ".join(tensor.name for tensor in (*metadata.inputs, *metadata.outputs))
        raise InvalidInput(
            f"model {metadata.name!r} does not generate text: it must have the tensors text_input and text_output; it has: {names}",
            hint="use infer for other models",
        )
    if not isinstance(prompt, str):
        raise InvalidInput(f"the prompt must be a str; seen: {type(prompt).__name__}")
    arrays = {"text_input": _array([text_bytes(prompt, what="the prompt")], text_input)}
    for option, value in options.items():
        if value is not None:
            tensor = _option_input(metadata, option)
            values = _stop_words(value) if option == "stop" else [value]
            arrays[tensor.name] = _array([_checked(option, one, tensor.datatype) for one in values], tensor)
    return arrays


def outputs_to_request(metadata: ModelMetadata) -> list[str]:
    """The outputs of the model that a ``Generation`` is made of."""
    return [name for name in _OUTPUTS if metadata.output(name) is not None]


def generation_from_result(result: InferResult, *, latency_s: float) -> Generation:
    """The generation in the outputs of an inference."""
    text = _single(result, "text_output")
    if text is None:
        raise ServerError(f"the answer of model {result.model!r} has no text_output")
    reason = _single(result, "finish_reason")
    return Generation(
        text=_decoded(text, result.model),
        finish_reason=None if reason is None else _decoded(reason, result.model),
        prompt_tokens=_count(result, "num_input_tokens"),
        output_tokens=_count(result, "num_output_tokens"),
        model=result.model,
        model_version=result.version,
        latency_s=latency_s,
    )


def _option_input(metadata: ModelMetadata, option: str) -> TensorMetadata:
    name = OPTION_INPUTS[option]
    tensor = metadata.input(name)
    if tensor is None:
        available = [known for known, carrier in OPTION_INPUTS.items() if metadata.input(carrier) is not None]
        raise InvalidInput(
            f"model {metadata.name!r} has no option {option} (no input {name!r})",
            hint=f"leave it out; the options of this model: {', '.join(available) or 'none'}",
        )
    return tensor


def _stop_words(value: Option) -> list[Option]:
    words = [value] if isinstance(value, str) else value
    if (
        not isinstance(words, Sequence)
        or not words
        or not all(isinstance(word, str) and word for word in words)
    ):
        raise InvalidInput(f"stop must be one or more non-empty strings; seen: {value!r}")
    return list(words)


def _checked(option: str, value: Option, datatype: str) -> object:
    """``value`` as something that numpy stores in ``datatype`` without changing it beyond rounding."""
    if datatype == "BYTES" and isinstance(value, str):
        return text_bytes(value, what=option)
    if datatype == "BOOL" and isinstance(value, (bool, np.bool_)):
        return value
    if datatype in NUMPY_TYPES and not isinstance(value, (bool, np.bool_)):
        dtype = np.dtype(NUMPY_TYPES[datatype])
        if dtype.kind in "iu" and isinstance(value, (int, np.integer)):
            limits = np.iinfo(dtype)
            if limits.min <= value <= limits.max:
                return value
            raise InvalidInput(f"{option} is {value}; the model takes {limits.min} to {limits.max}")
        if dtype.kind == "f" and isinstance(value, (int, float, np.integer, np.floating)):
            if math.isfinite(value) and abs(value) <= float(np.finfo(dtype).max):
                return value
            raise InvalidInput(f"{option} is {value}; it must be a finite {datatype} number")
    raise InvalidInput(f"{option} is {value!r} ({type(value).__name__}); the model takes {datatype}")


def _array(values: list[object], tensor: TensorMetadata) -> Array:
    """``values`` along the last dimension; all others, a batch dimension among them, are 1."""
    dtype = np.dtype(np.object_) if tensor.datatype == "BYTES" else np.dtype(NUMPY_TYPES[tensor.datatype])
    array = np.empty(len(values), dtype=dtype)
    array[:] = values
    return array.reshape((1,) * (len(tensor.shape) - 1) + (len(values),))


def _single(result: InferResult, name: str) -> object | None:
    """The one element of an output, or None if the model did not send it."""
    if name not in result.outputs:
        return None
    values = result.outputs[name].reshape(-1)
    if values.size != 1:
        raise ServerError(
            f"output {name} of model {result.model!r} holds {values.size} values for one prompt; expected 1"
        )
    element: object = values.item()
    return element


def _count(result: InferResult, name: str) -> int | None:
    value = _single(result, name)
    if value is None or isinstance(value, int):
        return value
    raise ServerError(
        f"output {name} of model {result.model!r} is {type(value).__name__}; expected an integer"
    )


def _decoded(text: object, model: str) -> str:
    if not isinstance(text, bytes):
        raise ServerError(f"model {model!r} answered with {type(text).__name__} where text was expected")
    try:
        return text.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ServerError(
            f"the text of model {model!r} is not valid UTF-8: {error.reason} at byte {error.start}",
            hint="use infer to get the raw bytes",
        ) from error

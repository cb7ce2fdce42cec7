"""Text generation as tensors: a question and its options in. Pure.

A model takes part by having the input ``text_input`` and the output ``text_output``; everything else is
optional and sent or asked for only where the metadata lists it. ``_answer`` reads what comes back.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TypeAlias

import numpy as np

from enginesmith_client._chat import ChatTemplate, Message, messages_json
from enginesmith_client._codec import NUMPY_TYPES, Array, text_bytes
from enginesmith_client._dialects import (
    FINISH_REASON,
    LOGPROBS,
    MESSAGES,
    OUTPUT_TOKENS,
    PROMPT_TOKENS,
    TEXT_INPUT,
    TEXT_OUTPUT,
    TOKENS,
    Dialect,
    dialect_of,
)
from enginesmith_client._errors import InvalidInput
from enginesmith_client._messages import ModelMetadata, TensorMetadata

Option: TypeAlias = "int | float | bool | str | Sequence[str] | None"


@dataclass(frozen=True, slots=True)
class Options:
    """The options of ``Client.generate`` under its names; None leaves one to the model."""

    max_tokens: int | None = None
    min_tokens: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: int | None = None
    stop: str | Sequence[str] | None = None
    chat: bool = False
    logprobs: bool = False

    def given(self) -> dict[str, Option]:
        """Those that are to be sent."""
        values = {option.name: getattr(self, option.name) for option in fields(self)}
        return {name: value for name, value in values.items() if value is not None and value is not False}


@dataclass(frozen=True, slots=True)
class Question:
    """What a language model is asked: a prompt, or a conversation."""

    content: str | Sequence[Message]
    options: Options
    is_conversation: bool = False
    template: ChatTemplate | None = None
    """Renders the conversation here."""


def inputs_from_question(
    metadata: ModelMetadata, question: Question, *, streaming: bool = False
) -> dict[str, Array]:
    """The input arrays for one question; options that were not given are left out.

    Raises:
        InvalidInput: the model does not generate text, lacks an option that was asked for, or a value is not sendable.
    """
    if metadata.input(TEXT_INPUT) is None or metadata.output(TEXT_OUTPUT) is None:
        names = ", ".join(tensor.name for tensor in (*metadata.inputs, *metadata.outputs))
        raise InvalidInput(
            f"model {metadata.name!r} does not generate text: it must have the tensors text_input and text_output; it has: {names}",
            hint="use infer for other models",
        )
    dialect = dialect_of(metadata)
    arrays = _content_input(metadata, question)
    for option, value in question.options.given().items():
        tensor = _option_input(metadata, dialect, option)
        values = _stop_words(value) if option == "stop" else [value]
        arrays[tensor.name] = _array([_checked(option, one, tensor.datatype) for one in values], tensor)
    for name in (*dialect.always, dialect.stream) if streaming else dialect.always:
        flag = metadata.input(name)
        if flag is not None:
            arrays[name] = _array([True], flag)
    _check_required(metadata, dialect, arrays)
    return arrays


def outputs_to_request(metadata: ModelMetadata, options: Options) -> list[str]:
    """The outputs of the model that an answer is made of."""
    names = [TEXT_OUTPUT, FINISH_REASON, PROMPT_TOKENS, OUTPUT_TOKENS]
    if options.logprobs:
        names += [LOGPROBS, TOKENS]
    return [name for name in names if metadata.output(name) is not None]


def _content_input(metadata: ModelMetadata, question: Question) -> dict[str, Array]:
    text_input = metadata.input(TEXT_INPUT)
    assert text_input is not None, "checked first"
    content = question.content
    if not question.is_conversation:
        if not isinstance(content, str):
            raise InvalidInput(f"the prompt must be a str; seen: {type(content).__name__}")
        return {TEXT_INPUT: _array([text_bytes(content, what="the prompt")], text_input)}
    if question.template is not None:
        rendered = question.template.render(content)  # type: ignore[arg-type]
        return {TEXT_INPUT: _array([text_bytes(rendered, what="the prompt")], text_input)}
    conversation = messages_json(content)  # type: ignore[arg-type]
    messages = metadata.input(MESSAGES)
    if messages is None:
        raise InvalidInput(
            f"model {metadata.name!r} takes no conversations: it has no input {MESSAGES!r}",
            hint="give template=ChatTemplate.from_directory(path of the model's tokenizer), which renders the "
            "conversation here, or ask a model that has this input, as those do that enginesmith builds for ONNX Runtime",
        )
    return {MESSAGES: _array([conversation.encode()], messages)}


def _check_required(metadata: ModelMetadata, dialect: Dialect, arrays: Mapping[str, Array]) -> None:
    """Speaks of options, where the check of all inputs could only speak of tensors."""
    for option, name in dialect.options.items():
        tensor = metadata.input(name)
        if tensor is not None and not tensor.optional and name not in arrays:
            raise InvalidInput(
                f"model {metadata.name!r} needs the option {option}", hint=f"give {option}=..."
            )


def _option_input(metadata: ModelMetadata, dialect: Dialect, option: str) -> TensorMetadata:
    name = dialect.options.get(option)
    tensor = metadata.input(name) if name else None
    # Log-probabilities without the tokens that they belong to could not be told apart.
    if tensor is None or (option == "logprobs" and metadata.output(TOKENS) is None):
        available = [
            known
            for known, carrier in dialect.options.items()
            if metadata.input(carrier) is not None
            and (known != "logprobs" or metadata.output(TOKENS) is not None)
        ]
        missing = f"no input {name!r}" if name and tensor is None else f"no output {TOKENS!r}"
        raise InvalidInput(
            f"model {metadata.name!r} has no option {option}" + (f" ({missing})" if name else ""),
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

"""A scripted language model with the tensors of those that enginesmith serves. Pure.

A token is a word with the white space before it. ``max_tokens`` and ``stop_words`` do what they do on a server; how a
real model would sample is not imitated: the other options are only handed to the script.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from enginesmith_client._codec import Array
from enginesmith_client._errors import InvalidInput
from enginesmith_client._messages import ModelMetadata
from enginesmith_client.testing._models import Answers, Arrays, tensor


@dataclass(frozen=True)
class Prompt:
    """What a language model was asked."""

    text: str
    """The prompt; of a conversation, the content of its last message."""
    messages: tuple[Mapping[str, str], ...]
    """The conversation, where the request was one; a prompt with ``chat=True`` is one message of a user."""
    options: Mapping[str, Any]
    """The other inputs of the request by their names in the model, such as ``max_tokens``."""


@dataclass(frozen=True)
class Answer:
    """What a language model says. Given as pieces, each is one token and one step of a stream."""

    text: str | Sequence[str]
    finish_reason: str = "stop"
    prompt_tokens: int | None = None
    """None: the words of the prompt."""
    logprobs: Sequence[float] | None = None
    """One for each token, for requests that ask; None: -0.5 for each."""


Script: TypeAlias = "str | Answer | Sequence[str | Answer] | Callable[[Prompt], str | Answer]"
"""One answer for all requests, one after the other (the last one stays), or what makes an answer of a prompt."""

_OPTIONS = {
    "max_tokens": "INT32", "min_tokens": "INT32", "temperature": "FP32", "top_k": "INT32", "top_p": "FP32",
    "repetition_penalty": "FP32", "presence_penalty": "FP32", "frequency_penalty": "FP32", "seed": "UINT64",
    "end_id": "INT32", "pad_id": "INT32", "beam_width": "INT32", "stream": "BOOL", "return_log_probs": "BOOL",
    "exclude_input_in_output": "BOOL", "return_num_input_tokens": "BOOL", "return_num_output_tokens": "BOOL",
    "return_perf_metrics": "BOOL",
}  # fmt: skip


_KV_CACHE_COUNTERS = (
    "kv_cache_reused_blocks",
    "kv_cache_alloc_new_blocks",
    "kv_cache_alloc_total_blocks",
)
_TIMES = ("arrival_time_ns", "first_scheduled_time_ns", "first_token_time_ns", "last_token_time_ns")
"""Declared, as on a server; the fake never gives them."""


def llm_interface(name: str, *, max_batch_size: int) -> ModelMetadata:
    """The interface of a text model that enginesmith serves."""
    inputs = (
        tensor("text_input", "BYTES", -1, 1, optional=True),
        tensor("messages", "BYTES", -1, 1, optional=True),
        tensor("apply_chat_template", "BOOL", -1, 1, optional=True),
        tensor("stop_words", "BYTES", -1, -1, optional=True),
        tensor("bad_words", "BYTES", -1, -1, optional=True),
        *(tensor(option, datatype, -1, 1, optional=True) for option, datatype in _OPTIONS.items()),
    )
    outputs = (
        tensor("text_output", "BYTES", -1, -1),
        tensor("finish_reason", "BYTES", -1, 1),
        tensor("num_input_tokens", "INT32", -1, 1),
        tensor("num_output_tokens", "INT32", -1, 1),
        tensor("cum_log_probs", "FP32", -1, -1),
        tensor("output_log_probs", "FP32", -1, -1, -1),
        tensor("output_tokens", "BYTES", -1, -1),
        *(tensor(counter, "INT32", -1, 1) for counter in _KV_CACHE_COUNTERS),
        *(tensor(time, "INT64", -1, 1) for time in _TIMES),
    )
    return ModelMetadata(name, ("1",), "python", inputs, outputs, max_batch_size, decoupled=True)


def llm_answers(script: Script) -> Answers:
    """The model that follows ``script``."""
    turn = _turns(script)

    def answers(inputs: Arrays) -> Iterator[Arrays]:
        prompt = _prompt(inputs)
        said = turn(prompt)
        answer = Answer(said) if isinstance(said, str) else said
        pieces, reason = _pieces(answer, prompt.options)
        streams = bool(prompt.options.get("stream", False))
        if not streams and not prompt.messages and not prompt.options.get("exclude_input_in_output", False):
            yield from _replies([[*pieces]], reason, answer, prompt, before=prompt.text)
        else:
            yield from _replies(
                [[piece] for piece in pieces] if streams else [pieces], reason, answer, prompt
            )

    return answers


def _turns(script: Script) -> Callable[[Prompt], str | Answer]:
    if callable(script):
        return script
    left = [script] if isinstance(script, (str, Answer)) else list(script)
    if not left:
        raise ValueError("the script of a language model is empty; give at least one answer")
    return lambda _: left.pop(0) if len(left) > 1 else left[0]


def _prompt(inputs: Arrays) -> Prompt:
    options = {name: _plain(array) for name, array in inputs.items()}
    text, conversation = options.pop("text_input", None), options.pop("messages", None)
    if (text is None) == (conversation is None):
        raise InvalidInput("exactly one of text_input and messages must be given")
    if conversation is None:
        of_a_user = ({"role": "user", "content": text},) if options.get("apply_chat_template") else ()
        return Prompt(text, of_a_user, options)
    messages = tuple(json.loads(conversation))
    return Prompt(messages[-1]["content"], messages, options)


def _plain(array: Array) -> Any:
    values = [value.decode() if isinstance(value, bytes) else value for value in array.reshape(-1).tolist()]
    return values if array.dtype == np.object_ and len(values) != 1 else values[0]


def _pieces(answer: Answer, options: Mapping[str, Any]) -> tuple[list[str], str]:
    """The tokens that are said, and why they end."""
    tokens = re.findall(r"\s*\S+|\s+$", answer.text) if isinstance(answer.text, str) else list(answer.text)
    limit, stops = options.get("max_tokens"), options.get("stop_words", [])
    end = min(
        (
            at
            for stop in ([stops] if isinstance(stops, str) else stops)
            if (at := "".join(tokens).find(stop)) >= 0
        ),
        default=None,
    )
    said: list[str] = []
    length = 0
    for token in tokens:
        if end is not None and length + len(token) > end:
            return [*said, token[: end - length]], "stop"
        if limit is not None and len(said) == limit:
            return said, "length"
        said.append(token)
        length += len(token)
    return said, answer.finish_reason


def _replies(
    steps: Sequence[Sequence[str]], reason: str, answer: Answer, prompt: Prompt, *, before: str = ""
) -> Iterator[Arrays]:
    """One mapping of outputs for each step; only the last has the reason."""
    prompt_tokens = len(prompt.text.split()) if answer.prompt_tokens is None else answer.prompt_tokens
    said = 0
    for number, tokens in enumerate(steps or [[]], start=1):
        scores = [answer.logprobs[said + i] if answer.logprobs else -0.5 for i in range(len(tokens))]
        said += len(tokens)
        outputs = {
            "text_output": _texts([before + "".join(tokens)]),
            "finish_reason": _texts([reason if number >= len(steps) else ""]),
            "num_input_tokens": np.array([[prompt_tokens]], np.int32),
            "num_output_tokens": np.array([[said]], np.int32),
        }
        if prompt.options.get("return_log_probs", False):
            outputs["cum_log_probs"] = np.array([[sum(scores)]], np.float32)
            outputs["output_log_probs"] = np.array([[scores]], np.float32)
            outputs["output_tokens"] = _texts(list(tokens))
        yield outputs


def _texts(texts: list[str]) -> Array:
    """BYTES [1, texts]."""
    array = np.empty((1, len(texts)), np.object_)
    array[0, :] = [text.encode() for text in texts]
    return array

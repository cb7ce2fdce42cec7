"""Triton requests as plain values, and answers as Triton tensors. Names and types are those of NVIDIA's models.

What a client got wrong is a ``ValueError`` that names the input, what was seen and what is allowed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils
from llm_batching import Job, Update
from llm_pieces import AnswerText
from llm_sampling import Generation, Sampling
from llm_text import Text

_SAMPLING_INPUTS: Mapping[str, Callable[[Any], Any]] = {
    "max_tokens": int,
    "min_tokens": int,
    "temperature": float,
    "top_k": int,
    "top_p": float,
    "repetition_penalty": float,
    "presence_penalty": float,
    "frequency_penalty": float,
    "seed": int,
}


@dataclass(frozen=True)
class Limits:
    """What requests may ask for, from ``serving.json``."""

    max_prompt_tokens: int
    default_max_tokens: int
    tokens_per_block: int
    vocabulary: int
    """Tokens that the model has. Its tokenizer may know more, as after a token for padding was added to it alone."""


@dataclass(frozen=True)
class Asked:
    """One request: a job per row, and what its responses hold."""

    jobs: tuple[Job, ...]
    echoes: tuple[str, ...]
    """What is put before each row's answer."""
    streaming: bool
    log_probs: bool
    perf_metrics: bool


def read_request(request: Any, text: Text, limits: Limits) -> Asked:
    """The request as plain values.

    Raises:
        ValueError: an input is missing, out of range, or not UTF-8; the prompt is empty or too long.
    """
    rows = _rows(request)
    streaming = _flag(rows[0], "stream")
    if streaming and len(rows) > 1:
        raise ValueError(f"the request has {len(rows)} rows; with stream it may have one")
    timeout_us = request.timeout()
    jobs, echoes = [], []
    for row in rows:
        prompt, echo = _prompt(row, text, limits)
        generation = Generation(prompt, _sampling(row, text, limits))
        stops = tuple(_utf8(word, "stop_words") for word in row.get("stop_words", ()) if word)
        timeout_s = timeout_us / 1e6 if timeout_us else None
        jobs.append(Job(generation, AnswerText(text.decode, stops), streaming=streaming, timeout_s=timeout_s))
        echoes.append("" if streaming or _flag(row, "exclude_input_in_output") else echo)
    return Asked(
        jobs=tuple(jobs),
        echoes=tuple(echoes),
        streaming=streaming,
        log_probs=_flag(rows[0], "return_log_probs"),
        perf_metrics=_flag(rows[0], "return_perf_metrics"),
    )


def _rows(request: Any) -> list[dict[str, Any]]:
    """The request's rows; each maps input names to that row's values."""
    inputs = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
    counts = {name: len(array) for name, array in inputs.items()}
    if len(set(counts.values())) != 1:
        raise ValueError(f"the inputs have different numbers of rows: {counts or 'there are no inputs'}")
    return [
        {name: array[row].reshape(-1) for name, array in inputs.items()}
        for row in range(next(iter(counts.values())))
    ]


def _prompt(row: Mapping[str, Any], text: Text, limits: Limits) -> tuple[list[int], str]:
    """The prompt's tokens, and the text that an answer without ``exclude_input_in_output`` begins with."""
    given = [name for name in ("text_input", "messages") if name in row]
    if len(given) != 1:
        raise ValueError(f"give one of text_input and messages; seen: {' and '.join(given) or 'none'}")
    written = _utf8(_one(row, given[0]), given[0])
    limit = limits.max_prompt_tokens
    if len(written) > limit * text.longest_token_bytes + len(_EMPTY_MESSAGES):
        # Before time is spent on tokens: no token stands for more characters.
        raise ValueError(
            f"{given[0]} has {len(written)} characters, more than the {limit} tokens that this model accepts at most can stand for"
        )
    chat = "messages" in row or _flag(row, "apply_chat_template")
    source = written
    if "messages" in row:
        source = text.render(_messages(written))
    elif chat:
        source = text.as_chat(written)
    prompt = text.encode(source, chat=chat)
    if not prompt:
        raise ValueError("text_input is empty: the prompt has no tokens")
    if len(prompt) > limit:
        raise ValueError(f"the prompt has {len(prompt)} tokens; this model accepts at most {limit}")
    if (largest := max(prompt)) >= limits.vocabulary:
        name = text.token_bytes(largest).decode(errors="replace")
        raise ValueError(
            f"{given[0]} holds {name!r}, token {largest} of the tokenizer; the model has tokens up to {limits.vocabulary - 1}"
        )
    return prompt, "" if chat else written


_EMPTY_MESSAGES = " " * 4096
"""Room for the JSON around the texts of ``messages``."""


def _messages(written: str) -> list[dict[str, Any]]:
    try:
        messages = json.loads(written)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"messages is not JSON: {error}") from error
    if not isinstance(messages, list) or not messages:
        raise ValueError('messages must be a list with at least one {"role": ..., "content": ...}')
    for place, message in enumerate(messages):
        if not isinstance(message, dict):
            raise ValueError(f"messages[{place}] is {type(message).__name__}; allowed: an object")
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                raise ValueError(
                    f"messages[{place}].{key} is {type(message.get(key)).__name__}; allowed: a string"
                )
    return messages


def _sampling(row: Mapping[str, Any], text: Text, limits: Limits) -> Sampling:
    beams = int(_one(row, "beam_width")) if "beam_width" in row else 1
    if beams != 1:
        raise ValueError(f"beam_width is {beams}; allowed: 1 (this model samples, it does not search)")
    given = {name: kind(_one(row, name)) for name, kind in _SAMPLING_INPUTS.items() if name in row}
    words = [_utf8(word, "bad_words") for word in row.get("bad_words", ()) if word]
    bad_words = (ids for word in words for ids in text.word_ids(word))
    end_ids = None
    if "end_id" in row:
        end_id = int(_one(row, "end_id"))
        known = min(text.vocabulary_size, limits.vocabulary)
        if not -1 <= end_id < known:
            raise ValueError(f"end_id is {end_id}; allowed: -1 (none) to {known - 1}")
        end_ids = frozenset({end_id} - {-1})
    return Sampling(
        **{"max_tokens": limits.default_max_tokens, **given},
        bad_words=tuple(ids for ids in bad_words if max(ids) < limits.vocabulary),
        end_ids=end_ids,
        logprobs=_flag(row, "return_log_probs"),
    )


def _one(row: Mapping[str, Any], name: str) -> Any:
    values = row[name]
    if len(values) != 1:
        raise ValueError(f"{name} has {len(values)} values; it takes one")
    return values[0]


def _flag(row: Mapping[str, Any], name: str) -> bool:
    return name in row and bool(_one(row, name))


def _utf8(value: bytes | str, name: str) -> str:
    if isinstance(value, str):
        return value
    try:
        return bytes(value).decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not valid UTF-8: {error.reason} at byte {error.start}") from error


def error_response(message: str, code: str) -> Any:
    """A refusal or a failure; ``code`` is the name of one in ``pb_utils.TritonError``, or DEADLINE_EXCEEDED, which it lacks.

    The message begins with the name, because tritonserver sends no code with an error in a stream.
    """
    sent = getattr(pb_utils.TritonError, "CANCELLED" if code == "DEADLINE_EXCEEDED" else code)
    error = pb_utils.TritonError(f"[{code}] {message}", sent)
    return pb_utils.InferenceResponse(error=error)


def response(asked: Asked, updates: Sequence[Update], text: Text, tokens_per_block: int) -> Any:
    """The response that says ``updates``, one per row of the request."""
    pairs = list(zip(asked.echoes, updates, strict=True))
    tensors = [
        _strings("text_output", [[(echo + one.text).encode()] for echo, one in pairs]),
        _strings("finish_reason", [[(one.finish_reason or "").encode()] for one in updates]),
        _numbers("num_input_tokens", [len(one.job.generation.prompt) for one in updates], np.int32),
        _numbers("num_output_tokens", [one.output_tokens for one in updates], np.int32),
    ]
    if asked.log_probs:
        tensors += _log_probs(updates, text)
    if asked.perf_metrics:
        tensors += _perf_metrics(updates, tokens_per_block)
    return pb_utils.InferenceResponse(tensors)


def _log_probs(updates: Sequence[Update], text: Text) -> list[Any]:
    """Rows of different lengths are filled up with zeros and empty strings."""
    width = max(len(one.tokens) for one in updates)
    logprobs = np.zeros((len(updates), 1, width), np.float32)
    tokens = np.full((len(updates), width), b"", np.object_)
    for row, one in enumerate(updates):
        logprobs[row, 0, : len(one.logprobs)] = one.logprobs
        tokens[row, : len(one.tokens)] = [text.token_bytes(token) for token in one.tokens]
    sums = [sum(one.job.generation.logprobs[: one.output_tokens]) for one in updates]
    return [
        _numbers("cum_log_probs", sums, np.float32),
        pb_utils.Tensor("output_log_probs", logprobs),
        pb_utils.Tensor("output_tokens", tokens),
    ]


def _perf_metrics(updates: Sequence[Update], tokens_per_block: int) -> list[Any]:
    jobs = [one.job for one in updates]
    reused = [job.generation.reused_tokens // tokens_per_block for job in jobs]
    total = [-(-job.generation.length // tokens_per_block) for job in jobs]
    new = [whole - known for whole, known in zip(total, reused, strict=True)]
    return [
        _numbers("kv_cache_reused_blocks", reused, np.int32),
        _numbers("kv_cache_alloc_new_blocks", new, np.int32),
        _numbers("kv_cache_alloc_total_blocks", total, np.int32),
        _numbers("arrival_time_ns", [job.arrived_ns for job in jobs], np.int64),
        _numbers("first_scheduled_time_ns", [job.scheduled_ns for job in jobs], np.int64),
        _numbers("first_token_time_ns", [job.first_token_ns for job in jobs], np.int64),
        _numbers("last_token_time_ns", [job.last_token_ns for job in jobs], np.int64),
    ]


def _strings(name: str, rows: Sequence[Sequence[bytes]]) -> Any:
    return pb_utils.Tensor(name, np.array(rows, np.object_))


def _numbers(name: str, values: Sequence[float], dtype: type[np.generic]) -> Any:
    return pb_utils.Tensor(name, np.array([[value] for value in values], dtype))

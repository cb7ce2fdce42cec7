"""Triton requests as plain values, and answers as Triton tensors. The inputs and outputs are those of NVIDIA's model.

What a client got wrong is a ``ValueError`` that names the input, what was seen and what is allowed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

_ERRORS = ("INVALID_ARG", "UNAVAILABLE", "CANCELLED", "INTERNAL")
_FLAGS = ("return_finish_reason", "return_stop_reason", "return_cumulative_logprob")


@dataclass(frozen=True)
class Asked:
    """One request."""

    text: str
    streaming: bool
    max_tokens: int | None
    best_of: int | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    frequency_penalty: float | None
    presence_penalty: float | None
    seed: int | None
    stops: tuple[str, ...]
    exclude_input: bool
    return_perf_metrics: bool
    return_finish_reason: bool
    return_stop_reason: bool
    return_cumulative_logprob: bool

    def sampling(self, max_tokens: int) -> dict[str, Any]:
        """Keyword arguments of ``SamplingParams``, for an answer of at most ``max_tokens``.

        Greedy is said as ``top_k=1``: TensorRT-LLM's samplers disagree on a temperature of 0. A temperature alone
        gets ``top_p=1``, without which some of them ignore it.
        """
        given = {
            "temperature": self.temperature,
            "top_k": self.top_k,
            "top_p": self.top_p,
            "frequency_penalty": self.frequency_penalty,
            "presence_penalty": self.presence_penalty,
            "seed": self.seed,
            "best_of": self.best_of,
        }
        chosen: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        if self.temperature == 0:
            chosen = {name: value for name, value in chosen.items() if name not in ("temperature", "top_p")}
            chosen["top_k"] = 1
        elif self.temperature is not None and not self.top_k and self.top_p is None:
            chosen["top_p"] = 1.0
        if self.stops:
            chosen["stop"] = list(self.stops)
        if self.return_cumulative_logprob:
            chosen["logprobs"] = 1
        return {"max_tokens": max_tokens, "return_perf_metrics": self.return_perf_metrics, **chosen}


def wants_stop(request: Any) -> bool:
    """Whether the request only asks to end the running requests with its id."""
    return bool(_scalar(request, "stop", bool))


def read_request(request: Any) -> Asked:
    """The request as plain values.

    Raises:
        ValueError: an input is missing, has a wrong shape or value, or is not UTF-8.
    """
    asked = Asked(
        text=_text(request),
        streaming=bool(_scalar(request, "streaming", bool)),
        max_tokens=_scalar(request, "sampling_param_max_tokens", int),
        best_of=_scalar(request, "sampling_param_best_of", int),
        temperature=_scalar(request, "sampling_param_temperature", float),
        top_k=_scalar(request, "sampling_param_top_k", int),
        top_p=_scalar(request, "sampling_param_top_p", float),
        frequency_penalty=_scalar(request, "sampling_param_frequency_penalty", float),
        presence_penalty=_scalar(request, "sampling_param_presence_penalty", float),
        seed=_scalar(request, "sampling_param_seed", int),
        stops=tuple(
            _utf8(word, "sampling_param_stop") for word in _array(request, "sampling_param_stop") if word
        ),
        exclude_input=bool(_scalar(request, "sampling_param_exclude_input_from_output", bool)),
        return_perf_metrics=bool(_scalar(request, "sampling_param_return_perf_metrics", bool)),
        **{flag: bool(_scalar(request, flag, bool)) for flag in _FLAGS},
    )
    _check_ranges(asked)
    return asked


def _check_ranges(asked: Asked) -> None:
    rules = (
        ("max_tokens", asked.max_tokens, lambda value: value >= 1, "at least 1"),
        ("best_of", asked.best_of, lambda value: value >= 1, "at least 1"),
        ("temperature", asked.temperature, lambda value: 0 <= value <= 100, "from 0 (greedy) to 100"),
        ("top_k", asked.top_k, lambda value: value >= 0, "at least 0 (0: off)"),
        ("top_p", asked.top_p, lambda value: 0 < value <= 1, "above 0 and at most 1"),
        ("frequency_penalty", asked.frequency_penalty, math.isfinite, "a finite number"),
        ("presence_penalty", asked.presence_penalty, math.isfinite, "a finite number"),
    )
    for name, value, allows, allowed in rules:
        if value is not None and not allows(value):
            raise ValueError(f"sampling_param_{name} is {value}; allowed: {allowed}")


def _array(request: Any, name: str) -> Any:
    tensor = pb_utils.get_input_tensor_by_name(request, name)
    return np.empty(0, np.object_) if tensor is None else tensor.as_numpy().reshape(-1)


def _scalar(request: Any, name: str, kind: type) -> Any:
    array = _array(request, name)
    if array.size > 1:
        raise ValueError(f"{name} has {array.size} values; it takes one")
    return kind(array[0]) if array.size else None


def _text(request: Any) -> str:
    array = _array(request, "text_input")
    if array.size != 1:
        raise ValueError(
            f"text_input has {array.size} values; send one prompt per request, many requests at once"
        )
    return _utf8(array[0], "text_input")


def _utf8(value: bytes | str, name: str) -> str:
    if isinstance(value, str):
        return value
    try:
        return bytes(value).decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not valid UTF-8: {error.reason} at byte {error.start}") from error


@dataclass(frozen=True)
class Answered:
    """How a generation ended."""

    finish_reason: str
    stop_reason: str
    """The stop string or token that ended it; empty where nothing of the kind did."""
    cumulative_logprob: float | None
    perf_metrics: Any


def text_response(text: str) -> Any:
    """A piece of an answer."""
    return pb_utils.InferenceResponse([_strings("text_output", text)])


def final_response(text: str, asked: Asked, answered: Answered) -> Any:
    """The whole answer, or the last piece of a streamed one, with everything that was asked for beside the text."""
    tensors = [_strings("text_output", text)]
    if asked.return_finish_reason:
        tensors.append(_strings("finish_reason", answered.finish_reason))
    if asked.return_stop_reason:
        tensors.append(_strings("stop_reason", answered.stop_reason))
    if asked.return_cumulative_logprob:
        tensors.append(
            pb_utils.Tensor("cumulative_logprob", np.array([answered.cumulative_logprob], np.float32))
        )
    if asked.return_perf_metrics and answered.perf_metrics is not None:
        tensors += _perf_tensors(answered.perf_metrics)
    return pb_utils.InferenceResponse(tensors)


def error_response(message: str, code: int) -> Any:
    """A refusal or a failure; ``code`` is one of ``pb_utils.TritonError``.

    The message begins with the code's name, because tritonserver sends no code with an error in a stream.
    """
    name = next(name for name in _ERRORS if getattr(pb_utils.TritonError, name) == code)
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(f"[{name}] {message}", code))


def _strings(name: str, value: str) -> Any:
    return pb_utils.Tensor(name, np.array([value.encode()], np.object_))


def _perf_tensors(metrics: Any) -> list[Any]:
    cache, timing, drafting = metrics.kv_cache_metrics, metrics.timing_metrics, metrics.speculative_decoding
    values: dict[str, Any] = {
        "kv_cache_reused_block": np.int32(cache.num_reused_blocks),
        "kv_cache_missed_block": np.int32(cache.num_missed_blocks),
        "kv_cache_alloc_new_blocks": np.int32(cache.num_new_allocated_blocks),
        "kv_cache_alloc_total_blocks": np.int32(cache.num_total_allocated_blocks),
        "kv_cache_hit_rate": np.float32(cache.kv_cache_hit_rate),
        "arrival_time_ns": _nanoseconds(timing.arrival_time),
        "first_scheduled_time_ns": _nanoseconds(timing.first_scheduled_time),
        "first_token_time_ns": _nanoseconds(timing.first_token_time),
        "last_token_time_ns": _nanoseconds(timing.last_token_time),
        "acceptance_rate": np.float32(drafting.acceptance_rate),
        "total_accepted_draft_tokens": np.int32(drafting.total_accepted_draft_tokens),
        "total_draft_tokens": np.int32(drafting.total_draft_tokens),
    }
    return [pb_utils.Tensor(name, np.array([value])) for name, value in values.items()]


def _nanoseconds(moment: timedelta) -> np.int64:
    return np.int64(moment // timedelta(microseconds=1) * 1000)

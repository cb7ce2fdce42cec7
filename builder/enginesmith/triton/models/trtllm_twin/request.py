"""Reads requests to ``tensorrt_llm`` into tasks, refuses what TensorRT-LLM refuses, and names what cannot be played.

Source of the rules: ``triton_backend/inflight_batcher_llm/src/utils.cc`` of TensorRT-LLM 1.2 and the checks of its
executor. Knows nothing of Triton; not shipped.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from enginesmith.triton.models.llm_onnxruntime.llm_runtime import Sampling
from enginesmith.triton.models.trtllm_twin.play import Steering, Task

Arrays = Mapping[str, Any]

_NOT_PLAYED = (
    "encoder_input_features",
    "encoder_output_lengths",
    "draft_input_ids",
    "draft_logits",
    "draft_acceptance_threshold",
    "prompt_embedding_table",
    "prompt_vocab_size",
    "cross_attention_mask",
    "mrope_rotary_cos_sin",
    "mrope_position_deltas",
    "lora_task_id",
    "lora_weights",
    "lora_config",
    "context_phase_params",
    "skip_cross_attn_blocks",
    "guided_decoding_guide_type",
    "guided_decoding_guide",
    "lookahead_window_size",
    "lookahead_ngram_size",
    "lookahead_verification_set_size",
)
_NOT_PLAYED_FLAGS = ("return_context_logits", "return_generation_logits")
_ONE_ONLY = ("beam_width", "num_return_sequences")


class NotServedError(ValueError):
    """The request is answered with an error."""


@dataclass(frozen=True)
class Limits:
    """What the engine was compiled for, as ``limits.json`` says."""

    max_input_len: int
    max_seq_len: int
    vocab_size: int


def read_tasks(inputs: Arrays, limits: Limits, *, decoupled: bool) -> list[Task]:
    """One task for each row of a request.

    Raises:
        NotServedError: TensorRT-LLM would refuse it, or it cannot be played here.
    """
    if given := [name for name in _NOT_PLAYED if name in inputs]:
        raise NotServedError(f"the stand-in for the engine cannot play: {', '.join(given)}")
    if "input_ids" not in inputs:
        raise NotServedError("input_ids is not present in the request")
    rows = len(inputs["input_ids"])
    if rows > 1 and not decoupled:
        raise NotServedError("more than one row in a request needs the decoupled transaction policy")
    if read_flag(inputs, "streaming", 0) and not decoupled:
        raise NotServedError("streaming needs the decoupled transaction policy")
    return [_task({name: array[row] for name, array in inputs.items()}, limits) for row in range(rows)]


def read_flag(inputs: Arrays, name: str, row: int, *, default: bool = False) -> bool:
    """A boolean input of one row."""
    return bool(np.ravel(inputs[name])[row]) if name in inputs else default


def _task(row: Arrays, limits: Limits) -> Task:
    for name in _NOT_PLAYED_FLAGS:
        if _number(row, name, 0):
            raise NotServedError(f"the stand-in for the engine cannot play: {name}")
    for name in _ONE_ONLY:
        if _number(row, name, 1) != 1:
            raise NotServedError(f"the stand-in for the engine cannot play: {name} {_number(row, name, 1):g}")
    prompt = tuple(int(token) for token in row["input_ids"][: int(np.ravel(row["input_lengths"])[0])])
    if not prompt or min(prompt) < 0 or max(prompt) >= limits.vocab_size:
        raise NotServedError(f"input_ids must hold tokens from 0 to {limits.vocab_size - 1}, at least one")
    if len(prompt) > limits.max_input_len:
        raise NotServedError(
            f"the prompt's length {len(prompt)} exceeds the maximum input length {limits.max_input_len}"
        )
    max_tokens = int(np.ravel(row["request_output_len"])[0])
    if max_tokens < 1:
        raise NotServedError(f"request_output_len is {max_tokens}; it must be positive")
    try:
        # As the executor does: an answer that does not fit is shortened, not refused.
        sampling = _sampling(row, min(max_tokens, limits.max_seq_len - len(prompt)))
    except ValueError as error:
        raise NotServedError(str(error)) from error
    return Task(prompt, sampling, _steering(row))


def _sampling(row: Arrays, max_tokens: int) -> Sampling:
    """Greedy unless top_k or top_p ask for more than one candidate, whatever the temperature."""
    top_k, top_p = int(_number(row, "runtime_top_k", 0)), _number(row, "runtime_top_p", 0.0)
    samples = top_k > 1 or (top_k == 0 and top_p > 0)
    return Sampling(
        max_tokens=max_tokens,
        temperature=_number(row, "temperature", 1.0) if samples else 0.0,
        top_k=top_k,
        top_p=top_p if top_p > 0 else 1.0,
        repetition_penalty=_number(row, "repetition_penalty", 1.0),
        seed=int(np.ravel(row["seed"])[0]) if "seed" in row else 0,
    )


def _steering(row: Arrays) -> Steering:
    bias = row.get("embedding_bias")
    return Steering(
        end_id=int(_number(row, "end_id", -1)),
        stop_words=read_words(row.get("stop_words_list")),
        bad_words=read_words(row.get("bad_words_list")),
        bias=bias if bias is not None and len(bias) else None,
        min_tokens=int(_number(row, "min_tokens", 0)),
        presence_penalty=_number(row, "presence_penalty", 0.0),
        frequency_penalty=_number(row, "frequency_penalty", 0.0),
    )


def read_words(pair: Any) -> tuple[tuple[int, ...], ...]:
    """The words in int32 [2, n]: all tokens, and where each word ends, increasing, padded with -1.

    Raises:
        NotServedError: the offsets are not of that form.
    """
    if pair is None or pair.shape[-1] == 0:
        return ()
    tokens, ends = pair[0].tolist(), [int(end) for end in pair[1] if end >= 0]
    if ends != sorted(set(ends)) or (ends and not 0 < ends[0] <= ends[-1] <= len(tokens)):
        raise NotServedError(
            f"a word list has offsets {ends}, which must increase up to {len(tokens)} at most"
        )
    return tuple(tuple(tokens[start:end]) for start, end in zip([0, *ends], ends, strict=False))


def _number(row: Arrays, name: str, default: float) -> float:
    return float(np.ravel(row[name])[0]) if name in row else default

"""What the text models of a Triton server call their tensors. Tables; pure.

A model takes part by the tensors that its metadata lists, so a dialect holds names and nothing else. Sources:
``ensemble`` and ``tensorrt_llm_bls`` of TensorRT-LLM's ``inflight_batcher_llm``, its ``llmapi/tensorrt_llm``
(release 1.2.1), and docs/serving.md for what enginesmith's own models add.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from enginesmith_client._messages import ModelMetadata

TEXT_INPUT = "text_input"
MESSAGES = "messages"
TEXT_OUTPUT = "text_output"
FINISH_REASON = "finish_reason"
PROMPT_TOKENS = "num_input_tokens"
OUTPUT_TOKENS = "num_output_tokens"
LOGPROBS = "output_log_probs"
TOKENS = "output_tokens"


@dataclass(frozen=True)
class Dialect:
    """The inputs of a kind of text model."""

    options: Mapping[str, str]
    """The input that carries each option of ``Client.generate``."""
    stream: str
    """BOOL: whether the answer comes in pieces."""
    always: tuple[str, ...]
    """BOOL inputs that are sent as true where the model has them: the answer without the prompt, and what it reports."""
    counts_pieces: bool
    """Whether the number of output tokens is that of one response, not of all responses so far."""


_TRITON_OPTIONS = {
    "max_tokens": "max_tokens",
    "min_tokens": "min_tokens",
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "repetition_penalty": "repetition_penalty",
    "presence_penalty": "presence_penalty",
    "frequency_penalty": "frequency_penalty",
    "seed": "seed",
    "stop": "stop_words",
    "chat": "apply_chat_template",
    "logprobs": "return_log_probs",
}
_TRITON_FLAGS = ("exclude_input_in_output", "return_num_input_tokens", "return_num_output_tokens")

ENGINESMITH = Dialect(_TRITON_OPTIONS, "stream", _TRITON_FLAGS, counts_pieces=False)
TENSORRT_LLM = Dialect(_TRITON_OPTIONS, "stream", _TRITON_FLAGS, counts_pieces=True)
LLM_API = Dialect(
    {
        "max_tokens": "sampling_param_max_tokens",
        "temperature": "sampling_param_temperature",
        "top_k": "sampling_param_top_k",
        "top_p": "sampling_param_top_p",
        "presence_penalty": "sampling_param_presence_penalty",
        "frequency_penalty": "sampling_param_frequency_penalty",
        "seed": "sampling_param_seed",
        "stop": "sampling_param_stop",
    },
    "streaming",
    ("sampling_param_exclude_input_from_output", "return_finish_reason"),
    counts_pieces=False,
)


def dialect_of(metadata: ModelMetadata) -> Dialect:
    """The dialect of a text model, told by the tensors that only one of them has."""
    if metadata.input(LLM_API.options["max_tokens"]) is not None or metadata.input("streaming") is not None:
        return LLM_API
    return ENGINESMITH if metadata.output(FINISH_REASON) is not None else TENSORRT_LLM

"""``SamplingParams`` as TensorRT-LLM 1.2 has it: the fields, their defaults, and what it refuses."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

# Fields that change the answer and that the CPU engine cannot honour.
_NOT_PLAYED = (
    "bad", "bad_token_ids", "stop_token_ids", "embedding_bias", "logits_processor", "use_beam_search",
    "top_p_min", "top_p_decay", "min_tokens", "presence_penalty", "frequency_penalty", "length_penalty",
    "no_repeat_ngram_size", "min_p", "logprobs", "prompt_logprobs", "return_context_logits",
    "return_generation_logits", "guided_decoding", "ignore_eos", "truncate_prompt_tokens",
)  # fmt: skip


@dataclass(kw_only=True)
class SamplingParams:
    """How one answer is chosen. A field that TensorRT-LLM does not have is a TypeError, as there."""

    end_id: int | None = None
    pad_id: int | None = None
    max_tokens: int = 32
    bad: Any = None
    bad_token_ids: Any = None
    stop: str | list[str] | None = None
    stop_token_ids: Any = None
    include_stop_str_in_output: bool = False
    embedding_bias: Any = None
    logits_processor: Any = None
    apply_batched_logits_processor: bool = False
    n: int = 1
    best_of: int | None = None
    use_beam_search: bool = False
    top_k: int | None = None
    top_p: float | None = None
    top_p_min: float | None = None
    top_p_reset_ids: int | None = None
    top_p_decay: float | None = None
    seed: int | None = None
    temperature: float | None = None
    min_tokens: int | None = None
    beam_search_diversity_rate: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    length_penalty: float | None = None
    early_stopping: int | None = None
    no_repeat_ngram_size: int | None = None
    min_p: float | None = None
    beam_width_array: Any = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    return_context_logits: bool = False
    return_generation_logits: bool = False
    exclude_input_from_output: bool = True
    return_encoder_output: bool = False
    return_perf_metrics: bool = False
    additional_model_outputs: Any = None
    lookahead_config: Any = None
    guided_decoding: Any = None
    ignore_eos: bool = False
    detokenize: bool = True
    add_special_tokens: bool = True
    truncate_prompt_tokens: int | None = None
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True

    def __post_init__(self) -> None:
        self.best_of = self.best_of or self.n
        if self.best_of < self.n:
            raise ValueError(f"best_of ({self.best_of}) cannot be less than n ({self.n})")
        greedy = self.top_k in (None, 1) and self.top_p in (None, 0.0)
        if self.best_of > 1 and greedy and not self.use_beam_search:
            raise ValueError(
                f"greedy decoding does not allow several answers: set best_of to 1, got {self.best_of}"
            )

    def refuse_what_is_not_played(self) -> None:
        """Raise ``ValueError`` for a field that the rehearsal cannot honour."""
        defaults = {field.name: field.default for field in fields(self)}
        for name in _NOT_PLAYED:
            value = getattr(self, name)
            if value != defaults[name] and value != 0:
                raise ValueError(f"the rehearsal's engine cannot play {name}={value!r}")
        if self.best_of != 1:
            raise ValueError(f"the rehearsal's engine cannot play best_of={self.best_of}")

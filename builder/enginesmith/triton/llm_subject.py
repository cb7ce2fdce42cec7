"""What a packaged language model should answer, found by asking its own runtime in this process.

A prompt alone and the same prompt in company may get different greedy answers, both right: kernels add in another order
for other batch sizes, and INT8 activations (mode "fast") turn the last bit of a sum into another integer. In flight the
company of a request changes at every token, so the possible answers cannot be listed. What can be said is whether an
answer is one that the engine could give: whether each of its tokens was, after those before it, as likely as the best
but for what kernels may differ by (``LOGIT_TOLERANCE``).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from enginesmith.triton.models.llm_onnxruntime.llm_text import Text

PROMPTS = (
    "The capital of France is",
    "Once upon a time there was a",
    "Water boils when",
)
QUESTION = "What is the capital of France?"
MAX_TOKENS = 16
LOGIT_TOLERANCE = {True: 2.0, False: 0.01}
"""By whether the engine computes with INT8 activations. There, logits alone and in a batch were seen 0.9 apart."""
_PROMPT_TOKENS = 15
"""Fewer than the smallest block of the prefix cache, so that asking twice computes the same twice."""
_LONG_BLOCKS = 3
_MOST_PASSES = 512
"""Passes of the engine after which an answer is held impossible."""
_LONG_TEXT = "The river flows from the hills in the north down to the sea, past the mill and the old bridge. "


@dataclass(frozen=True)
class Subject:
    """What the rehearsed package should answer, greedily, and what its limits are."""

    prompts: tuple[str, ...]
    alone: tuple[str, ...]
    """The answer to each prompt when it runs by itself."""
    log_probs: tuple[float, ...]
    """Of the tokens of the first answer."""
    chat: tuple[str, str] | None
    """A question and its answer as a chat message; None where the model has no chat template."""
    could_answer: Callable[[str, str], bool]
    """Whether the engine could give this answer (second) to this prompt (first), in some company."""
    too_long: str
    prompt_limit: int
    sequence_limit: int
    slots: int
    max_queue_size: int
    """0: no limit."""
    may_time_out: bool
    """Requests may be refused because they waited too long."""
    reusable: str | None
    """A prompt with blocks that the prefix cache keeps; None where there is no cache, or no room for such a prompt."""


def read_subject(package: Path) -> Subject:
    """Ask the runtime in ``package`` directly."""
    from enginesmith.triton.models.llm_onnxruntime.llm_runtime import Runtime, Sampling
    from enginesmith.triton.models.llm_onnxruntime.llm_text import Text

    version = package / "1"
    serving = json.loads((version / "serving.json").read_text(encoding="utf-8"))
    limit = int(serving["max_prompt_length"])
    text = Text(version)
    runtime = Runtime(
        version,
        slots=min(2, serving["max_batch_size"]),
        capacity=serving["max_sequence_length"],
        threads=serving["threads"],
        batch_invariant=serving["batch_invariant"],
    )

    def answer_to(ids: Sequence[int]) -> Any:
        return runtime.generate([ids], Sampling(max_tokens=MAX_TOKENS, logprobs=True))[0]

    prompts = tuple(_shortened(prompt, min(limit, _PROMPT_TOKENS), text.encode) for prompt in PROMPTS)
    alone = [answer_to(text.encode(prompt)) for prompt in prompts]
    chat = _shortened(QUESTION, limit, lambda question: _chat_ids(text, question))
    return Subject(
        prompts=prompts,
        alone=tuple(text.decode(generation.tokens) for generation in alone),
        log_probs=tuple(alone[0].logprobs),
        chat=(chat, text.decode(answer_to(_chat_ids(text, chat)).tokens)) if text.has_chat_template else None,
        could_answer=PossibleAnswers(version, text, capacity=runtime.capacity).could_answer,
        too_long="word " * (limit + 1),
        prompt_limit=limit,
        sequence_limit=int(serving["max_sequence_length"]),
        slots=int(serving["max_batch_size"]),
        max_queue_size=int(serving["max_queue_size"]),
        may_time_out=bool(serving["queue_timeout_us"]),
        reusable=_reusable(serving["kv_cache"], limit, text.encode),
    )


class PossibleAnswers:
    """Tells answers that the engine in ``version`` could give from those that it could not.

    It has a session of its own, made when it is first needed: an engine in exact mode answers in company as it does alone.
    """

    def __init__(self, version: Path, text: Text, *, capacity: int) -> None:
        self._version, self._text, self._capacity = version, text, capacity
        self._engine: dict[str, Any] = json.loads((version / "engine.json").read_text(encoding="utf-8"))
        approximates = bool(self._engine["accuracy_level"] != 1 or self._engine["int8_head"])
        self._tolerance = LOGIT_TOLERANCE[approximates]
        self._known: dict[tuple[str, str], bool] = {}

    def could_answer(self, prompt: str, answer: str) -> bool:
        """Whether ``answer``, of at most ``MAX_TOKENS`` tokens, may be a greedy answer to ``prompt``."""
        if (prompt, answer) not in self._known:
            ids = self._text.encode(prompt)
            left = [_MOST_PASSES]
            longest = min(MAX_TOKENS, self._capacity - len(ids))
            self._known[prompt, answer] = self._reaches(answer, ids, [], longest=longest, left=left)
        return self._known[prompt, answer]

    def _reaches(
        self, answer: str, prompt: list[int], tokens: list[int], *, longest: int, left: list[int]
    ) -> bool:
        """Whether likely tokens after ``tokens`` lead to ``answer``; ``left`` counts the passes that may still be made."""
        if len(tokens) == longest:
            return self._text.decode(tokens) == answer
        if not left[0]:
            return False
        left[0] -= 1
        logits = self._logits([*prompt, *tokens])
        likely = np.flatnonzero(logits >= logits.max() - self._tolerance)
        for token in likely[np.argsort(-logits[likely], kind="stable")].tolist():
            so_far = [*tokens, token]
            said = self._text.decode(so_far)
            if token in self._engine["eos_token_ids"]:
                if said == answer:
                    return True
            elif answer.startswith(said.rstrip("\ufffd")) and self._reaches(
                answer, prompt, so_far, longest=longest, left=left
            ):
                return True
        return False

    def _logits(self, ids: list[int]) -> npt.NDArray[np.float32]:
        """float32 [vocabulary] after ``ids``, computed at once."""
        feed = {
            "input_ids": np.array([ids], np.int64),
            "attention_mask": np.ones((1, len(ids)), np.int64),
            "logits_to_keep": np.ones(1, np.int64),
            **self._no_past,
        }
        logits: npt.NDArray[np.float32] = self._session.run(["logits"], feed)[0][0, -1]
        return logits

    @cached_property
    def _session(self) -> Any:
        from enginesmith.triton.models.llm_onnxruntime.llm_runtime import create_session

        return create_session(self._version / "model.onnx", self._engine, threads=0)

    @cached_property
    def _no_past(self) -> Mapping[str, npt.NDArray[np.float32]]:
        empty = np.zeros((1, self._engine["kv_heads"], 0, self._engine["head_dim"]), np.float32)
        layers, parts = range(self._engine["layers"]), ("key", "value")
        return {f"past_key_values.{layer}.{part}": empty for layer in layers for part in parts}


def _chat_ids(text: Text, question: str) -> list[int]:
    return text.encode(text.as_chat(question) if text.has_chat_template else question, chat=True)


def _shortened(prompt: str, limit: int, encode: Callable[[str], Sequence[int]]) -> str:
    while len(encode(prompt)) > limit and prompt:
        prompt = prompt[: len(prompt) // 2]
    return prompt


def _reusable(kv_cache: Mapping[str, Any], limit: int, encode: Callable[[str], Sequence[int]]) -> str | None:
    if not kv_cache["reuse"]:
        return None
    wanted = _LONG_BLOCKS * int(kv_cache["tokens_per_block"]) + 1
    prompt = _shortened(_LONG_TEXT * (wanted // len(encode(_LONG_TEXT)) + 1), limit, encode)
    return prompt if len(encode(prompt)) > int(kv_cache["tokens_per_block"]) else None

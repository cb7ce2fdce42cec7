"""What a rehearsed LLM API model should answer, as its twin answers in this process, without a server."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from enginesmith.spec import Serving

PROMPTS = (
    "The capital of France is",
    "Once upon a time there was a",
    "Water boils when",
    "café 東京 🙂🙂 means",
)
MAX_TOKENS = 16
SAMPLING = {"temperature": 0.8, "top_k": 50, "top_p": 0.95, "seed": 7}

Generate = Callable[..., list[int]]
"""The tokens of the answer to a prompt's tokens; sampling parameters by name."""


@dataclass(frozen=True)
class Subject:
    """Prompts and the answers to them, each generated alone."""

    prompts: tuple[str, ...]
    answers: tuple[str, ...]
    """Greedy, at most ``MAX_TOKENS`` tokens."""
    sampled: str
    """The answer to the second prompt with ``SAMPLING``."""
    stops: tuple[str, ...]
    """Strings inside the first answer, after its beginning."""
    too_long: str
    prompt_limit: int


def read_subject(checkpoint: Path, engine: Path | None, serving: Serving) -> Subject:
    """Ask the twin in ``engine``, or, where there is none, repeat the prompts' own tokens."""
    from enginesmith.triton.models.llm_onnxruntime.llm_text import Text

    text = Text(checkpoint)
    generate = _twin(engine, serving) if engine is not None else _echo(serving)
    limit = serving.prompt_limit
    prompts = tuple(_shortened(prompt, limit, text.encode) for prompt in PROMPTS)
    answers = [generate(text.encode(prompt), {}) for prompt in prompts]
    return Subject(
        prompts=prompts,
        answers=tuple(text.decode(tokens) for tokens in answers),
        sampled=text.decode(generate(text.encode(prompts[1]), SAMPLING)),
        stops=_inside(answers[0], text.decode),
        too_long="word " * (limit + 1),
        prompt_limit=limit,
    )


def _twin(engine: Path, serving: Serving) -> Generate:
    from enginesmith.triton.models.llm_onnxruntime.llm_runtime import Runtime, Sampling

    runtime = Runtime(engine, slots=1, capacity=serving.max_sequence_length)

    def generate(prompt: Sequence[int], sampling: dict[str, Any]) -> list[int]:
        return runtime.generate([prompt], Sampling(max_tokens=MAX_TOKENS, **sampling))[0].tokens

    return generate


def _echo(serving: Serving) -> Generate:
    def generate(prompt: Sequence[int], _sampling: dict[str, Any]) -> list[int]:
        return list(prompt)[: min(MAX_TOKENS, serving.max_sequence_length - len(prompt))]

    return generate


def _inside(tokens: Sequence[int], decode: Callable[[Sequence[int]], str]) -> tuple[str, ...]:
    """Up to two strings in the answer: the text of two of its tokens, and one that cuts through tokens."""
    answer = decode(tokens)
    aligned = decode(tokens[3:5])
    across = answer[len(answer) // 2 - 1 : len(answer) // 2 + 2]
    return tuple(
        dict.fromkeys(word for word in (aligned, across) if word and "\ufffd" not in word and word in answer)
    )


def _shortened(prompt: str, limit: int, encode: Callable[[str], Sequence[int]]) -> str:
    while len(encode(prompt)) > limit and prompt:
        prompt = prompt[: len(prompt) // 2]
    return prompt

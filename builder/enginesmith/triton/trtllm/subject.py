"""What a rehearsed deployment should answer: the stand-in for the engine, asked directly in this process.

Tokenizer, words and text are handled here by other code than the repository's own, on purpose.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from enginesmith.engines.tensorrt_llm.arguments import effective_max_num_tokens
from enginesmith.errors import GateError, SourceError
from enginesmith.spec import Serving
from enginesmith.targets import TensorRtLlmTarget
from enginesmith.triton.trtllm.assemble import LIMITS_FILE, end_tokens

PROMPTS = ("The capital of France is", "Once upon a time there was a", "Water boils when")
MANY_BYTES = "naïve café 👩‍🚀🇫🇷 日本語のテキスト 한국어 🙂"
MAX_TOKENS = 16
SAMPLING: dict[str, tuple[float, ...]] = {
    "temperature": (0.8,),
    "top_k": (50,),
    "top_p": (0.95,),
    "repetition_penalty": (1.1,),
    "seed": (7,),
}
_BIAS = 4.0


@dataclass(frozen=True)
class Word:
    """A word that changes the first prompt's answer when it stops it, and otherwise when it is forbidden."""

    text: str
    stopped: tuple[int, ...]
    without: tuple[int, ...]


class Subject:
    """The expected answers of a deployment whose engine is played by ``player``."""

    def __init__(
        self, checkpoint: Path, limits: dict[str, Any], target: TensorRtLlmTarget, player: Any
    ) -> None:
        from tokenizers import Tokenizer

        path = checkpoint / "tokenizer.json"
        if not path.is_file():
            raise SourceError(f"tokenizer.json is missing in {checkpoint}", hint="build the fetch step again")
        self._tokenizer = Tokenizer.from_file(str(path))
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._limits = limits
        self._target = target
        self._player = player
        self._answers: dict[tuple[object, ...], tuple[int, ...]] = {}
        self.prompt_limit = int(limits["max_input_len"])
        self.prompts = tuple(self._shortened(prompt) for prompt in PROMPTS)
        self.many_bytes = self._shortened(MANY_BYTES)
        self.too_long = "word " * (self.prompt_limit + 1)
        self.end_id = int(limits["end_id"])

    def encode(self, text: str) -> tuple[int, ...]:
        """A prompt's tokens."""
        return tuple(self._tokenizer.encode(text, add_special_tokens=self._target.add_special_tokens).ids)

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens."""
        text: str = self._tokenizer.decode(list(tokens), skip_special_tokens=self._target.skip_special_tokens)
        return text

    def decode_singly(self, tokens: Sequence[int]) -> str:
        """What a stream shows when every token is decoded by itself."""
        return "".join(self.decode([token]) for token in tokens)

    def whole(self, prompt: str, answer: Sequence[int]) -> str:
        """Prompt and answer as one text, which is how an answer that comes in one piece looks."""
        return self.decode([*self.encode(prompt), *answer])

    def answer(
        self,
        prompt: str,
        *,
        stop: str | None = None,
        bad: str | None = None,
        bias: str | None = None,
        sampled: bool = False,
    ) -> tuple[int, ...]:
        """The tokens of the answer to ``prompt``."""
        asked = (prompt, stop, bad, bias, sampled)
        if asked not in self._answers:
            self._answers[asked] = self._play(prompt, stop=stop, bad=bad, bias=bias, sampled=sampled)
        return self._answers[asked]

    def _play(
        self, prompt: str, *, stop: str | None, bad: str | None, bias: str | None, sampled: bool
    ) -> tuple[int, ...]:
        import numpy as np

        from enginesmith.triton.models.llm_onnxruntime.llm_runtime import Sampling
        from enginesmith.triton.models.trtllm_twin.play import Steering, Task, answer

        tokens = self.encode(prompt)
        room = int(self._limits["max_seq_len"]) - len(tokens)
        options: dict[str, Any] = {name: values[0] for name, values in SAMPLING.items()} if sampled else {}
        weights = None
        if bias is not None:
            weights = np.zeros(int(self._limits["vocab_size"]), np.float32)
            np.add.at(weights, list(self._word(bias)), _BIAS)
        further = tuple((token,) for token in self._limits["further_end_ids"])
        steering = Steering(
            end_id=int(self._limits["end_id"]),
            stop_words=(*((self._word(stop),) if stop else ()), *further),
            bad_words=(self._word(bad),) if bad else (),
            bias=weights,
        )
        sampling = Sampling(max_tokens=min(MAX_TOKENS, room), **options)
        return tuple(answer(self._player, Task(tokens, sampling, steering)))

    @cached_property
    def with_end(self) -> str | None:
        """The first prompt and the end token's own text; None where no text becomes that token, or none that fits."""
        if self.end_id < 0:
            return None
        prompt = self.prompts[0] + str(self._tokenizer.decode([self.end_id], skip_special_tokens=False))
        tokens = self.encode(prompt)
        fits = len(tokens) <= self.prompt_limit and len(tokens) < int(self._limits["max_seq_len"])
        return prompt if fits and self.end_id in tokens else None

    def echo(self, prompt: str, max_tokens: int) -> tuple[int, ...]:
        """The tokens of an answer that repeats the prompt's."""
        tokens = self.encode(prompt)
        return (tokens * (max_tokens // len(tokens) + 1))[:max_tokens]

    @property
    def bias(self) -> dict[str, tuple[object, ...]]:
        """The inputs that make the first prompt's word more likely."""
        return {
            "embedding_bias_words": (self.word.text.encode(),),
            "embedding_bias_weights": (_BIAS,),
        }

    @cached_property
    def word(self) -> Word:
        """Chosen from the first prompt's answer, so that stopping at it and forbidding it both show."""
        prompt = self.prompts[0]
        plain = self.answer(prompt)
        for token in plain:
            text = self.decode([token])
            if not text.strip() or "\ufffd" in text:
                continue
            stopped, without = self.answer(prompt, stop=text), self.answer(prompt, bad=text)
            if len({plain, stopped, without}) == 3:
                return Word(text, stopped, without)
        text = self.decode(plain[:1]) or prompt
        return Word(text, self.answer(prompt, stop=text), self.answer(prompt, bad=text))

    def spanning_stop(self, prompt: str) -> str:
        """A text of the answer that begins inside one token and ends inside another, where there is one."""
        text = self.decode(self.answer(prompt))
        pieces = [len(self.decode([token])) for token in self.answer(prompt)]
        start = sum(pieces[: len(pieces) // 2]) - 1
        stop = text[max(0, start) : start + 2]
        return stop if len(stop) == 2 else text[-2:]

    def _word(self, text: str) -> tuple[int, ...]:
        return tuple(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def _shortened(self, prompt: str) -> str:
        while len(self.encode(prompt)) > self.prompt_limit and len(prompt) > 1:
            prompt = prompt[: len(prompt) // 2]
        return prompt


def read_limits(
    repository: Path, checkpoint: Path, target: TensorRtLlmTarget, serving: Serving
) -> dict[str, Any]:
    """The limits that the repository relies on.

    Raises:
        SourceError: a ``limits.json`` cannot be read.
        GateError: the two of them differ, or differ from the spec or the checkpoint.
    """
    paths = [
        repository / target.triton_model(part) / "1" / LIMITS_FILE
        for part in ("preprocessing", "tensorrt_llm")
    ]
    limits, relied_on = map(_read_limits, paths)
    wanted = {
        "max_batch_size": serving.max_batch_size,
        "max_input_len": serving.prompt_limit,
        "max_seq_len": serving.max_sequence_length,
        "max_num_tokens": effective_max_num_tokens(target, serving),
        "max_beam_width": target.max_beam_width,
        "vocab_size": json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))["vocab_size"],
        **end_tokens(checkpoint),
    }
    problems = [
        f"{path}: {name} is {seen.get(name)}, wanted is {value}"
        for path, seen in zip(paths, (limits, relied_on), strict=True)
        for name, value in wanted.items()
        if seen.get(name) != value
    ]
    if limits != relied_on and not problems:
        problems = [f"{paths[0]} and {paths[1]} differ"]
    if problems:
        raise GateError(
            f"the limits of the repository are not those that were asked for: {'; '.join(problems)}",
            hint="build the assemble step again",
        )
    return limits


def _read_limits(path: Path) -> dict[str, Any]:
    try:
        limits: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SourceError(f"cannot read {path}: {error}", hint="build the assemble step again") from error
    return limits

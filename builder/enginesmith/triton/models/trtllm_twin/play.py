"""Generates as the model ``tensorrt_llm`` would, on a CPU: one sequence at a time, token by token.

``Twin`` runs the ONNX Runtime engine made from the same integers. ``Echo`` stands in where there is none and answers
with the prompt's own tokens, again and again. Semantics of words, penalties and the end token follow TensorRT-LLM 1.2
(``samplingTopKKernels.cu``: the end token is never part of an answer; stop words are). Not shipped: it plays in
rehearsals only.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from enginesmith.triton.models.llm_onnxruntime.llm_runtime import (
    Generation,
    Logits,
    Runtime,
    Sampling,
    choose_token,
)


@dataclass(frozen=True)
class Steering:
    """What bends the choice of tokens beside sampling."""

    end_id: int = -1
    stop_words: tuple[tuple[int, ...], ...] = ()
    bad_words: tuple[tuple[int, ...], ...] = ()
    bias: npt.NDArray[np.float32] | None = None
    """float32 [vocabulary], added to the logits."""
    min_tokens: int = 0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0


@dataclass(frozen=True)
class Task:
    """One row of a request."""

    prompt: tuple[int, ...]
    sampling: Sampling
    steering: Steering = Steering()


@dataclass(frozen=True)
class Step:
    """What one step of the engine brings."""

    token: int | None
    """None where the end token came."""
    log_prob: float
    ended: bool


class Player(Protocol):
    """Whoever plays the engine."""

    def steps(self, task: Task) -> Iterator[Step]:
        """The answer to ``task``; closing the iterator ends the generation."""


@dataclass
class _Sequence(Generation):
    """A running answer that is steered."""

    steering: Steering = field(default_factory=Steering)
    log_prob: float = 0.0

    def accept(self, logits: Logits) -> None:
        """Choose the next token and see whether it is the last."""
        steered = self._steered(logits)
        token = choose_token(steered, self)
        best = float(steered.max())
        self.log_prob = float(steered[token] - best - np.log(np.exp(steered - best).sum()))
        self.tokens.append(token)
        if token == self.steering.end_id or ends_with_word(self.tokens, self.steering.stop_words):
            self.finish_reason = "stop"
        elif len(self.tokens) >= self.sampling.max_tokens:
            self.finish_reason = "length"

    def _steered(self, logits: Logits) -> Logits:
        steered, steering = logits.copy(), self.steering
        if steering.bias is not None:
            steered[: len(steering.bias)] += steering.bias[: len(steered)]
        if self.tokens and (steering.presence_penalty or steering.frequency_penalty):
            seen, counts = np.unique(np.asarray(self.tokens), return_counts=True)
            steered[seen] -= steering.presence_penalty + steering.frequency_penalty * counts
        so_far = [*self.prompt, *self.tokens]
        for word in steering.bad_words:
            if len(word) == 1 or tuple(so_far[-(len(word) - 1) :]) == word[:-1]:
                steered[word[-1]] = -np.inf
        if len(self.tokens) < steering.min_tokens and steering.end_id >= 0:
            steered[steering.end_id] = -np.inf
        return steered


class _SteeredRuntime(Runtime):
    """The served runtime, whose sequences choose their tokens themselves."""

    def _accept(self, slot: int, logits: Logits) -> None:
        sequence = self.running[slot]
        assert isinstance(sequence, _Sequence)
        sequence.accept(logits)


class Twin:
    """The ONNX Runtime engine in ``directory``, for sequences of up to ``capacity`` tokens."""

    def __init__(self, directory: Path, *, capacity: int, threads: int = 0) -> None:
        self._runtime = _SteeredRuntime(directory, slots=1, capacity=capacity, threads=threads)

    def steps(self, task: Task) -> Iterator[Step]:
        """The answer to ``task``; closing the iterator ends the generation."""
        sequence = _Sequence(task.prompt, task.sampling, steering=task.steering)
        try:
            self._runtime.start(sequence)
            while True:
                ended = sequence.finish_reason is not None
                token = sequence.tokens[-1]
                came_end = token == task.steering.end_id
                yield Step(None if came_end else token, sequence.log_prob, ended)
                if ended:
                    return
                self._runtime.step()
        finally:
            self._runtime.clear()


class Echo:
    """Answers with the prompt's tokens, from the first and over again."""

    def steps(self, task: Task) -> Iterator[Step]:
        """The answer to ``task``."""
        answer: list[int] = []
        banned = {word[0] for word in task.steering.bad_words if len(word) == 1}
        allowed = [token for token in task.prompt if token not in banned] or list(task.prompt)
        for token in itertools.islice(itertools.cycle(allowed), task.sampling.max_tokens):
            answer.append(token)
            came_end = token == task.steering.end_id
            ended = (
                came_end
                or ends_with_word(answer, task.steering.stop_words)
                or len(answer) == task.sampling.max_tokens
            )
            yield Step(None if came_end else token, 0.0, ended)
            if ended:
                return


def ends_with_word(tokens: Sequence[int], words: Sequence[Sequence[int]]) -> bool:
    """Whether one of ``words`` is the end of ``tokens``."""
    return any(len(word) <= len(tokens) and list(tokens[-len(word) :]) == list(word) for word in words)


def answer(player: Player, task: Task) -> list[int]:
    """The whole answer to ``task``."""
    return [step.token for step in player.steps(task) if step.token is not None]

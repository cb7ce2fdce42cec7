"""Generation with one ONNX Runtime session and a batch whose members come and go at any token.

Self-contained: it is copied into the version directory of the served model and needs numpy, onnxruntime,
tokenizers and jinja2. It reads ``engine.json`` and ``model.onnx`` beside it and knows nothing of Triton.

Every running sequence owns a slot: a contiguous slice of the key/value buffers ``[slots, kv_heads, capacity,
head_dim]``, one pair per layer. Running sequences occupy the first slots. A new sequence is prefilled alone
into the next slot; one decoding step then advances all of them, each at its own length. The buffers are bound as
both past and present, so attention appends in place and nothing is copied between steps.
"""

from __future__ import annotations

import json
import os
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

Logits = npt.NDArray[np.float32]
ENGINE_FORMAT = 1
"""The ``format`` of ``engine.json`` that is understood here."""


class PromptTooLongError(ValueError):
    """The prompt leaves no room for an answer."""


class NonFiniteLogitsError(RuntimeError):
    """The engine produced NaN or Inf."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. The defaults are greedy."""

    max_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        allowed = {
            "max_tokens": (self.max_tokens >= 1, "at least 1"),
            "temperature": (0 <= self.temperature <= 100, "from 0 (greedy) to 100"),
            "top_k": (self.top_k >= 0, "at least 0 (0: off)"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1"),
            "repetition_penalty": (0 < self.repetition_penalty <= 100, "above 0 and at most 100"),
            "seed": (self.seed >= 0, "at least 0"),
        }
        for name, (valid, text) in allowed.items():
            if not valid:
                raise ValueError(f"{name} is {getattr(self, name)}; allowed: {text}")


@dataclass
class Generation:
    """One running or finished sequence."""

    prompt: Sequence[int]
    sampling: Sampling
    tokens: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    on_token: Callable[[Generation], bool] | None = None
    """Called after every token; returning True ends the sequence (a stop string was found)."""
    random: np.random.Generator = field(init=False)

    def __post_init__(self) -> None:
        self.random = np.random.default_rng(self.sampling.seed)

    @property
    def length(self) -> int:
        """Tokens in the key/value cache."""
        return len(self.prompt) + len(self.tokens) - 1


class Runtime:
    """An engine ready to generate.

    ``slots`` sequences run at once, each of at most ``capacity`` tokens, prompt and answer together. The key/value
    memory is bounded by ``slots x capacity`` and is taken from the system as it is first written.
    """

    def __init__(
        self, directory: Path, *, slots: int, capacity: int, threads: int = 0, graph: str = "model.onnx"
    ) -> None:
        self.engine: dict[str, Any] = json.loads((directory / "engine.json").read_text())
        if self.engine["format"] != ENGINE_FORMAT:
            raise ValueError(
                f"engine.json has format {self.engine['format']}; this runtime reads {ENGINE_FORMAT}"
            )
        if capacity > self.engine["max_positions"]:
            raise ValueError(
                f"capacity {capacity} exceeds the model's {self.engine['max_positions']} positions"
            )
        self.slots, self.capacity = slots, capacity
        self._session = create_session(directory / graph, self.engine, threads)
        self._eos = frozenset(self.engine["eos_token_ids"])
        shape = (slots, self.engine["kv_heads"], capacity, self.engine["head_dim"])
        names = [f"{layer}.{part}" for layer in range(self.engine["layers"]) for part in ("key", "value")]
        self._cache = {name: np.zeros(shape, np.float32) for name in names}
        self._ids = np.zeros((slots, 1), np.int64)
        self._mask = np.zeros((slots, capacity), np.int64)
        # Bindings hold addresses only: what they point to must live as long as they do.
        self._logits_to_keep = np.ones(1, np.int64)
        self._logits = np.zeros((slots, 1, self.engine["vocab_size"]), np.float32)
        self._bindings: dict[int, ort.IOBinding] = {}
        self.running: list[Generation] = []

    @property
    def free_slots(self) -> int:
        """How many more sequences can start now."""
        return self.slots - len(self.running)

    def start(self, sequence: Generation) -> None:
        """Prefill ``sequence`` and choose its first token.

        Raises:
            PromptTooLongError: the prompt fills the slot.
            NonFiniteLogitsError: the engine produced NaN or Inf.
        """
        if not sequence.prompt:
            raise ValueError("the prompt has no tokens")
        if len(sequence.prompt) >= self.capacity:
            raise PromptTooLongError(
                f"the prompt has {len(sequence.prompt)} tokens; at most {self.capacity - 1} fit"
            )
        assert self.free_slots, "start() needs a free slot"
        slot, length = len(self.running), len(sequence.prompt)
        binding = self._session.io_binding()
        ids = np.array([sequence.prompt], np.int64)
        mask = np.ones((1, length), np.int64)
        logits = np.empty((1, 1, self._logits.shape[2]), np.float32)
        _bind_input(binding, "input_ids", ids)
        _bind_input(binding, "attention_mask", mask)
        _bind_input(binding, "logits_to_keep", self._logits_to_keep)
        self._bind_cache(binding, slot, slot + 1)
        _bind_output(binding, "logits", logits)
        self._session.run_with_iobinding(binding)
        self.running.append(sequence)
        self._mask[slot] = 0
        self._mask[slot, :length] = 1
        self._accept(slot, logits[0, 0])

    def step(self) -> None:
        """Advance every running sequence by one token."""
        count = len(self.running)
        for slot, sequence in enumerate(self.running):
            self._ids[slot, 0] = sequence.tokens[-1]
            self._mask[slot, sequence.length] = 1
        self._session.run_with_iobinding(self._binding(count))
        for slot in range(count):
            self._accept(slot, self._logits[slot, 0])

    def retire(self) -> list[Generation]:
        """Remove and return the finished sequences; the last running ones move into their slots."""
        finished = [sequence for sequence in self.running if sequence.finish_reason is not None]
        slot = 0
        while slot < len(self.running):
            if self.running[slot].finish_reason is None:
                slot += 1
                continue
            last = self.running.pop()
            if slot < len(self.running):
                self._move(len(self.running), slot, last.length)
                self.running[slot] = last
        return finished

    def run(self, generations: Sequence[Generation]) -> None:
        """Bring all ``generations`` to their end, as many at once as there are slots."""
        waiting = deque(generations)
        while waiting or self.running:
            while waiting and self.free_slots:
                self.start(waiting.popleft())
            self.retire()
            if self.running:
                self.step()
                self.retire()

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[Generation]:
        """Generate for all ``prompts``; results are in their order."""
        generations = [Generation(prompt, sampling) for prompt in prompts]
        self.run(generations)
        return generations

    def clear(self) -> None:
        """Forget every running sequence."""
        self.running.clear()

    def _accept(self, slot: int, logits: Logits) -> None:
        sequence = self.running[slot]
        token = choose_token(logits, sequence)
        sequence.tokens.append(token)
        stopped = sequence.on_token is not None and sequence.on_token(sequence)
        if token in self._eos or stopped:
            sequence.finish_reason = "stop"
        elif len(sequence.tokens) >= sequence.sampling.max_tokens or sequence.length + 1 >= self.capacity:
            sequence.finish_reason = "length"

    def _move(self, source: int, target: int, length: int) -> None:
        for cache in self._cache.values():
            cache[target, :, :length] = cache[source, :, :length]
        self._mask[target] = self._mask[source]

    def _binding(self, count: int) -> ort.IOBinding:
        """The binding for a decoding step of ``count`` sequences; its memory stays, only values change."""
        if count not in self._bindings:
            binding = self._session.io_binding()
            _bind_input(binding, "input_ids", self._ids[:count])
            _bind_input(binding, "attention_mask", self._mask[:count])
            _bind_input(binding, "logits_to_keep", self._logits_to_keep)
            self._bind_cache(binding, 0, count)
            _bind_output(binding, "logits", self._logits[:count])
            self._bindings[count] = binding
        return self._bindings[count]

    def _bind_cache(self, binding: ort.IOBinding, start: int, stop: int) -> None:
        for name, cache in self._cache.items():
            _bind_input(binding, f"past_key_values.{name}", cache[start:stop])
            _bind_output(binding, f"present.{name}", cache[start:stop])


def create_session(path: Path, engine: dict[str, Any], threads: int) -> ort.InferenceSession:
    """An ONNX Runtime session with the settings that ``engine.json`` asks for."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads or os.cpu_count() or 1
    options.log_severity_level = 3
    for key, value in engine["session_config"].items():
        options.add_session_config_entry(key, value)
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _bind_input(binding: ort.IOBinding, name: str, array: npt.NDArray[Any]) -> None:
    binding.bind_input(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)


def _bind_output(binding: ort.IOBinding, name: str, array: npt.NDArray[Any]) -> None:
    binding.bind_output(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)


def choose_token(logits: Logits, sequence: Generation) -> int:
    """The next token for ``logits`` float32 [vocab]."""
    sampling = sequence.sampling
    if sampling.repetition_penalty != 1.0:
        logits = _penalized(logits, [*sequence.prompt, *sequence.tokens], sampling.repetition_penalty)
    best = int(np.argmax(logits))  # argmax finds the first NaN, if there is one
    if not np.isfinite(logits[best]):
        seen = len(sequence.prompt) + len(sequence.tokens)
        raise NonFiniteLogitsError(f"the engine produced {logits[best]} after {seen} tokens")
    if sampling.temperature == 0:
        return best
    scaled = logits.astype(np.float64) / sampling.temperature
    if sampling.top_k:
        kept = np.argpartition(scaled, -min(sampling.top_k, scaled.size))[-sampling.top_k :]
    else:
        kept = np.arange(scaled.size)
    order = kept[np.argsort(-scaled[kept], kind="stable")]
    weights = np.exp(scaled[order] - scaled[order[0]])
    weights /= weights.sum()
    if sampling.top_p < 1:
        keep = int(np.searchsorted(np.cumsum(weights), sampling.top_p)) + 1
        order, weights = order[:keep], weights[:keep] / weights[:keep].sum()
    return int(sequence.random.choice(order, p=weights))


def _penalized(logits: Logits, seen: Sequence[int], penalty: float) -> Logits:
    """Keskar et al. 2019 (CTRL): logits of seen tokens are divided by the penalty, or multiplied when negative."""
    penalized = logits.copy()
    ids = np.unique(np.asarray(seen))
    values = penalized[ids]
    penalized[ids] = np.where(values > 0, values / penalty, values * penalty)
    return penalized

"""Generation with one ONNX Runtime session and a batch whose members come and go at any token.

Self-contained: with ``llm_sampling`` and ``llm_prefix`` it is copied into the version directory of the served model
and needs numpy and onnxruntime. It reads ``engine.json`` and ``model.onnx`` beside it and knows nothing of Triton.

Every running sequence owns a slot: a contiguous slice of the key/value buffers ``[slots, kv_heads, capacity,
head_dim]``, one pair per layer. Running sequences occupy the first slots. A new sequence is prefilled alone, at once
or a few tokens at a time, in the first slot behind them; one decoding step then advances all of them, each at its own
length. The buffers are bound as both past and present, so attention appends in place and nothing is copied between steps.
"""

from __future__ import annotations

import json
import os
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

if TYPE_CHECKING or __package__:
    from enginesmith.triton.models.llm_onnxruntime.llm_prefix import PrefixCache
    from enginesmith.triton.models.llm_onnxruntime.llm_sampling import (
        Generation,
        Logits,
        NonFiniteLogitsError,
        Sampling,
        choose_token,
        log_probability,
    )
else:  # Beside the engine, where there is no package.
    from llm_prefix import PrefixCache
    from llm_sampling import (
        Generation,
        Logits,
        NonFiniteLogitsError,
        Sampling,
        choose_token,
        log_probability,
    )

__all__ = [
    "Generation", "Logits", "NonFiniteLogitsError", "PromptTooLongError", "Runtime", "Sampling", "choose_token",
    "create_session",
]  # fmt: skip

ENGINE_FORMAT = 1
"""The ``format`` of ``engine.json`` that is understood here."""


class PromptTooLongError(ValueError):
    """The prompt leaves no room for an answer."""


@dataclass
class _Prefill:
    """A sequence on its way into the batch; ``done`` tokens of its prompt are in slot ``slot``."""

    sequence: Generation
    slot: int
    done: int


class Runtime:
    """An engine ready to generate.

    ``slots`` sequences run at once, each of at most ``capacity`` tokens, prompt and answer together. ``reuse_tokens``
    tokens of finished prompts are kept for prompts that begin the same way, in blocks of ``tokens_per_block``. The
    key/value memory is bounded by both and is taken from the system as it is first written.

    Kernels for one row round differently from those for more, which give each row the same bits at any batch size (seen
    with MatMulNBits of ONNX Runtime 1.32). A ``batch_invariant`` runtime with room for two therefore never computes one
    row alone, so that an answer does not depend on what else is running; a lone sequence is slower for it.
    """

    def __init__(
        self,
        directory: Path,
        *,
        slots: int,
        capacity: int,
        threads: int = 0,
        graph: str = "model.onnx",
        reuse_tokens: int = 0,
        tokens_per_block: int = 32,
        batch_invariant: bool = False,
    ) -> None:
        self.engine = _read_engine(directory / "engine.json", capacity)
        self.slots, self.capacity = slots, capacity
        self._least_rows = 2 if batch_invariant and slots > 1 else 1
        # Configurations name tokens that the model does not have; those can neither come about nor be banned.
        self.end_ids = frozenset(
            end for end in self.engine["eos_token_ids"] if end < self.engine["vocab_size"]
        )
        self._session = create_session(directory / graph, self.engine, threads)
        self._names = [
            f"{layer}.{part}" for layer in range(self.engine["layers"]) for part in ("key", "value")
        ]
        heads, width = self.engine["kv_heads"], self.engine["head_dim"]
        # One array, so that a slice of all layers is copied at once; each [index] is one layer's buffer.
        self._cache = np.zeros((len(self._names), slots, heads, capacity, width), np.float32)
        self.prefixes = (
            PrefixCache(
                blocks=reuse_tokens // tokens_per_block,
                tokens_per_block=tokens_per_block,
                shape=(len(self._names), heads, width),
            )
            if reuse_tokens >= tokens_per_block
            else None
        )
        self._ids = np.zeros((slots, 1), np.int64)
        self._mask = np.zeros((slots, capacity), np.int64)
        # Bindings hold addresses only: what they point to must live as long as they do.
        self._logits_to_keep = np.ones(1, np.int64)
        self._logits = np.zeros((slots, 1, self.engine["vocab_size"]), np.float32)
        self._bindings: dict[int, ort.IOBinding] = {}
        self.running: list[Generation] = []
        self._prefill: _Prefill | None = None

    @property
    def kv_cache_bytes(self) -> int:
        """The memory that keys and values can take, slots and prefix cache together."""
        return self._cache.nbytes + (self.prefixes.nbytes if self.prefixes else 0)

    def kv_bytes(self) -> tuple[int, int]:
        """How much of that memory belongs to a sequence or to a prefix that is kept, and all of it."""
        tokens = sum(sequence.length for sequence in self.running)
        tokens += self._prefill.done if self._prefill else 0
        bytes_per_token = self._cache.nbytes // (self.slots * self.capacity)
        kept_bytes = self.prefixes.used_bytes if self.prefixes else 0
        return tokens * bytes_per_token + kept_bytes, self.kv_cache_bytes

    @property
    def free_slots(self) -> int:
        """How many more sequences can start now."""
        return self.slots - len(self.running) - (self._prefill is not None)

    @property
    def prefilling(self) -> Generation | None:
        """The sequence that was admitted and whose prompt is not computed yet."""
        return self._prefill.sequence if self._prefill else None

    @property
    def prefill_left(self) -> int:
        """How many tokens of the admitted prompt are not computed yet."""
        return len(self._prefill.sequence.prompt) - self._prefill.done if self._prefill else 0

    def start(self, sequence: Generation) -> None:
        """Prefill ``sequence`` and choose its first token.

        Raises:
            PromptTooLongError: the prompt fills the slot.
        """
        self.admit(sequence)
        self.prefill(len(sequence.prompt))

    def admit(self, sequence: Generation) -> None:
        """Give ``sequence`` a slot; ``prefill`` then computes its prompt. One sequence at a time is prefilled.

        Raises:
            PromptTooLongError: the prompt fills the slot.
            ValueError: the prompt has no tokens.
        """
        if not sequence.prompt:
            raise ValueError("the prompt has no tokens")
        if len(sequence.prompt) >= self.capacity:
            raise PromptTooLongError(
                f"the prompt has {len(sequence.prompt)} tokens; at most {self.capacity - 1} fit"
            )
        assert self.free_slots, "admit() needs a free slot"
        assert self._prefill is None, "admit() while another sequence is prefilled"
        if sequence.sampling.end_ids is None:
            sequence.end_ids = self.end_ids
        slot = len(self.running)
        if self.prefixes is not None:
            # All but the last token may be reused, or all but as many as must be computed at once.
            reusable = sequence.prompt[: len(sequence.prompt) + 1 - self._least_rows]
            sequence.reused_tokens = self.prefixes.load(reusable, self._cache[:, slot])
        self._prefill = _Prefill(sequence, slot, sequence.reused_tokens)

    def prefill(self, max_tokens: int) -> int:
        """Compute up to ``max_tokens`` more of the admitted prompt; returns how many. The last one joins the batch.

        After the last token of the prompt the first one of the answer is chosen.
        """
        prefill = self._prefill
        assert prefill is not None, "prefill() needs an admitted sequence"
        prompt = prefill.sequence.prompt
        start = prefill.done
        stop = min(len(prompt), start + max_tokens)
        if 0 < len(prompt) - stop < self._least_rows:
            stop = max(start + 1, stop - 1)
        logits = self._compute(prompt[start:stop], prefill.slot, before=start)
        prefill.done = stop
        if stop == len(prompt):
            self._prefill = None
            self._join(prefill, logits)
        return stop - start

    def step(self) -> None:
        """Advance every running sequence by one token."""
        count = len(self.running)
        for slot, sequence in enumerate(self.running):
            self._ids[slot, 0] = sequence.tokens[-1]
            self._mask[slot, sequence.length] = 1
        if count < self._least_rows:
            self._fill_row(count)
        self._session.run_with_iobinding(self._binding(max(count, self._least_rows)))
        for slot in range(count):
            self._accept(slot, self._logits[slot, 0])

    def retire(self) -> list[Generation]:
        """Remove and return the finished sequences; the last running ones move into their slots."""
        finished = [sequence for sequence in self.running if sequence.finish_reason is not None]
        slot = 0
        while finished and slot < len(self.running):
            if self.running[slot].finish_reason is None:
                slot += 1
                continue
            last = self.running.pop()
            if slot < len(self.running):
                self._move(len(self.running), slot, last.length)
                self.running[slot] = last
        return finished

    def drop_prefill(self) -> None:
        """Give up the sequence that is being prefilled."""
        self._prefill = None

    def run(self, generations: Sequence[Generation]) -> None:
        """Bring all ``generations`` to their end, as many at once as there are slots.

        Raises:
            NonFiniteLogitsError: the engine produced NaN or Inf for one of them.
        """
        waiting = deque(generations)
        while waiting or self.running:
            while waiting and self.free_slots:
                self.start(waiting.popleft())
            self._retire_sound()
            if self.running:
                self.step()
                self._retire_sound()

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[Generation]:
        """Generate for all ``prompts``; results are in their order."""
        generations = [Generation(prompt, sampling) for prompt in prompts]
        self.run(generations)
        return generations

    def clear(self) -> None:
        """Forget every running sequence."""
        self.running.clear()
        self._prefill = None

    def _retire_sound(self) -> None:
        for sequence in self.retire():
            if sequence.error is not None:
                raise sequence.error

    def _join(self, prefill: _Prefill, logits: Logits) -> None:
        slot, length = len(self.running), len(prefill.sequence.prompt)
        if slot != prefill.slot:  # Others left while it was prefilled.
            self._cache[:, slot, :, :length] = self._cache[:, prefill.slot, :, :length]
        self._mask[slot] = 0
        self._mask[slot, :length] = 1
        self.running.append(prefill.sequence)
        self._accept(slot, logits)
        if self.prefixes is not None and prefill.sequence.error is None:
            self.prefixes.store(prefill.sequence.prompt, self._cache[:, slot])

    def _compute(self, tokens: Sequence[int], slot: int, *, before: int) -> Logits:
        """Logits [vocabulary] after ``tokens``, which follow ``before`` others in ``slot``."""
        binding = self._session.io_binding()
        ids = np.array([tokens], np.int64)
        mask = np.ones((1, before + len(tokens)), np.int64)
        logits: Logits = np.empty((1, self._logits.shape[2]), np.float32)
        _bind_input(binding, "input_ids", ids)
        _bind_input(binding, "attention_mask", mask)
        _bind_input(binding, "logits_to_keep", self._logits_to_keep)
        self._bind_cache(binding, slot, slot + 1)
        _bind_output(binding, "logits", logits[None])
        self._session.run_with_iobinding(binding)
        chosen: Logits = logits[0]
        return chosen

    def _fill_row(self, slot: int) -> None:
        """Let a row be computed that nobody reads. What it writes into its slot, a prefill there writes over."""
        done = self._prefill.done if self._prefill is not None and self._prefill.slot == slot else 0
        self._ids[slot, 0] = 0
        self._mask[slot] = 0
        self._mask[slot, : done + 1] = 1

    def _accept(self, slot: int, logits: Logits) -> None:
        sequence = self.running[slot]
        try:
            token = choose_token(logits, sequence)
        except NonFiniteLogitsError as error:
            sequence.error, sequence.finish_reason = error, "error"
            return
        sequence.tokens.append(token)
        if sequence.sampling.logprobs:
            sequence.logprobs.append(log_probability(logits, token))
        stopped = sequence.on_token is not None and sequence.on_token(sequence)
        if token in sequence.end_ids or stopped:
            sequence.finish_reason = "stop"
        elif len(sequence.tokens) >= sequence.sampling.max_tokens or sequence.length + 1 >= self.capacity:
            sequence.finish_reason = "length"

    def _move(self, source: int, target: int, length: int) -> None:
        self._cache[:, target, :, :length] = self._cache[:, source, :, :length]
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
        for name, cache in zip(self._names, self._cache, strict=True):
            _bind_input(binding, f"past_key_values.{name}", cache[start:stop])
            _bind_output(binding, f"present.{name}", cache[start:stop])


def _read_engine(path: Path, capacity: int) -> dict[str, Any]:
    """The description of an engine that can serve ``capacity`` tokens.

    Raises:
        ValueError: it is of another format, or its model knows fewer positions.
    """
    engine: dict[str, Any] = json.loads(path.read_text())
    if engine["format"] != ENGINE_FORMAT:
        raise ValueError(f"engine.json has format {engine['format']}; this runtime reads {ENGINE_FORMAT}")
    if capacity > engine["max_positions"]:
        raise ValueError(f"capacity {capacity} exceeds the model's {engine['max_positions']} positions")
    return engine


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

"""The served LLM's engine over onnxruntime-genai: its ``Engine`` schedules, we queue, limit, cancel and answer.

Self-contained: it is copied beside the files of ``llm_onnxruntime`` and needs onnxruntime-genai. A model directory with
a ``genai_config.json`` decides the rest: with ``engine.dynamic_batching`` and a graph of PagedAttention (CUDA only)
sequences join and leave the batch between two steps and share a pool of key/value blocks; without it, onnxruntime-genai
batches statically, and a sequence that ended holds its row until the whole batch has.

Semantics of the Engine API: onnxruntime-genai 0.18, ``docs/engine_c_api_spec.md`` and ``docs/paged_attention_engine.md``
of its repository. All of its calls must come from the thread that made the engine.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime_genai as genai

if TYPE_CHECKING or __package__:
    from enginesmith.triton.models.llm_onnxruntime.llm_batching import BatchingEngine, Update
    from enginesmith.triton.models.llm_onnxruntime.llm_sampling import Generation, Sampling
else:  # Beside the engine, where there is no package.
    from llm_batching import BatchingEngine, Update
    from llm_sampling import Generation, Sampling

CONFIGURATION = "genai_config.json"
_LARGEST_SEED = 2**64 - 1
_STEPS_WITHOUT_TOKENS = 10_000
"""A prompt in pieces gives no token for some steps; nothing gives none for so many."""

_TOKEN, _TURN_FINISHED = int(genai.EngineEventFlags.TOKEN), int(genai.EngineEventFlags.TURN_FINISHED)
_BLOCKED = int(genai.EngineEventFlags.CAPACITY_BLOCKED) | int(genai.EngineEventFlags.RETRYABLE)
"""Nothing was done, and nothing is lost: another step will try again."""


class GenaiError(RuntimeError):
    """onnxruntime-genai could not go on with a sequence."""


class GenaiBatch:
    """The sequences that one ``onnxruntime_genai.Engine`` generates, as ``BatchingEngine`` drives them.

    ``slots`` of them at once, each of at most ``capacity`` tokens, prompt and answer together. ``open`` makes the engine
    for the thread that calls it; every other method but the properties belongs to that thread.
    """

    prefilling: Generation | None = None
    """Prompts are computed in ``step``, in pieces that onnxruntime-genai chooses: none is ever computed by itself."""
    prefill_left = 0

    def __init__(self, directory: Path, *, slots: int, capacity: int) -> None:
        self._directory = directory
        self.slots, self.capacity = slots, capacity
        self.configuration = read_configuration(directory / CONFIGURATION, slots=slots, capacity=capacity)
        ends = self.configuration["model"]["eos_token_id"]
        self.end_ids = frozenset(ends if isinstance(ends, list) else [ends])
        self.running: list[Generation] = []
        self._requests: dict[int, Any] = {}
        """What onnxruntime-genai holds for the running sequences, by the identity of these."""
        self._sequences: dict[int, Generation] = {}
        """The running sequences by the identity of their requests: events name the very object that was created."""
        self._idle_steps = 0
        self._engine: Any = None
        self._broken: GenaiError | None = None

    @property
    def paged(self) -> bool:
        """Whether sequences join and leave the batch between steps, over paged keys and values."""
        return _paging(self.configuration) is not None

    @property
    def vocabulary(self) -> int:
        """Tokens that the model has."""
        size: int = self.configuration["model"]["vocab_size"]
        return size

    @property
    def free_slots(self) -> int:
        """How many more sequences can start now."""
        return self.slots - len(self.running)

    def open(self) -> None:
        """Load the model; with paged attention this takes the whole pool of key/value memory.

        Raises:
            RuntimeError: onnxruntime-genai's own words for what it cannot do.
        """
        settings = genai.Config(str(self._directory))
        settings.overlay(json.dumps({"search": {"max_length": self.capacity}}))
        if not self.paged:
            settings.overlay(json.dumps({"engine": {"static_batching": {"max_batch_size": self.slots}}}))
        self._engine = genai.Engine(genai.Model(settings))
        # Room for every sequence's token and end, so that one run hands over all that a step brought.
        self._events = self._engine.create_event_buffer(2 * self.slots)

    def close(self) -> None:
        """Give everything back."""
        self.clear()
        self._engine = self._events = None

    def admit(self, sequence: Generation) -> None:
        """Hand ``sequence`` over.

        Raises:
            ValueError: the prompt is empty or fills the slot, or the sampling needs what onnxruntime-genai cannot do.
        """
        if not 1 <= len(sequence.prompt) < self.capacity:
            raise ValueError(
                f"the prompt has {len(sequence.prompt)} tokens; allowed: 1 to {self.capacity - 1}"
            )
        require_supported(sequence.sampling, self.end_ids, paged=self.paged)
        if self._broken is not None:
            raise self._broken
        sequence.end_ids = self.end_ids
        request = self._engine.create_request()
        try:
            options = _turn_options(
                request,
                sequence.sampling,
                room=self.capacity - len(sequence.prompt),
                vocabulary=self.vocabulary,
            )
            request.begin_turn(np.asarray(sequence.prompt, np.int32), options)
        except RuntimeError as error:
            request.close()
            raise ValueError(f"onnxruntime-genai refuses the request: {error}") from error
        self._requests[id(sequence)] = request
        self._sequences[id(request)] = sequence
        self.running.append(sequence)

    def prefill(self, max_tokens: int) -> int:
        """Nothing is left to do after ``admit``; returns 0."""
        del max_tokens
        return 0

    def drop_prefill(self) -> None:
        """Nothing is prefilled by itself."""

    def step(self) -> None:
        """One pass of the model; every sequence that it advanced gets its token.

        Raises:
            GenaiError: the engine failed and cannot go on, or nothing has come for so long that nothing will.
        """
        try:
            events = self._engine.run(self._events)
        except RuntimeError as error:
            self._broken = GenaiError(f"onnxruntime-genai cannot go on; load the model again: {error}")
            raise self._broken from error
        self._idle_steps += 1
        for event in events:
            self._take(event)
        if self._idle_steps > _STEPS_WITHOUT_TOKENS:
            raise GenaiError(f"onnxruntime-genai gave no token in {self._idle_steps} steps")

    def retire(self) -> list[Generation]:
        """Remove and return the finished sequences; onnxruntime-genai forgets them."""
        finished = [sequence for sequence in self.running if sequence.finish_reason is not None]
        if finished:
            self.running = [sequence for sequence in self.running if sequence.finish_reason is None]
        for sequence in finished:
            request = self._requests.pop(id(sequence))
            del self._sequences[id(request)]
            request.close()
        return finished

    def clear(self) -> None:
        """Forget every running sequence."""
        for request in self._requests.values():
            request.close()
        self._requests.clear()
        self._sequences.clear()
        self.running.clear()

    def _take(self, event: Any) -> None:
        flags = int(event.flags)
        if flags & _BLOCKED:
            return
        self._idle_steps = 0
        sequence = self._sequences.get(id(event.request))
        if sequence is None:
            raise GenaiError(f"onnxruntime-genai failed: {event.error_code.name}")
        if flags & _TOKEN:
            self._accept(sequence, event.token)
        if flags & _TURN_FINISHED:
            self._finish(sequence, event)

    def _accept(self, sequence: Generation, token: int) -> None:
        if (
            sequence.finish_reason is not None
        ):  # It was stopped by its text, before a token that was on its way.
            return
        sequence.tokens.append(token)
        if sequence.on_token is not None and sequence.on_token(sequence):
            sequence.finish_reason = "stop"

    def _finish(self, sequence: Generation, event: Any) -> None:
        if sequence.finish_reason is not None:
            return
        sequence.reused_tokens = int(event.usage.cached_prompt_tokens)
        reason = event.finish_reason
        if reason == genai.FinishReason.EOS:
            # It does not hand the end token out; it is counted like in every other engine of ours.
            self._accept(sequence, min(self.end_ids))
            sequence.finish_reason = "stop"
        elif reason in (genai.FinishReason.MAX_GENERATED_TOKENS, genai.FinishReason.MAX_SESSION_TOKENS):
            sequence.finish_reason = "length"
        else:
            sequence.error = GenaiError(
                f"onnxruntime-genai ended the sequence after {len(sequence.tokens)} tokens: "
                f"{reason.name}, {event.error_code.name}"
            )
            sequence.finish_reason = "error"


class GenaiEngine(BatchingEngine):
    """The ``Engine`` over onnxruntime-genai: queue, limits, time-outs and cancellation are those of ``BatchingEngine``.

    Raises:
        ValueError: ``genai_config.json`` cannot serve so many sequences or so long ones.
        RuntimeError: onnxruntime-genai's own words for why the model cannot be loaded.
    """

    def __init__(
        self,
        directory: Path,
        emit: Callable[[Sequence[Update]], None],
        *,
        slots: int,
        capacity: int,
        max_waiting: int = 0,
        max_wait_s: float = 0.0,
    ) -> None:
        self._batch = GenaiBatch(directory, slots=slots, capacity=capacity)
        self._opened = threading.Event()
        self._failure: Exception | None = None
        super().__init__(self._batch, emit, max_waiting=max_waiting, max_wait_s=max_wait_s)
        self._opened.wait()
        if self._failure is not None:
            raise self._failure

    @property
    def vocabulary(self) -> int:
        """Tokens that the model has."""
        return self._batch.vocabulary

    def _work(self) -> None:
        """In the thread of generation, to which alone onnxruntime-genai will listen."""
        try:
            self._batch.open()
        except Exception as error:  # noqa: BLE001 - the boundary of the thread: it is raised again in the caller's.
            self._failure = error
            return
        finally:
            self._opened.set()
        try:
            super()._work()
        finally:
            self._batch.close()


def read_configuration(path: Path, *, slots: int, capacity: int) -> dict[str, Any]:
    """``genai_config.json`` of a model that can serve ``slots`` sequences of ``capacity`` tokens.

    Raises:
        ValueError: it knows fewer positions, or batches fewer sequences, or its pool of key/value blocks holds less.
    """
    configuration: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    positions = configuration["model"]["context_length"]
    if capacity > positions:
        raise ValueError(f"capacity {capacity} exceeds the model's {positions} positions ({CONFIGURATION})")
    paged = _paging(configuration)
    if paged is None:
        return configuration
    if paged.get("max_batch_size", slots) < slots:
        raise ValueError(
            f"{slots} slots exceed engine.dynamic_batching.max_batch_size {paged['max_batch_size']} of {CONFIGURATION}"
        )
    if "num_blocks" in paged:
        blocks = slots * -(-capacity // paged["block_size"])
        if paged["num_blocks"] < blocks:
            raise ValueError(
                f"{slots} sequences of {capacity} tokens need {blocks} key/value blocks of {paged['block_size']}; "
                f"{CONFIGURATION} has engine.dynamic_batching.num_blocks {paged['num_blocks']}"
            )
    return configuration


def _paging(configuration: Mapping[str, Any]) -> Mapping[str, Any] | None:
    paging: Mapping[str, Any] | None = configuration.get("engine", {}).get("dynamic_batching")
    return paging


def require_supported(sampling: Sampling, end_ids: frozenset[int], *, paged: bool) -> None:
    """Refuse what onnxruntime-genai cannot do: nothing that a request asks for is left out silently.

    Without ``paged`` attention it takes no seed, so that an answer that is drawn could not be drawn again.

    Raises:
        ValueError: names every such option.
    """
    others = sampling.end_ids is not None and sampling.end_ids != end_ids
    asked = {
        "presence_penalty": sampling.presence_penalty != 0,
        "frequency_penalty": sampling.frequency_penalty != 0,
        "bad_words": bool(sampling.bad_words),
        "end_id": others,
        "return_log_probs": sampling.logprobs,
        f"seed above {_LARGEST_SEED}": sampling.seed > _LARGEST_SEED,
        "temperature without paged attention": sampling.temperature > 0 and not paged,
    }
    if names := [name for name, is_asked in asked.items() if is_asked]:
        raise ValueError(
            f"this model runs on onnxruntime-genai, which has no {', '.join(names)}; allowed: temperature, top_k, "
            "top_p, seed, repetition_penalty, min_tokens, max_tokens, stop_words"
        )


def _turn_options(request: Any, sampling: Sampling, *, room: int, vocabulary: int) -> Any:
    """Every option that has a say is set, so that no default of the model's configuration has one.

    onnxruntime-genai refuses what asks for nothing: more least tokens than there is ``room`` for, a larger top-k than the
    ``vocabulary``, and options of sampling beside a greedy choice. It is left away or cut here, with the same effect.
    """
    options = genai.TurnOptions(request)
    options.set_max_generated_tokens(min(sampling.max_tokens, room))
    options.set_min_generated_tokens(min(sampling.min_tokens, sampling.max_tokens, room))
    options.set_repetition_penalty(sampling.repetition_penalty)
    drawn = sampling.temperature > 0 and sampling.top_k != 1
    options.set_do_sample(drawn)
    if drawn:
        options.set_temperature(sampling.temperature)
        options.set_top_k(min(sampling.top_k, vocabulary))
        options.set_top_p(sampling.top_p)
        options.set_seed(sampling.seed)
    return options

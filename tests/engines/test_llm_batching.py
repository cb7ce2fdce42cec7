"""In-flight batching, without a server: who joins, who leaves, and that nobody waits for ever.

``Outbox`` takes the engine's updates in the engine's thread, so a test can act between two tokens.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from checkpoint_factory import tiny_checkpoint
from engine_cases import edit_tensors, lowered
from llm_engines import random_prompt, with_end_tokens

from enginesmith.triton.models.llm_onnxruntime.llm_batching import BatchingEngine, Job, RefusedError, Update
from enginesmith.triton.models.llm_onnxruntime.llm_pieces import AnswerText
from enginesmith.triton.models.llm_onnxruntime.llm_runtime import Generation, Runtime, Sampling

PATIENCE_S = 60
POISON = 7
"""A token that makes every logit of its sequence NaN."""


@pytest.fixture(scope="module")
def engine_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("batching")
    checkpoint = tiny_checkpoint(directory / "checkpoint")

    def poison(tensors: dict[str, Any]) -> None:
        tensors["model.embed_tokens.weight"][POISON] = float("nan")

    edit_tensors(checkpoint, poison)
    return with_end_tokens(lowered(checkpoint, directory / "engine"), [])


class Outbox:
    """Keeps updates; ``watch`` is called with each before the engine goes on."""

    def __init__(self) -> None:
        self._updates: queue.SimpleQueue[Update] = queue.SimpleQueue()
        self.watch: Callable[[Update], None] = lambda _update: None

    def __call__(self, updates: Sequence[Update]) -> None:
        for update in updates:
            self.watch(update)
            self._updates.put(update)

    def until_last(self, *jobs: Job) -> list[Update]:
        """Everything up to the last updates of ``jobs``."""
        missing, seen = set(jobs), []
        while missing:
            seen.append(self._updates.get(timeout=PATIENCE_S))
            if seen[-1].last:
                missing.discard(seen[-1].job)
        return seen


@contextmanager
def batching(directory: Path, *, slots: int = 2, **options: Any) -> Iterator[tuple[BatchingEngine, Outbox]]:
    outbox = Outbox()
    engine = BatchingEngine(Runtime(directory, slots=slots, capacity=64, threads=1), outbox, **options)
    try:
        yield engine, outbox
    finally:
        engine.close()


def characters(tokens: Sequence[int]) -> str:
    return "".join(chr(0x100 + token) for token in tokens)


def job_of(prompt: list[int], *, max_tokens: int = 8, timeout_s: float | None = None, **sampling: Any) -> Job:
    generation = Generation(prompt, Sampling(max_tokens=max_tokens, **sampling))
    return Job(generation, AnswerText(characters), streaming=True, timeout_s=timeout_s)


def prompt(seed: int, *, length: int = 6) -> list[int]:
    return [token if token != POISON else 8 for token in random_prompt(length, seed=seed)]


def alone(directory: Path, job: Job) -> list[int]:
    runtime = Runtime(directory, slots=1, capacity=64, threads=1)
    return runtime.generate([job.generation.prompt], job.generation.sampling)[0].tokens


def last_of(updates: Sequence[Update], job: Job) -> Update:
    (last,) = (update for update in updates if update.job is job and update.last)
    return last


def test_answers_in_flight_equal_answers_alone(engine_directory: Path) -> None:
    jobs = [job_of(prompt(seed, length=3 + 5 * seed), max_tokens=4 + seed) for seed in range(7)]
    with batching(engine_directory, slots=3, chunk_tokens=8) as (engine, outbox):
        engine.submit(jobs)
        updates = outbox.until_last(*jobs)

    for job in jobs:
        assert job.generation.tokens == alone(engine_directory, job)
        pieces = [update.text for update in updates if update.job is job]
        assert "".join(pieces) == characters(job.generation.tokens)
        assert last_of(updates, job).finish_reason == "length"


def test_prompts_are_cut_at_the_same_tokens_whoever_else_asks(engine_directory: Path) -> None:
    pieces: dict[int, list[int]] = {}

    class Recording(Runtime):
        def prefill(self, max_tokens: int) -> int:
            assert self.prefilling is not None
            sequence = self.prefilling
            computed = super().prefill(max_tokens)
            pieces.setdefault(len(sequence.prompt), []).append(computed)
            return computed

    jobs = [job_of(prompt(length, length=length)) for length in (5, 21, 6, 8, 7, 17)]
    outbox = Outbox()
    engine = BatchingEngine(
        Recording(engine_directory, slots=3, capacity=64, threads=1), outbox, chunk_tokens=8
    )
    try:
        engine.submit(jobs)
        outbox.until_last(*jobs)
    finally:
        engine.close()
    assert pieces == {5: [5], 21: [8, 8, 5], 6: [6], 8: [8], 7: [7], 17: [8, 8, 1]}


def test_request_joins_the_running_batch_and_leaves_it_first(engine_directory: Path) -> None:
    long, short = job_of(prompt(1), max_tokens=40), job_of(prompt(2), max_tokens=3)
    with batching(engine_directory) as (engine, outbox):

        def submit_at_third_token(update: Update) -> None:
            if update.job is long and update.output_tokens == 3:
                engine.submit([short])

        outbox.watch = submit_at_third_token
        engine.submit([long])
        updates = outbox.until_last(long, short)

    places = [update.job for update in updates if update.last]
    assert places == [short, long]
    assert short.generation.tokens == alone(engine_directory, short)
    assert long.generation.tokens == alone(engine_directory, long)


def test_long_prompt_lets_the_others_go_on_between_its_pieces(engine_directory: Path) -> None:
    running, late = job_of(prompt(1), max_tokens=30), job_of(prompt(2, length=40), max_tokens=2)
    with batching(engine_directory, chunk_tokens=4) as (engine, outbox):

        def submit_at_second_token(update: Update) -> None:
            if update.job is running and update.output_tokens == 2:
                engine.submit([late])

        outbox.watch = submit_at_second_token
        engine.submit([running])
        updates = outbox.until_last(running, late)

    before_late = updates[: next(place for place, one in enumerate(updates) if one.job is late)]
    assert before_late[-1].output_tokens >= 2 + 40 // 4 - 1


def test_cancelled_job_leaves_before_its_next_token_but_one(engine_directory: Path) -> None:
    doomed, other = job_of(prompt(1), max_tokens=50), job_of(prompt(2), max_tokens=20)
    with batching(engine_directory) as (engine, outbox):

        def cancel_at_fifth_token(update: Update) -> None:
            if update.job is doomed and update.output_tokens == 5:
                engine.cancel(doomed)

        outbox.watch = cancel_at_fifth_token
        engine.submit([doomed, other])
        updates = outbox.until_last(doomed, other)
        load = engine.load()

    assert last_of(updates, doomed).failure == "cancelled"
    assert len(doomed.generation.tokens) == 5
    assert other.generation.tokens == alone(engine_directory, other)
    assert (load.running, load.waiting, load.slots) == (0, 0, 2)


def test_waiting_and_prefilling_jobs_can_be_cancelled(engine_directory: Path) -> None:
    first = job_of(prompt(1), max_tokens=30)
    prefilling, waiting = job_of(prompt(2, length=50)), job_of(prompt(3))
    with batching(engine_directory, chunk_tokens=2) as (engine, outbox):

        def act(update: Update) -> None:
            if update.job is first and update.output_tokens == 2:
                engine.submit([prefilling, waiting])
            if update.job is first and update.output_tokens == 6:
                engine.cancel(prefilling)
                engine.cancel(waiting)

        outbox.watch = act
        engine.submit([first])
        updates = outbox.until_last(first, prefilling, waiting)

    assert last_of(updates, prefilling).failure == last_of(updates, waiting).failure == "cancelled"
    assert prefilling.generation.tokens == waiting.generation.tokens == []
    assert first.generation.tokens == alone(engine_directory, first)


def test_full_queue_refuses_and_says_how_many_wait(engine_directory: Path) -> None:
    gate, running = threading.Event(), threading.Event()
    first, second, third = (job_of(prompt(seed)) for seed in (1, 2, 3))
    with batching(engine_directory, slots=1, max_waiting=1) as (engine, outbox):

        def hold(_update: Update) -> None:
            running.set()
            assert gate.wait(PATIENCE_S)

        outbox.watch = hold
        engine.submit([first])
        assert running.wait(PATIENCE_S)
        engine.submit([second])
        with pytest.raises(RefusedError, match="the queue is full: 1 requests wait, at most 1 may"):
            engine.submit([third])
        load = engine.load()
        gate.set()
        updates = outbox.until_last(first, second)

    assert (load.running, load.waiting) == (1, 1)
    assert last_of(updates, second).finish_reason == "length"


@pytest.mark.parametrize("limits", [{"max_wait_s": 1e-6}, {}])
def test_job_that_waited_too_long_is_told_to_try_again(
    limits: dict[str, Any], engine_directory: Path
) -> None:
    first = job_of(prompt(1), max_tokens=30)
    second = job_of(prompt(2), timeout_s=None if limits else 1e-6)
    with batching(engine_directory, slots=1, **limits) as (engine, outbox):

        def submit_another(update: Update) -> None:
            if update.job is first and update.output_tokens == 2:
                engine.submit([second])

        outbox.watch = submit_another
        # What is admitted at once has not waited, however short the limit.
        first.arrived_ns += 10**12
        engine.submit([first])
        updates = outbox.until_last(first, second)

    refused = last_of(updates, second)
    assert refused.failure == ("busy" if limits else "late")
    assert "waited" in refused.message
    assert "at most 1e-06 s are allowed; try again later" in refused.message
    assert last_of(updates, first).finish_reason == "length"


def test_running_job_ends_at_its_timeout(engine_directory: Path) -> None:
    job = job_of(prompt(1), max_tokens=50, timeout_s=1000.0)
    with batching(engine_directory) as (engine, outbox):

        def let_time_pass(update: Update) -> None:
            if update.output_tokens == 4:
                job.arrived_ns -= 1001 * 10**9

        outbox.watch = let_time_pass
        engine.submit([job])
        ended = outbox.until_last(job)[-1]

    assert ended.failure == "late"
    assert ended.message == "the request's timeout of 1000 s has passed after 4 tokens"


def test_nan_ends_its_own_sequence_only(engine_directory: Path) -> None:
    sick, sound = job_of([3, POISON, 9]), job_of(prompt(4), max_tokens=12)
    with batching(engine_directory) as (engine, outbox):
        engine.submit([sound, sick])
        updates = outbox.until_last(sick, sound)

    failed = last_of(updates, sick)
    assert (failed.failure, failed.message) == ("internal", "the engine produced nan after 3 tokens")
    assert sound.generation.tokens == alone(engine_directory, sound)


def test_slot_of_a_nan_is_as_good_as_new(engine_directory: Path) -> None:
    with batching(engine_directory, slots=1) as (engine, outbox):
        sick, next_one = job_of([POISON] * 20), job_of(prompt(5))
        engine.submit([sick, next_one])
        outbox.until_last(sick, next_one)
    assert next_one.generation.tokens == alone(engine_directory, next_one)


def test_prompt_longer_than_a_slot_is_the_clients_fault(engine_directory: Path) -> None:
    with batching(engine_directory) as (engine, outbox):
        long, good = job_of(prompt(1, length=64)), job_of(prompt(2))
        engine.submit([long, good])
        updates = outbox.until_last(long, good)
    assert last_of(updates, long).failure == "invalid"
    assert last_of(updates, good).finish_reason == "length"


def test_failure_of_the_engine_answers_everybody_and_the_next_request_works(engine_directory: Path) -> None:
    broken, waiting, running = job_of(prompt(1)), job_of(prompt(2)), job_of(prompt(3), max_tokens=40)

    def fail(_tokens: Sequence[int]) -> str:
        raise RuntimeError("a broken tokenizer")

    broken.text = AnswerText(fail)
    with batching(engine_directory) as (engine, outbox):
        engine.submit([running, broken, waiting])
        failed = outbox.until_last(running, broken, waiting)
        after = job_of(prompt(4))
        engine.submit([after])
        outbox.until_last(after)

    for job in (running, broken, waiting):
        assert last_of(failed, job).failure == "internal"
        assert last_of(failed, job).message == "generation failed: RuntimeError: a broken tokenizer"
    assert after.generation.tokens == alone(engine_directory, after)


def test_answer_that_was_there_before_a_failure_is_not_lost(engine_directory: Path) -> None:
    done, broken = job_of(prompt(1), max_tokens=1), job_of(prompt(2))

    def fail(_tokens: Sequence[int]) -> str:
        raise RuntimeError("a broken tokenizer")

    broken.text = AnswerText(fail)
    with batching(engine_directory) as (engine, outbox):
        engine.submit([done, broken])  # Both are prefilled before the first step.
        updates = outbox.until_last(done, broken)

    assert last_of(updates, done).finish_reason == "length"
    assert last_of(updates, broken).failure == "internal"


def test_closed_engine_has_answered_everybody_and_takes_nobody(engine_directory: Path) -> None:
    outbox, started = Outbox(), threading.Event()
    outbox.watch = lambda _update: started.set()
    engine = BatchingEngine(Runtime(engine_directory, slots=1, capacity=64, threads=1), outbox)
    running, waiting = job_of(prompt(1), max_tokens=55), job_of(prompt(2))
    engine.submit([running, waiting])
    assert started.wait(PATIENCE_S)

    engine.close()

    updates = outbox.until_last(running, waiting)
    assert last_of(updates, waiting).last
    with pytest.raises(RefusedError, match="being unloaded"):
        engine.submit([job_of(prompt(3))])


def test_stop_word_found_in_the_text_ends_the_sequence(engine_directory: Path) -> None:
    free = alone(engine_directory, job_of(prompt(1), max_tokens=12))
    place = next(place for place in range(3, 12) if free[place] not in free[:place])
    job = job_of(prompt(1), max_tokens=12)
    job.text = AnswerText(characters, [characters(free[place : place + 1])])
    with batching(engine_directory) as (engine, outbox):
        engine.submit([job])
        updates = outbox.until_last(job)
    assert updates[-1].finish_reason == "stop"
    assert updates[-1].output_tokens == place + 1
    assert "".join(update.text for update in updates) == characters(free[:place])


def test_log_probabilities_come_with_the_tokens_of_their_piece(engine_directory: Path) -> None:
    job = job_of(prompt(1), max_tokens=9, logprobs=True)
    with batching(engine_directory) as (engine, outbox):
        engine.submit([job])
        updates = outbox.until_last(job)
    assert [token for update in updates for token in update.tokens] == job.generation.tokens
    assert [value for update in updates for value in update.logprobs] == job.generation.logprobs
    assert all(value <= 0 for value in job.generation.logprobs)

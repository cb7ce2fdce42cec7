"""The stand-in for the engine: it generates as the runtime does, obeys words, and refuses what the engine refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoint_factory import tiny_checkpoint
from trtllm_deployment import Context

from enginesmith.engines.onnxruntime import lower
from enginesmith.triton.models.llm_onnxruntime.llm_runtime import Runtime, Sampling
from enginesmith.triton.models.trtllm_twin.play import Echo, Steering, Task, Twin, answer
from enginesmith.triton.models.trtllm_twin.request import Limits, NotServedError, read_tasks

PROMPT = (40, 41, 42, 43)
LIMITS = Limits(max_input_len=8, max_seq_len=16, vocab_size=512)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("engine")
    context = Context(root / "lower", {"mode": "exact"}, {"checkpoint": tiny_checkpoint(root / "checkpoint")})
    lower.run(context)
    return context.out


@pytest.fixture(scope="module")
def twin(engine: Path) -> Twin:
    return Twin(engine, capacity=64, threads=1)


def task(max_tokens: int = 12, *, sampling: dict[str, Any] | None = None, **steering: Any) -> Task:
    return Task(PROMPT, Sampling(max_tokens=max_tokens, **(sampling or {})), Steering(**steering))


@pytest.mark.model
@pytest.mark.parametrize(
    "sampling", [{}, {"temperature": 0.9, "top_k": 20, "seed": 5, "repetition_penalty": 1.2}]
)
def test_unsteered_answers_are_the_runtimes(engine: Path, twin: Twin, sampling: dict[str, Any]) -> None:
    runtime = Runtime(engine, slots=1, capacity=64, threads=1)
    (expected,) = runtime.generate([PROMPT], Sampling(max_tokens=12, **sampling))
    assert answer(twin, task(sampling=sampling)) == expected.tokens


@pytest.mark.model
def test_the_end_token_ends_an_answer_and_is_no_part_of_it(twin: Twin) -> None:
    plain = answer(twin, task())
    end = plain[4]
    assert answer(twin, task(end_id=end)) == plain[: plain.index(end)]
    assert end not in answer(twin, task(end_id=end, min_tokens=12))


@pytest.mark.model
def test_a_stop_word_is_the_end_of_an_answer_and_a_bad_word_is_nowhere(twin: Twin) -> None:
    plain = answer(twin, task())
    word = tuple(plain[2:4])
    assert answer(twin, task(stop_words=(word,))) == plain[:4]
    without = answer(twin, task(bad_words=(word, (plain[0],))))
    assert plain[0] not in without
    assert all(tuple(without[place : place + 2]) != word for place in range(len(without)))


@pytest.mark.model
def test_a_closed_generation_leaves_the_next_one_alone(twin: Twin) -> None:
    plain = answer(twin, task())
    steps = twin.steps(task())
    next(steps)
    steps.close()  # type: ignore[attr-defined]
    assert answer(twin, task()) == plain


@pytest.mark.model
def test_log_probs_are_those_of_the_chosen_tokens(twin: Twin) -> None:
    assert all(-20 < step.log_prob <= 0 for step in twin.steps(task()))


def test_an_echo_repeats_the_prompt() -> None:
    assert answer(Echo(), task(6)) == [40, 41, 42, 43, 40, 41]
    assert answer(Echo(), task(6, end_id=42)) == [40, 41]
    assert answer(Echo(), task(6, stop_words=((41, 42),))) == [40, 41, 42]


def inputs(**changes: Any) -> dict[str, Any]:
    plain = {
        "input_ids": np.array([[1, 2, 3]], np.int32),
        "input_lengths": np.array([3], np.int32),
        "request_output_len": np.array([5], np.int32),
    }
    return {name: array for name, array in (plain | changes).items() if array is not None}


def test_answers_that_do_not_fit_are_shortened_as_the_executor_does() -> None:
    (read,) = read_tasks(inputs(request_output_len=np.array([99], np.int32)), LIMITS, decoupled=True)
    assert read.sampling.max_tokens == 13


def test_temperature_alone_does_not_sample() -> None:
    heat = {"temperature": np.array([2.0], np.float32)}
    (greedy,) = read_tasks(inputs(**heat), LIMITS, decoupled=True)
    (sampled,) = read_tasks(inputs(**heat, runtime_top_k=np.array([4], np.int32)), LIMITS, decoupled=True)
    assert (greedy.sampling.temperature, sampled.sampling.temperature) == (0.0, 2.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"input_ids": np.arange(9, dtype=np.int32)[None], "input_lengths": np.array([9])},
            "maximum input length 8",
        ),
        ({"input_ids": None}, "input_ids is not present"),
        ({"input_ids": np.array([[1, 512, 3]])}, "tokens from 0 to 511"),
        ({"request_output_len": np.array([0])}, "request_output_len is 0"),
        ({"beam_width": np.array([2])}, "cannot play: beam_width 2"),
        ({"num_return_sequences": np.array([3])}, "cannot play: num_return_sequences 3"),
        ({"lora_task_id": np.array([1])}, "cannot play: lora_task_id"),
        ({"draft_input_ids": np.array([[1]])}, "cannot play: draft_input_ids"),
        ({"return_context_logits": np.array([True])}, "cannot play: return_context_logits"),
        ({"stop_words_list": np.array([[[1, 2], [2, 1]]])}, "offsets"),
        ({"runtime_top_k": np.array([5]), "temperature": np.array([-1.0])}, "temperature is -1"),
    ],
)
def test_requests_that_are_not_served_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(NotServedError, match=message):
        read_tasks(inputs(**changes), LIMITS, decoupled=True)


def test_without_the_decoupled_policy_there_are_no_streams_and_no_rows() -> None:
    with pytest.raises(NotServedError, match="streaming needs the decoupled"):
        read_tasks(inputs(streaming=np.array([True])), LIMITS, decoupled=False)
    two = {name: np.repeat(array, 2, axis=0) for name, array in inputs().items()}
    with pytest.raises(NotServedError, match="more than one row"):
        read_tasks(two, LIMITS, decoupled=False)

"""Prompts in pieces and prompts that were there before: the answer is that of a prompt computed at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoint_factory import tiny_checkpoint
from engine_cases import edit_tensors, lowered, quantized
from llm_engines import random_prompt, with_end_tokens

from enginesmith.triton.models.llm_onnxruntime.llm_prefix import PrefixCache
from enginesmith.triton.models.llm_onnxruntime.llm_runtime import Generation, Runtime, Sampling

GREEDY = Sampling(max_tokens=12)


def with_int8_cache(tensors: dict[str, Any]) -> None:
    import torch

    for layer in (0, 1):
        for part in "kv":
            tensors[f"model.layers.{layer}.self_attn.{part}_proj.{part}_scale"] = torch.tensor(0.02)


@pytest.fixture(scope="module", params=["llama", "mistral_window", "quantized_cache"])
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp(request.param)
    if request.param == "mistral_window":
        checkpoint = tiny_checkpoint(
            directory / "checkpoint", architecture="MistralForCausalLM", sliding_window=8
        )
    else:
        checkpoint = tiny_checkpoint(directory / "checkpoint")
    if request.param == "quantized_cache":
        edit_tensors(checkpoint, with_int8_cache)
    return with_end_tokens(lowered(checkpoint, directory / "engine"), [])


def runtime_of(engine: Path, **options: Any) -> Runtime:
    return Runtime(engine, **{"slots": 3, "capacity": 96, "threads": 1, **options})


def finish(runtime: Runtime) -> None:
    while runtime.running:
        runtime.step()
        runtime.retire()


@pytest.mark.parametrize("chunk", [1, 7, 32])
def test_prompt_in_pieces_gives_the_answer_of_the_whole(chunk: int, engine: Path) -> None:
    prompt = random_prompt(40)
    runtime = runtime_of(engine)
    expected = runtime.generate([prompt], GREEDY)[0].tokens

    sequence = Generation(prompt, GREEDY)
    runtime.admit(sequence)
    computed = []
    while runtime.prefilling is not None:
        computed.append(runtime.prefill(chunk))
    finish(runtime)

    assert sum(computed) == 40
    assert max(computed) == chunk
    assert sequence.tokens == expected


def test_batch_that_shrinks_during_a_prefill_takes_the_new_sequence_into_the_right_slot(engine: Path) -> None:
    runtime = runtime_of(engine)
    short = [Generation(random_prompt(5, seed=seed), Sampling(max_tokens=3)) for seed in (1, 2)]
    late = Generation(random_prompt(30), GREEDY)
    for sequence in short:
        runtime.start(sequence)
    runtime.admit(late)
    assert runtime.free_slots == 0
    while runtime.running:
        runtime.prefill(4)
        runtime.step()
        runtime.retire()
    assert runtime.prefilling is late
    while runtime.prefilling is not None:
        runtime.prefill(4)
    finish(runtime)

    for sequence in (*short, late):
        assert sequence.tokens == runtime.generate([sequence.prompt], sequence.sampling)[0].tokens


def test_prefill_that_is_given_up_leaves_its_slot(engine: Path) -> None:
    runtime = runtime_of(engine, slots=1)
    runtime.admit(Generation(random_prompt(20), GREEDY))
    runtime.prefill(4)
    runtime.drop_prefill()
    assert runtime.free_slots == 1
    assert runtime.generate([random_prompt(9)], GREEDY)[0].finish_reason == "length"


def test_known_beginning_is_not_computed_again_and_the_answer_stays(engine: Path) -> None:
    plain = runtime_of(engine)
    reusing = runtime_of(engine, reuse_tokens=64, tokens_per_block=8)
    shared = random_prompt(32)
    for seed, reused in ((1, 0), (2, 32), (3, 32)):
        prompt = [*shared, *random_prompt(6, seed=seed)]
        sequence = reusing.generate([prompt], GREEDY)[0]
        assert sequence.reused_tokens == reused
        assert sequence.tokens == plain.generate([prompt], GREEDY)[0].tokens


def test_last_token_of_a_known_prompt_is_computed(engine: Path) -> None:
    runtime = runtime_of(engine, reuse_tokens=64, tokens_per_block=8)
    first, again = (runtime.generate([random_prompt(16)], GREEDY)[0] for _ in range(2))
    assert again.reused_tokens == 8
    assert again.tokens == first.tokens


@pytest.fixture(scope="module")
def rounding_engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """8-bit weights with INT8 activations inside the kernels, whose rounding is what batch sizes can change."""
    directory = tmp_path_factory.mktemp("rounding")
    checkpoint = quantized(tiny_checkpoint(directory / "checkpoint"), directory / "quantized", "int8_wo")
    return with_end_tokens(lowered(checkpoint, directory / "engine", mode="fast"), [])


def test_batch_invariant_answers_have_the_same_log_probabilities_in_any_company(
    rounding_engine: Path,
) -> None:
    sampling = Sampling(max_tokens=12, logprobs=True)
    runtime = runtime_of(rounding_engine, slots=5, batch_invariant=True)
    prompts = [random_prompt(6 + seed, seed=seed) for seed in range(5)]
    together = runtime.generate(prompts, sampling)
    for prompt, sequence in zip(prompts, together, strict=True):
        (alone,) = runtime.generate([prompt], sampling)
        assert (alone.tokens, alone.logprobs) == (sequence.tokens, sequence.logprobs)


def test_lone_batch_invariant_sequence_and_the_prefill_beside_it_do_not_disturb_each_other(
    rounding_engine: Path,
) -> None:
    runtime = runtime_of(rounding_engine, slots=2, batch_invariant=True)
    running = Generation(random_prompt(5, seed=1), Sampling(max_tokens=20))
    late = Generation(random_prompt(33, seed=2), GREEDY)
    runtime.start(running)
    runtime.admit(late)
    computed = []
    while runtime.prefilling is not None:
        runtime.step()
        computed.append(runtime.prefill(8))
    while runtime.running:
        runtime.step()
        runtime.retire()

    assert computed == [8, 8, 8, 7, 2]
    for sequence in (running, late):
        assert sequence.tokens == runtime.generate([sequence.prompt], sequence.sampling)[0].tokens


def test_batch_invariant_reuse_leaves_two_tokens_to_compute(engine: Path) -> None:
    runtime = runtime_of(engine, reuse_tokens=64, tokens_per_block=8, batch_invariant=True)
    first, again = (runtime.generate([random_prompt(17)], GREEDY)[0] for _ in range(2))
    assert again.reused_tokens == 8
    assert again.tokens == first.tokens


def test_memory_is_that_of_the_slots_and_the_kept_blocks(engine: Path) -> None:
    token_bytes = 2 * 2 * 2 * 16 * 4  # layers, keys and values, heads, width, FP32
    assert runtime_of(engine).kv_cache_bytes == 3 * 96 * token_bytes
    assert (
        runtime_of(engine, reuse_tokens=64, tokens_per_block=8).kv_cache_bytes == (3 * 96 + 64) * token_bytes
    )


def numbered(tokens: list[int]) -> Any:
    """A cache [1, 1, tokens, 1] that holds the token ids."""
    return np.array(tokens, np.float32).reshape(1, 1, -1, 1)


def loaded(cache: PrefixCache, tokens: list[int]) -> list[int]:
    target = numbered([-1] * len(tokens))
    count = cache.load(tokens, target)
    assert (target[0, 0, count:, 0] == -1).all()
    return [int(value) for value in target[0, 0, :count, 0]]


def test_block_after_another_beginning_is_another_block() -> None:
    cache = PrefixCache(blocks=8, tokens_per_block=2, shape=(1, 1, 1))
    cache.store([1, 2, 3, 4, 5], numbered([1, 2, 3, 4, 5]))

    assert loaded(cache, [1, 2, 3, 4, 9]) == [1, 2, 3, 4]
    assert loaded(cache, [1, 2, 7, 4, 9]) == [1, 2]
    assert loaded(cache, [7, 2, 3, 4, 9]) == []
    assert loaded(cache, [1, 2, 3, 4]) == [1, 2]  # The last token is to be computed.


def test_least_recently_used_block_makes_room() -> None:
    cache = PrefixCache(blocks=2, tokens_per_block=2, shape=(1, 1, 1))
    for first in (1, 3):
        cache.store([first, first + 1], numbered([first, first + 1]))
    assert loaded(cache, [1, 2, 0]) == [1, 2]

    cache.store([5, 6], numbered([5, 6]))

    assert loaded(cache, [3, 4, 0]) == []
    assert loaded(cache, [1, 2, 0]) == [1, 2]
    assert loaded(cache, [5, 6, 0]) == [5, 6]


def test_prompt_longer_than_the_memory_keeps_its_beginning() -> None:
    cache = PrefixCache(blocks=2, tokens_per_block=2, shape=(1, 1, 1))
    tokens = [1, 2, 3, 4, 5, 6, 7]
    cache.store(tokens, numbered(tokens))
    assert loaded(cache, tokens) == [1, 2, 3, 4]

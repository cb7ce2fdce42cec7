"""Generation: batches whose members come and go give what each would give alone, and every end is the right one."""

from __future__ import annotations

import json
import math
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoint_factory import VOCAB_SIZE, tiny_checkpoint
from engine_cases import edit_tensors, lowered

from enginesmith.triton.models.llm_onnxruntime.llm_runtime import (
    Generation,
    NonFiniteLogitsError,
    PromptTooLongError,
    Runtime,
    Sampling,
    choose_token,
)
from enginesmith.verify.measure import teacher_forced

CAPACITY = 64


def with_fp8_cache(checkpoint: Path) -> Path:
    """``checkpoint`` with cache scales, which is all that FP8 attention needs."""

    def edit(tensors: dict[str, Any]) -> None:
        import torch

        for layer in (0, 1):
            for part in "kv":
                tensors[f"model.layers.{layer}.self_attn.{part}_proj.{part}_scale"] = torch.tensor(0.02)

    edit_tensors(checkpoint, edit)
    return checkpoint


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("engines")
    checkpoints = {
        "llama": tiny_checkpoint(directory / "llama"),
        "mistral_window": tiny_checkpoint(
            directory / "mistral", architecture="MistralForCausalLM", sliding_window=8
        ),
        "qwen3": tiny_checkpoint(directory / "qwen3", architecture="Qwen3ForCausalLM", head_dim=32),
        "llama_fp8_cache": with_fp8_cache(tiny_checkpoint(directory / "fp8_cache")),
    }
    made = {name: lowered(path, directory / f"{name}-engine") for name, path in checkpoints.items()}
    for engine in made.values():
        with_eos(engine, [])  # Random models would meet it at random.
    return made


@pytest.fixture(scope="module")
def llama(engines: dict[str, Path]) -> Runtime:
    return Runtime(engines["llama"], slots=3, capacity=CAPACITY, threads=1)


def with_eos(engine: Path, tokens: list[int]) -> Path:
    path = engine / "engine.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_ids": tokens}))
    return engine


def prompts(count: int, *, lengths: tuple[int, ...] = (1, 2, 9, 30, 17, 5, 12, 3)) -> list[list[int]]:
    random = np.random.default_rng(11)
    return [random.integers(3, VOCAB_SIZE, lengths[index % len(lengths)]).tolist() for index in range(count)]


def alone(runtime: Runtime, prompt: list[int], sampling: Sampling) -> list[int]:
    return runtime.generate([prompt], sampling)[0].tokens


ENGINES = ("llama", "mistral_window", "qwen3", "llama_fp8_cache")


@pytest.mark.parametrize("name", ENGINES)
def test_decoding_with_a_cache_equals_full_passes(name: str, engines: dict[str, Path]) -> None:
    engine = engines[name]
    description = json.loads((engine / "engine.json").read_text())
    logits_of_tokens = teacher_forced(engine / "exact.onnx", description)
    runtime = Runtime(engine, slots=1, capacity=CAPACITY, threads=1)
    for prompt in prompts(4):
        generated = alone(runtime, prompt, Sampling(max_tokens=20))
        logits = logits_of_tokens(np.array([*prompt, *generated]))
        chosen = logits[len(prompt) - 1 : -1]
        # Not argmax: two logits may be equal but for the order of additions.
        margins = chosen.max(axis=1) - chosen[np.arange(20), generated]
        assert margins.max() < (0.1 if name == "llama_fp8_cache" else 1e-4)


@pytest.mark.parametrize("name", ENGINES)
def test_sequences_that_join_and_leave_generate_what_each_does_alone(
    name: str, engines: dict[str, Path]
) -> None:
    # Eight prompts of all lengths through three slots, each with its own number of tokens: slots are left in
    # every order, the last running sequence moves, and new ones start where longer ones have been.
    runtime = Runtime(engines[name], slots=3, capacity=CAPACITY, threads=1)
    wanted = [7, 1, 20, 3, 12, 2, 9, 15]
    batch = [
        Generation(prompt, Sampling(max_tokens=count))
        for prompt, count in zip(prompts(8), wanted, strict=True)
    ]

    runtime.run(batch)

    single = Runtime(engines[name], slots=1, capacity=CAPACITY, threads=1)
    assert [len(one.tokens) for one in batch] == wanted
    for one in batch:
        assert one.tokens == alone(single, list(one.prompt), one.sampling)


def test_bound_memory_outlives_what_is_allocated_meanwhile(llama: Runtime) -> None:
    """Bindings hold addresses: small blocks that are freed and filled again must not be among them."""
    sampling = Sampling(max_tokens=8)
    expected = alone(llama, prompts(1)[0], sampling)
    sequence = Generation(prompts(1)[0], sampling)
    llama.start(sequence)
    filled = []
    while sequence.finish_reason is None:
        filled += [np.full(size, 7, np.int64) for size in (1, 2, 3, 8, 16) for _ in range(200)]
        llama.step()
    llama.retire()
    assert sequence.tokens == expected


def test_slot_taken_over_by_the_last_sequence_keeps_its_history(llama: Runtime) -> None:
    short, long, longest = (
        Generation(prompt, Sampling(max_tokens=count))
        for prompt, count in zip(prompts(3), (2, 6, 12), strict=True)
    )
    for sequence in (short, long, longest):
        llama.start(sequence)
    llama.step()

    assert llama.retire() == [short]
    assert llama.running == [longest, long]
    assert llama.free_slots == 1
    while llama.running:
        llama.step()
        llama.retire()

    for sequence in (short, long, longest):
        assert sequence.tokens == alone(llama, list(sequence.prompt), sequence.sampling)


def test_sequences_that_end_together_all_leave(llama: Runtime) -> None:
    batch = [Generation(prompt, Sampling(max_tokens=2)) for prompt in prompts(3)]
    for sequence in batch:
        llama.start(sequence)
    llama.step()

    assert llama.retire() == batch
    assert llama.free_slots == 3


@pytest.mark.parametrize("prompt_tokens", [1, 10, 15])
def test_sequence_ends_when_its_slot_is_full(prompt_tokens: int, engines: dict[str, Path]) -> None:
    prompt = prompts(1, lengths=(prompt_tokens,))[0]
    narrow = Runtime(engines["llama"], slots=1, capacity=16, threads=1)
    wide = Runtime(engines["llama"], slots=1, capacity=CAPACITY, threads=1)

    ended = narrow.generate([prompt], Sampling(max_tokens=100))[0]

    assert ended.finish_reason == "length"
    assert len(ended.tokens) == 16 - prompt_tokens
    assert ended.tokens == alone(wide, prompt, Sampling(max_tokens=16 - prompt_tokens))


def test_end_token_stops_and_is_kept(engines: dict[str, Path], llama: Runtime, tmp_path: Path) -> None:
    prompt = prompts(3)[2]
    free = alone(llama, prompt, Sampling(max_tokens=30))
    position = next(index for index in range(1, 30) if free[index] not in free[:index])
    copy = with_eos(shutil.copytree(engines["llama"], tmp_path / "engine"), [511, free[position]])

    ended = Runtime(copy, slots=1, capacity=CAPACITY, threads=1).generate([prompt], Sampling(max_tokens=30))[
        0
    ]

    assert ended.finish_reason == "stop"
    assert ended.tokens == free[: position + 1]


def test_end_token_that_comes_first_needs_no_decoding_step(
    engines: dict[str, Path], llama: Runtime, tmp_path: Path
) -> None:
    first, second = prompts(2)
    token = alone(llama, first, Sampling(max_tokens=1))[0]
    copy = with_eos(shutil.copytree(engines["llama"], tmp_path / "engine"), [token])
    runtime = Runtime(copy, slots=1, capacity=CAPACITY, threads=1)

    ended = runtime.generate([first, second, first], Sampling(max_tokens=3))

    assert [one.tokens for one in ended] == [[token], alone(llama, second, Sampling(max_tokens=3)), [token]]


def test_callback_sees_every_token_and_can_end_the_sequence(llama: Runtime) -> None:
    seen: list[int] = []

    def enough(sequence: Generation) -> bool:
        seen.append(sequence.tokens[-1])
        return len(sequence.tokens) == 5

    watched = Generation(prompts(1)[0], Sampling(max_tokens=30), on_token=enough)
    other = Generation(prompts(2)[1], Sampling(max_tokens=8))
    llama.run([watched, other])

    assert watched.finish_reason == "stop"
    assert watched.tokens == seen == alone(llama, list(watched.prompt), Sampling(max_tokens=5))
    assert (len(other.tokens), other.finish_reason) == (8, "length")


def test_prompt_that_fills_its_slot_is_refused_and_the_others_go_on(llama: Runtime) -> None:
    llama.start(running := Generation(prompts(1)[0], Sampling(max_tokens=2)))

    with pytest.raises(PromptTooLongError, match="64 tokens; at most 63 fit"):
        llama.start(Generation([5] * CAPACITY, Sampling()))
    with pytest.raises(ValueError, match="no tokens"):
        llama.start(Generation([], Sampling()))

    llama.step()
    assert llama.retire() == [running]
    assert running.tokens == alone(llama, list(running.prompt), Sampling(max_tokens=2))


def test_engine_of_another_format_is_refused(engines: dict[str, Path], tmp_path: Path) -> None:
    description = json.loads((engines["llama"] / "engine.json").read_text())
    (tmp_path / "engine.json").write_text(json.dumps(description | {"format": 2}))

    with pytest.raises(ValueError, match=r"engine\.json has format 2; this runtime reads 1"):
        Runtime(tmp_path, slots=1, capacity=16)


def test_capacity_beyond_the_models_positions_is_refused(engines: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match="capacity 1025 exceeds the model's 1024 positions"):
        Runtime(engines["llama"], slots=1, capacity=1025)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weight_that_is_not_finite_is_noticed_at_the_first_token(value: float, tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "checkpoint")

    def spoil(tensors: dict[str, Any]) -> None:
        tensors["model.layers.1.mlp.down_proj.weight"][0, 0] = value

    edit_tensors(checkpoint, spoil)
    runtime = Runtime(lowered(checkpoint, tmp_path / "engine"), slots=2, capacity=CAPACITY, threads=1)

    with pytest.raises(NonFiniteLogitsError, match="the engine produced nan after 9 tokens"):
        runtime.generate([[5] * 9], Sampling())
    runtime.clear()
    assert runtime.free_slots == 2


@pytest.mark.parametrize("bad", [[0.0, math.nan, 1.0], [0.0, math.inf, 1.0], [-math.inf] * 3])
@pytest.mark.parametrize(
    "sampling", [Sampling(), Sampling(temperature=1.0), Sampling(repetition_penalty=1.2)]
)
def test_logits_that_are_not_finite_choose_no_token(bad: list[float], sampling: Sampling) -> None:
    with pytest.raises(NonFiniteLogitsError):
        choose_token(np.array(bad, np.float32), Generation([1], sampling))


def test_default_is_greedy() -> None:
    logits = np.array([0.1, 3.0, 2.9, -5.0], np.float32)
    assert choose_token(logits, Generation([0], Sampling())) == 1


def test_same_seed_repeats_and_another_differs(llama: Runtime) -> None:
    prompt = prompts(1)[0]
    samplings = [Sampling(max_tokens=20, temperature=1.0, seed=seed) for seed in (3, 3, 4)]
    first, again, other = (alone(llama, prompt, sampling) for sampling in samplings)
    assert first == again != other


def test_sampling_does_not_depend_on_the_batch(llama: Runtime) -> None:
    sampling = Sampling(max_tokens=10, temperature=1.0, seed=5)
    together = llama.generate(prompts(3), sampling)
    assert [one.tokens for one in together] == [alone(llama, prompt, sampling) for prompt in prompts(3)]


@pytest.mark.parametrize("narrow", [{"top_k": 1}, {"top_p": 1e-6}])
def test_narrowest_sampling_equals_greedy(narrow: dict[str, Any], llama: Runtime) -> None:
    prompt = prompts(1)[0]
    greedy = alone(llama, prompt, Sampling(max_tokens=20))
    assert alone(llama, prompt, Sampling(max_tokens=20, temperature=5.0, **narrow)) == greedy


PROBABILITIES = np.array([0.5, 0.05, 0.3, 0.15])


def frequencies(draws: int = 4000, **parameters: Any) -> dict[int, float]:
    sequence = Generation([0], Sampling(seed=1, **{"temperature": 1.0, **parameters}))
    logits = np.log(PROBABILITIES).astype(np.float32)
    counts = Counter(choose_token(logits, sequence) for _ in range(draws))
    return {token: count / draws for token, count in sorted(counts.items())}


@pytest.mark.parametrize(
    ("parameters", "expected"),
    [
        ({}, {0: 0.5, 1: 0.05, 2: 0.3, 3: 0.15}),
        ({"top_k": 2}, {0: 0.625, 2: 0.375}),
        ({"top_k": 9}, {0: 0.5, 1: 0.05, 2: 0.3, 3: 0.15}),
        ({"top_p": 0.79}, {0: 0.625, 2: 0.375}),  # 0.5 is not enough, 0.5 + 0.3 is.
        ({"top_p": 0.81}, {0: 0.526, 2: 0.316, 3: 0.158}),
        ({"top_k": 3, "top_p": 0.5}, {0: 1.0}),  # 0.5 / 0.95 of what top_k leaves.
        ({"temperature": 0.5}, {0: 0.685, 1: 0.007, 2: 0.247, 3: 0.062}),
    ],
)
def test_tokens_are_drawn_with_the_probabilities_that_the_parameters_leave(
    parameters: dict[str, Any], expected: dict[int, float]
) -> None:
    seen = frequencies(**parameters)
    assert seen.keys() == expected.keys()
    assert max(abs(seen[token] - share) for token, share in expected.items()) < 0.03


def test_repetition_penalty_divides_positive_and_multiplies_negative_logits_of_seen_tokens() -> None:
    logits = np.array([4.0, 3.0, -1.0, -1.5], np.float32)
    sequence = Generation([0], Sampling(repetition_penalty=2.0))
    assert choose_token(logits, sequence) == 1  # 4 / 2 < 3
    sequence.tokens.append(1)
    assert choose_token(logits, sequence) == 0  # 4 / 2 > 3 / 2
    negative = np.array([-9.0, -9.0, -1.0, -1.5], np.float32)
    assert choose_token(negative, Generation([2], Sampling(repetition_penalty=2.0))) == 3  # -1 x 2 < -1.5
    np.testing.assert_array_equal(logits, np.array([4.0, 3.0, -1.0, -1.5], np.float32))


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("max_tokens", 0, "at least 1"),
        ("temperature", -0.1, "from 0"),
        ("temperature", math.nan, "from 0"),
        ("top_k", -1, "at least 0"),
        ("top_p", 0.0, "above 0"),
        ("top_p", 1.1, "at most 1"),
        ("repetition_penalty", 0.0, "above 0"),
        ("repetition_penalty", math.inf, "at most 100"),
        ("seed", -1, "at least 0"),
    ],
)
def test_sampling_parameter_out_of_range_is_named(name: str, value: float, allowed: str) -> None:
    with pytest.raises(ValueError, match=rf"^{name} is .*; allowed: .*{allowed}"):
        Sampling(**{name: value})

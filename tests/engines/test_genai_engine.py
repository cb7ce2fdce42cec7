"""The engine over onnxruntime-genai, on the CPU: the code that a GPU runs, over a graph that is batched statically.

The peer is onnxruntime-genai's own ``Generator`` on the same files. The graph for CUDA is made here and looked at; nothing
here can run it.
"""

from __future__ import annotations

import json
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime_genai as genai
import pytest
from checkpoint_factory import VOCAB_SIZE, tiny_checkpoint
from llm_engines import random_prompt
from llm_served import serving_llm, stream_to

from enginesmith.errors import ServerError, SourceError
from enginesmith.triton.genai import GenaiLimits, export_model, write_package
from enginesmith.triton.models.llm_genai.llm_genai import GenaiEngine
from enginesmith.triton.models.llm_onnxruntime.llm_batching import Job, RefusedError, Update
from enginesmith.triton.models.llm_onnxruntime.llm_pieces import AnswerText
from enginesmith.triton.models.llm_onnxruntime.llm_sampling import Generation, Sampling
from enginesmith.triton.models.llm_onnxruntime.llm_text import Text

pytestmark = pytest.mark.model

PATIENCE_S = 60
CAPACITY = 96
LIMITS = GenaiLimits(slots=4, capacity=CAPACITY, max_queue_size=8, default_max_tokens=6)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``checkpoint``, and of it ``cpu`` (FP32, never ends by itself) and ``cuda`` (FP16, paged)."""
    root = tmp_path_factory.mktemp("genai")
    checkpoint = tiny_checkpoint(root / "checkpoint")
    with ThreadPoolExecutor() as threads:
        cuda = threads.submit(
            export_model, checkpoint, root / "cuda", precision="fp16", provider="cuda", limits=LIMITS
        )
        export_model(checkpoint, root / "cpu", precision="fp32", provider="cpu", limits=LIMITS)
        cuda.result()
    return root


@pytest.fixture(scope="module")
def endless(exported: Path) -> Path:
    """A model for the CPU whose end token never comes about by a greedy choice of these tests."""
    return with_end_token(exported / "cpu", exported / "endless", VOCAB_SIZE - 1)


def with_end_token(model: Path, out: Path, token: int) -> Path:
    return with_configuration(model, out, lambda document: document["model"].update(eos_token_id=token))


def with_configuration(model: Path, out: Path, edit: Callable[[dict[str, Any]], None]) -> Path:
    """``model`` with another ``genai_config.json``."""
    out.mkdir()
    for file in model.iterdir():
        if file.is_file():
            (out / file.name).hardlink_to(file)
    path = out / "genai_config.json"
    document = json.loads(path.read_text())
    edit(document)
    path.unlink()
    path.write_text(json.dumps(document))
    return out


class Outbox:
    """Keeps updates; ``watch`` is called with each before the engine goes on."""

    def __init__(self) -> None:
        self._updates: queue.SimpleQueue[Update] = queue.SimpleQueue()
        self.watch: Callable[[Update], None] = lambda _update: None

    def __call__(self, updates: Sequence[Update]) -> None:
        for update in updates:
            self.watch(update)
            self._updates.put(update)

    def until_last(self, *jobs: Job) -> dict[Job, list[Update]]:
        """Everything up to the last updates of ``jobs``, by job."""
        seen: dict[Job, list[Update]] = {job: [] for job in jobs}
        missing = set(jobs)
        while missing:
            update = self._updates.get(timeout=PATIENCE_S)
            seen.setdefault(update.job, []).append(update)
            if update.last:
                missing.discard(update.job)
        return seen


@contextmanager
def generating(directory: Path, *, slots: int = 4, **options: Any) -> Iterator[tuple[GenaiEngine, Outbox]]:
    outbox = Outbox()
    engine = GenaiEngine(directory, outbox, slots=slots, capacity=CAPACITY, **options)
    try:
        yield engine, outbox
    finally:
        engine.close()


def characters(tokens: Sequence[int]) -> str:
    return "".join(chr(0x100 + token) for token in tokens)


def job_of(
    prompt: list[int],
    *,
    stops: Sequence[str] = (),
    timeout_s: float | None = None,
    max_tokens: int = 8,
    **sampling: Any,
) -> Job:
    generation = Generation(prompt, Sampling(max_tokens=max_tokens, **sampling))
    return Job(generation, AnswerText(characters, stops), streaming=True, timeout_s=timeout_s)


def of_generator(directory: Path, prompt: Sequence[int], tokens: int) -> list[int]:
    """The greedy answer of onnxruntime-genai's ``Generator``, which computes the prompt alone."""
    model = genai.Model(str(directory))
    parameters = genai.GeneratorParams(model)
    parameters.set_search_options(max_length=len(prompt) + tokens, do_sample=False)
    generator = genai.Generator(model, parameters)
    generator.append_tokens(np.asarray(prompt, np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    answer: list[int] = generator.get_sequence(0)[len(prompt) :].tolist()
    return answer


def test_sixteen_at_once_answer_as_the_generator_does_alone(endless: Path) -> None:
    jobs = [job_of(random_prompt(3 + 2 * seed, seed=seed), max_tokens=4 + seed) for seed in range(16)]
    with generating(endless, slots=16) as (engine, outbox):
        engine.submit(jobs)
        seen = outbox.until_last(*jobs)
        load = engine.load()

    for job in jobs:
        wanted = of_generator(endless, job.generation.prompt, job.generation.sampling.max_tokens)
        assert job.generation.tokens == wanted
        assert "".join(update.text for update in seen[job]) == characters(wanted)
        assert seen[job][-1].finish_reason == "length"
    assert (load.running, load.waiting, load.slots) == (0, 0, 16)
    assert load.output_tokens == sum(len(job.generation.tokens) for job in jobs)
    assert load.prompt_tokens == sum(len(job.generation.prompt) for job in jobs)


def test_more_jobs_than_slots_are_all_answered(endless: Path) -> None:
    jobs = [job_of(random_prompt(4 + seed, seed=seed), max_tokens=3 + seed % 4) for seed in range(9)]
    with generating(endless, slots=2) as (engine, outbox):
        engine.submit(jobs)
        outbox.until_last(*jobs)

    for job in jobs:
        tokens = job.generation.tokens
        assert tokens == of_generator(endless, job.generation.prompt, len(tokens))
        assert len(tokens) == job.generation.sampling.max_tokens


def test_every_token_is_told_as_it_comes(endless: Path) -> None:
    job = job_of(random_prompt(5), max_tokens=6)
    with generating(endless) as (engine, outbox):
        engine.submit([job])
        updates = outbox.until_last(job)[job]

    assert [update.output_tokens for update in updates] == [1, 2, 3, 4, 5, 6]
    assert job.scheduled_ns <= job.first_token_ns < job.last_token_ns


def test_the_end_token_ends_an_answer_and_is_counted(exported: Path, endless: Path, tmp_path: Path) -> None:
    prompt = random_prompt(5)
    answer = of_generator(endless, prompt, 12)
    end = answer[5]
    length = answer.index(end) + 1
    directory = with_end_token(exported / "cpu", tmp_path / "ending", end)
    job = job_of(prompt, max_tokens=12)
    late = job_of(prompt, max_tokens=12, min_tokens=12)
    with generating(directory) as (engine, outbox):
        engine.submit([job, late])
        seen = outbox.until_last(job, late)

    assert seen[job][-1].finish_reason == "stop"
    assert job.generation.tokens == answer[:length]
    assert seen[late][-1].finish_reason == "length"
    assert len(late.generation.tokens) == 12
    assert end not in late.generation.tokens


def test_a_stop_word_ends_the_answer_before_it(endless: Path) -> None:
    prompt = random_prompt(6, seed=4)
    answer = characters(of_generator(endless, prompt, 16))
    stopped = job_of(prompt, stops=[answer[6:8]], max_tokens=16)
    beside = job_of(prompt, max_tokens=16)
    with generating(endless) as (engine, outbox):
        engine.submit([stopped, beside])
        seen = outbox.until_last(stopped, beside)

    assert "".join(update.text for update in seen[stopped]) == answer[: answer.find(answer[6:8])]
    assert seen[stopped][-1].finish_reason == "stop"
    assert "".join(update.text for update in seen[beside]) == answer


def test_a_cancelled_job_frees_its_slot_and_hurts_nobody(endless: Path) -> None:
    long = job_of(random_prompt(5), max_tokens=80)
    beside = job_of(random_prompt(7, seed=3), max_tokens=20)
    after = job_of(random_prompt(9, seed=5), max_tokens=5)
    with generating(endless, slots=2) as (engine, outbox):

        def cancel_long(update: Update) -> None:
            if update.job is long and update.output_tokens == 3:
                engine.cancel(long)

        outbox.watch = cancel_long
        engine.submit([long, beside, after])
        seen = outbox.until_last(long, beside, after)

    assert seen[long][-1].failure == "cancelled"
    assert len(long.generation.tokens) == 3
    for job in (beside, after):
        wanted = of_generator(endless, job.generation.prompt, job.generation.sampling.max_tokens)
        assert job.generation.tokens == wanted


def test_a_job_whose_time_is_over_ends_late(endless: Path) -> None:
    job = job_of(random_prompt(5), max_tokens=90, timeout_s=1e-6)
    with generating(endless) as (engine, outbox):
        engine.submit([job])
        assert outbox.until_last(job)[job][-1].failure == "late"


def test_a_full_queue_refuses(endless: Path) -> None:
    running, held, beyond = (job_of(random_prompt(5), max_tokens=10) for _ in range(3))
    started, go_on = threading.Event(), threading.Event()
    with generating(endless, slots=1, max_waiting=1) as (engine, outbox):

        def hold(update: Update) -> None:
            started.set()
            go_on.wait(PATIENCE_S)

        outbox.watch = hold
        engine.submit([running])
        assert started.wait(PATIENCE_S)
        engine.submit([held])
        with pytest.raises(RefusedError, match="1 requests wait, at most 1"):
            engine.submit([beyond])
        go_on.set()
        outbox.until_last(running, held)


@pytest.mark.parametrize(
    ("asked", "name"),
    [
        ({"presence_penalty": 0.5}, "presence_penalty"),
        ({"frequency_penalty": 0.5}, "frequency_penalty"),
        ({"bad_words": ((5, 6),)}, "bad_words"),
        ({"end_ids": frozenset({9})}, "end_id"),
        ({"logprobs": True}, "return_log_probs"),
        ({"seed": 2**64}, f"seed above {2**64 - 1}"),
        ({"temperature": 0.7}, "temperature without paged attention"),
    ],
)
def test_what_onnxruntime_genai_cannot_do_is_refused_by_name(
    endless: Path, asked: dict[str, Any], name: str
) -> None:
    refused, beside = job_of(random_prompt(5), **asked), job_of(random_prompt(5))
    with generating(endless) as (engine, outbox):
        engine.submit([refused, beside])
        seen = outbox.until_last(refused, beside)

    assert seen[refused][-1].failure == "invalid"
    assert f"onnxruntime-genai, which has no {name};" in seen[refused][-1].message
    assert seen[beside][-1].finish_reason == "length"


@pytest.mark.parametrize("length", [0, CAPACITY])
def test_a_prompt_that_leaves_no_room_is_refused(endless: Path, length: int) -> None:
    job = job_of(random_prompt(length))
    with generating(endless) as (engine, outbox):
        engine.submit([job])
        last = outbox.until_last(job)[job][-1]

    assert last.failure == "invalid"
    assert f"{length} tokens; allowed: 1 to {CAPACITY - 1}" in last.message


def test_a_repetition_penalty_changes_the_answer_of_its_own_request_alone(endless: Path) -> None:
    plain = job_of(random_prompt(5), max_tokens=30)
    penalized = job_of(random_prompt(5), max_tokens=30, repetition_penalty=5.0)
    with generating(endless) as (engine, outbox):
        engine.submit([plain, penalized])
        outbox.until_last(plain, penalized)

    assert plain.generation.tokens == of_generator(endless, plain.generation.prompt, 30)
    assert len(set(penalized.generation.tokens)) > len(set(plain.generation.tokens))


def test_an_answer_ends_where_the_slot_does(endless: Path) -> None:
    job = job_of(random_prompt(CAPACITY - 5), max_tokens=50, min_tokens=40)
    with generating(endless) as (engine, outbox):
        engine.submit([job])
        last = outbox.until_last(job)[job][-1]

    assert last.finish_reason == "length"
    assert len(job.generation.tokens) == 5


def test_unloading_gives_every_job_its_last_update(endless: Path) -> None:
    jobs = [job_of(random_prompt(5), max_tokens=80) for _ in range(4)]
    outbox, started = Outbox(), threading.Event()
    engine = GenaiEngine(endless, outbox, slots=2, capacity=CAPACITY)
    outbox.watch = lambda _update: started.set()
    engine.submit(jobs)
    assert started.wait(PATIENCE_S)
    engine.close()

    seen = outbox.until_last(*jobs)
    assert {seen[job][-1].failure for job in jobs} <= {"busy", None}
    assert seen[jobs[-1]][-1].message == "the model is being unloaded"
    with pytest.raises(RefusedError, match="being unloaded"):
        engine.submit([job_of(random_prompt(5))])


def test_a_model_that_cannot_be_loaded_says_why(endless: Path, tmp_path: Path) -> None:
    broken = with_configuration(
        endless,
        tmp_path / "broken",
        lambda document: document["model"]["decoder"].update(filename="other.onnx"),
    )
    with pytest.raises(RuntimeError, match=r"other\.onnx"):
        GenaiEngine(broken, Outbox(), slots=1, capacity=CAPACITY)
    with pytest.raises(ValueError, match=r"capacity 100000 exceeds the model's \d+ positions"):
        GenaiEngine(endless, Outbox(), slots=1, capacity=100_000)


def test_the_graph_for_cuda_pages_its_keys_and_values(exported: Path) -> None:
    graph = onnx.load(str(exported / "cuda" / "model.onnx"), load_external_data=False).graph
    document = json.loads((exported / "cuda" / "genai_config.json").read_text())

    attention = [node for node in graph.node if node.op_type == "PagedAttention"]
    assert len(attention) == document["model"]["decoder"]["num_hidden_layers"]
    inputs = {one.name: one.type.tensor_type for one in graph.input}
    assert {"block_table", "cumulative_sequence_lengths", "past_sequence_lengths"} <= set(inputs)
    assert inputs["past_key_values.0.key"].elem_type == onnx.TensorProto.FLOAT16
    assert document["engine"]["dynamic_batching"] == {
        "block_size": 256,
        "max_batch_size": LIMITS.slots,
        "num_blocks": LIMITS.slots * 1 + 16,
    }
    (provider,) = document["model"]["decoder"]["session_options"]["provider_options"]
    assert set(provider) == {"cuda"}


def test_more_than_the_paged_memory_holds_is_refused_at_load(exported: Path) -> None:
    with pytest.raises(ValueError, match=r"8 slots exceed engine\.dynamic_batching\.max_batch_size 4"):
        GenaiEngine(exported / "cuda", Outbox(), slots=8, capacity=CAPACITY)


def test_too_few_blocks_are_refused_at_load(exported: Path, tmp_path: Path) -> None:
    short = with_configuration(
        exported / "cuda",
        tmp_path / "short",
        lambda document: document["engine"]["dynamic_batching"].update(num_blocks=3),
    )
    with pytest.raises(ValueError, match="4 sequences of 96 tokens need 4 key/value blocks of 256"):
        GenaiEngine(short, Outbox(), slots=4, capacity=CAPACITY)


@pytest.mark.skipif(genai.is_cuda_available(), reason="this machine can run it")
def test_without_cuda_the_graph_for_it_is_refused_in_words(exported: Path) -> None:
    with pytest.raises(RuntimeError, match=r"(?i)cuda"):
        GenaiEngine(exported / "cuda", Outbox(), slots=4, capacity=CAPACITY)


def test_a_directory_that_is_no_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"no config\.json"):
        export_model(tmp_path, tmp_path / "out", precision="fp32", provider="cpu")


@pytest.mark.server
def test_tritonserver_serves_it_like_any_other_llm(endless: Path, exported: Path, tmp_path: Path) -> None:
    checkpoint = exported / "checkpoint"
    write_package(tmp_path, "tiny", model=endless, checkpoint=checkpoint, limits=LIMITS)
    text = Text(checkpoint)
    wanted = of_generator(endless, text.encode("The sea"), 6)
    with serving_llm(tmp_path) as server, stream_to(server.grpc_url) as stream:
        reply = stream.ask("tiny", [b"The sea"], exclude_input_in_output=True)
        assert reply.text() == text.decode(wanted)
        assert reply.number("num_output_tokens") == 6
        assert reply.finish_reason == "length"

        stream.send("tiny", [b"The sea"], stream=True)
        pieces = stream.all()
        assert "".join(piece.text() for piece in pieces if piece.tensors) == text.decode(wanted)

        refused = stream.ask("tiny", [b"The sea"], return_log_probs=True)
        assert refused.error.startswith("[INVALID_ARG]")
        assert "return_log_probs" in refused.error


@pytest.mark.server
def test_an_engine_of_another_name_is_refused_at_load(endless: Path, exported: Path, tmp_path: Path) -> None:
    model = write_package(tmp_path, "tiny", model=endless, checkpoint=exported / "checkpoint", limits=LIMITS)
    serving = model / "1" / "serving.json"
    serving.write_text(json.dumps(json.loads(serving.read_text()) | {"engine": "other"}))
    with (
        pytest.raises(ServerError, match="engine is 'other'; allowed: onnxruntime, genai"),
        serving_llm(tmp_path),
    ):
        pytest.fail("it was loaded")

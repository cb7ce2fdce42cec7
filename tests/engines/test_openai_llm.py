"""The served LLM as callers of OpenAI's API meet it: the ``openai`` package, the front, tritonserver, the model."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from checkpoint_factory import tiny_checkpoint
from engine_cases import lowered
from llm_engines import with_end_tokens
from llm_served import PATIENCE_S, place_model, serving_llm

from enginesmith_client import Client

pytestmark = pytest.mark.server


@pytest.fixture(scope="module")
def triton_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    directory = tmp_path_factory.mktemp("openai-llm")
    checkpoint = tiny_checkpoint(directory / "checkpoint")
    engine = with_end_tokens(lowered(checkpoint, directory / "engine"), [])
    repository = directory / "repository"
    place_model(repository, "llm", engine, checkpoint, max_sequence_length=1024)
    with serving_llm(repository) as running:
        yield f"grpc://{running.grpc_url}"


@pytest.fixture(scope="module")
def url(triton_url: str) -> Iterator[str]:
    command = [
        sys.executable,
        "-m",
        "enginesmith.cli",
        "openai",
        "--triton",
        triton_url,
        "--port",
        "0",
        "--json",
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield json.loads(process.stdout.readline())["url"]
    finally:
        process.terminate()
        process.communicate()


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=url, api_key="any", max_retries=0, timeout=PATIENCE_S) as connected:
        yield connected


CHAT: list[Any] = [{"role": "system", "content": "a b"}, {"role": "user", "content": "hello there"}]


def test_a_streamed_chat_is_the_chat_and_that_of_the_client(client: openai.OpenAI, triton_url: str) -> None:
    whole = client.chat.completions.create(model="llm", messages=CHAT, max_tokens=8, logprobs=True)
    with client.chat.completions.create(
        model="llm", messages=CHAT, max_tokens=8, stream=True, stream_options={"include_usage": True}
    ) as stream:
        *pieces, counts = list(stream)
    with Client(triton_url, timeout_s=PATIENCE_S) as direct:
        known = direct.chat("llm", CHAT, max_tokens=8)

    assert whole.choices[0].message.content == known.text
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == known.text
    assert whole.usage is not None
    assert counts.usage == whole.usage
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (known.prompt_tokens, 8)
    assert [pieces[-1].choices[0].finish_reason, whole.choices[0].finish_reason] == ["length", "length"]
    assert whole.choices[0].logprobs is not None
    assert len(whole.choices[0].logprobs.content or []) == 8


def test_drawn_choices_differ_and_their_seed_repeats_them(client: openai.OpenAI) -> None:
    def draw() -> list[str]:
        answer = client.completions.create(
            model="llm", prompt="hello", n=3, seed=5, temperature=1.5, max_tokens=8
        )
        return [choice.text for choice in answer.choices]

    first = draw()

    assert len(set(first)) == 3
    assert draw() == first


def test_a_question_asked_again_without_a_seed_is_drawn_anew(client: openai.OpenAI) -> None:
    answers = {
        client.completions.create(model="llm", prompt="hello", temperature=1.5, max_tokens=16).choices[0].text
        for _ in range(3)
    }

    assert len(answers) == 3


def test_a_prompt_that_is_too_long_is_the_callers_error(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="llm", prompt="hello " * 5000)

    assert "tokens" in caught.value.message

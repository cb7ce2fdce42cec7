"""Language models on a real tritonserver, asked for one answer, over both protocols."""

import json
import re
from typing import Any

import pytest

from enginesmith_client import (
    Cancelled,
    ChatTemplate,
    Client,
    InvalidInput,
    Overloaded,
    ServerError,
    TokenLogprob,
    TritonClientError,
)

pytestmark = pytest.mark.server


def test_a_prompt_is_sent_with_the_options_that_were_given_and_no_others(client: Client) -> None:
    assert json.loads(client.generate("llm", "hi").text) == {"text_input": ["hi"]}
    answer = client.generate(
        "llm",
        "schön",
        max_tokens=5,
        min_tokens=2,
        temperature=0.5,
        top_k=4,
        top_p=0.25,
        repetition_penalty=1.5,
        presence_penalty=-0.5,
        frequency_penalty=0.75,
        seed=2**64 - 1,
        stop=["a", "ü"],
        chat=True,
    )
    assert json.loads(answer.text) == {
        "text_input": ["schön"],
        "max_tokens": [5],
        "min_tokens": [2],
        "temperature": [0.5],
        "top_k": [4],
        "top_p": [0.25],
        "repetition_penalty": [1.5],
        "presence_penalty": [-0.5],
        "frequency_penalty": [0.75],
        "seed": [2**64 - 1],
        "stop_words": ["a", "ü"],
        "apply_chat_template": [True],
    }


def test_a_generation_reports_what_the_model_reports(client: Client) -> None:
    answer = client.generate("llm", "hi", max_tokens=3)
    assert (answer.finish_reason, answer.prompt_tokens) == ("length", 7)
    assert answer.output_tokens == len(answer.text)
    assert (answer.model, answer.model_version) == ("llm", "1")
    assert (answer.logprobs, answer.ttft_s) == (None, None)
    assert answer.latency_s > 0


def test_log_probabilities_come_with_their_tokens(client: Client) -> None:
    answer = client.generate("llm", "hi", logprobs=True)
    assert answer.logprobs is not None
    assert answer.logprobs[:2] == (TokenLogprob(b"{", -1.0), TokenLogprob(b'"', -2.0))
    assert b"".join(one.token for one in answer.logprobs).decode() == answer.text


@pytest.mark.parametrize(
    "prompt",
    ["a\0b", "", "\n\r\t\x1b", "\U0001f600\u200d\u0301", '"\\{}', pytest.param("ü" * 5_000_000, id="10 MB")],
)
def test_any_unicode_text_arrives_as_it_is(client: Client, prompt: str) -> None:
    assert json.loads(client.generate("llm", prompt).text) == {"text_input": [prompt]}


def test_messages_arrive_as_they_are(client: Client) -> None:
    messages = [{"role": "system", "content": "kurz"}, {"role": "user", "content": "grün\0?"}]
    answer = json.loads(client.chat("llm", messages, max_tokens=4).text)
    assert json.loads(answer.pop("messages")[0]) == messages
    assert answer == {"max_tokens": [4]}


def test_a_template_renders_a_conversation_for_a_model_that_takes_none(client: Client) -> None:
    template = ChatTemplate("{{ messages[0]['content'] }}!")
    messages = [{"role": "user", "content": "hi"}]
    assert client.chat("plain_llm", messages, template=template).text == "hi!"
    with pytest.raises(InvalidInput, match="give template="):
        client.chat("plain_llm", messages)


def test_a_model_of_tensorrt_llm_gives_its_answer_without_the_prompt(client: Client) -> None:
    answer = client.generate("bls", "hi", max_tokens=2)
    assert (answer.text, answer.prompt_tokens, answer.output_tokens) == ("one two ", 5, 2)
    assert answer.finish_reason == "length"
    assert client.generate("bls", "hi", max_tokens=9).finish_reason is None
    with pytest.raises(InvalidInput, match="needs the option max_tokens"):
        client.generate("bls", "hi")


def test_a_model_of_the_llm_api_is_asked_in_its_words(client: Client) -> None:
    answer = client.generate("llmapi", "hi", max_tokens=2, stop=["x", "y"], seed=5)
    assert json.loads(answer.text) == {
        "text_input": ["hi"],
        "sampling_param_max_tokens": [2],
        "sampling_param_stop": ["x", "y"],
        "sampling_param_seed": [5],
        "sampling_param_exclude_input_from_output": [True],
        "return_finish_reason": [True],
    }
    assert (answer.finish_reason, answer.prompt_tokens, answer.output_tokens) == ("stop", None, None)


@pytest.mark.parametrize(
    ("prompt", "error", "message"),
    [
        ("raise:INVALID_ARG", InvalidInput, "asked to fail"),
        ("raise:UNAVAILABLE", Overloaded, "asked to fail"),
        ("raise:INTERNAL", ServerError, "asked to fail"),
        ("raise late:INTERNAL", ServerError, "asked to fail"),
        ("nothing:", ServerError, "ended its answer without a response"),
        ("without text:", ServerError, "no text_output"),
    ],
)
def test_a_model_that_fails_is_told_by_what_the_caller_can_do(
    client: Client, prompt: str, error: type[TritonClientError], message: str
) -> None:
    with pytest.raises(TritonClientError, match=re.escape(message)) as caught:
        client.generate("llm", prompt)
    assert type(caught.value) is error


def test_a_model_that_gives_up_a_request_is_a_cancellation(client: Client) -> None:
    with pytest.raises(Cancelled, match="asked to fail"):
        client.generate("llm", "raise:CANCELLED")


def test_text_that_is_not_utf_8_is_the_models_error(client: Client) -> None:
    if client.url.startswith("http"):
        pytest.skip("Triton's JSON of decoupled models cannot carry it")
    with pytest.raises(ServerError, match="'llm' is not valid UTF-8"):
        client.generate("llm", "bytes:")


def test_the_server_is_told_for_how_long_somebody_waits(client: Client) -> None:
    if client.url.startswith("http"):
        pytest.skip("Triton's /generate has no timeout")
    timeout_us = int(client.generate("llm", "timeout:", timeout_s=20).text)
    assert 0 < timeout_us <= 20_000_000


@pytest.mark.parametrize("prompt", ["\ud800", "a\udfffb", b"hi", None, 3, ["hi"]])
def test_a_prompt_that_is_no_text_never_reaches_the_server(client: Client, prompt: Any) -> None:
    with pytest.raises(InvalidInput, match="the prompt"):
        client.generate("llm", prompt)

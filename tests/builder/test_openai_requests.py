"""What the front reads and writes, without servers: requests, errors, documents."""

from __future__ import annotations

import asyncio
import base64
import json
import math
import socket
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError
from starlette.requests import Request

from enginesmith.cli import run
from enginesmith.errors import OperatorError
from enginesmith.openai_front._errors import ApiError, api_error_from_client, api_error_from_validation
from enginesmith.openai_front._http import REQUEST_ID, read_body, send_events
from enginesmith.openai_front._requests import ChatRequest, CompletionRequest, EmbeddingRequest
from enginesmith.openai_front._responses import (
    ChatStyle,
    CompletionStyle,
    Usage,
    embeddings,
    finish_reason,
    json_bytes,
)
from enginesmith.openai_front.settings import api_keys_from_file
from enginesmith_client import (
    Cancelled,
    ConnectError,
    DeadlineExceeded,
    InvalidInput,
    Overloaded,
    ServerError,
    TokenLogprob,
    TritonClientError,
)

CHAT: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "hello"}]}
COMPLETION: dict[str, Any] = {"model": "m", "prompt": "hello"}
EMBEDDING: dict[str, Any] = {"model": "m", "input": "hello"}


def read(kind: type[BaseModel], body: bytes | dict[str, Any]) -> Any:
    """The request, or the error that the caller gets."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    try:
        return kind.model_validate_json(content)
    except ValidationError as error:
        return api_error_from_validation(error)


@pytest.mark.parametrize(
    ("kind", "body", "param", "says"),
    [
        (ChatRequest, {"model": "m"}, "messages", "Missing required parameter: 'messages'"),
        (ChatRequest, CHAT | {"messages": []}, "messages", "at least 1"),
        (ChatRequest, CHAT | {"messages": "hello"}, "messages", "seen: 'hello'"),
        (ChatRequest, CHAT | {"messages": [{"role": "user"}]}, "messages[0].content", "Missing"),
        (
            ChatRequest,
            CHAT | {"messages": [{"role": "user", "content": 5}]},
            "messages[0].content",
            "seen: 5",
        ),
        (ChatRequest, CHAT | {"messages": [{"role": "king", "content": ""}]}, "messages[0].role", "'king'"),
        (ChatRequest, CHAT | {"messages": [{"role": "tool", "content": ""}]}, "messages[0].role", "no tools"),
        (
            ChatRequest,
            CHAT | {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "messages[0].content",
            "'image_url' are not supported",
        ),
        (ChatRequest, CHAT | {"model": None}, "model", "seen: null"),
        (ChatRequest, CHAT | {"temperature": "0.5"}, "temperature", "seen: '0.5'"),
        (ChatRequest, CHAT | {"temperature": 2.5}, "temperature", "less than or equal to 2"),
        (ChatRequest, CHAT | {"temperature": True}, "temperature", "seen: true"),
        (ChatRequest, CHAT | {"max_tokens": 0}, "max_tokens", "seen: 0"),
        (ChatRequest, CHAT | {"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens", "one limit"),
        (ChatRequest, CHAT | {"stop": list("abcde")}, "stop", "at most 4"),
        (ChatRequest, CHAT | {"stop": [""]}, "stop[0]", "at least 1 character"),
        (ChatRequest, CHAT | {"n": 0}, "n", "seen: 0"),
        (ChatRequest, CHAT | {"tools": [{"type": "function"}]}, "tools", "not supported"),
        (ChatRequest, CHAT | {"response_format": {"type": "json_object"}}, "response_format", "text"),
        (ChatRequest, CHAT | {"logit_bias": {"1": 5}}, "logit_bias", "not supported"),
        (ChatRequest, CHAT | {"logprobs": True, "top_logprobs": 2}, "top_logprobs", "send top_logprobs 0"),
        (ChatRequest, CHAT | {"top_logprobs": 0}, "top_logprobs", "when logprobs is true"),
        (ChatRequest, CHAT | {"stream_options": {"include_usage": True}}, "stream_options", "stream is true"),
        (ChatRequest, CHAT | {"fo{o}": 1}, "fo{o}", "Unrecognized request argument supplied: fo{o}"),
        (CompletionRequest, COMPLETION | {"prompt": [1, 2]}, "prompt", "tokens are not supported"),
        (CompletionRequest, COMPLETION | {"prompt": [[1], [2]]}, "prompt", "tokens are not supported"),
        (CompletionRequest, COMPLETION | {"prompt": []}, "prompt", "at least 1"),
        (CompletionRequest, COMPLETION | {"prompt": ["a", 1]}, "prompt[1]", "seen: 1"),
        (CompletionRequest, COMPLETION | {"logprobs": 3}, "logprobs", "send logprobs 0"),
        (CompletionRequest, COMPLETION | {"logprobs": 0, "echo": True}, "echo", "of the prompt"),
        (CompletionRequest, COMPLETION | {"suffix": "end"}, "suffix", "not supported"),
        (CompletionRequest, COMPLETION | {"best_of": 3}, "best_of", "not supported"),
        (EmbeddingRequest, EMBEDDING | {"input": [1, 2]}, "input", "tokens are not supported"),
        (EmbeddingRequest, EMBEDDING | {"dimensions": 5}, "dimensions", "not supported"),
        (EmbeddingRequest, EMBEDDING | {"encoding_format": "hex"}, "encoding_format", "'hex'"),
    ],
)
def test_a_wrong_field_is_named_with_what_was_seen(
    kind: type[BaseModel], body: dict[str, Any], param: str, says: str
) -> None:
    error = read(kind, body)

    assert isinstance(error, ApiError)
    assert (error.status, error.param) == (400, param)
    assert says in error.message


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"", "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b"[" * 100_000, "recursion limit"),
        (b"[]", "must be a JSON object"),
        (b"null", "must be a JSON object"),
        (b'{"model": "m", "messages": [{"role": "user", "content": "\\ud800"}]}', "not JSON"),
        (b'{"model": "m", "messages": [{"role": "user", "content": "a"}], "top_p": NaN}', "finite"),
        (b'{"model": "m", "messages": [{"role": "user", "content": "a"}], "top_p": 1e999}', "finite"),
        (b'{"model": "m", "n": ' + b"9" * 5000 + b"}", "out of range"),
    ],
)
def test_what_is_no_request_is_refused_in_words(body: bytes, says: str) -> None:
    error = read(ChatRequest, body)

    assert isinstance(error, ApiError)
    assert error.status == 400
    assert says in error.message


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "content", "type", "text", "x"]), inner, max_size=3)
    ),
    max_leaves=6,
)
FIELDS = st.sampled_from(
    [
        *CompletionRequest.model_fields,
        *ChatRequest.model_fields,
        "input",
        "tools",
        "response_format",
        "user",
        "foo",
    ]
)


@given(st.dictionaries(FIELDS, JSON, max_size=4), st.sampled_from([CHAT, COMPLETION, EMBEDDING, {}]))
def test_any_json_is_a_request_or_an_error_with_status_400(
    fields: dict[str, Any], rest: dict[str, Any]
) -> None:
    for kind in (ChatRequest, CompletionRequest, EmbeddingRequest):
        request = read(kind, rest | fields)

        assert isinstance(request, kind) or (request.status == 400 and json_bytes(request.body))


def test_what_asks_for_nothing_is_accepted() -> None:
    nothing = {"tools": [], "tool_choice": "none", "response_format": {"type": "text"}, "logit_bias": None}
    notes = {"user": "u", "metadata": {"a": "b"}, "store": False, "service_tier": "auto"}
    body = CHAT | nothing | notes | {"n": None, "stop": None, "top_logprobs": 0, "logprobs": True}

    assert isinstance(read(ChatRequest, body), ChatRequest)


def test_an_answer_of_the_openai_package_can_be_sent_back_as_a_message() -> None:
    from openai.types.chat import ChatCompletionMessage

    said = ChatCompletionMessage(role="assistant", content="hello").model_dump()

    request = read(ChatRequest, CHAT | {"messages": [said, {"role": "developer", "content": "be kind"}]})

    assert [message.rendered for message in request.messages] == [
        {"role": "assistant", "content": "hello"},
        {"role": "system", "content": "be kind"},
    ]


def test_the_parts_of_a_message_are_one_text() -> None:
    parts = [{"type": "text", "text": "one "}, {"type": "text", "text": "text"}]

    request = read(ChatRequest, CHAT | {"messages": [{"role": "user", "content": parts}]})

    assert request.messages[0].content == "one text"


@pytest.mark.parametrize(
    ("error", "status", "header"),
    [
        (InvalidInput("x"), 400, {}),
        (Overloaded("x"), 429, {"retry-after": "1"}),
        (Overloaded("x", retry_after_s=2.1), 429, {"retry-after": "3"}),
        (Overloaded("x", retry_after_s=math.inf), 429, {"x-should-retry": "false"}),
        (ConnectError("x"), 503, {"retry-after": "1"}),
        (Cancelled("x"), 503, {"retry-after": "1"}),
        (DeadlineExceeded("x"), 504, {"x-should-retry": "false"}),
        (ServerError("x"), 500, {}),
    ],
)
def test_errors_of_the_client_have_the_status_that_says_what_to_do(
    error: TritonClientError, status: int, header: dict[str, str]
) -> None:
    api_error = api_error_from_client(error)

    assert (api_error.status, dict(api_error.headers)) == (status, header)


@pytest.mark.parametrize(
    ("reported", "output_tokens", "max_tokens", "reason"),
    [
        ("stop", 5, 5, "stop"),
        ("length", 1, None, "length"),
        ("timeout", 1, 5, "length"),
        (None, 5, 5, "length"),
        ("", 4, 5, "stop"),
        (None, None, 5, "stop"),
    ],
)
def test_every_answer_has_a_reason_for_its_end(
    reported: str | None, output_tokens: int | None, max_tokens: int | None, reason: str
) -> None:
    assert finish_reason(reported, output_tokens=output_tokens, max_tokens=max_tokens) == reason


def test_tokens_that_are_parts_of_a_character_are_written_and_placed() -> None:
    euro = [TokenLogprob(b"a", -0.5), TokenLogprob(b"\xe2\x82", -1.0), TokenLogprob(b"\xac", -math.inf)]

    chunk = CompletionStyle().chunk(0, "a€", finish_reason=None, logprobs=euro)
    chat = ChatStyle().choice(0, "a€", finish_reason="stop", logprobs=euro)

    assert chunk["logprobs"]["tokens"] == ["a", "\\xe2\\x82", "\\xac"]
    assert chunk["logprobs"]["text_offset"] == [0, 1, 1]
    assert chunk["logprobs"]["token_logprobs"] == [-0.5, -1.0, -9999.0]
    assert [one["bytes"] for one in chat["logprobs"]["content"]] == [[97], [0xE2, 0x82], [0xAC]]


def test_offsets_of_tokens_go_on_from_chunk_to_chunk_for_each_choice() -> None:
    style, token = CompletionStyle(), [TokenLogprob(b"ab", -0.5)]

    offsets = [
        style.chunk(index, "ab", finish_reason=None, logprobs=token)["logprobs"]["text_offset"]
        for index in (0, 0, 1)
    ]

    assert offsets == [[0], [2], [0]]


def test_prompts_count_once_and_unknown_counts_give_no_usage() -> None:
    counted = Usage({0: 3, 1: 4}, {0: 1, 1: 1, 2: 2, 3: 2})

    assert counted.document() == {"prompt_tokens": 7, "completion_tokens": 6, "total_tokens": 13}
    assert Usage({0: 3}, {0: 1, 1: None}).document() is None


def test_base64_embeddings_are_little_endian_float32() -> None:
    vectors = np.array([[1.5, -2.0]], ">f4")

    document = embeddings(vectors.astype(np.float32), model="m", as_base64=True)

    raw = base64.b64decode(document["data"][0]["embedding"])
    assert np.frombuffer(raw, "<f4").tolist() == [1.5, -2.0]


def test_json_on_the_wire_has_no_characters_that_end_lines() -> None:
    assert json_bytes({"text": "a\u2028b\x85c"}).isascii()


def test_keys_are_the_lines_of_the_file_without_comments(tmp_path: Any) -> None:
    path = tmp_path / "keys"
    path.write_text("# two teams\nkey-a\n\n  key-b  \n")

    assert api_keys_from_file(path) == ("key-a", "key-b")


@pytest.mark.parametrize("content", [b"", b"# nothing\n", b"two words\n", b"k\xc3\xa9y\n", b"\xff\n"])
def test_files_without_usable_keys_are_refused(tmp_path: Any, content: bytes) -> None:
    path = tmp_path / "keys"
    path.write_bytes(content)

    with pytest.raises(OperatorError):
        api_keys_from_file(path)


async def never(*_: Any) -> Any:
    """Neither sends nor receives."""
    await asyncio.Event().wait()


def test_a_body_that_does_not_arrive_is_not_waited_for() -> None:
    request = Request({"type": "http", "method": "POST", "headers": []}, never)

    with pytest.raises(ApiError, match="did not arrive within") as caught:
        asyncio.run(read_body(request, max_bytes=10, timeout_s=0.01))

    assert caught.value.status == 408


def test_a_caller_that_takes_no_events_is_given_up() -> None:
    heads: list[str] = []
    closed: list[bool] = []

    async def takes_the_head(message: Any) -> None:
        heads.append(message["type"])
        if message["type"] == "http.response.body":
            await never()

    async def events() -> AsyncGenerator[bytes, None]:
        try:
            while True:
                yield b"data: more"
        finally:
            closed.append(True)

    async def answer() -> None:
        REQUEST_ID.set("id")
        async with aclosing(events()) as stream:
            await send_events(takes_the_head, stream, first=await anext(stream), timeout_s=0.01)

    asyncio.run(answer())

    assert heads == ["http.response.start", "http.response.body"]
    assert closed == [True]


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        (["--alias", "gpt-4o"], 2, "--alias gpt-4o: give two names with = between"),
        (["--alias", "a=b", "--alias", "a=c"], 2, "--alias gives a twice"),
        (["--chat-template", "llm=/nowhere"], 1, "/nowhere"),
        (["--triton", "ftp://host"], 1, "ftp"),
        (["--api-key-file", "/nowhere"], 1, "cannot be read"),
    ],
)
def test_a_front_that_cannot_start_says_why(
    arguments: list[str], status: int, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["openai", "--port", "0", *arguments]) == status
    assert says in capsys.readouterr().err


def test_a_port_that_is_taken_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]

        assert run(["openai", "--port", str(port)]) == 1

    assert f"cannot listen on 127.0.0.1 port {port}" in capsys.readouterr().err

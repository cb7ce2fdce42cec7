"""The official ``openai`` package against ``enginesmith openai`` over a real tritonserver."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import socket
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import openai
import pytest
from openai_deployment import PATIENCE_S, Front, front_over, serving_models, wait_for_text

pytestmark = pytest.mark.server

PLACES = 32
"""Answers that the front of the module gives at once."""


@pytest.fixture(scope="module")
def triton_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with serving_models(tmp_path_factory.mktemp("openai") / "repository") as url:
        yield url


@pytest.fixture(scope="module")
def front(triton_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Front]:
    templates = tmp_path_factory.mktemp("template")
    (templates / "chat_template.jinja").write_text(
        "{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}<assistant>"
    )
    arguments = ("--alias", "gpt-4o=speaker", "--alias", "gone=nobody", "--max-generations", str(PLACES))
    chats = ("--chat-template", f"prompts-only={templates}", "--default-max-tokens", "33")
    with front_over(triton_url, *arguments, *chats) as running:
        yield running


@pytest.fixture(scope="module")
def strict_front(triton_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Front]:
    """Short answers to short questions, for those who know a key."""
    keys = tmp_path_factory.mktemp("keys") / "keys.txt"
    keys.write_text("# of the tests\nsecret-1\nsecret-2\n")
    limits = ("--timeout-s", "1", "--max-request-mib", "1")
    with front_over(triton_url, "--api-key-file", str(keys), *limits) as running:
        yield running


def client_of(front: Front, *, key: str = "any") -> openai.OpenAI:
    return openai.OpenAI(base_url=front.url, api_key=key, max_retries=0, timeout=PATIENCE_S)


@pytest.fixture(scope="module")
def client(front: Front) -> Iterator[openai.OpenAI]:
    with client_of(front) as connected:
        yield connected


def chat(text: str) -> list[Any]:
    return [{"role": "user", "content": text}]


def test_models_that_speak_or_embed_are_listed_by_the_names_that_callers_use(client: openai.OpenAI) -> None:
    names = [model.id for model in client.models.list()]

    assert names == ["gpt-4o", "prompts-only", "sentences", "speaker"]
    assert client.models.retrieve("gpt-4o").id == "gpt-4o"


def test_a_chat_is_answered_with_a_message_and_counts(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="gpt-4o", messages=chat("say one two"))

    [choice] = answer.choices
    assert (choice.message.role, choice.message.content) == ("assistant", "one two")
    assert choice.finish_reason == "stop"
    assert answer.model == "gpt-4o"
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (
        3,
        2,
        5,
    )


def test_options_arrive_at_the_model_as_they_were_sent(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="speaker",
        messages=[{"role": "system", "content": "be kind"}, *chat("inputs")],
        max_completion_tokens=7,
        temperature=0.5,
        top_p=0.25,
        presence_penalty=0.5,
        frequency_penalty=-0.5,
        seed=-1,
        stop=["a", "b"],
        extra_body={"top_k": 3, "min_tokens": 1, "repetition_penalty": 1.5},
    )

    inputs = json.loads(answer.choices[0].message.content or "")
    roles = [message["role"] for message in json.loads(inputs.pop("messages")[0])]
    assert roles == ["system", "user"]
    assert inputs.pop("seed") == [2**64 - 1]
    assert {name: inputs[name] for name in sorted(inputs) if name not in ("stream", "return_log_probs")} == {
        "frequency_penalty": [-0.5],
        "max_tokens": [7],
        "min_tokens": [1],
        "presence_penalty": [0.5],
        "repetition_penalty": [1.5],
        "stop_words": ["a", "b"],
        "temperature": [0.5],
        "top_k": [3],
        "top_p": [0.25],
    } | ({"exclude_input_in_output": [True]} if "exclude_input_in_output" in inputs else {})


def test_what_is_not_sent_is_left_to_the_model(client: openai.OpenAI) -> None:
    completion = client.completions.create(model="speaker", prompt="inputs")

    inputs = json.loads(completion.choices[0].text)
    assert inputs["max_tokens"] == [16]  # OpenAI's default for completions.
    assert not {"temperature", "top_p", "seed", "stop_words"} & set(inputs)


def test_a_stream_gives_the_role_then_the_pieces_then_the_counts(client: openai.OpenAI) -> None:
    with client.chat.completions.create(
        model="speaker",
        messages=chat("say one two"),
        max_tokens=2,
        stream=True,
        stream_options={"include_usage": True},
    ) as stream:
        *chunks, last = list(stream)

    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert deltas[0].role == "assistant"
    assert [delta.content for delta in deltas if delta.content] == ["one", " two"]
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None, None, "stop"]
    assert last.choices == []
    assert last.usage is not None
    assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (3, 2)
    assert len({chunk.id for chunk in [*chunks, last]}) == 1


def test_an_answer_that_is_cut_off_says_so(client: openai.OpenAI) -> None:
    whole = client.completions.create(model="speaker", prompt="say a b c", max_tokens=2)
    with client.completions.create(model="speaker", prompt="say a b c", max_tokens=2, stream=True) as stream:
        pieces = [chunk.choices[0] for chunk in stream]

    assert (whole.choices[0].text, whole.choices[0].finish_reason) == ("a b", "length")
    assert "".join(piece.text for piece in pieces) == "a b"
    assert pieces[-1].finish_reason == "length"


def test_choices_of_several_prompts_come_in_their_order_and_differ_in_their_seeds(
    client: openai.OpenAI,
) -> None:
    answer = client.completions.create(model="speaker", prompt=["inputs", "say b"], n=2, seed=7, max_tokens=5)
    unseeded = client.completions.create(model="speaker", prompt="inputs", n=2)

    seeds = [json.loads(choice.text)["seed"] for choice in answer.choices[:2]]
    drawn = {json.loads(choice.text)["seed"][0] for choice in unseeded.choices}
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert [choice.text for choice in answer.choices[2:]] == ["b", "b"]
    assert seeds == [[7], [8]]
    assert len(drawn) == 2
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == 1 + 2


def test_streamed_choices_are_each_whole(client: openai.OpenAI) -> None:
    texts = {0: "", 1: "", 2: "", 3: ""}
    with client.completions.create(
        model="speaker", prompt=["say a b c", "say x y"], n=2, stream=True, echo=True
    ) as stream:
        for chunk in stream:
            texts[chunk.choices[0].index] += chunk.choices[0].text

    assert texts == {0: "say a b ca b c", 1: "say a b ca b c", 2: "say x yx y", 3: "say x yx y"}


def test_logprobs_come_with_the_tokens_streamed_and_not(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model="speaker", messages=chat("say a é"), logprobs=True)
    with client.completions.create(model="speaker", prompt="say a é", logprobs=0, stream=True) as stream:
        streamed = [chunk.choices[0].logprobs for chunk in stream]

    assert whole.choices[0].logprobs is not None
    content = whole.choices[0].logprobs.content or []
    assert [(one.token, one.logprob, one.bytes) for one in content] == [
        ("a", -0.5, [97]),
        (" é", -9999.0, [32, 0xC3, 0xA9]),
    ]
    assert [one.tokens for one in streamed if one] == [["a"], [" é"]]
    assert [one.text_offset for one in streamed if one] == [[0], [1]]


def test_embeddings_are_the_same_as_numbers_and_as_base64(client: openai.OpenAI) -> None:
    texts = ["three", "e"]

    as_base64 = client.embeddings.create(
        model="sentences", input=texts
    )  # What the package asks for by itself.
    as_floats = client.embeddings.create(model="sentences", input=texts, encoding_format="float")

    assert [one.embedding for one in as_floats.data] == [[5.0, 2.0, 2.0], [1.0, 1.0, 2.0]]
    assert [one.embedding for one in as_base64.data] == [one.embedding for one in as_floats.data]


def test_models_without_messages_take_the_template_of_the_front(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="prompts-only", messages=chat("hello"))

    # The model tells no counts and no reason; the default limit was sent, because it needs one.
    assert answer.choices[0].message.content == "<user>hello<assistant>|33"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is None


@pytest.mark.parametrize(
    ("prompt", "status", "kind"),
    [
        ("refuse", 400, openai.BadRequestError),
        ("full", 429, openai.RateLimitError),
        ("crash", 500, openai.InternalServerError),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_a_model_refuses_has_the_status_of_the_reason(
    client: openai.OpenAI, prompt: str, status: int, kind: type[openai.APIStatusError], stream: bool
) -> None:
    with pytest.raises(kind) as caught:
        client.completions.create(model="speaker", prompt=prompt, stream=stream)

    assert caught.value.status_code == status
    assert "asked to fail" in caught.value.message
    assert "127.0.0.1" not in caught.value.message
    assert ("retry-after" in caught.value.response.headers) == (status == 429)


def test_a_failure_in_the_middle_of_a_stream_is_an_error_of_the_stream(client: openai.OpenAI) -> None:
    with client.completions.create(model="speaker", prompt="break", stream=True) as stream:
        assert next(stream).choices[0].text == "word"
        with pytest.raises(openai.APIError, match="asked to fail"):
            next(stream)


@pytest.mark.parametrize("model", ["nobody", "gone"])
def test_a_model_that_is_not_served_is_not_found(client: openai.OpenAI, model: str) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model=model, messages=chat("hello"))
    with pytest.raises(openai.NotFoundError, match="The models here: gpt-4o"):
        client.models.retrieve(model)

    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")


def test_models_are_asked_for_what_they_can(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="does not generate text"):
        client.completions.create(model="sentences", prompt="hello")
    with pytest.raises(openai.BadRequestError):
        client.embeddings.create(model="speaker", input="hello")


@pytest.mark.parametrize("command", ["wait", "think"])
def test_closing_a_stream_ends_the_generation_on_the_server(
    client: openai.OpenAI, tmp_path: Path, command: str
) -> None:
    mark = tmp_path / "mark"

    async def leave() -> None:
        async with openai.AsyncOpenAI(base_url=client.base_url, api_key="x", max_retries=0) as connected:
            asking = asyncio.create_task(
                connected.completions.create(model="speaker", prompt=f"{command} {mark}", stream=True)
            )
            if command == "wait":
                stream = await asking
                assert (await anext(aiter(stream))).choices[0].text == "word"
                await stream.close()
            else:
                await asyncio.to_thread(wait_for_text, mark, "waiting")
                asking.cancel()
                await asyncio.gather(asking, return_exceptions=True)

    asyncio.run(leave())

    wait_for_text(mark, "cancelled")


def test_a_caller_that_goes_away_ends_its_answer_on_the_server(front: Front, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    body = json.dumps({"model": "speaker", "prompt": f"think {mark}"}).encode()
    address = urlsplit(front.url)

    with socket.create_connection((address.hostname, address.port), timeout=PATIENCE_S) as connection:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        connection.sendall(head.encode() + body)
        wait_for_text(mark, "waiting")

    wait_for_text(mark, "cancelled")


def test_many_streams_at_once_are_each_answered_with_their_own_text(front: Front) -> None:
    async def one(client: openai.AsyncOpenAI, number: int) -> str:
        prompt = chat(f"say this is number {number}")
        stream = await client.chat.completions.create(model="speaker", messages=prompt, stream=True)
        pieces: AsyncIterator[Any] = stream
        return "".join([chunk.choices[0].delta.content or "" async for chunk in pieces])

    async def all_of_them() -> list[str]:
        async with openai.AsyncOpenAI(base_url=front.url, api_key="x", timeout=PATIENCE_S) as client:
            return await asyncio.gather(*(one(client, number) for number in range(PLACES)))

    assert asyncio.run(all_of_them()) == [f"this is number {number}" for number in range(PLACES)]


def test_callers_without_a_key_are_turned_away_and_probes_are_not(strict_front: Front) -> None:
    with (
        client_of(strict_front, key="wrong") as stranger,
        pytest.raises(openai.AuthenticationError) as caught,
    ):
        stranger.models.list()
    with client_of(strict_front, key="secret-2") as friend:
        assert "speaker" in [model.id for model in friend.models.list()]

    assert caught.value.code == "invalid_api_key"
    assert strict_front.send("GET", "/v1/models")[0] == 401
    assert strict_front.send("GET", "/health")[0] == 200
    assert strict_front.send("GET", "/ready")[0] == 200


def test_an_answer_that_takes_too_long_is_ended_here_and_on_the_server(
    strict_front: Front, tmp_path: Path
) -> None:
    mark = tmp_path / "mark"

    with client_of(strict_front, key="secret-1") as client, pytest.raises(openai.APIStatusError) as caught:
        client.completions.create(model="speaker", prompt=f"think {mark}")

    assert (caught.value.status_code, caught.value.code) == (504, "timeout")
    assert caught.value.response.headers["x-should-retry"] == "false"
    wait_for_text(mark, "cancelled")


def test_more_answers_than_there_is_room_for_are_told_to_come_back(
    client: openai.OpenAI, tmp_path: Path
) -> None:
    mark = tmp_path / "mark"
    with client.completions.create(
        model="speaker", prompt=f"wait {mark}", n=PLACES, stream=True
    ) as all_places:
        next(all_places)
        with pytest.raises(openai.RateLimitError) as caught:
            client.completions.create(model="speaker", prompt="say a")
    with pytest.raises(openai.BadRequestError, match=f"asks for {PLACES + 1} answers; at most {PLACES}"):
        client.completions.create(model="speaker", prompt="say a", n=PLACES + 1)

    again = client.with_options(max_retries=5).completions.create(model="speaker", prompt="say a")

    assert caught.value.response.headers["retry-after"] == "1"
    assert again.choices[0].text == "a"


def test_bodies_have_a_longest_length_declared_or_not(strict_front: Front) -> None:
    head = {"Authorization": "Bearer secret-1"}
    long = b'{"model": "speaker", "prompt": "' + b"x" * (1 << 20) + b'"}'

    declared = strict_front.send("POST", "/v1/completions", long, head)
    chunked = strict_front.send("POST", "/v1/completions", iter([long]), head)  # type: ignore[arg-type]

    assert [answer[0] for answer in (declared, chunked)] == [413, 413]
    assert declared[2]["error"]["code"] == "request_too_large"


def test_ten_megabytes_are_a_request_like_any_other(front: Front) -> None:
    status, _, document = front.ask("/v1/completions", model="speaker", prompt="refuse " + "x" * 10_000_000)

    assert (status, document["error"]["type"]) == (400, "invalid_request_error")


def test_lone_surrogates_and_broken_bodies_are_the_callers_error(front: Front) -> None:
    surrogate = b'{"model": "speaker", "messages": [{"role": "user", "content": "\\ud800"}]}'

    answers = [front.send("POST", "/v1/chat/completions", body) for body in (surrogate, b"", b"[[", b"5")]

    assert [answer[0] for answer in answers] == [400] * 4


def test_nul_characters_travel_through_the_front(client: openai.OpenAI) -> None:
    assert client.completions.create(model="speaker", prompt="say a\0b").choices[0].text == "a\0b"


def test_each_answer_has_an_id_and_keeps_that_of_the_caller(front: Front) -> None:
    own = front.send("GET", "/health", headers={"X-Request-Id": "mine-1"})[1]["x-request-id"]
    strange = front.send("GET", "/health", headers={"X-Request-Id": "two words"})[1]["x-request-id"]
    missing = front.send("GET", "/nothing")

    assert own == "mine-1"
    assert strange.startswith("req_")
    assert (missing[0], missing[2]["error"]["code"]) == (404, "unknown_url")
    assert missing[1]["x-request-id"].startswith("req_")


def test_sigterm_lets_answers_end_and_takes_no_new_ones(triton_url: str, tmp_path: Path) -> None:
    gate, mark = tmp_path / "gate", tmp_path / "mark"
    with front_over(triton_url, "--drain-s", "2") as ending, client_of(ending) as client:
        with (
            client.completions.create(model="speaker", prompt=f"hold {gate}", stream=True) as short,
            client.completions.create(model="speaker", prompt=f"wait {mark}", stream=True) as endless,
        ):
            next(short)
            next(endless)
            ending.process.send_signal(signal.SIGTERM)
            gate.touch()
            assert [chunk.choices[0].text for chunk in short] == [" end"]
            # This one would never end: its time over, it is ended on the server as well.
            with pytest.raises(openai.APIError):
                list(endless)
        wait_for_text(mark, "cancelled")

        assert ending.process.wait(PATIENCE_S) == 0
        with pytest.raises(openai.APIConnectionError):
            client.models.list()


def test_without_a_server_callers_are_told_to_come_back() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # Bound and not listening: nobody answers there.
        url = f"grpc://127.0.0.1:{unused.getsockname()[1]}"
        with front_over(url, "--timeout-s", "2") as lonely, client_of(lonely) as client:
            with pytest.raises(openai.InternalServerError) as caught:
                client.completions.create(model="speaker", prompt="say a")
            ready = lonely.send("GET", "/ready")

    assert (caught.value.status_code, caught.value.code) == (503, "server_unreachable")
    assert (ready[0], ready[2]["error"]["code"]) == (503, "server_unreachable")
    assert "127.0.0.1" not in caught.value.message


def test_the_example_of_the_documentation_runs(front: Front, capsys: pytest.CaptureFixture[str]) -> None:
    page = (Path(__file__).parents[2] / "docs" / "openai.md").read_text()
    [example] = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    question, address = "What is a compiler?", "http://127.0.0.1:8080/v1"
    assert question in example
    assert address in example

    exec(example.replace(question, "say a program").replace(address, front.url), {})

    assert capsys.readouterr().out == "a program 5\na program"

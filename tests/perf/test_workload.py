"""What is sent to a model: the bytes that the client sends, of the lengths that the profile asks for; on a real server."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from asked_models import load_models, recorder
from perf_models import PerfServer
from tritonclient.grpc import InferenceServerClient, service_pb2
from tritonclient.utils import deserialize_bytes_tensor

from enginesmith_client import Client, ModelNotReady
from enginesmith_client.perf._errors import ProfileError
from enginesmith_client.perf._profile import FixedLength, RequestsPart, UniformLength
from enginesmith_client.perf._target import Target
from enginesmith_client.perf.load._prepared import Due, Prepared, TokenCounts
from enginesmith_client.perf.workload._payload import Workload
from enginesmith_client.perf.workload._prompts import WORDS, fit_from_counts, made_prompts
from enginesmith_client.perf.workload._workload import make_workload

pytestmark = pytest.mark.server
MODELS = ("echo", "pair", "plain_llm", "relevance-text", "sentences", "sentences-text", "stateful", "wordy")
SHORT = FixedLength(tokens=6)


@pytest.fixture(scope="module")
def client(perf_server: PerfServer) -> Iterator[Client]:
    with Client(f"grpc://{perf_server.grpc_url}", timeout_s=30) as connected:
        load_models(connected, perf_server, *MODELS)
        yield connected


def made(
    client: Client, model: str, *, seed: int = 0, trace: tuple[Due, ...] = (), **requests: Any
) -> Workload:
    target = Target(model, client.url)
    return make_workload(client, target, RequestsPart(**requests), seed=seed, trace=trace)


def message_of(request: Prepared) -> Any:
    return service_pb2.ModelInferRequest.FromString(request.message)


def sent(request: Prepared) -> dict[str, bytes]:
    """The bytes of each input."""
    message = message_of(request)
    return {one.name: data for one, data in zip(message.inputs, message.raw_input_contents, strict=True)}


def prompt_of(request: Prepared) -> str:
    return sent(request)["text_input"][4:].decode()


def texts_in(data: bytes) -> list[str]:
    """The elements of a BYTES tensor."""
    return [text.decode() for text in deserialize_bytes_tensor(data)]


def number_of(data: bytes) -> int:
    return int.from_bytes(data, "little")


@pytest.mark.parametrize("streaming", [True, False])
def test_a_text_request_is_what_the_client_sends(client: Client, streaming: bool) -> None:
    with recorder(client.url.removeprefix("grpc://")) as (url, seen), Client(url) as recorded:
        workload = made(recorded, "tokens", output_tokens=FixedLength(tokens=5), streaming=streaming)
        seen.clear()
        prepared = workload.requests[3]
        if streaming:
            pieces = list(recorded.stream("tokens", prompt_of(prepared), max_tokens=5))
            assert len(pieces) == 5
        else:
            assert recorded.generate("tokens", prompt_of(prepared), max_tokens=5).output_tokens == 5
    assert_same(prepared, seen)
    assert (prepared.streaming, workload.streaming) == (True, streaming)
    assert prepared.counts == TokenCounts("num_input_tokens", "num_output_tokens", counts_pieces=False)


def test_a_batch_of_texts_is_what_the_client_sends(client: Client) -> None:
    with recorder(client.url.removeprefix("grpc://")) as (url, seen), Client(url) as recorded:
        workload = made(recorded, "sentences-text", texts=3, prompt_tokens=FixedLength(tokens=4))
        seen.clear()
        recorded.embed("sentences-text", texts_in(sent(workload.requests[1])["TEXT"]))
    assert_same(workload.requests[1], seen)
    assert (workload.kind, workload.requests[1].rows, workload.requests[1].streaming) == ("embed", 3, False)


def assert_same(prepared: Prepared, seen: list[Any]) -> None:
    """But for the time that was left of the client's deadline."""
    (by_client,) = seen
    by_us = message_of(prepared)
    assert (
        0
        < by_client.parameters["timeout"].int64_param
        <= by_us.parameters["timeout"].int64_param
        == 60_000_000
    )
    by_client.parameters["timeout"].int64_param = 60_000_000
    assert by_us == by_client


@pytest.mark.parametrize("tokens", [8, 40, 200])
def test_prompts_have_the_length_that_was_asked_for_by_the_models_own_count(
    client: Client, tokens: int
) -> None:
    workload = made(client, "wordy", prompt_tokens=FixedLength(tokens=tokens), different=24)
    counted = [
        client.generate("wordy", prompt_of(request)).prompt_tokens or 0 for request in workload.requests
    ]
    assert np.mean(counted) == pytest.approx(tokens, rel=0.05, abs=1.5)
    assert workload.described["prompt_lengths"].startswith("calibrated")
    assert {request.prompt_tokens for request in workload.requests} == {tokens}


def test_a_model_that_does_not_count_is_said_not_to(client: Client) -> None:
    workload = made(client, "plain_llm")
    assert workload.described["prompt_lengths"] == (
        "the model does not report the length of prompts: one token a word is assumed"
    )
    assert workload.counts == TokenCounts(None, None, counts_pieces=True)
    assert not workload.requests[0].streaming


def test_counts_that_do_not_follow_the_prompt_are_not_believed() -> None:
    assert fit_from_counts((24, 7), (96, 7)) is None
    fit = fit_from_counts((24, 35), (96, 131))
    assert fit is not None
    assert (fit.fixed, round(fit.per_word, 3), fit.words(131)) == (pytest.approx(3), 1.333, 96)


def test_prompts_differ_from_their_first_word_on(client: Client) -> None:
    prompts = [
        prompt_of(one) for one in made(client, "tokens", different=len(WORDS), prompt_tokens=SHORT).requests
    ]
    assert len({prompt.split()[0] for prompt in prompts}) == len(prompts)


def test_a_shared_prefix_is_the_same_in_all_prompts_and_nothing_after_it_is(client: Client) -> None:
    workload = made(
        client, "tokens", shared_prefix_tokens=10, prompt_tokens=UniformLength(kind="uniform", low=4, high=30)
    )
    prompts = [prompt_of(one).split() for one in workload.requests]
    long = [prompt for prompt in prompts if len(prompt) > 10]
    assert len({tuple(prompt[:10]) for prompt in long}) == 1
    assert len({prompt[10] for prompt in long}) == len(long)
    assert len({tuple(prompt) for prompt in prompts}) == len(prompts)


def test_the_same_seed_makes_the_same_requests_and_another_seed_others(client: Client) -> None:
    lengths = UniformLength(kind="uniform", low=4, high=30)
    first, again, other = (made(client, "tokens", seed=seed, prompt_tokens=lengths) for seed in (1, 1, 2))
    assert first.requests == again.requests
    assert len({one.message for one in (*first.requests, *other.requests)}) > len(first.requests)


def test_more_prompts_than_words_are_still_different() -> None:
    prompts = made_prompts([8] * 1000, shared_words=2, rng=np.random.default_rng(0))
    assert len({tuple(prompt.split()[:4]) for prompt in prompts}) == 1000


def test_requests_are_gone_round(client: Client) -> None:
    workload = made(client, "tokens", different=5, prompt_tokens=SHORT)
    assert [workload.request(number) for number in (0, 4, 5, 13)] == [
        workload.requests[index] for index in (0, 4, 0, 3)
    ]


def test_a_model_with_min_tokens_is_asked_for_exactly_so_many(client: Client) -> None:
    workload = made(client, "wordy", output_tokens=FixedLength(tokens=9))
    assert number_of(sent(workload.requests[0])["min_tokens"]) == 9
    assert number_of(sent(workload.requests[0])["max_tokens"]) == 9
    assert workload.described["output_lengths"] == "as asked: min_tokens is max_tokens"
    shorter = made(client, "tokens").described["output_lengths"]
    assert shorter == "the model has no option min_tokens: answers may end sooner than asked"


def test_a_prompt_that_is_too_long_is_an_error_of_the_profile_in_the_servers_words(client: Client) -> None:
    with pytest.raises(ProfileError) as caught:
        made(client, "wordy", prompt_tokens=UniformLength(kind="uniform", low=4, high=900))
    assert "refuses a prompt of about" in caught.value.message
    assert "with the answer this is too long" in caught.value.message
    assert caught.value.hint == "lower requests.prompt_tokens"


def test_lengths_of_a_trace_are_those_of_the_requests(client: Client) -> None:
    trace = (Due(0, 5, 7), Due(1, prompt_tokens=12), Due(2, output_tokens=3), Due(3))
    workload = made(client, "tokens", prompt_tokens=SHORT, output_tokens=FixedLength(tokens=4), trace=trace)
    requests = [workload.request(number, due) for number, due in enumerate(trace)]
    assert [(len(prompt_of(one).split()), one.output_tokens) for one in requests] == [
        (5, 7),
        (12, 4),
        (6, 3),
        (6, 4),
    ]
    assert [number_of(sent(one)["max_tokens"]) for one in requests] == [7, 4, 3, 4]
    assert workload.request(0, trace[0]) is requests[0]


@pytest.mark.parametrize(
    ("model", "requests", "message", "hint"),
    [
        ("wordy", {"streaming": True}, "is not decoupled: it answers once", "leave out requests.streaming"),
        ("plain_llm", {"temperature": 0.5}, "has no option temperature", "leave it out"),
        ("echo", {"kind": "text"}, "requests.kind is text, but model 'echo'", "leave out requests.kind"),
        (
            "pair",
            {"kind": "embed"},
            "requests.kind is embed, but model 'pair' needs more than one text",
            "tensors",
        ),
        (
            "sentences-text",
            {"texts": 5},
            "requests.texts is 5; model 'sentences-text' takes at most 4",
            "lower",
        ),
        ("sentences-text", {}, "a text is longer than 40 bytes", "change requests.prompt_tokens"),
        ("stateful", {}, "keeps state between the requests of a sequence", "perf_analyzer itself"),
        ("pair", {}, "input 'a' of model 'pair' has the shape [-1, 2]", "give requests.shapes: {a: [16, 2]}"),
        (
            "pair",
            {"shapes": {"a": (2, 3), "b": (1, 2)}},
            "requests.shapes.a is [2, 3]; model 'pair' takes [-1, 2]",
            "",
        ),
        ("pair", {"shapes": {"a": (0, 2), "b": (1, 2)}}, "requests.shapes.a is [0, 2]", "each at least 1"),
        (
            "pair",
            {"shapes": {"a": (1, 2), "c": (1, 2)}},
            "requests.shapes names the input 'c'",
            "it has: a, b",
        ),
        (
            "pair",
            {"rows": 2},
            "requests.rows is 2; model 'pair' has no batch dimension",
            "set requests.rows to 1",
        ),
        (
            "echo",
            {"rows": 9, "shapes": {"in_FP32": (1,)}},
            "takes batches of at most 8",
            "set requests.rows to 8",
        ),
        ("echo", {}, "all inputs of model 'echo' are optional: in_BOOL", "requests.shapes: {in_BOOL: [16]}"),
        ("echo", {"shapes": {"in_FP23": (1,)}}, "names the input 'in_FP23'", "did you mean 'in_FP32'?"),
    ],
)
def test_what_a_model_cannot_be_asked_is_an_error_that_names_the_key(
    client: Client, model: str, requests: dict[str, Any], message: str, hint: str
) -> None:
    with pytest.raises(ProfileError) as caught:
        made(client, model, **requests)
    assert message in caught.value.message
    assert hint in (caught.value.hint or "")


def test_a_model_that_is_not_served_is_not_an_error_of_the_profile(client: Client) -> None:
    with pytest.raises(ModelNotReady):
        made(client, "nobody")


def test_tensors_of_every_datatype_are_made_and_taken(client: Client) -> None:
    inputs = client.metadata("echo").inputs
    workload = made(client, "echo", shapes={one.name: (3,) for one in inputs}, rows=2, different=4)
    assert (workload.kind, len(workload.requests), workload.requests[0].rows) == ("tensors", 4, 2)
    with InferenceServerClient(client.url.removeprefix("grpc://")) as raw:
        answer = raw._client_stub.ModelInfer(message_of(workload.requests[1]))
    echoed = {
        one.name.replace("out_", "in_"): data
        for one, data in zip(answer.outputs, answer.raw_output_contents, strict=True)
    }
    assert echoed == sent(workload.requests[1])
    assert len({one.message for one in workload.requests}) == 4


def test_made_tensors_are_small_integers_and_words(client: Client) -> None:
    workload = made(client, "echo", shapes={"in_INT32": (2,), "in_STRING": (1,)}, rows=2, different=3)
    assert workload.described["shapes"] == {"in_INT32": [2, 2], "in_STRING": [2, 1]}
    for request in workload.requests:
        values = np.frombuffer(sent(request)["in_INT32"], "<i4")
        assert len(values) == 4
        assert all(0 <= value < 100 for value in values)
        assert all(word in WORDS for word in texts_in(sent(request)["in_STRING"]))


def test_pairs_of_texts_are_sent_to_a_model_that_takes_pairs(client: Client) -> None:
    workload = made(client, "relevance-text", texts=2, prompt_tokens=SHORT)
    assert workload.kind == "embed"
    assert set(sent(workload.requests[0])) == {"TEXT", "TEXT_PAIR"}


def test_large_tensors_are_fewer(client: Client) -> None:
    workload = made(client, "pair", shapes={"a": (1_000_000, 2), "b": (1_000_000, 2)}, different=64)
    assert len(workload.requests) == 4
    assert "4 different ones instead of 64, because they are large" in workload.described["tensors"]


def written(directory: Path, content: object) -> Path:
    path = directory / "inputs.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def test_tensors_come_from_a_file_of_perf_analyzer(client: Client, tmp_path: Path) -> None:
    data = [
        {"in_FP32": [1.5, 2], "in_STRING": ["a", "ü"], "in_BOOL": [True, False]},
        {"in_FP32": {"content": [3, 4.25], "shape": [2]}, "in_STRING": ["c", "d"], "in_BOOL": {"b64": "AQE=", "shape": [2]}},
    ]  # fmt: skip
    workload = made(client, "echo", tensors_file=written(tmp_path, {"data": data}), rows=2)
    (request,) = workload.requests
    assert np.frombuffer(sent(request)["in_FP32"], "<f4").tolist() == [1.5, 2, 3, 4.25]
    assert sent(request)["in_BOOL"] == b"\1\0\1\1"
    assert sent(request)["in_STRING"] == b"\1\0\0\0a\2\0\0\0\xc3\xbc\1\0\0\0c\1\0\0\0d"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("nothing", "is not JSON"),
        ({"data": []}, "has no list called data"),
        ({"data": [[{"in_FP32": [1]}]]}, "data[0] is a list: sequences and several streams are not supported"),
        ({"data": [{"in_FP32": [1]}], "validation_data": []}, "has validation_data; answers are not compared here"),
        ({"data": [{"in_FP23": [1]}]}, "model 'echo' has no input 'in_FP23'"),
        ({"data": [{"in_FP32": {"content": [1], "shapes": [1]}}]}, "a tensor has content or b64, and shape; seen: content, shapes"),
        ({"data": [{"in_FP32": {"content": [1, 2], "shape": [3]}}]}, "2 values, but the shape [3] holds 3"),
        ({"data": [{"in_FP32": {"content": [1], "shape": [1, 1]}}]}, "shape must be 1 sizes without the batch"),
        ({"data": [{"in_FP32": ["1"]}]}, "data[0], in_FP32: '1' is no FP32"),
        ({"data": [{"in_INT8": [300]}]}, "a value is out of range of INT8"),
        ({"data": [{"in_INT32": [1.0]}]}, "1.0 is no INT32"),
        ({"data": [{"in_INT32": {"b64": "AQE="}}]}, "so the file must say which"),
        ({"data": [{"in_INT32": {"b64": "AQE=", "shape": [1]}}]}, "came with 2 bytes instead of 4"),
        ({"data": [{"in_INT32": {"b64": "?", "shape": [1]}}]}, "b64 is not base64"),
        ({"data": [{"in_FP32": [10**400]}]}, "a value is out of range of FP32"),
        ({"data": [{"in_STRING": ["\ud800"]}]}, "in_STRING: an element cannot be sent: character 0"),
        ({"data": [{"in_STRING": [1]}]}, "elements of a BYTES input must be text"),
        ({"data": [{"in_FP32": [1]}, {"in_FP32": [1, 2]}]}, "rows of different inputs or shapes"),
    ],
)  # fmt: skip
def test_a_file_of_tensors_that_does_not_fit_is_an_error_that_says_where(
    client: Client, tmp_path: Path, content: object, message: str
) -> None:
    with pytest.raises(ProfileError) as caught:
        made(client, "echo", tensors_file=written(tmp_path, content), rows=2)
    assert message in caught.value.message


def test_inputs_that_a_file_leaves_out_are_named(client: Client, tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match="data\\[0\\]: inputs that model 'pair' needs are missing: b"):
        made(
            client,
            "pair",
            tensors_file=written(tmp_path, {"data": [{"a": {"content": [1, 2], "shape": [1, 2]}}]}),
        )


def test_prompts_come_from_a_file(client: Client, tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "one\u2028two", "max_tokens": 3}\r\n\n{"prompt": "drei"}\n', encoding="utf-8")
    workload = made(client, "tokens", prompts_file=path, output_tokens=FixedLength(tokens=8))
    assert [(prompt_of(one), one.output_tokens) for one in workload.requests] == [
        ("one\u2028two", 3),
        ("drei", 8),
    ]
    assert workload.described["prompts"] == "the 2 of prompts.jsonl, gone round in their order"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no prompts"),
        (b"\xff", "is not UTF-8"),
        (b'{"prompt": "a"}\nprompt', "line 2: not JSON"),
        (b'{"text": "a"}', "line 1: there is no prompt"),
        (b'{"prompt": "a", "tokens": 3}', "line 1: unknown key 'tokens'; allowed: prompt, max_tokens"),
        (b'{"prompt": " "}', "line 1: prompt must be text that is not empty"),
        (b'{"prompt": "a", "max_tokens": true}', "max_tokens must be a whole number from 1 on; seen: True"),
        (b'{"prompt": "\\ud800"}', "prompt cannot be sent"),
    ],
)
def test_a_file_of_prompts_that_is_wrong_is_an_error_that_names_the_line(
    client: Client, tmp_path: Path, content: bytes, message: str
) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(content)
    with pytest.raises(ProfileError, match=r"requests\.prompts_file") as caught:
        made(client, "tokens", prompts_file=path)
    assert message in caught.value.message


def test_a_prompt_of_a_file_that_is_too_long_is_the_files_fault(client: Client, tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps({"prompt": "word " * 300}), encoding="utf-8")
    with pytest.raises(ProfileError, match=r"refuses the longest prompt of .*prompts\.jsonl"):
        made(client, "wordy", prompts_file=path)

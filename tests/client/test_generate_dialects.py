"""What is asked of text models, and what is read out of their answers; no server."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest

from enginesmith_client import (
    ChatTemplate,
    InferResult,
    InvalidInput,
    ModelMetadata,
    ServerError,
    TensorMetadata,
    TextDelta,
    TokenLogprob,
)
from enginesmith_client._answer import Answer
from enginesmith_client._generate import Options, Question, inputs_from_question, outputs_to_request

CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "schön?"}]


def text_model(
    inputs: Sequence[str], outputs: Sequence[str], *, required: Sequence[str] = (), batched: bool = True
) -> ModelMetadata:
    """``inputs`` and ``outputs`` are ``name:DATATYPE``; all inputs but ``required`` are optional."""

    def tensor(described: str) -> TensorMetadata:
        name, datatype = described.split(":")
        return TensorMetadata(name, datatype, (-1, -1) if batched else (-1,), name not in required)

    return ModelMetadata(
        name="m",
        versions=("1",),
        platform="python",
        inputs=tuple(map(tensor, inputs)),
        outputs=tuple(map(tensor, outputs)),
        max_batch_size=4 if batched else 0,
        decoupled=True,
    )


OURS = text_model(
    ["text_input:BYTES", "messages:BYTES", "max_tokens:INT32", "stream:BOOL", "return_log_probs:BOOL",
     "exclude_input_in_output:BOOL", "apply_chat_template:BOOL"],
    ["text_output:BYTES", "finish_reason:BYTES", "num_input_tokens:INT32", "num_output_tokens:INT32",
     "output_log_probs:FP32", "output_tokens:BYTES"],
)  # fmt: skip
BLS = text_model(
    ["text_input:BYTES", "max_tokens:INT32", "stop_words:BYTES", "stream:BOOL", "return_log_probs:BOOL",
     "exclude_input_in_output:BOOL", "return_num_input_tokens:BOOL", "return_num_output_tokens:BOOL"],
    ["text_output:BYTES", "output_log_probs:FP32", "num_input_tokens:INT32", "num_output_tokens:INT32"],
    required=["text_input", "max_tokens"],
)  # fmt: skip
LLM_API = text_model(
    ["text_input:BYTES", "streaming:BOOL", "sampling_param_max_tokens:INT32", "sampling_param_stop:BYTES",
     "sampling_param_exclude_input_from_output:BOOL", "return_finish_reason:BOOL"],
    ["text_output:BYTES", "finish_reason:BYTES"],
    required=["text_input"],
    batched=False,
)  # fmt: skip


def asked(
    metadata: ModelMetadata, options: Mapping[str, Any], *, streaming: bool = False
) -> dict[str, list[Any]]:
    arrays = inputs_from_question(metadata, Question("hi", Options(**options)), streaming=streaming)
    return {name: array.reshape(-1).tolist() for name, array in arrays.items() if name != "text_input"}


def result(**outputs: Any) -> InferResult:
    arrays = {
        name: np.array(
            value, np.object_ if name in ("text_output", "finish_reason", "output_tokens") else None
        )
        for name, value in outputs.items()
    }
    return InferResult(arrays, "m", "3", "")


@pytest.mark.parametrize(
    ("metadata", "streaming", "inputs"),
    [
        (OURS, False, {"max_tokens": [3], "exclude_input_in_output": [True]}),
        (OURS, True, {"max_tokens": [3], "exclude_input_in_output": [True], "stream": [True]}),
        (BLS, False, {"max_tokens": [3], "exclude_input_in_output": [True], "return_num_input_tokens": [True],
                      "return_num_output_tokens": [True]}),
        (BLS, True, {"max_tokens": [3], "exclude_input_in_output": [True], "return_num_input_tokens": [True],
                     "return_num_output_tokens": [True], "stream": [True]}),
        (LLM_API, False, {"sampling_param_max_tokens": [3], "sampling_param_exclude_input_from_output": [True],
                          "return_finish_reason": [True]}),
        (LLM_API, True, {"sampling_param_max_tokens": [3], "sampling_param_exclude_input_from_output": [True],
                         "return_finish_reason": [True], "streaming": [True]}),
    ],
)  # fmt: skip
def test_each_kind_of_text_model_is_asked_by_the_names_that_it_has(
    metadata: ModelMetadata, streaming: bool, inputs: Mapping[str, Any]
) -> None:
    assert asked(metadata, {"max_tokens": 3}, streaming=streaming) == inputs


def test_a_model_without_batches_gets_vectors() -> None:
    arrays = inputs_from_question(LLM_API, Question("hi", Options(stop=["a", "b"])))
    assert (arrays["text_input"].shape, arrays["sampling_param_stop"].shape) == ((1,), (2,))


@pytest.mark.parametrize(
    ("metadata", "options", "message"),
    [
        (BLS, {}, "needs the option max_tokens\n  hint: give max_tokens=..."),
        (BLS, {"max_tokens": 1, "min_tokens": 1}, "no option min_tokens (no input 'min_tokens')"),
        (BLS, {"max_tokens": 1, "logprobs": True}, "no option logprobs (no output 'output_tokens')"),
        (BLS, {"max_tokens": 1, "seed": 1}, "the options of this model: max_tokens, stop\n"),
        (LLM_API, {"repetition_penalty": 1.1}, "no option repetition_penalty\n"),
        (LLM_API, {"seed": 1}, "no option seed (no input 'sampling_param_seed')"),
        (LLM_API, {"chat": True}, "the options of this model: max_tokens, stop\n"),
    ],
)
def test_an_option_that_the_model_lacks_is_answered_with_those_that_it_has(
    metadata: ModelMetadata, options: Mapping[str, Any], message: str
) -> None:
    with pytest.raises(InvalidInput) as caught:
        asked(metadata, options)
    assert message in f"{caught.value}\n"


def test_a_conversation_goes_as_messages_where_the_model_has_them() -> None:
    arrays = inputs_from_question(OURS, Question(CHAT, Options(), is_conversation=True))
    assert "text_input" not in arrays
    expected = '[{"role": "system", "content": "Be brief."}, {"role": "user", "content": "schön?"}]'
    assert arrays["messages"].tolist() == [[expected.encode()]]


def test_a_conversation_is_rendered_here_where_the_caller_gives_a_template() -> None:
    template = ChatTemplate("{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}")
    question = Question(CHAT, Options(max_tokens=1), is_conversation=True, template=template)
    arrays = inputs_from_question(BLS, question)
    assert arrays["text_input"].tolist() == [["<system>Be brief.<user>schön?".encode()]]


def test_a_model_that_takes_no_conversation_is_told_with_both_ways_out() -> None:
    with pytest.raises(InvalidInput, match=r"no input 'messages'\n.*template=.*or ask a model that has"):
        inputs_from_question(BLS, Question(CHAT, Options(max_tokens=1), is_conversation=True))


def test_log_probabilities_are_asked_for_only_with_the_option() -> None:
    basic = ["text_output", "finish_reason", "num_input_tokens", "num_output_tokens"]
    assert outputs_to_request(OURS, Options()) == basic
    assert outputs_to_request(OURS, Options(logprobs=True)) == [*basic, "output_log_probs", "output_tokens"]


def test_pieces_count_the_tokens_so_far_and_end_with_the_reason() -> None:
    answer = Answer(OURS, Options(), started_s=0)
    first = answer.take(
        result(text_output=[[b"a"]], finish_reason=[[b""]], num_input_tokens=[[7]], num_output_tokens=[[2]])
    )
    last = answer.take(
        result(
            text_output=[["ß".encode()]],
            finish_reason=[[b"stop"]],
            num_input_tokens=[[7]],
            num_output_tokens=[[3]],
        )
    )
    assert first == TextDelta("a", 2, 7, None, None)
    assert last == TextDelta("ß", 3, 7, "stop", None)
    whole = answer.generation(streamed=True)
    assert (whole.text, whole.output_tokens, whole.finish_reason) == ("aß", 3, "stop")
    assert (whole.model, whole.model_version) == ("m", "3")
    assert whole.ttft_s is not None
    assert 0 < whole.ttft_s <= whole.latency_s


def test_counts_of_single_responses_are_added_up() -> None:
    """TensorRT-LLM counts the tokens of each response by itself."""
    answer = Answer(BLS, Options(max_tokens=5), started_s=0)
    deltas = [answer.take(result(text_output=[[b"x"]], num_output_tokens=[[2]])) for _ in range(3)]
    assert [delta.output_tokens for delta in deltas] == [2, 4, 6]
    assert [delta.finish_reason for delta in deltas] == [None, None, "length"]


def test_a_reason_that_cannot_be_known_is_none() -> None:
    answer = Answer(BLS, Options(max_tokens=5), started_s=0)
    answer.take(result(text_output=[[b"x"]], num_output_tokens=[[4]]))
    assert answer.generation(streamed=False).finish_reason is None


def test_log_probabilities_come_with_the_bytes_of_their_tokens() -> None:
    answer = Answer(OURS, Options(logprobs=True), started_s=0)
    answer.take(
        result(
            text_output=[["ß".encode()]],
            output_tokens=[[b"\xc3", b"\x9f"]],
            output_log_probs=[[[-1.0, -2.0]]],
        )
    )
    assert answer.generation(streamed=False).logprobs == (
        TokenLogprob(b"\xc3", -1.0),
        TokenLogprob(b"\x9f", -2.0),
    )


@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        ({"num_output_tokens": [[1]]}, "has no text_output"),
        ({"text_output": [[b"a", b"b"]]}, "holds 2 values for one prompt"),
        ({"text_output": [[1.5]]}, "float where text was expected"),
        ({"text_output": [[b"\xff"]]}, "not valid UTF-8"),
        ({"text_output": [[b"a"]], "num_output_tokens": [[1.5]]}, "is float; expected an integer"),
        ({"text_output": [[b"a"]], "finish_reason": [[b"\xff"]]}, "not valid UTF-8"),
        ({"text_output": [[b"a"]], "output_tokens": [[b"a"]]}, "did not send output_log_probs"),
        (
            {"text_output": [[b"a"]], "output_tokens": [[b"a"]], "output_log_probs": [[[1.0, 2.0]]]},
            "2 log-probabilities for 1 tokens",
        ),
    ],
)
def test_an_answer_that_cannot_be_read_is_the_servers_error(outputs: Mapping[str, Any], message: str) -> None:
    logprobs = "output_tokens" in outputs
    with pytest.raises(ServerError, match=re.escape(message)):
        Answer(OURS, Options(logprobs=logprobs), started_s=0).take(result(**outputs))


def test_extra_and_missing_outputs_of_another_version_do_no_harm() -> None:
    answer = Answer(OURS, Options(), started_s=0)
    delta = answer.take(result(text_output=[[b"a"]], new_in_the_next_release=[[1]]))
    assert delta == TextDelta("a", None, None, None, None)

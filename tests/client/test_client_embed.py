"""Embedding, classification and reranking against a real tritonserver, over both protocols."""

from collections.abc import Callable

import numpy as np
import pytest

from enginesmith_client import Client, InvalidInput, ModelNotReady, ServerError, TritonClientError
from enginesmith_client._messages import InferReply, InferResult, TensorMetadata
from enginesmith_client._requests import result_from_reply
from enginesmith_client._texts import batches_of, check_rows, classifications_from_results

TEXTS = ["e", "tree", "", "grün", "été", "sea", "here", "a" * 40, "x"]


def vectors(*batches: list[str]) -> list[list[float]]:
    return [[len(text.encode()), text.count("e"), len(batch)] for batch in batches for text in batch]


@pytest.mark.server
def test_each_text_has_its_vector_in_order_whatever_the_batches(client: Client) -> None:
    embeddings = client.embed("sentences-text", TEXTS)
    assert embeddings.dtype == np.float32
    assert embeddings.tolist() == vectors(TEXTS[:4], TEXTS[4:8], TEXTS[8:])


@pytest.mark.server
def test_the_model_that_takes_tokens_names_the_one_that_takes_texts(client: Client) -> None:
    assert client.embed("sentences", ["tree"]).tolist() == vectors(["tree"])


@pytest.mark.server
def test_classes_come_with_their_names_and_probabilities(client: Client) -> None:
    first, second = client.classify("moods-text", ["Why? What? Who?", "No! Stop!"])
    assert first.label == "very: curious"
    assert first.score == pytest.approx(np.exp(3) / (np.exp(3) + 2), abs=1e-6)
    assert next(iter(first.scores)) == "very: curious"
    assert sum(first.scores.values()) == pytest.approx(1)
    assert second.label == "cross"
    assert second.scores["calm"] == pytest.approx(1 / (np.exp(2) + 2), abs=1e-6)


@pytest.mark.server
def test_more_texts_than_a_batch_are_classified_in_order(client: Client) -> None:
    texts = ["Stop!" if index in (2, 3, 7) else "Why?" for index in range(10)]
    labels = [one.label for one in client.classify("moods", texts)]
    assert [index for index, label in enumerate(labels) if label == "cross"] == [2, 3, 7]


@pytest.mark.server
def test_a_model_names_its_classes_also_without_an_ensemble(client: Client) -> None:
    assert client.classify("moods", ["a.", "b!"])[1].label == "cross"


@pytest.mark.server
def test_documents_are_ranked_and_equal_ones_keep_their_order(client: Client) -> None:
    documents = ["about bread", "the sea", "a red boat on the sea", "nothing", "the red sea", "bread"]
    ranking = client.rerank("relevance-text", "the red boat", documents)
    assert [one.index for one in ranking] == [2, 4, 1, 0, 3, 5]
    assert [one.score for one in ranking] == [3, 2, 1, 0, 0, 0]
    assert ranking[0].document == documents[2]


@pytest.mark.server
@pytest.mark.parametrize(
    ("call", "kind", "said"),
    [
        (lambda c: c.embed("sentences-text", []), InvalidInput, "texts is empty"),
        (lambda c: c.embed("sentences-text", "tree"), InvalidInput, r"list of str; seen: str.*\n.*\[text\]"),
        (lambda c: c.embed("sentences-text", ["a", 3]), InvalidInput, r"texts\[1\] must be a str; seen: int"),
        (lambda c: c.embed("sentences-text", ["a", "\ud83d"]), InvalidInput, r"texts\[1\]"),
        (lambda c: c.embed("sentences-text", ["a" * 41]), InvalidInput, "longer than 40 bytes"),
        (lambda c: c.embed("sentence-text", ["a"]), ModelNotReady, "did you mean 'sentences-text'"),
        (
            lambda c: c.embed("echo", ["a"]),
            InvalidInput,
            "takes no text: it takes in_.*'echo-text'.*not served",
        ),
        (
            lambda c: c.embed("moods", ["a"]),
            InvalidInput,
            "cannot embed.*embedding.*logits\n.*client.classify",
        ),
        (lambda c: c.classify("sentences", ["a"]), InvalidInput, "cannot classify.*\n.*client.embed"),
        (lambda c: c.embed("relevance-text", ["a"]), InvalidInput, "cannot embed.*score\n.*client.rerank"),
        (lambda c: c.rerank("sentences", "a", ["b"]), InvalidInput, "cannot rerank"),
        (lambda c: c.rerank("relevance-text", "a", []), InvalidInput, "documents is empty"),
        (lambda c: c.rerank("relevance-text", 3, ["b"]), InvalidInput, "query must be a str; seen: int"),
        (lambda c: c.rerank("relevance-text", "a", ["nan"]), ServerError, "no numbers"),
        (lambda c: c.embed("sentences-text", ["a"], timeout_s=-1), InvalidInput, "timeout_s"),
    ],
)
def test_what_cannot_be_answered_is_one_clear_error(
    client: Client, call: Callable[[Client], object], kind: type[TritonClientError], said: str
) -> None:
    with pytest.raises(kind, match=rf"(?s).*{said}") as raised:
        call(client)
    assert type(raised.value) is kind


@pytest.mark.server
def test_one_text_that_is_refused_fails_the_call_and_not_the_next(client: Client) -> None:
    with pytest.raises(InvalidInput, match="longer than 40 bytes"):
        client.embed("sentences-text", ["short"] * 9 + ["l" * 50])
    assert client.embed("sentences-text", ["short"] * 9).shape == (9, 3)


def classes(*rows: list[bytes], output: str = "probabilities") -> list[tuple[str, InferResult]]:
    return [(output, InferResult({output: np.array(rows, np.object_)}, "m", "1", ""))]


def test_classes_without_names_are_numbered() -> None:
    (one,) = classifications_from_results(classes([b"0.700000:2", b"0.300000:0"]))
    assert one.label == "2"
    assert one.scores == {"2": 0.7, "0": 0.3}


def test_two_classes_of_one_name_both_count() -> None:
    (one,) = classifications_from_results(classes([b"0.7:2:other", b"0.3:0:other"]))
    assert one.scores == {"other": 0.7, "other (0)": 0.3}


def test_a_single_class_has_the_probability_of_its_logit() -> None:
    (one,) = classifications_from_results(classes([b"1.098612:0:spam"], output="logits"))
    assert one.score == pytest.approx(0.75, abs=1e-6)


@pytest.mark.parametrize("element", [b"many:0:x", b"nan:0:x", b"inf:0:x"])
def test_scores_that_are_no_numbers_are_the_servers_error(element: bytes) -> None:
    with pytest.raises(ServerError):
        classifications_from_results(classes([element], output="logits"))


def test_batches_hold_every_row_once() -> None:
    columns = {"TEXT": list("abcde"), "TEXT_PAIR": list("vwxyz")}
    assert list(batches_of(columns, size=2)) == [
        {"TEXT": ["a", "b"], "TEXT_PAIR": ["v", "w"]},
        {"TEXT": ["c", "d"], "TEXT_PAIR": ["x", "y"]},
        {"TEXT": ["e"], "TEXT_PAIR": ["z"]},
    ]


def test_an_answer_without_outputs_is_the_servers_error() -> None:
    with pytest.raises(ServerError, match="'m' gave an answer without outputs"):
        result_from_reply(InferReply("m", "1", "", ()))


@pytest.mark.parametrize(
    ("outputs", "said"),
    [({"embedding": np.zeros((2, 4))}, r"3 texts.*\[2, 4\]"), ({"other": np.zeros((3, 4))}, "is missing")],
)
def test_rows_that_belong_to_no_text_are_the_servers_error(outputs: dict[str, np.ndarray], said: str) -> None:
    output = TensorMetadata("embedding", "FP32", (-1, 4))
    with pytest.raises(ServerError, match=said):
        check_rows(InferResult(outputs, "m", "1", ""), output, texts=3, batched=True)

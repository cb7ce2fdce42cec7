"""Text in pieces: together they are the text of all tokens, and none of them is half of anything."""

from __future__ import annotations

import pytest
from checkpoint_factory import VOCAB_SIZE, write_tokenizer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from enginesmith.triton.models.llm_onnxruntime.llm_pieces import AnswerText
from enginesmith.triton.models.llm_onnxruntime.llm_text import Text


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Text:
    directory = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(directory)
    return Text(directory)


def pieces_of(text: Text, tokens: list[int], stops: tuple[str, ...] = ()) -> list[str]:
    answer = AnswerText(text.decode, stops)
    pieces = []
    for token in tokens:
        pieces.append(answer.add(token))
        if answer.stopped:
            return pieces
    return [*pieces, answer.finish()]


@given(st.text(max_size=60))
def test_pieces_of_a_text_are_the_text_and_whole_characters(text: Text, written: str) -> None:
    tokens = text.encode(written)
    pieces = pieces_of(text, tokens)
    assert "".join(pieces) == text.decode(tokens)
    if "\ufffd" not in written:
        assert all("\ufffd" not in piece for piece in pieces)


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=60))
def test_pieces_of_any_tokens_are_what_all_of_them_decode_to(text: Text, tokens: list[int]) -> None:
    assert "".join(pieces_of(text, tokens)) == text.decode(tokens)


@given(
    st.text(alphabet="ab", max_size=30), st.lists(st.text(alphabet="ab", min_size=1, max_size=4), max_size=3)
)
def test_stop_word_and_what_follows_are_never_shown(text: Text, written: str, stops: list[str]) -> None:
    shown = "".join(pieces_of(text, text.encode(written), tuple(stops)))
    found = [(written.find(stop) + len(stop), written.find(stop)) for stop in stops if stop in written]
    assert shown == written[: min(found, default=(0, len(written)))[1]]


def test_beginning_of_a_stop_word_is_held_back_until_it_is_none(text: Text) -> None:
    answer = AnswerText(lambda tokens: "".join(map(chr, tokens)), ["STOP"])
    assert [answer.add(ord(one)) for one in "aSTSTx"] == ["a", "", "", "ST", "", "STx"]
    assert answer.finish() == ""
    assert not answer.stopped


def test_character_that_never_ends_is_shown_at_the_end(text: Text) -> None:
    half = text.encode("\U0001f600")[:-1]
    assert pieces_of(text, half) == ["", "", "", "\ufffd"]


def test_cost_of_a_token_does_not_grow_with_the_answer(text: Text) -> None:
    decoded: list[int] = []

    def decode(tokens: list[int]) -> str:
        decoded.append(len(tokens))
        return text.decode(tokens)

    answer = AnswerText(decode)  # type: ignore[arg-type]
    for token in text.encode("plain words " * 200):
        answer.add(token)
    assert max(decoded) <= 4


def test_garbage_does_not_wait_for_ever(text: Text) -> None:
    half = text.encode("\U0001f600")[0]
    pieces = pieces_of(text, [half] * 200)
    assert "".join(pieces) == text.decode([half] * 200)
    assert sum(1 for piece in pieces if piece) >= 3


@given(st.text(max_size=40))
def test_bytes_of_tokens_are_the_bytes_of_the_text(text: Text, written: str) -> None:
    assert b"".join(map(text.token_bytes, text.encode(written))).decode() == written


def test_special_token_is_written_by_its_name(text: Text) -> None:
    assert text.token_bytes(text.encode("<|im_end|>")[0]) == b"<|im_end|>"

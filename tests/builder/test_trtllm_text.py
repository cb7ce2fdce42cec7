"""Pieces of text from tokens, stop words across pieces, word lists: what the Python models share."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
from checkpoint_factory import write_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from enginesmith.triton.models.trtllm_text.text_pieces import (
    RefusedError,
    StopText,
    TokenWindow,
    load_tokenizer,
    read_parameters,
    utf8,
    word_lists,
)
from enginesmith.triton.models.trtllm_twin.request import read_words

TEXTS = st.text(alphabet="ab é漢字👩‍🚀🇫🇷한\n", max_size=24)


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A byte-level BPE, as Llama 3 and Qwen have: a character can be several tokens."""
    directory = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(directory)
    return load_tokenizer(directory, "")


@pytest.fixture(scope="module")
def byte_fallback() -> Tokenizer:
    """As Llama 2 and Mistral have: spaces are part of tokens, unknown characters are bytes."""
    pieces = [f"<0x{byte:02X}>" for byte in range(256)] + ["▁", "▁a", "a", "b", "▁b", "é"]
    tokenizer = Tokenizer(
        models.BPE({piece: place for place, piece in enumerate(pieces)}, [], byte_fallback=True)
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return tokenizer


def pieces_of(tokenizer: Tokenizer, tokens: list[int], sizes: list[int]) -> list[str]:
    """The text of ``tokens`` that arrive in groups of these sizes, then one by one."""
    window, pieces = TokenWindow(), []
    while tokens:
        size = sizes.pop(0) if sizes else 1
        window.add(tokens[:size])
        tokens = tokens[size:]
        before, after = window.questions()
        pieces.append(window.take(tokenizer.decode(before), tokenizer.decode(after)))
    if window.pending:
        before, after = window.questions()
        pieces.append(window.take(tokenizer.decode(before), tokenizer.decode(after), last=True))
    return pieces


@given(text=TEXTS, sizes=st.lists(st.integers(0, 5), max_size=6))
def test_pieces_join_to_the_text_and_never_cut_a_character(
    byte_level: Tokenizer, text: str, sizes: list[int]
) -> None:
    tokens = byte_level.encode(text, add_special_tokens=False).ids
    pieces = pieces_of(byte_level, tokens, sizes)
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


@given(tokens=st.lists(st.integers(3, 511), max_size=24), sizes=st.lists(st.integers(0, 4), max_size=5))
def test_pieces_of_any_tokens_join_to_what_they_decode_to(
    byte_level: Tokenizer, tokens: list[int], sizes: list[int]
) -> None:
    assert "".join(pieces_of(byte_level, tokens, sizes)) == byte_level.decode(tokens)


@given(text=TEXTS.filter(lambda text: text.strip() != ""), sizes=st.lists(st.integers(0, 5), max_size=6))
def test_spaces_and_bytes_of_sentencepiece_tokenizers_survive_streaming(
    byte_fallback: Tokenizer, text: str, sizes: list[int]
) -> None:
    known = {" ": "▁", "a": "a", "b": "b", "é": "é"}
    tokens = []
    for character in text:
        if character in known:
            tokens.append(byte_fallback.token_to_id(known[character]))
        else:
            tokens += [byte_fallback.token_to_id(f"<0x{byte:02X}>") for byte in character.encode()]
    pieces = pieces_of(byte_fallback, tokens, sizes)
    assert "".join(pieces) == byte_fallback.decode(tokens)
    assert not any("\ufffd" in piece for piece in pieces)


@given(
    text=st.text(alphabet="abc", max_size=20),
    stops=st.lists(st.text(alphabet="abc", min_size=1, max_size=4), max_size=3),
    cuts=st.lists(st.integers(0, 20), max_size=6),
)
def test_a_text_ends_after_the_first_stop_word_wherever_it_was_cut(
    text: str, stops: list[str], cuts: list[int]
) -> None:
    ends = [text.find(stop) + len(stop) for stop in stops if stop in text]
    expected = text[: min(ends)] if ends else text
    places = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    pieces = [text[start:end] for start, end in pairwise(places)]
    ending, shown = StopText(stops), ""
    for piece in pieces:
        shown += ending.add(piece)
        # What is shown never ends inside the stop word that ends the text.
        for stop in stops if ends else ():
            begins = text.find(stop)
            if begins >= 0 and begins + len(stop) == min(ends):
                assert not begins < len(shown) < min(ends)
    shown += ending.add("", last=True)
    assert shown == expected
    assert ending.found == bool(ends)


@given(st.lists(st.lists(st.lists(st.integers(0, 99), max_size=4), max_size=4), min_size=1, max_size=3))
def test_word_lists_are_what_the_engine_reads_back(rows: list[list[list[int]]]) -> None:
    lists = word_lists(rows)
    assert lists.shape[:2] == (len(rows), 2)
    for row, words in zip(lists, rows, strict=True):
        assert read_words(row) == tuple(tuple(word) for word in words if word)


def test_bytes_that_are_not_utf8_are_refused_with_their_place() -> None:
    with pytest.raises(RefusedError, match=r"text_input is not valid UTF-8: .* at byte 3"):
        utf8(b"caf\xe9 x", "text_input")


def test_the_tokenizer_beside_the_model_comes_before_the_configured_one(tmp_path: Path) -> None:
    write_tokenizer(tmp_path / "beside")
    write_tokenizer(tmp_path / "configured")
    (tmp_path / "configured" / "tokenizer.json").write_text("damaged")
    assert load_tokenizer(tmp_path / "beside", str(tmp_path / "configured")).get_vocab_size() == 512
    (tmp_path / "elsewhere").mkdir()
    with pytest.raises(FileNotFoundError, match=r"looked in .*elsewhere and /not/there"):
        load_tokenizer(tmp_path / "elsewhere", "/not/there")


def test_a_parameter_that_is_not_there_is_named() -> None:
    parameters = read_parameters('{"parameters": {"tokenizer_dir": {"string_value": "/models"}}}')
    assert parameters["tokenizer_dir"] == "/models"
    with pytest.raises(ValueError, match="no parameter accumulate_tokens"):
        parameters["accumulate_tokens"]

"""Corpora: what is read from each kind, which windows are drawn, and what is said about a bad one."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from checkpoint_factory import write_tokenizer
from tokenizers import Tokenizer

from enginesmith.corpora import corpus_sha256, load_documents, token_windows
from enginesmith.errors import SourceError

FILE = {"file": "corpus", "field": "text"}


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(directory)
    return directory


def write(path: Path, content: bytes | str) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_builtin_english_is_the_topics_of_pydoc_in_the_order_of_their_names() -> None:
    from pydoc_data.topics import topics

    documents = load_documents({"builtin": "english"})
    assert documents == [topics[name] for name in sorted(topics)]
    assert len(documents) > 50


def test_blank_lines_separate_the_documents_of_a_text_file(tmp_path: Path) -> None:
    path = write(tmp_path / "corpus.txt", "first\nstill first\r\n\r\nsecond\n\n\n\nthird\n")
    assert [document.strip() for document in load_documents(FILE, path)] == [
        "first\nstill first",
        "second",
        "third",
    ]


def test_a_byte_order_mark_is_not_part_of_the_text(tmp_path: Path) -> None:
    assert load_documents(FILE, write(tmp_path / "corpus.txt", b"\xef\xbb\xbfword")) == ["word"]


def test_jsonl_documents_come_from_the_named_field_whatever_separators_they_hold(tmp_path: Path) -> None:
    records = [{"body": "one\n\ntwo"}, {"body": "line\u2028separator", "other": 1}]
    lines = "\n".join(json.dumps(record, ensure_ascii=False) for record in records)
    documents = load_documents({"file": "x", "field": "body"}, write(tmp_path / "corpus.jsonl", lines))
    assert documents == ["one\n\ntwo", "line\u2028separator"]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("corpus.txt", b"", "holds no text"),
        ("corpus.txt", b" \n\n \t\n", "holds no text"),
        ("corpus.txt", b"good \xff bad", r"not UTF-8: invalid start byte at byte 5"),
        ("corpus.txt", b"\xef\xbb\xbfgood \xff", r"not UTF-8: invalid start byte at byte 8"),
        ("corpus.jsonl", b'{"text": "a"}\n\n{"text": \n', "line 3 is not JSON"),
        ("corpus.jsonl", b'{"text": "a"}\n{"body": "b"}\n', "line 2 has no text in field 'text'; seen: body"),
        ("corpus.jsonl", b'{"text": 7}\n', "line 1 has no text in field 'text'"),
        ("corpus.jsonl", b"[1]\n", "line 1 has no text in field 'text'; seen: list"),
        ("corpus.csv", b"a,b\n", r"suffix '.csv'; allowed: .txt, .jsonl"),
    ],
)
def test_a_bad_file_is_refused_with_where_and_what(
    tmp_path: Path, name: str, content: bytes, said: str
) -> None:
    with pytest.raises(SourceError, match=said):
        load_documents(FILE, write(tmp_path / name, content))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"corpus .*nowhere\.txt does not exist"):
        load_documents(FILE, tmp_path / "nowhere.txt")


def test_windows_are_runs_of_the_token_stream_and_none_overlap(tokenizer_dir: Path) -> None:
    documents = load_documents({"builtin": "english"})[:8]
    tokenizer = Tokenizer.from_file(str(tokenizer_dir / "tokenizer.json"))
    stream = np.concatenate([tokenizer.encode(document).ids for document in documents])
    windows = token_windows(documents, tokenizer_dir, count=20, length=32, seed=3)
    assert windows.shape == (20, 32)
    assert windows.dtype == np.int64
    places = [
        place
        for window in windows
        for place in range(0, stream.size - 31, 32)
        if (stream[place : place + 32] == window).all()
    ]
    assert len(set(places)) == 20


def test_the_seed_alone_decides_which_windows_are_drawn(tokenizer_dir: Path) -> None:
    documents = load_documents({"builtin": "english"})
    first, again, other = (
        token_windows(documents, tokenizer_dir, count=5, length=16, seed=seed) for seed in (0, 0, 1)
    )
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_too_few_tokens_says_how_many_there_are_and_how_many_fit(tokenizer_dir: Path) -> None:
    with pytest.raises(SourceError, match=r"the corpus has \d+ tokens; 4 windows of 64 tokens need 256"):
        token_windows(["a short text"], tokenizer_dir, count=4, length=64, seed=0)


def test_a_checkpoint_without_a_fast_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"tokenizer\.json is missing"):
        token_windows(["text"], tmp_path, count=1, length=1, seed=0)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(SourceError, match="not a tokenizer that this version"):
        token_windows(["text"], tmp_path, count=1, length=1, seed=0)


def test_the_digest_tells_apart_where_documents_end() -> None:
    assert corpus_sha256(["ab", "c"]) == corpus_sha256(["ab", "c"])
    assert corpus_sha256(["ab", "c"]) != corpus_sha256(["a", "bc"])


def test_a_dataset_is_read_from_a_local_directory_by_column(tmp_path: Path) -> None:
    pytest.importorskip("datasets", exc_type=ImportError)
    write(tmp_path / "part.jsonl", '{"body": "one"}\n{"body": "two"}\n')
    corpus = {"dataset": "local", "field": "body", "split": "train"}
    assert load_documents(corpus, tmp_path) == ["one", "two"]
    with pytest.raises(SourceError, match="no column 'text'; seen: body"):
        load_documents({**corpus, "field": "text"}, tmp_path)


def test_a_dataset_that_cannot_be_loaded_is_named(tmp_path: Path) -> None:
    pytest.importorskip("datasets", exc_type=ImportError)
    with pytest.raises(SourceError, match=r"dataset '.*nowhere' .* cannot be loaded"):
        load_documents({"dataset": "x"}, tmp_path / "nowhere")

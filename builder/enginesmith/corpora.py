"""Text for calibration and evaluation: documents from a corpus, and token windows cut from them.

Owns how a corpus is read and how windows are drawn; knows nothing of models. ``enginesmith.quantize`` and
``enginesmith.verify.reference`` are its only users, and both record ``corpus_sha256`` in their facts because
the built-in corpus belongs to the Python that runs the step.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from enginesmith.errors import SourceError, ToolchainError

_SUFFIXES = (".txt", ".jsonl")
_DOCUMENTS_PER_BATCH = 256


def load_documents(corpus: Mapping[str, Any], corpus_path: Path | None = None) -> list[str]:
    """The non-empty documents of ``corpus``, a mapping with the keys of ``enginesmith.spec.Corpus``.

    ``corpus_path`` says where a ``file`` (or a dataset in a local directory) is on this machine; its suffix
    decides how it is read. Documents keep the order of their source.

    Raises:
        SourceError: the corpus is missing, empty, damaged, or lacks the field that was asked for.
    """
    if corpus.get("builtin") is not None:
        documents, origin = (
            _builtin_documents(corpus["builtin"]),
            f"the built-in corpus {corpus['builtin']!r}",
        )
    elif corpus.get("dataset") is not None:
        documents, origin = _dataset_documents(corpus, corpus_path), f"dataset {corpus['dataset']!r}"
    else:
        path = corpus_path or Path(str(corpus["file"]))
        documents, origin = _file_documents(path, field=corpus.get("field", "text")), str(path)
    documents = [document for document in documents if document.strip()]
    if not documents:
        raise SourceError(
            f"{origin} holds no text", hint="give a corpus with at least one document that is not blank"
        )
    return documents


def corpus_sha256(documents: Sequence[str]) -> str:
    """SHA-256 of the documents and of where each ends."""
    digest = hashlib.sha256()
    for document in documents:
        text = document.encode("utf-8", "surrogatepass")
        digest.update(len(text).to_bytes(8, "little"))
        digest.update(text)
    return digest.hexdigest()


def token_windows(
    documents: Sequence[str], tokenizer_dir: Path, *, count: int, length: int, seed: int
) -> npt.NDArray[np.int64]:
    """``count`` windows of ``length`` tokens: int64 [count, length], drawn without replacement.

    The documents are tokenized one by one, with the special tokens that the tokenizer itself adds, and their
    tokens joined to one stream; it is cut into adjacent windows, from which ``seed`` chooses. A window may
    span documents, and no two windows of one call overlap.

    Raises:
        SourceError: there is no usable ``tokenizer.json`` or the corpus has too few tokens.
    """
    stream = _token_stream(documents, tokenizer_dir)
    needed = count * length
    if stream.size < needed:
        raise SourceError(
            f"the corpus has {stream.size} tokens; {count} windows of {length} tokens need {needed}",
            hint=f"use at most {stream.size // length} windows of this length, shorter windows, or a larger corpus",
        )
    windows = stream[: stream.size // length * length].reshape(-1, length)
    chosen: npt.NDArray[np.int64] = windows[np.random.default_rng(seed).permutation(len(windows))[:count]]
    return chosen


def _token_stream(documents: Sequence[str], tokenizer_dir: Path) -> npt.NDArray[np.int64]:
    from tokenizers import Tokenizer

    path = tokenizer_dir / "tokenizer.json"
    if not path.is_file():
        raise SourceError(
            f"tokenizer.json is missing in {tokenizer_dir}",
            hint="the checkpoint needs a fast tokenizer; AutoTokenizer.from_pretrained(...).save_pretrained(...) writes one",
        )
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises bare Exception for every kind of bad file.
        raise SourceError(
            f"{path} is not a tokenizer that this version of tokenizers can read: {error}"
        ) from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    batches = [
        documents[start : start + _DOCUMENTS_PER_BATCH]
        for start in range(0, len(documents), _DOCUMENTS_PER_BATCH)
    ]
    ids = [
        np.asarray(encoding.ids, dtype=np.int64)
        for batch in batches
        for encoding in tokenizer.encode_batch(list(batch))
    ]
    return np.concatenate([np.empty(0, dtype=np.int64), *ids])


def _builtin_documents(name: str) -> list[str]:
    if name != "english":
        raise SourceError(f"there is no built-in corpus {name!r}; allowed: english")
    from pydoc_data.topics import topics

    return [topics[topic] for topic in sorted(topics)]


def _file_documents(path: Path, *, field: str) -> list[str]:
    if path.suffix not in _SUFFIXES:
        raise SourceError(f"corpus {path} has the suffix {path.suffix!r}; allowed: {', '.join(_SUFFIXES)}")
    try:
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise SourceError(
            f"corpus {path} does not exist", hint="paths in a spec are relative to the spec's directory"
        ) from error
    except OSError as error:
        raise SourceError(f"cannot read corpus {path}: {error.strerror}") from error
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise SourceError(
            f"corpus {path} is not UTF-8: {error.reason} at byte {_byte_offset(content, error)}",
            hint="convert it, e.g. with `iconv -f ENCODING -t UTF-8`",
        ) from error
    if path.suffix == ".jsonl":
        return list(_jsonl_documents(text, path, field))
    return text.replace("\r\n", "\n").split("\n\n")


def _byte_offset(content: bytes, error: UnicodeDecodeError) -> int:
    # utf-8-sig counts from behind the byte order mark.
    return error.start + (len(content) - len(error.object))


def _jsonl_documents(text: str, path: Path, field: str) -> Iterator[str]:
    # Not splitlines(): JSON strings may hold U+2028 and its kin unescaped.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise SourceError(f"corpus {path}, line {number} is not JSON: {error}") from error
        if not isinstance(record, dict) or not isinstance(record.get(field), str):
            seen = ", ".join(sorted(record)) if isinstance(record, dict) else type(record).__name__
            raise SourceError(
                f"corpus {path}, line {number} has no text in field {field!r}; seen: {seen}",
                hint="name the field with `field:` in the spec's corpus",
            )
        yield record[field]


def _dataset_documents(corpus: Mapping[str, Any], corpus_path: Path | None) -> list[str]:
    try:
        import datasets
    except ImportError as error:
        raise ToolchainError(
            f"a corpus from a dataset needs the distribution datasets, which cannot be imported: {error}",
            hint="install the pinned versions: pip install -c constraints.txt datasets",
        ) from error
    name = str(corpus_path or corpus["dataset"])
    split, column = corpus.get("split", "train"), corpus.get("field", "text")
    datasets.disable_progress_bars()
    try:
        dataset = datasets.load_dataset(
            name, corpus.get("config"), split=split, revision=corpus.get("revision")
        )
    except (datasets.exceptions.DatasetsError, OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip() or type(error).__name__
        raise SourceError(
            f"dataset {name!r} (config {corpus.get('config')!r}, split {split!r}) cannot be loaded: {reason}",
            hint="give a name or a local directory that datasets.load_dataset accepts; a hub dataset needs the network or a filled cache",
        ) from error
    if column not in dataset.column_names:
        raise SourceError(
            f"dataset {name!r} has no column {column!r}; seen: {', '.join(dataset.column_names)}",
            hint="name the column with `field:` in the spec's corpus",
        )
    texts = list(dataset[column])
    if not all(isinstance(text, str) for text in texts):
        raise SourceError(
            f"column {column!r} of dataset {name!r} does not hold text; seen: {dataset.features[column]}"
        )
    return texts

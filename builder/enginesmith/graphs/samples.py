"""The ``sample`` step: the inputs that calibrate, measure and warm up a graph, in batches.

Owns ``batches/NNN.npz`` (one array per input) and ``texts.json``. Texts are cut from a corpus and tokenized as the
checkpoint's tokenizer does it; ``tensor_samples`` makes the inputs of models that read no text. Runs before the
export, so it knows the checkpoint or the ONNX file, but no graph of ours.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from enginesmith.checkpoints.tensors import read_json_object
from enginesmith.corpora import corpus_sha256, load_documents
from enginesmith.errors import SourceError
from enginesmith.graphs.planned import check_planned
from enginesmith.graphs.tensor_samples import tensor_batches
from enginesmith.steps import StepContext

BATCHES_DIRECTORY = "batches"
TEXTS_FILE = "texts.json"

Batch = Mapping[str, npt.NDArray[Any]]
Text = str | tuple[str, str]
"""One sample: a text, or a query and a passage."""

_SENTENCE_END = re.compile(r"(?<=[.!?:])\s+|\n\s*\n")
_WORDS = re.compile(r"\S+")
_CAPS = (1.0, 0.5, 0.75, 0.25)
"""What share of the longest length the texts of a batch reach, in turn, so that lengths differ between batches."""
_SHORTEST_WORDS = 3


def run(context: StepContext) -> Mapping[str, Any]:
    """Write the batches; facts: how many samples, in how many batches, and how long the texts are.

    Raises:
        SourceError: the corpus or the file of samples is missing, damaged, too small or does not fit the inputs.
        SpecError: a dynamic axis of an ONNX file has no lengths.
    """
    params = context.params
    check_planned(params)
    (context.out / BATCHES_DIRECTORY).mkdir()
    if params["task"] == "tensors":
        facts: dict[str, Any] = {}
        batches: Sequence[Batch] = tensor_batches(params)
    else:
        batches, facts = _text_batches(context)
    for number, batch in enumerate(batches):
        np.savez(context.out / BATCHES_DIRECTORY / f"{number:03d}.npz", **batch)
    return {"samples": params["samples"], "batches": len(batches), **facts}


def read_batches(directory: Path) -> list[Batch]:
    """The batches of a ``sample`` artifact, in order."""
    batches: list[Batch] = []
    for path in sorted((directory / BATCHES_DIRECTORY).glob("*.npz")):
        with np.load(path, allow_pickle=False) as archive:
            batches.append({name: archive[name] for name in archive.files})
    return batches


def text_input_names(checkpoint: Path, task: str) -> tuple[str, ...]:
    """What a model that reads text gets: token types only where a second text can be told by them."""
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    told = task == "reranking" and int(config.get("type_vocab_size") or 0) > 1
    return ("input_ids", "attention_mask", "token_type_ids") if told else ("input_ids", "attention_mask")


def pad_id_of(checkpoint: Path) -> int:
    """The token that pads, by ``config.json``; 0 where it names none."""
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    pad = config.get("pad_token_id")
    return pad if isinstance(pad, int) else 0


def _lowers(checkpoint: Path) -> bool:
    """Whether sentence-transformers makes the letters small before the checkpoint's tokenizer sees them."""
    path = checkpoint / "sentence_bert_config.json"
    return path.is_file() and bool(read_json_object(path).get("do_lower_case"))


@dataclass(frozen=True)
class _Encoded:
    ids: list[int]
    type_ids: list[int]


class _Tokens:
    """Texts to tokens, with the special tokens that the tokenizer adds."""

    def __init__(self, checkpoint: Path) -> None:
        from tokenizers import Tokenizer, normalizers

        path = checkpoint / "tokenizer.json"
        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises bare Exception for every kind of bad file.
            raise SourceError(
                f"{path} is not a tokenizer that this version of tokenizers can read: {error}"
            ) from error
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        if _lowers(checkpoint):
            own = self._tokenizer.normalizer
            self._tokenizer.normalizer = normalizers.Sequence(
                [normalizers.Lowercase(), *([own] if own else [])]
            )

    def fitting(self, words: Sequence[str], *, limit: int) -> str | None:
        """As many of the first ``words`` as fit into ``limit`` tokens, as one text; None if not even one does."""
        words = list(words[:limit])
        while words:
            text = " ".join(words)
            seen = len(self._tokenizer.encode(text).ids)
            if seen <= limit:
                return text
            words = _shortened(words, by=limit / seen)
        return None

    def encode(self, text: Text) -> _Encoded:
        encoding = (
            self._tokenizer.encode(text)
            if isinstance(text, str)
            else self._tokenizer.encode(text[0], text[1])
        )
        return _Encoded(encoding.ids, encoding.type_ids)

    def pair(self, query: Sequence[str], passage: Sequence[str], *, limit: int) -> tuple[str, str] | None:
        """A query of at most half of ``limit`` tokens and a passage that fills the rest; None if there is no room."""
        first = self.fitting(query, limit=limit // 2)
        rest = list(passage[:limit])
        while first is not None and rest:
            text = (first, " ".join(rest))
            seen = len(self.encode(text).ids)
            if seen <= limit:
                return text
            rest = _shortened(rest, by=limit / seen)
        return None


def _shortened(words: list[str], *, by: float) -> list[str]:
    """The first ``by`` of ``words``, and at least one word less."""
    return words[: min(len(words) - 1, int(len(words) * by))]


def _text_batches(context: StepContext) -> tuple[list[Batch], dict[str, Any]]:
    params, checkpoint = context.params, context.inputs["checkpoint"]
    path = params["location"]["corpus_path"]
    documents = load_documents(params["corpus"], Path(path) if path else None)
    tokens = _Tokens(checkpoint)
    texts = _draw_texts(documents, tokens, params)
    names, pad = text_input_names(checkpoint, params["task"]), pad_id_of(checkpoint)
    encoded = [tokens.encode(text) for text in texts]
    key = "pairs" if params["task"] == "reranking" else "texts"
    document = json.dumps({key: texts}, ensure_ascii=False, indent=1)
    (context.out / TEXTS_FILE).write_text(document + "\n", encoding="utf-8")
    size = params["batch_size"]
    batches: list[Batch] = [
        _padded(encoded[start : start + size], names, pad=pad) for start in range(0, len(encoded), size)
    ]
    lengths = [len(entry.ids) for entry in encoded]
    return batches, {
        "corpus_sha256": corpus_sha256(documents),
        "shortest_tokens": min(lengths),
        "longest_tokens": max(lengths),
        "mean_tokens": round(sum(lengths) / len(lengths), 1),
    }


def _draw_texts(documents: Sequence[str], tokens: _Tokens, params: Mapping[str, Any]) -> list[Text]:
    """``samples`` texts of one sentence or several, each from another place of the corpus."""
    sentences = [sentence for document in documents for sentence in _sentences(document)]
    random = np.random.default_rng(params["seed"])
    texts: list[Text] = []
    for start in random.permutation(len(sentences)):
        cap = _CAPS[len(texts) // params["batch_size"] % len(_CAPS)]
        limit = max(min(params["length"], 8), int(params["length"] * cap))
        # Log-uniform, because most texts that are embedded are short; a batch's first reaches its limit.
        wanted = int(np.exp(random.uniform(np.log(_SHORTEST_WORDS), np.log(limit))))
        words = _words_from(
            sentences, int(start), count=limit if len(texts) % params["batch_size"] == 0 else wanted
        )
        text: Text | None
        if params["task"] == "reranking":
            text = tokens.pair(*_query_and_passage(sentences, int(start), words, random), limit=limit)
        else:
            text = tokens.fitting(words, limit=limit)
        if text is not None:
            texts.append(text)
        if len(texts) == params["samples"]:
            return texts
    raise SourceError(
        f"the corpus gives {len(texts)} texts that fit into {params['length']} tokens, {params['samples']} are needed",
        hint=f"use samples: {len(texts)} or a larger corpus"
        if texts
        else "use a greater length or another corpus",
    )


def _sentences(document: str) -> Iterator[list[str]]:
    for sentence in _SENTENCE_END.split(document):
        words = _WORDS.findall(sentence)
        if len(words) >= _SHORTEST_WORDS and any(word.isalpha() for word in words):
            yield words


def _words_from(sentences: Sequence[list[str]], start: int, *, count: int) -> list[str]:
    """The first ``count`` words of sentence ``start`` and those that follow it."""
    words: list[str] = []
    for sentence in sentences[start:]:
        words += sentence
        if len(words) >= count:
            break
    return words[:count]


def _query_and_passage(
    sentences: Sequence[list[str]], start: int, words: list[str], random: np.random.Generator
) -> tuple[list[str], list[str]]:
    """A sentence, and what follows it or, for every other pair, words from elsewhere."""
    passage = start + 1 if random.random() < 0.5 else int(random.integers(len(sentences)))
    return sentences[start], _words_from(sentences, passage, count=len(words)) or words


def _padded(encoded: Sequence[_Encoded], names: Sequence[str], *, pad: int) -> Batch:
    """int64 [batch, longest] for each of ``names``."""
    shape = (len(encoded), max(len(entry.ids) for entry in encoded))
    ids, mask, types = np.full(shape, pad, np.int64), np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    for row, entry in enumerate(encoded):
        ids[row, : len(entry.ids)] = entry.ids
        mask[row, : len(entry.ids)] = 1
        types[row, : len(entry.ids)] = entry.type_ids
    arrays = {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}
    return {name: arrays[name] for name in names}

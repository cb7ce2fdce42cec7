"""Text as the inputs of a graph: tokenized, cut, padded. Knows nothing of Triton.

Self-contained: it is copied into the version directory of the tokenization model and needs numpy and tokenizers. It
reads ``tokenizer.json`` and ``text.json`` there.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Encoding, Tokenizer, normalizers

SETTINGS_FILE = "text.json"
TOKENIZER_FILE = "tokenizer.json"
Array = npt.NDArray[Any]
# What an Encoding calls the inputs that graphs take, and what pads them where it is not the model's token.
_FIELDS: Mapping[str, str] = {
    "input_ids": "ids",
    "attention_mask": "attention_mask",
    "token_type_ids": "type_ids",
}


class TextRefusedError(ValueError):
    """A text cannot be served; the message is for the client."""


class GraphText:
    """The tokenizer of one model and how its texts are cut and padded."""

    def __init__(self, directory: Path) -> None:
        """``text.json``: ``max_length`` with special tokens, ``truncate``, ``pad_to``, ``pad_id``, ``lower_case``, ``pairs``, ``inputs``."""
        settings = json.loads((directory / SETTINGS_FILE).read_text(encoding="utf-8"))
        self.pairs: bool = settings["pairs"]
        self._limit: int = settings["max_length"]
        self._pad_to: tuple[int, ...] = tuple(settings["pad_to"])
        self._pad_id: int = settings["pad_id"]
        self._inputs = {tensor["name"]: np.dtype(tensor["dtype"]) for tensor in settings["inputs"]}
        if unknown := sorted(set(self._inputs) - set(_FIELDS)):
            raise ValueError(f"no tokenizer makes the input {unknown[0]}; it makes {', '.join(_FIELDS)}")
        self._tokenizer = Tokenizer.from_file(str(directory / TOKENIZER_FILE))
        # A checkpoint's tokenizer.json may cut and pad as its author once did; what is served is in text.json.
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        if settings["lower_case"]:
            # By the tokenizer, as sentence-transformers does it: str.lower makes another letter of a final sigma.
            own = self._tokenizer.normalizer
            self._tokenizer.normalizer = normalizers.Sequence(
                [normalizers.Lowercase(), *([own] if own else [])]
            )
        if settings["truncate"]:
            self._tokenizer.enable_truncation(self._limit)

    def encode(self, texts: Sequence[str], pairs: Sequence[str] | None = None) -> list[Encoding]:
        """The tokens of each text, or of each text with the one of ``pairs`` in its place.

        Raises:
            TextRefusedError: the tokenizer has no tokens for a text, such as for a character without an unknown token.
        """
        given = list(texts) if pairs is None else list(zip(texts, pairs, strict=True))
        try:
            encodings: list[Encoding] = self._tokenizer.encode_batch(given)
        except Exception as error:  # tokenizers raises bare Exception for every text that it cannot tokenize.
            raise TextRefusedError(f"the text cannot be tokenized: {error}") from error
        return encodings

    def inputs(self, encodings: Sequence[Encoding]) -> dict[str, Array]:
        """The graph's inputs, [texts, length], padded to the longest text or to the next of ``pad_to``.

        Raises:
            TextRefusedError: a text has no tokens, or more than are served.
        """
        lengths = [len(encoding.ids) for encoding in encodings]
        if lengths and max(lengths) > self._limit:
            raise TextRefusedError(
                f"the text has {max(lengths)} tokens; this model accepts at most {self._limit}"
            )
        if not all(lengths):
            raise TextRefusedError("the text is empty: it has no tokens")
        longest = max(lengths, default=1)
        width = next((length for length in self._pad_to if length >= longest), longest)
        return {name: self._padded(name, encodings, width) for name in self._inputs}

    def _padded(self, name: str, encodings: Sequence[Encoding], width: int) -> Array:
        padding = self._pad_id if name == "input_ids" else 0
        padded: Array = np.full((len(encodings), width), padding, self._inputs[name])
        for row, encoding in zip(padded, encodings, strict=True):
            values = getattr(encoding, _FIELDS[name])
            row[: len(values)] = values
        return padded


def utf8(value: Any, name: str) -> str:
    """The text in one element of a BYTES tensor.

    Raises:
        TextRefusedError: it is not UTF-8.
    """
    if isinstance(value, str):
        return value
    try:
        return bytes(value).decode()
    except UnicodeDecodeError as error:
        raise TextRefusedError(f"{name} is not valid UTF-8: {error.reason} at byte {error.start}") from error

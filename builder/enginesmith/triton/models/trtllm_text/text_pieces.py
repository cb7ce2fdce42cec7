"""Text and tokens for the Python models of a TensorRT-LLM deployment. Knows nothing of Triton.

Self-contained: it is copied into the version directory of each of those models and needs numpy and tokenizers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

Ints = npt.NDArray[np.int32]
UNFINISHED = "\ufffd"
"""What a decoder gives for bytes that are no character, or not yet one."""


class RefusedError(ValueError):
    """The request cannot be served; the message is for the client."""


def load_tokenizer(version_directory: Path, tokenizer_dir: str) -> Tokenizer:
    """The tokenizer beside the model, else that in ``tokenizer_dir`` (the parameter of ``config.pbtxt``).

    The one beside the model is what was rehearsed and published; it also works wherever the repository is mounted.

    Raises:
        FileNotFoundError: there is neither; Triton shows the message as the reason why the model did not load.
    """
    places = [version_directory, *([Path(tokenizer_dir)] if tokenizer_dir else [])]
    for place in places:
        if (place / "tokenizer.json").is_file():
            tokenizer = Tokenizer.from_file(str(place / "tokenizer.json"))
            tokenizer.no_truncation()
            tokenizer.no_padding()
            return tokenizer
    raise FileNotFoundError(f"tokenizer.json is missing; looked in {' and '.join(map(str, places))}")


class _Parameters(dict[str, str]):
    """Says which parameter is missing, because Triton shows only that sentence."""

    def __missing__(self, name: str) -> str:
        raise ValueError(f"config.pbtxt has no parameter {name}; build the repository again")


def read_parameters(model_config: str) -> Mapping[str, str]:
    """The string parameters in Triton's JSON form of a ``config.pbtxt``; asked for another, it is a ValueError."""
    parameters: Mapping[str, Mapping[str, str]] = json.loads(model_config).get("parameters", {})
    return _Parameters({name: value.get("string_value", "") for name, value in parameters.items()})


def utf8(value: Any, name: str) -> str:
    """The text in one element of a BYTES tensor.

    Raises:
        RefusedError: it is not UTF-8.
    """
    if isinstance(value, str):
        return value
    try:
        return bytes(value).decode()
    except UnicodeDecodeError as error:
        raise RefusedError(f"{name} is not valid UTF-8: {error.reason} at byte {error.start}") from error


def padded(rows: Sequence[Sequence[int]], padding: int) -> Ints:
    """int32 [rows, longest row]."""
    result: Ints = np.full((len(rows), max(map(len, rows), default=0)), padding, np.int32)
    for place, row in zip(result, rows, strict=True):
        place[: len(row)] = row
    return result


def word_lists(rows: Sequence[Sequence[Sequence[int]]]) -> Ints:
    """The words of each row as TensorRT-LLM takes them: int32 [rows, 2, n].

    ``[row, 0]`` holds the tokens of all words one after the other, ``[row, 1]`` where each word ends, then -1.
    """
    words_of = [[list(word) for word in words if word] for words in rows]
    width = max((sum(map(len, words)) for words in words_of), default=0)
    result: Ints = np.zeros((len(rows), 2, width), np.int32)
    result[:, 1] = -1
    for place, words in zip(result, words_of, strict=True):
        flat = [token for word in words for token in word]
        place[0, : len(flat)] = flat
        place[1, : len(words)] = np.cumsum([len(word) for word in words])
    return result


class TokenWindow:
    """Turns tokens that arrive one by one into pieces of text that are whole characters.

    A token can be part of a character, and what a token becomes depends on the one before it. So the tokens since the
    last piece are decoded together with those of the piece before, once without the new ones and once with them; the
    difference is new text. While the last character is unfinished there is none.
    """

    def __init__(self) -> None:
        self._tokens: list[int] = []
        self._start = 0
        self._done = 0

    def add(self, tokens: Sequence[int]) -> None:
        """Append tokens that arrived."""
        self._tokens.extend(tokens)

    @property
    def pending(self) -> bool:
        """Whether there are tokens whose text was not taken."""
        return self._done < len(self._tokens)

    def questions(self) -> tuple[list[int], list[int]]:
        """The two token lists to decode: without the pending tokens and with them."""
        return self._tokens[self._start : self._done], self._tokens[self._start :]

    def take(self, before: str, after: str, *, last: bool = False) -> str:
        """The new text, given the answers to ``questions``; the ``last`` piece may end in an unfinished character."""
        if not last and (after.endswith(UNFINISHED) or len(after) <= len(before)):
            return ""
        self._start, self._done = self._done, len(self._tokens)
        return after[len(before) :]


class StopText:
    """Ends a text after the first stop word, also one that arrives in pieces.

    What may be the beginning of a stop word is held back until it is clear, so that a client never sees half of one.
    The stop word itself is the end of the text, as the engine's own tokens are.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [stop for stop in stops if stop]
        self._held = ""
        self.found = False

    def add(self, piece: str, *, last: bool = False) -> str:
        """What of the text up to now can be shown; with ``last``, all that is left of it."""
        if self.found:
            return ""
        text, self._held = self._held + piece, ""
        ends = [text.find(stop) + len(stop) for stop in self._stops if stop in text]
        if ends:
            self.found = True
            return text[: min(ends)]
        if last:
            return text
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of ``text`` that ``stop`` begins with."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0

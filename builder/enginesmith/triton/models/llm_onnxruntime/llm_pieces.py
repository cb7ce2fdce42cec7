"""The text of one answer, token by token: never half a character, never the beginning of a stop word.

Self-contained; knows nothing of engines or Triton. The cost of a token does not grow with the answer: only the tokens
around the last whole character are decoded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

Decode = Callable[[Sequence[int]], str]

_UNFINISHED = "\ufffd"
"""What a decoder gives for bytes that are no character, or not yet one."""
_LONGEST_WAIT = 64
"""Tokens without a whole character after which the bytes are taken for garbage. A character has four bytes."""


class AnswerText:
    """Turns tokens that arrive one by one into pieces of text that never have to be taken back.

    The pieces together are the text of all tokens up to the one of ``stops`` that is complete first, which is left out.
    """

    def __init__(self, decode: Decode, stops: Sequence[str] = ()) -> None:
        self._decode = decode
        self._stops = tuple(stop for stop in stops if stop)
        self._tokens: list[int] = []
        self._context = 0
        self._done = 0
        self._before = ""
        self._held = ""
        self.stopped = False
        """A stop word was found: nothing follows."""

    def add(self, token: int) -> str:
        """The text that can be shown because of ``token``; often none."""
        self._tokens.append(token)
        return self._released(self._new_text(last=False), last=False)

    def finish(self) -> str:
        """What is left, now that no token follows."""
        return self._released(self._new_text(last=True), last=True)

    def _new_text(self, *, last: bool) -> str:
        """The text of the tokens that were not decoded before, if they are whole characters.

        What a token becomes depends on the one before it, so the tokens of the last piece are decoded with them.
        """
        if self._done == len(self._tokens):
            return ""
        text = self._decode(self._tokens[self._context :])
        waited = len(self._tokens) - self._done
        if not last and text.endswith(_UNFINISHED) and waited < _LONGEST_WAIT:
            return ""
        if len(text) <= len(self._before):
            return ""
        piece = text[len(self._before) :]
        self._context, self._done = self._done, len(self._tokens)
        self._before = self._decode(self._tokens[self._context :])
        return piece

    def _released(self, piece: str, *, last: bool) -> str:
        if self.stopped or not self._stops:
            return "" if self.stopped else piece
        text, self._held = self._held + piece, ""
        # The first to be complete, so that the answer does not depend on where its tokens begin.
        found = [(place + len(stop), place) for stop in self._stops if (place := text.find(stop)) >= 0]
        if found:
            self.stopped = True
            return text[: min(found)[1]]
        keep = 0 if last else max(_overlap(text, stop) for stop in self._stops)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of ``text`` with which ``stop`` begins."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0

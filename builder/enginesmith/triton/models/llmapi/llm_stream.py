"""The text of one answer, piece by piece: never half a character, never the beginning of a stop string.

TensorRT-LLM ends a generation where the *tokens* of a stop string appear. A stop string whose text comes about
through other tokens passes it by, and in a stream the first tokens of a stop string are in the text before the last
one arrives. So the text is searched here as well.
"""

from __future__ import annotations

from collections.abc import Sequence

_INCOMPLETE = "\ufffd"


class TextStream:
    """Turns the text so far into pieces that can be sent and need never be taken back."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._sent = ""

    def piece(self, text: str) -> str:
        """What can be sent of ``text``, the answer so far, beyond what was sent."""
        text = text.rstrip(_INCOMPLETE)
        return self._advance(text[: len(text) - self._held_back(text)])

    def last_piece(self, text: str) -> str:
        """What remains of ``text``, the complete answer."""
        return self._advance(text)

    def cut(self, text: str) -> tuple[str, str | None]:
        """``text`` up to the stop string that is complete first, and that stop string."""
        # Not the one that begins first: the answer would depend on the pieces in which the text came.
        found = [(place + len(stop), place, stop) for stop in self._stops if (place := text.find(stop)) >= 0]
        if not found:
            return text, None
        _, place, stop = min(found)
        return text[:place], stop

    def _advance(self, text: str) -> str:
        if not text.startswith(self._sent):
            return ""  # The tokenizer rewrote what was sent, as a clean-up of spaces does.
        piece = text[len(self._sent) :]
        self._sent = text
        return piece

    def _held_back(self, text: str) -> int:
        """The length of the longest end of ``text`` with which a stop string begins."""
        longest = max((len(stop) for stop in self._stops), default=0)
        for size in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-size:]) for stop in self._stops):
                return size
        return 0

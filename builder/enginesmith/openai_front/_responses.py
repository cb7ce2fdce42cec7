"""What callers get: the documents of OpenAI's API, as dicts that ``json`` can write. Pure.

Source: https://platform.openai.com/docs/api-reference and the response types of the ``openai`` package 3.54.
"""

from __future__ import annotations

import base64
import codecs
import json
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from enginesmith_client import TokenLogprob

Document: TypeAlias = dict[str, Any]

_LOWEST_LOGPROB = -9999.0
"""OpenAI's word for impossible; JSON has no infinity."""

DONE = b"data: [DONE]\n\n"
"""The end of a stream."""


def json_bytes(document: Document) -> bytes:
    """The document as JSON, in ASCII: some readers of events take U+2028 and U+0085 for ends of lines."""
    return json.dumps(document, allow_nan=False, separators=(",", ":")).encode()


def event(document: Document) -> bytes:
    """The document as one server-sent event."""
    return b"data: " + json_bytes(document) + b"\n\n"


class Style(Protocol):
    """How one kind of answer is written. One object writes one answer or stream, because logprobs have a position."""

    @property
    def id_prefix(self) -> str:
        """How ids of answers begin."""

    @property
    def answer_object(self) -> str:
        """What a whole answer calls itself."""

    @property
    def chunk_object(self) -> str:
        """What a chunk of a stream calls itself."""

    def opening(self, index: int, /) -> Document | None:
        """The choice of a chunk that comes before the text of choice ``index``; None: there is none."""

    def chunk(
        self, index: int, text: str, *, finish_reason: str | None, logprobs: Sequence[TokenLogprob] | None
    ) -> Document:
        """The choice of a chunk with a piece of text."""

    def choice(
        self, index: int, text: str, *, finish_reason: str, logprobs: Sequence[TokenLogprob] | None
    ) -> Document:
        """A finished choice."""


@dataclass(frozen=True)
class CompletionStyle:
    """``/v1/completions``."""

    id_prefix: str = "cmpl-"
    answer_object: str = "text_completion"
    chunk_object: str = "text_completion"
    _offsets: dict[int, _Offsets] = field(default_factory=dict)

    def opening(self, _index: int, /) -> Document | None:
        """None: text follows at once."""
        return None

    def chunk(
        self, index: int, text: str, *, finish_reason: str | None, logprobs: Sequence[TokenLogprob] | None
    ) -> Document:
        """Chunks look as answers do."""
        return {
            "index": index,
            "text": text,
            "logprobs": None if logprobs is None else self._logprobs(index, logprobs),
            "finish_reason": finish_reason,
        }

    def choice(
        self, index: int, text: str, *, finish_reason: str, logprobs: Sequence[TokenLogprob] | None
    ) -> Document:
        """The text is there beside the reason why it ended."""
        return self.chunk(index, text, finish_reason=finish_reason, logprobs=logprobs)

    def _logprobs(self, index: int, tokens: Sequence[TokenLogprob]) -> Document:
        offsets = self._offsets.setdefault(index, _Offsets())
        return {
            "tokens": [_token_text(one.token) for one in tokens],
            "token_logprobs": [_finite(one.logprob) for one in tokens],
            "top_logprobs": None,
            "text_offset": [offsets.place(one.token) for one in tokens],
        }


@dataclass(frozen=True)
class ChatStyle:
    """``/v1/chat/completions``."""

    id_prefix: str = "chatcmpl-"
    answer_object: str = "chat.completion"
    chunk_object: str = "chat.completion.chunk"

    def opening(self, index: int, /) -> Document | None:
        """Who speaks."""
        return _chat_chunk(index, {"role": "assistant", "content": ""})

    def chunk(
        self, index: int, text: str, *, finish_reason: str | None, logprobs: Sequence[TokenLogprob] | None
    ) -> Document:
        """A delta; an empty one only ends the choice."""
        delta = {"content": text} if text else {}
        return _chat_chunk(index, delta, finish_reason=finish_reason, logprobs=logprobs)

    def choice(
        self, index: int, text: str, *, finish_reason: str, logprobs: Sequence[TokenLogprob] | None
    ) -> Document:
        """A message of the assistant."""
        return {
            "index": index,
            "message": {"role": "assistant", "content": text, "refusal": None},
            "logprobs": _chat_logprobs(logprobs),
            "finish_reason": finish_reason,
        }


@dataclass(frozen=True)
class Envelope:
    """What all parts of one answer have in common."""

    style: Style
    model: str
    """As the caller named it."""
    id: str
    created_s: int

    @classmethod
    def of(cls, style: Style, model: str) -> Envelope:
        """A new answer."""
        return cls(style, model, f"{style.id_prefix}{uuid.uuid4().hex}", int(time.time()))

    def answer(self, choices: Sequence[Document], usage: Usage) -> Document:
        """The whole answer."""
        return {**self._head(self.style.answer_object), "choices": list(choices), "usage": usage.document()}

    def chunk(self, choice: Document, *, wants_usage: bool) -> Document:
        """One chunk of a stream; where usage comes at the end, it is null until then."""
        document = {**self._head(self.style.chunk_object), "choices": [choice]}
        return {**document, "usage": None} if wants_usage else document

    def usage_chunk(self, usage: Usage) -> Document:
        """The last chunk of a stream whose caller wants the counts."""
        return {**self._head(self.style.chunk_object), "choices": [], "usage": usage.document()}

    def _head(self, kind: str) -> Document:
        return {"id": self.id, "object": kind, "created": self.created_s, "model": self.model}


@dataclass
class Usage:
    """Counts of tokens over the choices of one answer; prompts count once, whatever the number of choices."""

    prompt_tokens: dict[int, int | None] = field(default_factory=dict)
    """By number of the prompt."""
    output_tokens: dict[int, int | None] = field(default_factory=dict)
    """By number of the choice."""

    def document(self) -> Document | None:
        """As OpenAI writes it; None where the model does not count."""
        prompt, output = _total(self.prompt_tokens), _total(self.output_tokens)
        if prompt is None or output is None:
            return None
        return {"prompt_tokens": prompt, "completion_tokens": output, "total_tokens": prompt + output}


def finish_reason(reported: str | None, *, output_tokens: int | None, max_tokens: int | None) -> str:
    """``stop`` or ``length``, also of models that report none or others (an answer cut off for time is one of ``length``)."""
    if reported in ("stop", "length"):
        return str(reported)
    if reported:
        return "length"
    reached = output_tokens is not None and max_tokens is not None and output_tokens >= max_tokens
    return "length" if reached else "stop"


def embeddings(vectors: NDArray[np.float32], *, model: str, as_base64: bool) -> Document:
    """``vectors``: float32 [texts, width]. As base64 they are little-endian. Encoders count no tokens: usage is null."""
    rows = vectors.astype("<f4", copy=False)
    return {
        "object": "list",
        "model": model,
        "data": [
            {
                "object": "embedding",
                "index": index,
                "embedding": base64.b64encode(row.tobytes()).decode() if as_base64 else row.tolist(),
            }
            for index, row in enumerate(rows)
        ],
        "usage": None,
    }


def model_card(name: str, *, created_s: int) -> Document:
    """One model; ``created`` is when the front started, because Triton tells no age of a model."""
    return {"id": name, "object": "model", "created": created_s, "owned_by": "triton"}


@dataclass
class _Offsets:
    """Where in the text each token begins, in characters; a character may be made of several tokens."""

    _decoder: Any = field(default_factory=lambda: codecs.getincrementaldecoder("utf-8")("replace"))
    _characters: int = 0

    def place(self, token: bytes) -> int:
        here = self._characters
        self._characters += len(self._decoder.decode(token))
        return here


def _chat_chunk(
    index: int,
    delta: Document,
    *,
    finish_reason: str | None = None,
    logprobs: Sequence[TokenLogprob] | None = None,
) -> Document:
    return {
        "index": index,
        "delta": delta,
        "logprobs": _chat_logprobs(logprobs),
        "finish_reason": finish_reason,
    }


def _chat_logprobs(tokens: Sequence[TokenLogprob] | None) -> Document | None:
    if tokens is None:
        return None
    content = [
        {
            "token": _token_text(one.token),
            "logprob": _finite(one.logprob),
            "bytes": list(one.token),
            "top_logprobs": [],
        }
        for one in tokens
    ]
    return {"content": content, "refusal": None}


def _token_text(token: bytes) -> str:
    """Bytes that are a part of a character are written as ``\\xe2``."""
    return token.decode("utf-8", "backslashreplace")


def _finite(logprob: float) -> float:
    return max(logprob, _LOWEST_LOGPROB)


def _total(counts: dict[int, int | None]) -> int | None:
    known = [count for count in counts.values() if count is not None]
    return sum(known) if known and len(known) == len(counts) else None

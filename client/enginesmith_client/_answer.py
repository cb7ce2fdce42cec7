"""The answer of a language model, read as it comes: outputs in, ``TextDelta`` and ``Generation`` out. Pure."""

from __future__ import annotations

import time

from enginesmith_client._dialects import (
    FINISH_REASON,
    LOGPROBS,
    OUTPUT_TOKENS,
    PROMPT_TOKENS,
    TEXT_OUTPUT,
    TOKENS,
    dialect_of,
)
from enginesmith_client._errors import ServerError
from enginesmith_client._generate import Options
from enginesmith_client._messages import Generation, InferResult, ModelMetadata, TextDelta, TokenLogprob


class Answer:
    """One answer: takes the responses of a model in their order, one or many."""

    def __init__(self, metadata: ModelMetadata, options: Options, *, started_s: float) -> None:
        self._metadata = metadata
        self._options = options
        self._counts_pieces = dialect_of(metadata).counts_pieces
        self._started_s = started_s
        self._first_s: float | None = None
        self._texts: list[str] = []
        self._logprobs: list[TokenLogprob] = []
        self._output_tokens: int | None = None
        self._prompt_tokens: int | None = None
        self._finish_reason: str | None = None
        self._version = ""

    def take(self, result: InferResult) -> TextDelta:
        """The piece in the next response.

        Raises:
            ServerError: it cannot be read.
        """
        if self._first_s is None:
            self._first_s = time.monotonic()
        text = _single(result, TEXT_OUTPUT)
        if text is None:
            raise ServerError(f"the answer of model {result.model!r} has no text_output")
        logprobs = _logprobs(result) if self._options.logprobs else None
        self._count(result)
        self._version = result.version
        self._texts.append(_decoded(text, result.model))
        self._logprobs += logprobs or ()
        self._finish_reason = self._reason(result)
        return TextDelta(
            self._texts[-1], self._output_tokens, self._prompt_tokens, self._finish_reason, logprobs
        )

    def generation(self, *, streamed: bool) -> Generation:
        """All of it, after the last response.

        Raises:
            ServerError: there was none.
        """
        if self._first_s is None:
            raise ServerError(
                f"model {self._metadata.name!r} ended its answer without a response",
                hint="a decoupled model must send one before its final flag",
            )
        return Generation(
            text="".join(self._texts),
            finish_reason=self._finish_reason,
            prompt_tokens=self._prompt_tokens,
            output_tokens=self._output_tokens,
            model=self._metadata.name,
            model_version=self._version,
            latency_s=time.monotonic() - self._started_s,
            logprobs=tuple(self._logprobs) if self._options.logprobs else None,
            ttft_s=self._first_s - self._started_s if streamed else None,
        )

    def _count(self, result: InferResult) -> None:
        prompt_tokens, output_tokens = _count(result, PROMPT_TOKENS), _count(result, OUTPUT_TOKENS)
        if prompt_tokens is not None:
            self._prompt_tokens = prompt_tokens
        if output_tokens is not None:
            before = (self._output_tokens or 0) if self._counts_pieces else 0
            self._output_tokens = before + output_tokens

    def _reason(self, result: InferResult) -> str | None:
        """As the model says; of one that cannot say, only that the limit was reached is certain."""
        if self._metadata.output(FINISH_REASON) is not None:
            reason = _single(result, FINISH_REASON)
            return (None if reason is None else _decoded(reason, result.model)) or None
        limit, seen = self._options.max_tokens, self._output_tokens
        return "length" if limit is not None and seen is not None and seen >= limit else None


def _logprobs(result: InferResult) -> tuple[TokenLogprob, ...]:
    """Of the tokens of one response."""
    if LOGPROBS not in result.outputs or TOKENS not in result.outputs:
        raise ServerError(
            f"model {result.model!r} was asked for log-probabilities and did not send {LOGPROBS} and {TOKENS}"
        )
    values, tokens = (
        result.outputs[LOGPROBS].reshape(-1).tolist(),
        result.outputs[TOKENS].reshape(-1).tolist(),
    )
    if len(values) != len(tokens):
        raise ServerError(
            f"model {result.model!r} sent {len(values)} log-probabilities for {len(tokens)} tokens"
        )
    return tuple(TokenLogprob(token, value) for token, value in zip(tokens, values, strict=True))


def _single(result: InferResult, name: str) -> object | None:
    """The one element of an output, or None if the model did not send it."""
    if name not in result.outputs:
        return None
    values = result.outputs[name].reshape(-1)
    if values.size != 1:
        raise ServerError(
            f"output {name} of model {result.model!r} holds {values.size} values for one prompt; expected 1"
        )
    element: object = values.item()
    return element


def _count(result: InferResult, name: str) -> int | None:
    value = _single(result, name)
    if value is None or isinstance(value, int):
        return value
    raise ServerError(
        f"output {name} of model {result.model!r} is {type(value).__name__}; expected an integer"
    )


def _decoded(text: object, model: str) -> str:
    if not isinstance(text, bytes):
        raise ServerError(f"model {model!r} answered with {type(text).__name__} where text was expected")
    try:
        return text.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ServerError(
            f"the text of model {model!r} is not valid UTF-8: {error.reason} at byte {error.start}",
            hint="use infer to get the raw bytes",
        ) from error

"""A request that is ready to be sent: nothing is left to do at the moment when it is due."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TokenCounts:
    """The outputs in which a model says how many tokens there were; INT32 of one element."""

    prompt_output: str | None = None
    answer_output: str | None = None
    counts_pieces: bool = False
    """Whether ``answer_output`` counts the tokens of one response, not of all so far."""
    pieces_are_tokens: bool = True
    """Whether each response of a stream counts as a token where there is no ``answer_output``."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """One request."""

    message: bytes
    """A serialized ``inference.ModelInferRequest``."""
    streaming: bool = False
    """It must travel over ``ModelStreamInfer``, and its answer has any number of responses."""
    rows: int = 1
    prompt_tokens: int | None = None
    """As intended; the server may count otherwise."""
    output_tokens: int | None = None
    """The most that were asked for."""
    counts: TokenCounts = TokenCounts()


@dataclass(frozen=True, slots=True)
class Due:
    """When a request is due: nanoseconds after the start of the load."""

    at_ns: int
    prompt_tokens: int | None = None
    """As a trace recorded it, as the next."""
    output_tokens: int | None = None

"""Requests for text as calls of the client: one for each choice of each prompt, all at once."""

from __future__ import annotations

import secrets
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from enginesmith.openai_front._requests import ChatRequest, CompletionRequest
from enginesmith.openai_front._responses import (
    DONE,
    ChatStyle,
    CompletionStyle,
    Document,
    Envelope,
    Usage,
    event,
    finish_reason,
)
from enginesmith.openai_front._together import merged, together
from enginesmith_client import AsyncClient, AsyncTextStream, ChatTemplate, Generation, TextDelta

_SEEDS = 2**64


@dataclass(frozen=True)
class Ask:
    """One choice: a call of the client that is still to be made."""

    client: AsyncClient
    model: str
    """As Triton calls it."""
    prompt: str | None
    """To continue; None for a chat."""
    messages: Sequence[Mapping[str, str]]
    template: ChatTemplate | None
    options: Mapping[str, Any]
    """Keyword arguments that all four calls have."""

    async def generation(self) -> Generation:
        """The whole answer."""
        if self.prompt is not None:
            return await self.client.generate(self.model, self.prompt, **self.options)
        return await self.client.chat(self.model, self.messages, template=self.template, **self.options)

    def stream(self) -> AsyncTextStream:
        """The answer piece by piece; nothing is sent before the first is read."""
        if self.prompt is not None:
            return self.client.stream(self.model, self.prompt, **self.options)
        return self.client.stream_chat(self.model, self.messages, template=self.template, **self.options)


@dataclass(frozen=True)
class Question:
    """A request for text and the calls that answer it. Choice ``i`` belongs to prompt ``i // request.choices``."""

    request: CompletionRequest | ChatRequest
    envelope: Envelope
    asks: tuple[Ask, ...]
    max_tokens: int | None
    usage: Usage = field(default_factory=Usage)

    async def answer(self) -> Document:
        """The whole answer, when all choices are there. The first failure ends the others."""
        generations = await together([ask.generation() for ask in self.asks])
        choices = [self._choice(index, generation) for index, generation in enumerate(generations)]
        return self.envelope.answer(choices, self.usage)

    async def events(self) -> AsyncGenerator[bytes, None]:
        """The answer as server-sent events; closing the iterator ends the generation on the server."""
        ended: set[int] = set()
        begun: set[int] = set()
        async with aclosing(merged([ask.stream() for ask in self.asks])) as pieces:
            async for index, delta in pieces:
                if index not in begun:
                    begun.add(index)
                    for choice in self._opening(index):
                        yield self._chunk(choice)
                if delta is not None:
                    self._count(index, delta)
                    if delta.finish_reason:
                        ended.add(index)
                    if delta.text or delta.logprobs or delta.finish_reason:
                        yield self._chunk(self._piece(index, delta))
                elif index not in ended:
                    yield self._chunk(self._end(index))
        if self.request.wants_usage:
            yield event(self.envelope.usage_chunk(self.usage))
        yield DONE

    def _choice(self, index: int, generation: Generation) -> Document:
        self._count(index, generation)
        return self.envelope.style.choice(
            index,
            self._echo(index) + generation.text,
            finish_reason=self._reason(index, generation.finish_reason),
            logprobs=generation.logprobs if self.request.wants_logprobs else None,
        )

    def _piece(self, index: int, delta: TextDelta) -> Document:
        return self.envelope.style.chunk(
            index,
            delta.text,
            finish_reason=self._reason(index, delta.finish_reason) if delta.finish_reason else None,
            logprobs=delta.logprobs if self.request.wants_logprobs else None,
        )

    def _opening(self, index: int) -> list[Document]:
        style = self.envelope.style
        opening, echo = style.opening(index), self._echo(index)
        echoed = [style.chunk(index, echo, finish_reason=None, logprobs=None)] if echo else []
        return [opening, *echoed] if opening is not None else echoed

    def _end(self, index: int) -> Document:
        return self.envelope.style.chunk(index, "", finish_reason=self._reason(index, None), logprobs=None)

    def _reason(self, index: int, reported: str | None) -> str:
        output_tokens = self.usage.output_tokens.get(index)
        return finish_reason(reported, output_tokens=output_tokens, max_tokens=self.max_tokens)

    def _count(self, index: int, counted: Generation | TextDelta) -> None:
        self.usage.prompt_tokens[index // self.request.choices] = counted.prompt_tokens
        self.usage.output_tokens[index] = counted.output_tokens

    def _echo(self, index: int) -> str:
        if isinstance(self.request, CompletionRequest) and self.request.echo:
            return self.request.prompt[index // self.request.choices]
        return ""

    def _chunk(self, choice: Document) -> bytes:
        return event(self.envelope.chunk(choice, wants_usage=self.request.wants_usage))


def question_from_completion(
    request: CompletionRequest, client: AsyncClient, *, model: str, request_id: str
) -> Question:
    """The calls for prompts that are continued."""
    asks = [
        Ask(client, model, prompt, (), None, _options(request, request.answer_tokens, choice, request_id))
        for prompt in request.prompt
        for choice in range(request.choices)
    ]
    envelope = Envelope.of(CompletionStyle(), request.model)
    return Question(request, envelope, tuple(asks), request.answer_tokens)


def question_from_chat(
    request: ChatRequest,
    client: AsyncClient,
    *,
    model: str,
    template: ChatTemplate | None,
    default_max_tokens: int | None,
    request_id: str,
) -> Question:
    """The calls for a conversation that is continued."""
    messages = [message.rendered for message in request.messages]
    max_tokens = request.answer_tokens or default_max_tokens
    asks = [
        Ask(client, model, None, messages, template, _options(request, max_tokens, choice, request_id))
        for choice in range(request.choices)
    ]
    return Question(request, Envelope.of(ChatStyle(), request.model), tuple(asks), max_tokens)


def _options(
    request: CompletionRequest | ChatRequest, max_tokens: int | None, choice: int, request_id: str
) -> dict[str, Any]:
    """What the request says, for the client; choices differ in their seeds."""
    seed = request.seed
    if seed is None and (request.choices > 1 or request.temperature):
        # Some models take a missing seed for 0: all choices, and all answers to one question, would be the same.
        seed = secrets.randbits(63)
    return {
        "max_tokens": max_tokens,
        "min_tokens": request.min_tokens,
        "temperature": request.temperature,
        "top_k": request.top_k,
        "top_p": request.top_p,
        "repetition_penalty": request.repetition_penalty,
        "presence_penalty": request.presence_penalty,
        "frequency_penalty": request.frequency_penalty,
        "seed": None if seed is None else (seed + choice) % _SEEDS,
        "stop": request.stop or None,
        "logprobs": request.wants_logprobs,
        "request_id": f"{request_id}-{choice}" if request.choices > 1 else request_id,
    }

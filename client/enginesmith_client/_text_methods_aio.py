"""The methods of ``AsyncClient`` that ask language models."""

from __future__ import annotations

from collections.abc import Sequence

from enginesmith_client._calls import Calls
from enginesmith_client._chat import ChatTemplate, Message
from enginesmith_client._flow_aio import run_async
from enginesmith_client._generate import Options, Question
from enginesmith_client._messages import Generation
from enginesmith_client._requests import Envelope
from enginesmith_client._stream_aio import AsyncTextStream


class AsyncTextMethods:
    """A part of ``AsyncClient``."""

    _calls: Calls

    async def generate(
        self,
        model: str,
        prompt: str,
        *,
        max_tokens: int | None = None,
        min_tokens: int | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        repetition_penalty: float | None = None,
        presence_penalty: float | None = None,
        frequency_penalty: float | None = None,
        seed: int | None = None,
        stop: str | Sequence[str] | None = None,
        chat: bool = False,
        logprobs: bool = False,
        priority: int | None = None,
        request_id: str = "",
        version: str = "",
        timeout_s: float | None = None,
    ) -> Generation:
        """As ``Client.generate``."""
        options = Options(
            max_tokens, min_tokens, temperature, top_k, top_p, repetition_penalty,
            presence_penalty, frequency_penalty, seed, stop, chat, logprobs,
        )  # fmt: skip
        question = Question(prompt, options)
        envelope = Envelope(request_id, priority)
        return await run_async(
            self._calls.generate(model, question, envelope=envelope, version=version, timeout_s=timeout_s)
        )

    def stream(
        self,
        model: str,
        prompt: str,
        *,
        max_tokens: int | None = None,
        min_tokens: int | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        repetition_penalty: float | None = None,
        presence_penalty: float | None = None,
        frequency_penalty: float | None = None,
        seed: int | None = None,
        stop: str | Sequence[str] | None = None,
        chat: bool = False,
        logprobs: bool = False,
        priority: int | None = None,
        request_id: str = "",
        version: str = "",
        timeout_s: float | None = None,
    ) -> AsyncTextStream:
        """As ``Client.stream``."""
        options = Options(
            max_tokens, min_tokens, temperature, top_k, top_p, repetition_penalty,
            presence_penalty, frequency_penalty, seed, stop, chat, logprobs,
        )  # fmt: skip
        question = Question(prompt, options)
        envelope = Envelope(request_id, priority)
        return AsyncTextStream(
            self._calls.stream(model, question, envelope=envelope, version=version, timeout_s=timeout_s)
        )

    async def chat(
        self,
        model: str,
        messages: Sequence[Message],
        *,
        template: ChatTemplate | None = None,
        max_tokens: int | None = None,
        min_tokens: int | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        repetition_penalty: float | None = None,
        presence_penalty: float | None = None,
        frequency_penalty: float | None = None,
        seed: int | None = None,
        stop: str | Sequence[str] | None = None,
        logprobs: bool = False,
        priority: int | None = None,
        request_id: str = "",
        version: str = "",
        timeout_s: float | None = None,
    ) -> Generation:
        """As ``Client.chat``."""
        options = Options(
            max_tokens, min_tokens, temperature, top_k, top_p, repetition_penalty,
            presence_penalty, frequency_penalty, seed, stop, False, logprobs,
        )  # fmt: skip
        question = Question(messages, options, is_conversation=True, template=template)
        envelope = Envelope(request_id, priority)
        return await run_async(
            self._calls.generate(model, question, envelope=envelope, version=version, timeout_s=timeout_s)
        )

    def stream_chat(
        self,
        model: str,
        messages: Sequence[Message],
        *,
        template: ChatTemplate | None = None,
        max_tokens: int | None = None,
        min_tokens: int | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        repetition_penalty: float | None = None,
        presence_penalty: float | None = None,
        frequency_penalty: float | None = None,
        seed: int | None = None,
        stop: str | Sequence[str] | None = None,
        logprobs: bool = False,
        priority: int | None = None,
        request_id: str = "",
        version: str = "",
        timeout_s: float | None = None,
    ) -> AsyncTextStream:
        """As ``Client.stream_chat``."""
        options = Options(
            max_tokens, min_tokens, temperature, top_k, top_p, repetition_penalty,
            presence_penalty, frequency_penalty, seed, stop, False, logprobs,
        )  # fmt: skip
        question = Question(messages, options, is_conversation=True, template=template)
        envelope = Envelope(request_id, priority)
        return AsyncTextStream(
            self._calls.stream(model, question, envelope=envelope, version=version, timeout_s=timeout_s)
        )

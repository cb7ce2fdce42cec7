"""The methods of ``Client`` that ask language models."""

from __future__ import annotations

from collections.abc import Sequence

from enginesmith_client._calls import Calls
from enginesmith_client._chat import ChatTemplate, Message
from enginesmith_client._flow import run
from enginesmith_client._generate import Options, Question
from enginesmith_client._messages import Generation
from enginesmith_client._requests import Envelope
from enginesmith_client._stream import TextStream


class TextMethods:
    """A part of ``Client``."""

    _calls: Calls

    def generate(
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
        """The model's continuation of ``prompt``, or with ``chat`` its answer to it as a user's message.

        Options left out are the model's defaults. An option that the model does not have raises ``InvalidInput``.
        ``priority`` counts from 1, the highest; ``logprobs`` asks for the tokens and their log-probabilities.
        """
        options = Options(
            max_tokens, min_tokens, temperature, top_k, top_p, repetition_penalty,
            presence_penalty, frequency_penalty, seed, stop, chat, logprobs,
        )  # fmt: skip
        question = Question(prompt, options)
        envelope = Envelope(request_id, priority)
        return run(
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
    ) -> TextStream:
        """The pieces of what ``generate`` would answer, as they come. The request is sent when the first is asked for.

        ``timeout_s`` covers the answer to its last piece. Leaving a ``with`` block, ``close`` or dropping the stream
        ends the request on the server. A model that is not decoupled answers in one piece.
        """
        options = Options(
            max_tokens, min_tokens, temperature, top_k, top_p, repetition_penalty,
            presence_penalty, frequency_penalty, seed, stop, chat, logprobs,
        )  # fmt: skip
        question = Question(prompt, options)
        envelope = Envelope(request_id, priority)
        return TextStream(
            self._calls.stream(model, question, envelope=envelope, version=version, timeout_s=timeout_s)
        )

    def chat(
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
        """The assistant's next message in a conversation of ``{"role": ..., "content": ...}``.

        A model with the input ``messages`` renders them with its own chat template. For others give ``template``,
        which is rendered here; without either, raises ``InvalidInput``.
        """
        options = Options(
            max_tokens, min_tokens, temperature, top_k, top_p, repetition_penalty,
            presence_penalty, frequency_penalty, seed, stop, False, logprobs,
        )  # fmt: skip
        question = Question(messages, options, is_conversation=True, template=template)
        envelope = Envelope(request_id, priority)
        return run(
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
    ) -> TextStream:
        """``chat`` in pieces, as ``stream`` gives them."""
        options = Options(
            max_tokens, min_tokens, temperature, top_k, top_p, repetition_penalty,
            presence_penalty, frequency_penalty, seed, stop, False, logprobs,
        )  # fmt: skip
        question = Question(messages, options, is_conversation=True, template=template)
        envelope = Envelope(request_id, priority)
        return TextStream(
            self._calls.stream(model, question, envelope=envelope, version=version, timeout_s=timeout_s)
        )

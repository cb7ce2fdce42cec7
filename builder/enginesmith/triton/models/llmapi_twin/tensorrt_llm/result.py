"""``RequestOutput`` and ``CompletionOutput``: an answer that grows, can be awaited, iterated and aborted."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

FinishReason = Literal["stop", "length", "timeout", "cancelled"]


class RequestError(RuntimeError):
    """A generation failed; the others go on. The original lives in ``tensorrt_llm.executor.utils``."""


@dataclass(slots=True)
class CompletionOutput:
    """The output of one sequence. ``text`` and ``token_ids`` hold everything so far, not the new part."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    cumulative_logprob: float | None = None
    logprobs: list[Any] = field(default_factory=list)
    prompt_logprobs: list[Any] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    generation_logits: Any = None
    disaggregated_params: Any = None
    request_perf_metrics: Any = None


@dataclass(frozen=True)
class Step:
    """What the worker reports: the tokens so far, and at the end how and why it ended."""

    tokens: tuple[int, ...]
    finish_reason: FinishReason | None = None
    stop_reason: str | None = None
    stop_length: int = 0
    """Tokens at the end that belong to the stop string."""
    perf_metrics: Any = None
    error: str | None = None


class RequestOutput:
    """One request. As in TensorRT-LLM it is its own iterator, and yields itself, changed."""

    def __init__(
        self, request_id: int, prompt_token_ids: Sequence[int], tokenizer: Any, *, streaming: bool
    ) -> None:
        self.request_id = request_id
        self.prompt: str | None = None
        self.prompt_token_ids = list(prompt_token_ids)
        self.outputs = [CompletionOutput(0)]
        self.context_logits = None
        self.finished = False
        self.aborted = threading.Event()
        self.streaming = streaming
        self._tokenizer = tokenizer
        self._steps: asyncio.Queue[Step] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()

    def abort(self) -> None:
        """End the generation soon; the request then finishes as ``cancelled``."""
        self.aborted.set()

    def report(self, step: Step) -> None:
        """Called by the worker, from its own thread."""
        self._loop.call_soon_threadsafe(self._steps.put_nowait, step)

    def __aiter__(self) -> RequestOutput:
        return self

    async def __anext__(self) -> RequestOutput:
        if self.finished:
            raise StopAsyncIteration
        await self._take()
        return self

    def __await__(self) -> Generator[Any, None, RequestOutput]:
        return self.aresult().__await__()

    async def aresult(self) -> RequestOutput:
        """The request when it is finished."""
        while not self.finished:
            await self._take()
        return self

    async def _take(self) -> None:
        step = await self._steps.get()
        if step.error is not None:
            self.finished = True
            raise RequestError(step.error)
        output = self.outputs[0]
        kept = step.tokens[: len(step.tokens) - step.stop_length]
        text = self._tokenizer.decode(kept, skip_special_tokens=True)
        ended = step.finish_reason is not None
        readable = not step.stop_length if ended else not text.endswith("\ufffd")
        if readable or not self.streaming:
            output.text = text
        # What was streamed of a stop string stays in the text, as in TensorRT-LLM; only the tokens are cleaned.
        output.token_ids = list(kept)
        output.finish_reason = step.finish_reason
        output.stop_reason = step.stop_reason
        output.request_perf_metrics = step.perf_metrics
        self.finished = ended

"""Triton's entry point: text requests through TensorRT-LLM's LLM API.

Each request is a task in the engine's loop; TensorRT-LLM batches what runs at the same time. A thread of its own talks
to Triton, because that waits for the server: it sends answers, and looks for requests whose client has gone, to abort
them. A request that cannot run is answered with its own error and does not touch the others.
"""

from __future__ import annotations

import json
import queue
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton_python_backend_utils as pb_utils
from llm_engine import Engine
from llm_requests import (
    Answered,
    Asked,
    error_response,
    final_response,
    read_request,
    text_response,
    wants_stop,
)
from llm_settings import choose_gpus, leave_mpi_job, read_settings
from llm_stream import TextStream

_FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL
_CANCELLED = "the request was cancelled"


class RefusedError(Exception):
    """A request that is not run; ``code`` is one of ``pb_utils.TritonError``."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


@dataclass(eq=False)
class Running:
    """A request under way. Changed in the engine's loop only, but for ``closed``."""

    sender: Any
    request_id: str
    result: Any = None
    """The RequestOutput, once it was started."""
    answered: bool = False
    """The final response is on its way; nothing more may be sent."""
    closed: bool = False
    """The final response was sent. Set by the thread that talks to Triton."""


class TritonPythonModel:
    """One instance of the served model."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the engine; an exception here becomes the reason that Triton gives for a failed load."""
        config = json.loads(args["model_config"])
        version = Path(args["model_repository"]) / args["model_version"]
        self._settings = read_settings(version)
        self._decoupled = pb_utils.using_decoupled_model_transaction_policy(config)
        choose_gpus(config, args["model_instance_name"])
        leave_mpi_job()
        self._engine = Engine(self._settings.llm_arguments)
        self._running: set[Running] = set()
        self._outbox: queue.SimpleQueue[tuple[Running, Any, int] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._talk_to_triton, name="responses", daemon=True)
        self._thread.start()

    def execute(self, requests: list[Any]) -> None:
        """Start ``requests`` and return at once; each is answered through its own sender."""
        for request in requests:
            self._engine.submit(self._serve(request))

    def finalize(self) -> None:
        """End what is running, then the engine."""
        self._engine.close()
        self._outbox.put(None)
        self._thread.join()

    async def _serve(self, request: Any) -> None:
        """Answer one request. Whatever goes wrong, it gets exactly one final response."""
        running = Running(request.get_response_sender(), request.request_id())
        self._running.add(running)
        try:
            if wants_stop(request):
                self._stop(running)
            else:
                await self._answer(running, read_request(request))
        except RefusedError as error:
            self._end(running, error_response(str(error), error.code))
        except ValueError as error:
            self._end(running, error_response(str(error), pb_utils.TritonError.INVALID_ARG))
        except Exception as error:  # noqa: BLE001 - the boundary of a request: no other may be hurt.
            pb_utils.Logger.log_error(f"request {running.request_id!r}: {type(error).__name__}: {error}")
            message = f"TensorRT-LLM failed: {type(error).__name__}: {error}"
            self._end(running, error_response(message, pb_utils.TritonError.INTERNAL))
        finally:
            self._running.discard(running)

    async def _answer(self, running: Running, asked: Asked) -> None:
        if asked.streaming and not self._decoupled:
            raise ValueError("this model does not stream; build it with streaming: true in the target")
        self._require_room()
        prompt = self._engine.encode(asked.text)
        sampling = asked.sampling(self._answer_length(len(prompt), asked))
        running.result = self._engine.generate(prompt, sampling, streaming=asked.streaming)
        stream = TextStream(asked.stops)
        async for output in running.result:
            completion = output.outputs[0]
            if running.answered or completion.finish_reason == "cancelled":
                break
            text, found = stream.cut(completion.text)
            if found is not None and not output.finished:
                # Its text holds a stop string that its tokens do not: TensorRT-LLM would go on.
                running.result.abort()
                self._finish(running, asked, stream.last_piece(text), completion, found)
                return
            if output.finished:
                break
            if asked.streaming and (piece := stream.piece(text)):
                self._outbox.put((running, text_response(piece), 0))
        if not running.answered:
            self._complete(running, asked, stream)

    def _complete(self, running: Running, asked: Asked, stream: TextStream) -> None:
        """Send the last response of a generation that has ended."""
        completion = running.result.outputs[0]
        if completion.finish_reason == "cancelled":
            raise RefusedError(_CANCELLED, pb_utils.TritonError.CANCELLED)
        text = completion.text
        if isinstance(completion.stop_reason, str) and asked.streaming:
            # A streamed text still has the first tokens of the stop string; the tokens have been cleaned of it.
            text = self._engine.decode(completion.token_ids)
        text, found = stream.cut(text)
        piece = stream.last_piece(text)
        if not asked.streaming and not asked.exclude_input:
            piece = asked.text + piece
        self._finish(running, asked, piece, completion, found)

    def _finish(
        self, running: Running, asked: Asked, piece: str, completion: Any, stopped_by: str | None
    ) -> None:
        reason = stopped_by if stopped_by is not None else completion.stop_reason
        answered = Answered(
            finish_reason="stop" if stopped_by is not None else str(completion.finish_reason),
            stop_reason="" if reason is None else str(reason),
            cumulative_logprob=_cumulative_logprob(completion) if asked.return_cumulative_logprob else None,
            perf_metrics=getattr(completion, "request_perf_metrics", None),
        )
        self._end(running, final_response(piece, asked, answered))

    def _require_room(self) -> None:
        limit = self._settings.max_requests
        if limit is not None and len(self._running) > limit:
            raise RefusedError(
                f"the model is busy with {limit} requests, as many as it may hold; try again later",
                pb_utils.TritonError.UNAVAILABLE,
            )

    def _answer_length(self, prompt_tokens: int, asked: Asked) -> int:
        """How many tokens the answer may have.

        Raises:
            ValueError: the prompt has no tokens, or too many.
        """
        if not prompt_tokens:
            raise ValueError("text_input is empty: the prompt has no tokens")
        limit = self._settings.max_prompt_length
        if limit is not None and prompt_tokens > limit:
            raise ValueError(f"the prompt has {prompt_tokens} tokens; this model accepts at most {limit}")
        wanted = asked.max_tokens or self._settings.default_max_tokens
        longest = self._settings.max_sequence_length
        return int(wanted if longest is None else min(wanted, longest - prompt_tokens))

    def _stop(self, stopper: Running) -> None:
        """End the running requests that have the id of ``stopper``, which itself gets an empty answer."""
        if not stopper.request_id:
            raise ValueError("a request with stop must have the id of the request to stop")
        for running in [one for one in self._running if one.request_id == stopper.request_id]:
            if running is not stopper:
                self._cancel(running)
        self._end(stopper, text_response(""))

    def _cancel(self, running: Running) -> None:
        """Abort a request and tell its client at once."""
        if running.result is not None:
            running.result.abort()
        self._end(running, error_response(_CANCELLED, pb_utils.TritonError.CANCELLED))

    def _end(self, running: Running, response: Any) -> None:
        if not running.answered:
            running.answered = True
            self._outbox.put((running, response, _FINAL))

    def _talk_to_triton(self) -> None:
        """Send what is in the outbox, and every so often look for clients that have gone.

        One thread does both, because a sender must not be asked whether it is cancelled once its final response is
        sent, nor while it is: tritonserver ends with a segmentation fault.
        """
        period_s = self._settings.cancellation_check_period_s
        due = time.monotonic() + period_s
        while True:
            try:
                item = self._outbox.get(timeout=max(0.0, due - time.monotonic()))
            except queue.Empty:
                self._look_for_cancelled()
                due = time.monotonic() + period_s
                continue
            if item is None:
                return
            self._send(*item)
            if time.monotonic() >= due:
                self._look_for_cancelled()
                due = time.monotonic() + period_s

    def _send(self, running: Running, response: Any, flags: int) -> None:
        running.closed = bool(flags & _FINAL)
        try:
            running.sender.send(response, flags=flags)
        except pb_utils.TritonModelException as error:
            pb_utils.Logger.log_error(f"a response could not be sent: {error}")

    def _look_for_cancelled(self) -> None:
        for running in tuple(self._running):
            if not (running.answered or running.closed) and running.sender.is_cancelled():
                self._engine.call(self._cancel, running)


def _cumulative_logprob(completion: Any) -> float:
    """The log-probability of the answer.

    TensorRT-LLM's PyTorch backend leaves the sum to its callers: it gives each token's, the chosen one's among them.
    """
    if completion.cumulative_logprob is not None:
        return float(completion.cumulative_logprob)
    if not completion.logprobs:
        raise RuntimeError("TensorRT-LLM returned no log-probabilities")
    pairs = zip(completion.token_ids, completion.logprobs, strict=False)
    return sum(float(entry[token].logprob if isinstance(entry, dict) else entry) for token, entry in pairs)

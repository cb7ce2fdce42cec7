"""Triton's entry point of the stand-in for ``tensorrt_llm`` in rehearsals.

It has the very inputs and outputs of NVIDIA's backend and answers as that does: what a response holds, which is the
last, what is refused. One request is generated at a time, in a thread, so that new requests and cancellations are seen
while it runs. Beside it are ``limits.json`` of the repository, ``twin.json`` and, where there is one, the engine.

A request whose id begins with ``rehearse:`` steers it: ``echo`` answers with the prompt's tokens, ``hold`` stops after
three tokens until the request is cancelled.
"""

from __future__ import annotations

import json
import queue
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from enginesmith.triton.models.trtllm_text.text_pieces import read_parameters
from enginesmith.triton.models.trtllm_twin.play import Echo, Player, Step, Task, Twin
from enginesmith.triton.models.trtllm_twin.request import Limits, NotServedError, read_flag, read_tasks

_FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL
_HOLD_AFTER_TOKENS = 3
_HOLD_TIMEOUT_S = 5.0
"""Beyond the time in which a cancellation must be seen."""
_HOLD_POLL_S = 0.01


class TritonPythonModel:
    """The one instance."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the engine, if there is one."""
        version = Path(args["model_repository"]) / args["model_version"]
        settings = json.loads((version / "twin.json").read_text(encoding="utf-8"))
        limits = json.loads((version / "limits.json").read_text(encoding="utf-8"))
        self._limits = Limits(limits["max_input_len"], limits["max_seq_len"], limits["vocab_size"])
        config = json.loads(args["model_config"])
        self._decoupled = pb_utils.using_decoupled_model_transaction_policy(config)
        parameters = read_parameters(args["model_config"])
        self._exclude_input = parameters["exclude_input_in_output"] == "true"
        period_s = int(parameters["cancellation_check_period_ms"]) / 1000
        self._hold_timeout_s = _HOLD_TIMEOUT_S + 2 * period_s
        self._player: Player = Echo()
        if settings["played_by"] != "echo":
            self._player = Twin(version, capacity=self._limits.max_seq_len, threads=settings["threads"])
        self._log = Path(settings["log"])
        self._jobs: queue.Queue[_Job | None] = queue.Queue()
        self._stops: dict[str, threading.Event] = {}
        self._worker = threading.Thread(target=self._work)
        self._worker.start()

    def execute(self, requests: list[Any]) -> list[None] | None:
        """Queue each request, or cancel the one that it names."""
        for request in requests:
            sender = request.get_response_sender()
            inputs = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
            try:
                if read_flag(inputs, "stop", 0):
                    self._cancel(request.request_id(), sender)
                    continue
                tasks = read_tasks(inputs, self._limits, decoupled=self._decoupled)
            except NotServedError as error:
                refusal = pb_utils.TritonError(str(error), pb_utils.TritonError.INTERNAL)
                sender.send(pb_utils.InferenceResponse(error=refusal), flags=_FINAL)
                continue
            job = _Job(request.request_id(), sender, inputs, tasks)
            self._stops[job.id] = job.stop
            self._jobs.put(job)
        return None if self._decoupled else [None for _ in requests]

    def finalize(self) -> None:
        """End what runs."""
        for stop in list(self._stops.values()):
            stop.set()
        self._jobs.put(None)
        self._worker.join()

    def _cancel(self, request_id: str, sender: Any) -> None:
        if not request_id:
            raise NotServedError("stop needs the id of the request that it ends")
        if request_id in self._stops:
            self._stops[request_id].set()
        sender.send(pb_utils.InferenceResponse([]), flags=_FINAL)

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                for row, task in enumerate(job.tasks):
                    self._generate(job, row, task)
            except Exception as error:  # noqa: BLE001 - a boundary: the thread must live for the next request
                pb_utils.Logger.log_error(f"request {job.id}: {error!r}")
                failure = pb_utils.TritonError(f"the stand-in for the engine failed: {error!r}")
                job.sender.send(pb_utils.InferenceResponse(error=failure), flags=_FINAL)
            finally:
                self._stops.pop(job.id, None)

    def _generate(self, job: _Job, row: int, task: Task) -> None:
        streaming = read_flag(job.inputs, "streaming", 0)
        excluded = read_flag(job.inputs, "exclude_input_in_output", row, default=self._exclude_input)
        last_row = row + 1 == len(job.tasks)
        done: list[Step] = []
        player = Echo() if job.told("echo") else self._player
        ended = "cancelled"
        steps = player.steps(task)
        for step in () if job.cancelled() else steps:
            done.append(step)
            if streaming:
                flags = _FINAL if step.ended and last_row else 0
                job.sender.send(self._response(job, row, [], [step]), flags=flags)
            if step.ended:
                ended = "complete"
                break
            if job.told("hold") and len(done) == _HOLD_AFTER_TOKENS:
                job.wait_cancelled(self._hold_timeout_s)
            if job.cancelled():
                break
        steps.close()  # type: ignore[attr-defined]
        if not streaming or ended == "cancelled":
            prompt = [] if excluded or streaming else list(task.prompt)
            response = self._response(job, row, prompt, [] if streaming else done)
            job.sender.send(response, flags=_FINAL if last_row else 0)
        with self._log.open("a", encoding="utf-8") as log:
            log.write(json.dumps({"id": job.id, "tokens": len(done), "ended": ended}) + "\n")

    def _response(self, job: _Job, row: int, prompt: list[int], steps: list[Step]) -> Any:
        answer = [step.token for step in steps if step.token is not None]
        tokens = [*prompt, *answer]
        tensors: dict[str, Any] = {
            "output_ids": np.array([[tokens]], np.int32).reshape(1, 1, len(tokens)),
            "sequence_length": np.array([[len(tokens)]], np.int32),
        }
        if len(job.tasks) > 1:
            tensors["batch_index"] = np.array([[row]], np.int32)
        counts = {
            "return_num_input_tokens": ("num_input_tokens", len(job.tasks[row].prompt)),
            "return_num_output_tokens": ("num_output_tokens", len(tokens)),
        }
        for flag, (name, count) in counts.items():
            if read_flag(job.inputs, flag, row):
                tensors[name] = np.array([[count]], np.int32)
        if read_flag(job.inputs, "return_log_probs", row):
            probs = np.array([step.log_prob for step in steps if step.token is not None], np.float32)
            tensors["output_log_probs"] = probs.reshape(1, 1, -1)
            tensors["cum_log_probs"] = np.array([[probs.sum()]], np.float32)
        if read_flag(job.inputs, "return_perf_metrics", row):
            tensors |= self._metrics(job)
        return pb_utils.InferenceResponse([pb_utils.Tensor(name, array) for name, array in tensors.items()])

    def _metrics(self, job: _Job) -> dict[str, Any]:
        """Times of this stand-in, and zeros for the cache that it does not have."""
        now_ns = time.monotonic_ns()
        times = ("first_scheduled_time_ns", "first_token_time_ns", "last_token_time_ns")
        zeros = (
            "kv_cache_alloc_new_blocks",
            "kv_cache_reused_blocks",
            "kv_cache_alloc_total_blocks",
            "total_accepted_draft_tokens",
            "total_draft_tokens",
        )
        return {
            "arrival_time_ns": np.array([[job.arrived_ns]], np.int64),
            **{name: np.array([[now_ns]], np.int64) for name in times},
            **{name: np.zeros((1, 1), np.int32) for name in zeros},
            "acceptance_rate": np.zeros((1, 1), np.float32),
        }


class _Job:
    """A request that waits or runs."""

    def __init__(self, request_id: str, sender: Any, inputs: dict[str, Any], tasks: list[Task]) -> None:
        self.id = request_id
        self.sender = sender
        self.inputs = inputs
        self.tasks = tasks
        self.stop = threading.Event()
        self.arrived_ns = time.monotonic_ns()

    def told(self, word: str) -> bool:
        """Whether the request's id asks for this behaviour."""
        first, *words = self.id.split("~")[0].split(":")
        return first == "rehearse" and word in words

    def cancelled(self) -> bool:
        """Whether its client went away, or a request with ``stop`` named it."""
        return self.stop.is_set() or bool(self.sender.is_cancelled())

    def wait_cancelled(self, timeout_s: float) -> None:
        """Return when it was cancelled, or after a while."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline and not self.sender.is_cancelled():
            if self.stop.wait(_HOLD_POLL_S):
                return

"""A text model of which every token takes 2 ms: words as tokens, and an answer of as many as max_tokens says.

With stream, every token is a response; without, the answer is one. The prompt "fail" is refused after its first token.
One thread answers all requests: tritonserver 2.51 crashes when a sender is asked whether it is cancelled while another
thread sends.
"""

import heapq
import queue
import threading
import time

import numpy as np
import triton_python_backend_utils as pb_utils

TOKEN_S = 0.002
_FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL


class TritonPythonModel:
    def initialize(self, arguments):
        self._arrived = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._answer_all)
        self._thread.start()

    def execute(self, requests):
        for request in requests:
            self._arrived.put(_Answering(request))

    def finalize(self):
        self._arrived.put(None)
        self._thread.join()

    def _answer_all(self):
        running = []
        while True:
            wait_s = running[0].due_s - time.monotonic() if running else None
            try:
                if wait_s is not None and wait_s <= 0:
                    raise queue.Empty
                arrived = self._arrived.get(timeout=wait_s)
            except queue.Empty:
                answering = heapq.heappop(running)
                if answering.step():
                    heapq.heappush(running, answering)
                continue
            if arrived is None:
                return
            heapq.heappush(running, arrived)


class _Answering:
    """One request on its way."""

    def __init__(self, request):
        arrived = {tensor.name(): tensor.as_numpy().flat[0] for tensor in request.inputs()}
        self._sender = request.get_response_sender()
        self._prompt = arrived["text_input"].decode()
        self._wanted, self._pieces = int(arrived["max_tokens"]), bool(arrived.get("stream", False))
        self._tokens = 0
        self.due_s = time.monotonic() + TOKEN_S

    def __lt__(self, other):
        return self.due_s < other.due_s

    def step(self):
        """Make one token; returns whether there is more to do."""
        self._tokens += 1
        self.due_s += TOKEN_S
        if self._sender.is_cancelled():
            return self._fail("CANCELLED", "the caller left")
        if self._prompt == "fail" and self._tokens == 2:
            return self._fail("INVALID_ARG", "asked to fail")
        last = self._tokens == self._wanted
        if self._pieces or last:
            self._sender.send(self._response(last), flags=_FINAL if last else 0)
        return not last

    def _fail(self, status, words):
        error = pb_utils.TritonError(f"[{status}] {words}", getattr(pb_utils.TritonError, status))
        self._sender.send(pb_utils.InferenceResponse([], error=error), flags=_FINAL)
        return False

    def _response(self, last):
        text = " word" if self._pieces else " word" * self._tokens
        values = (
            ("text_output", text, np.object_),
            ("num_input_tokens", len(self._prompt.split()), np.int32),
            ("num_output_tokens", self._tokens, np.int32),
            ("finish_reason", "length" if last else "", np.object_),
        )
        return pb_utils.InferenceResponse(
            [pb_utils.Tensor(name, np.array([[value]], dtype=kind)) for name, value, kind in values]
        )

"""A text model of which every token takes 2 ms: words as tokens, and an answer of as many as max_tokens says.

With stream, every token is a response; without, the answer is one. The prompt "fail" is refused after its first token.
"""

import threading
import time

import numpy as np
import triton_python_backend_utils as pb_utils

TOKEN_S = 0.002
_FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL


class TritonPythonModel:
    def execute(self, requests):
        for request in requests:
            threading.Thread(target=_answer, args=(request, request.get_response_sender())).start()


def _answer(request, sender):
    arrived = {tensor.name(): tensor.as_numpy().flat[0] for tensor in request.inputs()}
    prompt = arrived["text_input"].decode()
    count, pieces = int(arrived["max_tokens"]), bool(arrived.get("stream", False))
    started_s = time.monotonic()
    for number in range(1, count + 1):
        time.sleep(max(0.0, started_s + number * TOKEN_S - time.monotonic()))
        if request.is_cancelled():
            error = pb_utils.TritonError("[CANCELLED] the caller left", pb_utils.TritonError.CANCELLED)
            sender.send(pb_utils.InferenceResponse([], error=error), flags=_FINAL)
            return
        if prompt == "fail" and number == 2:
            error = pb_utils.TritonError("[INVALID_ARG] asked to fail", pb_utils.TritonError.INVALID_ARG)
            sender.send(pb_utils.InferenceResponse([], error=error), flags=_FINAL)
            return
        last = number == count
        if pieces or last:
            text = " word" if pieces else " word" * count
            response = _response(text, prompt_tokens=len(prompt.split()), tokens=number, last=last)
            sender.send(response, flags=_FINAL if last else 0)


def _response(text, *, prompt_tokens, tokens, last):
    return pb_utils.InferenceResponse(
        [
            pb_utils.Tensor("text_output", np.array([[text]], dtype=np.object_)),
            pb_utils.Tensor("num_input_tokens", np.array([[prompt_tokens]], dtype=np.int32)),
            pb_utils.Tensor("num_output_tokens", np.array([[tokens]], dtype=np.int32)),
            pb_utils.Tensor("finish_reason", np.array([["length" if last else ""]], dtype=np.object_)),
        ]
    )

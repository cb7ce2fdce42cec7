"""A decoupled model that answers ``count`` times with its text, and then does what ``then`` says.

``then`` is ``end`` (the default), ``final`` (the last answer carries the final flag), the name of a Triton error code
(fails with it and names it at the
beginning of its message, as models of enginesmith do), or ``wait`` (until the request is cancelled). What became of a request that waits is written to the
file ``mark``: ``waiting`` when it begins to and ``cancelled`` in the end.
"""

import threading
import time
from pathlib import Path

import numpy as np
import triton_python_backend_utils as pb_utils

_FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL


class TritonPythonModel:
    def execute(self, requests):
        for request in requests:
            threading.Thread(target=_answer, args=(request, request.get_response_sender())).start()


def _answer(request, sender):
    arrived = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
    text = arrived["text_input"].reshape(-1)[0]
    count = int(arrived["count"].reshape(-1)[0]) if "count" in arrived else 1
    then = arrived["then"].reshape(-1)[0].decode() if "then" in arrived else "end"
    for number in range(count):
        last = number == count - 1 and then == "final"
        sender.send(_piece(text, number, arrived), flags=_FINAL if last else 0)
    if then == "wait":
        _wait(request, Path(arrived["mark"].reshape(-1)[0].decode()))
        error = pb_utils.TritonError("the request was cancelled", pb_utils.TritonError.CANCELLED)
        sender.send(pb_utils.InferenceResponse([], error=error), flags=_FINAL)
    elif then == "end":
        sender.send(flags=_FINAL)
    elif then != "final":
        error = pb_utils.TritonError(f"[{then}] asked to fail", getattr(pb_utils.TritonError, then))
        sender.send(pb_utils.InferenceResponse([], error=error), flags=_FINAL)


def _wait(request, mark):
    mark.write_text("waiting")
    while not request.is_cancelled():
        time.sleep(0.001)
    done = mark.with_suffix(".part")
    done.write_text("cancelled")
    done.rename(mark)


def _piece(text, number, arrived):
    words = [text, *arrived["stop_words"].reshape(-1)] if "stop_words" in arrived else [text]
    scores = [np.nan, np.inf, 0.1] if text == b"strange" else [0.1]
    return pb_utils.InferenceResponse(
        [
            pb_utils.Tensor("text_output", np.array([words], dtype=np.object_)),
            pb_utils.Tensor("number", np.array([[number]], dtype=np.int32)),
            pb_utils.Tensor("large", np.array([[2**64 - 1]], dtype=np.uint64)),
            pb_utils.Tensor("done", np.array([[number % 2 == 0]])),
            pb_utils.Tensor("scores", np.array([scores], dtype=np.float32)),
        ]
    )

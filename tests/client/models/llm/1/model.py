"""Speaks like the language models that enginesmith serves: its answer is the JSON of the inputs that arrived.

A token is one character. Prompts that begin with a word and a colon ask for something else: see ``_ACTS``.
"""

import json
import threading
import time
from pathlib import Path

import numpy as np
import triton_python_backend_utils as pb_utils

_FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL
_PIECE_CHARACTERS = 16


class TritonPythonModel:
    def execute(self, requests):
        for request in requests:
            threading.Thread(target=_answer, args=(request, request.get_response_sender())).start()


def _answer(request, sender):
    arrived = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
    prompt = arrived["text_input"][0, 0].decode() if "text_input" in arrived else ""
    word, _, argument = prompt.partition(":")
    if word in _ACTS:
        _ACTS[word](request, sender, argument)
        return
    text = json.dumps(
        {
            name: [_plain(value) for value in array[0]]
            for name, array in arrived.items()
            if name not in ("stream", "exclude_input_in_output")
        },
        ensure_ascii=False,
    )
    # As at NVIDIA: the prompt comes first unless the request says otherwise.
    if "messages" not in arrived and not arrived.get("exclude_input_in_output", np.array([False])).any():
        text = prompt + text
    reason = "length" if "max_tokens" in arrived else "stop"
    _send(sender, text, reason, arrived, pieces=bool(arrived.get("stream", np.array([False])).any()))


def _send(sender, text, reason, arrived, *, pieces):
    size = _PIECE_CHARACTERS if pieces else max(1, len(text))
    for start in range(0, len(text), size):
        end = min(start + size, len(text))
        last = end == len(text)
        response = _response(text[start:end], reason if last else "", end, "return_log_probs" in arrived)
        sender.send(response, flags=_FINAL if last else 0)


def _response(text, reason, count, logprobs=False):
    tensors = [
        pb_utils.Tensor("text_output", np.array([[text]], dtype=np.object_)),
        pb_utils.Tensor("finish_reason", np.array([[reason]], dtype=np.object_)),
        pb_utils.Tensor("num_input_tokens", np.array([[7]], dtype=np.int32)),
        pb_utils.Tensor("num_output_tokens", np.array([[count]], dtype=np.int32)),
    ]
    if logprobs:
        scores = -np.arange(1, len(text) + 1, dtype=np.float32)
        tokens = np.array([[character.encode() for character in text]], dtype=np.object_)
        tensors += [
            pb_utils.Tensor("output_log_probs", scores.reshape(1, 1, -1)),
            pb_utils.Tensor("output_tokens", tokens),
        ]
    return pb_utils.InferenceResponse(tensors)


def _plain(value):
    return value.decode() if isinstance(value, bytes) else value.item()


def _bytes(request, sender, argument):
    sender.send(_response(b"\xff\xfe", "stop", 2), flags=_FINAL)


def _raise(request, sender, code):
    # The name of the status is in the text, as in the models that enginesmith builds: a stream carries no other.
    error = pb_utils.TritonError(f"[{code}] asked to fail", getattr(pb_utils.TritonError, code))
    sender.send(pb_utils.InferenceResponse([], error=error), flags=_FINAL)


def _raise_late(request, sender, code):
    sender.send(_response("one ", "", 1))
    _raise(request, sender, code)


def _timeout(request, sender, argument):
    sender.send(_response(str(request.timeout()), "stop", 1), flags=_FINAL)


def _nothing(request, sender, argument):
    sender.send(flags=_FINAL)


def _without_text(request, sender, argument):
    tensor = pb_utils.Tensor("num_output_tokens", np.array([[1]], dtype=np.int32))
    sender.send(pb_utils.InferenceResponse([tensor]), flags=_FINAL)


def _wait(request, sender, mark):
    """One piece, and then nothing until the request is cancelled; the file says how far it is."""
    sender.send(_response("one ", "", 1))
    _silent(request, sender, mark)


def _silent(request, sender, mark):
    _write(mark, "waiting")
    while not request.is_cancelled():
        time.sleep(0.001)
    _write(mark, "cancelled")
    error = pb_utils.TritonError("the request was cancelled", pb_utils.TritonError.CANCELLED)
    sender.send(pb_utils.InferenceResponse([], error=error), flags=_FINAL)


def _write(mark, state):
    part = Path(mark).with_suffix(f".{state}")
    part.write_text(state)
    part.rename(mark)


_ACTS = {
    "bytes": _bytes,
    "raise": _raise,
    "raise late": _raise_late,
    "timeout": _timeout,
    "nothing": _nothing,
    "without text": _without_text,
    "wait": _wait,
    "silent": _silent,
}

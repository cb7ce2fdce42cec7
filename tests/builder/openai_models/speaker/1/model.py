"""Has the tensors of a served LLM. Its tokens are words, and what it says depends on the first word of the prompt.

``say A B C``: A B C, at most ``max_tokens`` of them. ``inputs``: the JSON of what arrived. ``refuse``, ``full``, ``crash``:
fails as INVALID_ARG, UNAVAILABLE, INTERNAL; ``break``: fails after a word. ``wait FILE``: says a word and waits until the
request is cancelled; ``think FILE``: the same without the word. FILE says what became of it: waiting, cancelled.
``hold FILE``: says a word, and another one when FILE is there.
"""

import json
import threading
import time
from pathlib import Path

import numpy as np
import triton_python_backend_utils as pb_utils

_FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL
_FAILURES = {"refuse": "INVALID_ARG", "full": "UNAVAILABLE", "crash": "INTERNAL", "break": "INTERNAL"}


class TritonPythonModel:
    def execute(self, requests):
        for request in requests:
            threading.Thread(target=_answer, args=(request, request.get_response_sender())).start()


def _answer(request, sender):
    inputs = {
        tensor.name(): [value.decode() if isinstance(value, bytes) else value.item() for value in tensor.as_numpy().reshape(-1)]
        for tensor in request.inputs()
    }  # fmt: skip
    prompt = (
        inputs["text_input"][0]
        if "text_input" in inputs
        else json.loads(inputs["messages"][0])[-1]["content"]
    )
    command, *words = prompt.split(" ")
    streams = inputs.get("stream", [False])[0]
    logprobs = inputs.get("return_log_probs", [False])[0]
    if command in ("wait", "break", "hold") and streams:
        sender.send(_response(["word"], "", said=1, asked=len(words) + 1, logprobs=logprobs))
    if command in ("wait", "think"):
        _wait(request, Path(words[0]))
        _fail(sender, "CANCELLED")
    elif command == "hold":
        while not Path(words[0]).exists():
            time.sleep(0.001)
        sender.send(_response([" end"], "stop", said=2, asked=2, logprobs=logprobs), flags=_FINAL)
    elif command in _FAILURES:
        _fail(sender, _FAILURES[command])
    else:
        said = [json.dumps(inputs)] if command == "inputs" else words
        tokens = [word if place == 0 else f" {word}" for place, word in enumerate(said)]
        limit = inputs.get("max_tokens", [64])[0]
        reason = "length" if len(tokens) > limit else "stop"
        steps = [[token] for token in tokens[:limit]] if streams else [tokens[:limit]]
        for number, step in enumerate(steps, start=1):
            last = number == len(steps)
            said_now = number if streams else len(step)
            sender.send(
                _response(
                    step, reason if last else "", said=said_now, asked=len(words) + 1, logprobs=logprobs
                ),
                flags=_FINAL if last else 0,
            )


def _fail(sender, status):
    # tritonserver sends no status with an error in a stream, so the models that enginesmith serves begin with its name.
    error = pb_utils.TritonError(f"[{status}] asked to fail", getattr(pb_utils.TritonError, status))
    sender.send(pb_utils.InferenceResponse([], error=error), flags=_FINAL)


def _wait(request, mark):
    mark.write_text("waiting")
    while not request.is_cancelled():
        time.sleep(0.001)
    done = mark.with_suffix(f".{threading.get_ident()}")
    done.write_text("cancelled")
    done.rename(mark)


def _response(tokens, reason, *, said, asked, logprobs):
    outputs = [
        pb_utils.Tensor("text_output", np.array([["".join(tokens)]], dtype=np.object_)),
        pb_utils.Tensor("finish_reason", np.array([[reason]], dtype=np.object_)),
        pb_utils.Tensor("num_input_tokens", np.array([[asked]], dtype=np.int32)),
        pb_utils.Tensor("num_output_tokens", np.array([[said]], dtype=np.int32)),
    ]
    if logprobs:
        scores = [-0.5 if token.isascii() else -np.inf for token in tokens]
        raw = np.array([[token.encode() for token in tokens]], dtype=np.object_)
        outputs += [
            pb_utils.Tensor("output_log_probs", np.array([[scores]], dtype=np.float32)),
            pb_utils.Tensor("output_tokens", raw),
        ]
    return pb_utils.InferenceResponse(outputs)

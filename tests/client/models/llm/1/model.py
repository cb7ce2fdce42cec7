"""Speaks like a served language model: its answer is the JSON of the inputs that arrived."""

import json

import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def execute(self, requests):
        return [self._answer(request) for request in requests]

    def _answer(self, request):
        arrived = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
        if arrived["text_input"][0, 0] == b"give me bytes that are not text":
            text = b"\xff\xfe"
        else:
            text = json.dumps(
                {name: [_plain(value) for value in array[0]] for name, array in arrived.items()}
            )
        reason = "length" if "max_tokens" in arrived else "stop"
        return pb_utils.InferenceResponse(
            [
                pb_utils.Tensor("text_output", np.array([[text]], dtype=np.object_)),
                pb_utils.Tensor("finish_reason", np.array([[reason]], dtype=np.object_)),
                pb_utils.Tensor("num_input_tokens", np.array([[7]], dtype=np.int32)),
                pb_utils.Tensor("num_output_tokens", np.array([[3]], dtype=np.int32)),
            ]
        )


def _plain(value):
    return value.decode() if isinstance(value, bytes) else value.item()

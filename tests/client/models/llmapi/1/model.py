"""Speaks like the model of TensorRT-LLM's LLM API: the JSON of the inputs that arrived, in two pieces if it streams."""

import json

import numpy as np
import triton_python_backend_utils as pb_utils

_FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL


class TritonPythonModel:
    def execute(self, requests):
        for request in requests:
            self._answer(request, request.get_response_sender())

    def _answer(self, request, sender):
        arrived = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
        text = json.dumps({name: [_plain(value) for value in array] for name, array in arrived.items()})
        pieces = [text[:10], text[10:]] if "streaming" in arrived else [text]
        for number, piece in enumerate(pieces, 1):
            tensors = [pb_utils.Tensor("text_output", np.array([piece], dtype=np.object_))]
            if "return_finish_reason" in arrived and number == len(pieces):
                tensors.append(pb_utils.Tensor("finish_reason", np.array(["stop"], dtype=np.object_)))
            sender.send(pb_utils.InferenceResponse(tensors))
        sender.send(flags=_FINAL)


def _plain(value):
    return value.decode() if isinstance(value, bytes) else value.item()

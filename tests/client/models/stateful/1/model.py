"""Keeps state between the requests of a sequence: the sum of what was sent."""

import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def initialize(self, args):
        self._total = 0

    def execute(self, requests):
        return [self._answer(request) for request in requests]

    def _answer(self, request):
        started = pb_utils.get_input_tensor_by_name(request, "START").as_numpy().item()
        x = pb_utils.get_input_tensor_by_name(request, "x").as_numpy().item()
        self._total = x if started else self._total + x
        return pb_utils.InferenceResponse([pb_utils.Tensor("total", np.array([[self._total]], np.int32))])

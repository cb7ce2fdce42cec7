"""Takes tokens, not texts: what a text encoder is without its tokenization stage."""

import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def execute(self, requests):
        return [self._answer(request) for request in requests]

    def _answer(self, request):
        ids = pb_utils.get_input_tensor_by_name(request, "input_ids").as_numpy()
        rows = np.zeros((len(ids), 3), np.float32)
        return pb_utils.InferenceResponse([pb_utils.Tensor("embedding", rows)])

"""The least that a language model can have, and it needs a limit: its answer is its prompt and the limit."""

import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def execute(self, requests):
        return [self._answer(request) for request in requests]

    def _answer(self, request):
        text = pb_utils.get_input_tensor_by_name(request, "text_input").as_numpy()[0].decode()
        limit = pb_utils.get_input_tensor_by_name(request, "max_tokens").as_numpy()[0]
        answer = np.array([f"{text}|{limit}"], dtype=np.object_)
        return pb_utils.InferenceResponse([pb_utils.Tensor("text_output", answer)])

"""The least a language model can have: text in, text out, and no batch dimension."""

import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def execute(self, requests):
        return [self._answer(request) for request in requests]

    def _answer(self, request):
        text = pb_utils.get_input_tensor_by_name(request, "text_input").as_numpy()
        return pb_utils.InferenceResponse([pb_utils.Tensor("text_output", text)])

"""Cannot be loaded as long as there is no file ``weights`` beside it."""

from pathlib import Path

import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def initialize(self, args):
        if not Path(__file__).with_name("weights").exists():
            raise RuntimeError("the weights are missing")

    def execute(self, requests):
        return [self._answer(request) for request in requests]

    def _answer(self, request):
        a = pb_utils.get_input_tensor_by_name(request, "a").as_numpy()
        return pb_utils.InferenceResponse([pb_utils.Tensor("b", a)])

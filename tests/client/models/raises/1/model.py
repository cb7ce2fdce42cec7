"""Fails every request: with a Python exception, or with the Triton error code that it is asked for."""

import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def execute(self, requests):
        return [self._answer(request) for request in requests]

    def _answer(self, request):
        code = pb_utils.get_input_tensor_by_name(request, "code").as_numpy()[0].decode()
        if code == "exception":
            raise ValueError("the model's own trouble")
        error = pb_utils.TritonError("asked to fail", getattr(pb_utils.TritonError, code))
        return pb_utils.InferenceResponse([], error=error)

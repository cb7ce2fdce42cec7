"""Returns its input after 20 ms, whatever the batch: the time of a model that the load does not change."""

import time

import triton_python_backend_utils as pb_utils

EXECUTION_S = 0.020


class TritonPythonModel:
    def execute(self, requests):
        end_s = time.monotonic() + EXECUTION_S
        responses = [
            pb_utils.InferenceResponse([pb_utils.Tensor("out", request.inputs()[0].as_numpy())])
            for request in requests
        ]
        time.sleep(max(0.0, end_s - time.monotonic()))
        return responses

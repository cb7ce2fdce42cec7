"""Returns its input after 2 ms, but stands still for the last second of every ten since it was loaded."""

import time

import triton_python_backend_utils as pb_utils

EXECUTION_S = 0.002
PERIOD_S = 10.0
STALL_S = 1.0


class TritonPythonModel:
    def initialize(self, arguments):
        self._loaded_s = time.monotonic()

    def execute(self, requests):
        into_s = (time.monotonic() - self._loaded_s) % PERIOD_S
        stalled_s = PERIOD_S - into_s if into_s >= PERIOD_S - STALL_S else 0.0
        time.sleep(EXECUTION_S + stalled_s)
        return [
            pb_utils.InferenceResponse([pb_utils.Tensor("out", request.inputs()[0].as_numpy())])
            for request in requests
        ]

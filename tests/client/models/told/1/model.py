"""Answers with all that it is told about a request beside its inputs, as JSON."""

import json

import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def execute(self, requests):
        return [_answer(request) for request in requests]


def _answer(request):
    flags = request.flags()
    told = {
        "id": request.request_id(),
        "correlation_id": request.correlation_id(),
        "start": bool(flags & pb_utils.TRITONSERVER_REQUEST_FLAG_SEQUENCE_START),
        "end": bool(flags & pb_utils.TRITONSERVER_REQUEST_FLAG_SEQUENCE_END),
        "timeout_us": request.timeout(),
        "parameters": json.loads(request.parameters()),
    }
    text = np.array([json.dumps(told)], dtype=np.object_)
    return pb_utils.InferenceResponse([pb_utils.Tensor("request", text)])

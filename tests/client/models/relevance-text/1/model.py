"""The score of a document: how many words of the query it has; of one called nan, no number."""

import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def execute(self, requests):
        return [self._answer(request) for request in requests]

    def _answer(self, request):
        pairs = [
            pb_utils.get_input_tensor_by_name(request, name).as_numpy()[:, 0]
            for name in ("TEXT", "TEXT_PAIR")
        ]
        rows = [[_score(query, document)] for query, document in zip(*pairs, strict=True)]
        return pb_utils.InferenceResponse([pb_utils.Tensor("score", np.array(rows, np.float32))])


def _score(query, document):
    return np.nan if document == b"nan" else len(set(query.split()) & set(document.split()))

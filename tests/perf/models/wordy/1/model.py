"""A text model that answers once: a prompt is 3 tokens and one for every 3 characters; 300 in all are too many.

The answer is the number of tokens that it was asked for.
"""

import numpy as np
import triton_python_backend_utils as pb_utils

LIMIT = 300


class TritonPythonModel:
    def execute(self, requests):
        return [_answer({one.name(): one.as_numpy()[0] for one in request.inputs()}) for request in requests]


def _answer(arrived):
    count = 3 + len(arrived["text_input"]) // 3
    if count + arrived.get("max_tokens", 1) > LIMIT:
        words = f"the prompt has {count} tokens; with the answer this is too long"
        return pb_utils.InferenceResponse(
            [], error=pb_utils.TritonError(words, pb_utils.TritonError.INVALID_ARG)
        )
    text = f"{arrived.get('min_tokens', 0)} to {arrived.get('max_tokens', 'any')}"
    return pb_utils.InferenceResponse(
        [
            pb_utils.Tensor("text_output", np.array([text], np.object_)),
            pb_utils.Tensor("num_input_tokens", np.array([count], np.int32)),
        ]
    )

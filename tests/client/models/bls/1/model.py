"""Speaks like ``tensorrt_llm_bls`` of TensorRT-LLM: three words at most, counted for each response, and no reason."""

import numpy as np
import triton_python_backend_utils as pb_utils

_FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL
_WORDS = ("one ", "two ", "three")


class TritonPythonModel:
    def execute(self, requests):
        for request in requests:
            self._answer(request, request.get_response_sender())

    def _answer(self, request, sender):
        arrived = {tensor.name(): tensor.as_numpy().reshape(-1) for tensor in request.inputs()}
        words = _WORDS[: arrived["max_tokens"].item()]
        if "stream" in arrived:
            for word in words:
                sender.send(self._response(word, 1, arrived))
        else:
            prompt = "" if "exclude_input_in_output" in arrived else arrived["text_input"].item().decode()
            sender.send(self._response(prompt + "".join(words), len(words), arrived))
        # A response of its own for the flag, as a decoupled model may.
        sender.send(flags=_FINAL)

    def _response(self, text, count, arrived):
        tensors = [pb_utils.Tensor("text_output", np.array([[text]], dtype=np.object_))]
        if "return_num_input_tokens" in arrived:
            tensors.append(pb_utils.Tensor("num_input_tokens", np.array([[5]], dtype=np.int32)))
        if "return_num_output_tokens" in arrived:
            tensors.append(pb_utils.Tensor("num_output_tokens", np.array([[count]], dtype=np.int32)))
        return pb_utils.InferenceResponse(tensors)

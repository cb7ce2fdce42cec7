"""Tiny Triton models for tests: no engine, known answers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from enginesmith.spec_part import DynamicBatching
from enginesmith.triton.config import LLM_INPUTS, Tensor, config_text, model_config

ECHO = '''
import json
import numpy
import triton_python_backend_utils as triton


class TritonPythonModel:
    """Answers with what it was asked, and how many requests shared the batch."""

    def execute(self, requests):
        return [self.answer(request, len(requests)) for request in requests]

    def answer(self, request, batch):
        seen = {tensor.name(): tensor.as_numpy().shape for tensor in request.inputs()}
        text = triton.get_input_tensor_by_name(request, "text_input").as_numpy()[0, 0].decode()
        answer = json.dumps({"text": text, "batch": batch, "inputs": seen, "parameters": json.loads(request.parameters())})
        return triton.InferenceResponse([triton.Tensor("text_output", numpy.array([[answer.encode()]], dtype=object))])
'''
PIECES = '''
import numpy
import triton_python_backend_utils as triton


class TritonPythonModel:
    """Answers with as many pieces as max_tokens says, and refuses the text "boom"."""

    def execute(self, requests):
        for request in requests:
            sender = request.get_response_sender()
            given = {tensor.name(): tensor.as_numpy()[0, 0] for tensor in request.inputs()}
            if given["text_input"] == b"boom":
                error = triton.InferenceResponse(error=triton.TritonError("boom, as asked"))
                sender.send(error, flags=triton.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
                continue
            count = int(given["max_tokens"])
            for number in range(1, count + 1):
                piece = triton.Tensor("text_output", numpy.array([[str(number).encode()]], dtype=object))
                flags = triton.TRITONSERVER_RESPONSE_COMPLETE_FINAL if number == count else 0
                sender.send(triton.InferenceResponse([piece]), flags=flags)
'''
MISSING_IMPORT = "import a_module_that_nobody_has\n"
ENDS_THE_PROCESS = """
import os

class TritonPythonModel:
    def initialize(self, arguments):
        os.kill(os.getpid(), 9)
"""


def loads_after(path: Path) -> str:
    """Code of a model that loads once the file ``path`` exists."""
    return (
        f"import pathlib, time\nwhile not pathlib.Path({str(path)!r}).exists():\n    time.sleep(0.01)\n{ECHO}"
    )


def write_model(
    repository: Path,
    name: str,
    code: str = ECHO,
    *,
    batching: DynamicBatching | None = None,
    inputs: Sequence[Tensor] = LLM_INPUTS,
    decoupled: bool = False,
) -> Path:
    """A model directory in ``repository``; returns it."""
    version = repository / name / "1"
    version.mkdir(parents=True)
    (version / "model.py").write_text(code)
    config = model_config(
        name,
        inputs=inputs,
        outputs=(Tensor("text_output", "TYPE_STRING"),),
        max_batch_size=8,
        dynamic_batching=batching,
        decoupled=decoupled,
    )
    (version.parent / "config.pbtxt").write_text(config_text(config))
    return version.parent

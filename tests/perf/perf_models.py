"""The models that the tests of the perf harness are served, requests for them, and a handle on their server."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tritonclient.grpc import service_pb2

from enginesmith_client.perf._target import Target
from enginesmith_client.perf.load._prepared import Prepared, TokenCounts

MODELS = Path(__file__).parent / "models"
LOADED = ("tiny", "steady20", "stalling", "tokens")
TOKEN_COUNTS = TokenCounts("num_input_tokens", "num_output_tokens")


@dataclass(frozen=True)
class PerfServer:
    """The server of the session."""

    grpc_url: str
    metrics_url: str
    pid: int
    repository: Path

    def target(self, model: str) -> Target:
        """One of its models."""
        return Target(model, f"grpc://{self.grpc_url}", metrics_url=self.metrics_url, server_pid=self.pid)


def tensor_request(model: str = "tiny", *, rows: int = 1) -> Prepared:
    """For ``tiny``, ``steady20`` and ``stalling``."""
    message = service_pb2.ModelInferRequest(model_name=model)
    message.inputs.add(name="in", datatype="FP32", shape=[rows, 4])
    message.raw_input_contents.append(np.zeros((rows, 4), np.float32).tobytes())
    return Prepared(message.SerializeToString(), rows=rows)


def text_request(prompt: str, *, tokens: int, model: str = "tokens") -> Prepared:
    """A stream of ``tokens`` pieces."""
    message = service_pb2.ModelInferRequest(model_name=model)
    text = prompt.encode()
    for name, datatype, data in (
        ("text_input", "BYTES", len(text).to_bytes(4, "little") + text),
        ("max_tokens", "INT32", np.int32(tokens).tobytes()),
        ("stream", "BOOL", b"\x01"),
    ):
        message.inputs.add(name=name, datatype=datatype, shape=[1, 1])
        message.raw_input_contents.append(data)
    message.parameters["triton_enable_empty_final_response"].bool_param = True
    return Prepared(
        message.SerializeToString(),
        streaming=True,
        prompt_tokens=len(prompt.split()),
        output_tokens=tokens,
        counts=TOKEN_COUNTS,
    )

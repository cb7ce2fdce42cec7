"""A TensorRT engine ready to run: ``model.plan`` beside ``signature.json``. Not yet run on a GPU.

Self-contained: it is copied into the version directory of the served model, beside ``cuda_memory.py`` and the
``graph_runtime.py`` that checks and joins requests. Takes ``tensorrt`` and ``tensorrt_rtx``, whose Python interfaces are
the same for what is used here (TensorRT 10 and newer: named tensors, ``execute_async_v3``).
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from cuda_memory import Cuda
from graph_runtime import GraphRequests

Array = npt.NDArray[Any]
_INSTALL = {
    "tensorrt": "run inside nvcr.io/nvidia/tritonserver, or install NVIDIA's TensorRT",
    "tensorrt_rtx": "pip install tensorrt-rtx-cu12 in the environment of the Python backend",
}


class TensorRtGraph(GraphRequests):  # type: ignore[misc]  # Where it runs, graph_runtime.py is beside it.
    """An engine on one GPU. One thread at a time may use it."""

    def __init__(self, directory: Path, *, library: str, device: int) -> None:
        """``library``: "tensorrt" or "tensorrt_rtx".

        Raises:
            RuntimeError: the library or CUDA is missing, or the engine was built for another version or GPU.
        """
        super().__init__(directory)
        trt = _library(library)
        self._cuda = Cuda(device)
        # The logger and the runtime must live as long as what they made.
        self._logger = trt.Logger(trt.Logger.WARNING)
        self._runtime = trt.Runtime(self._logger)
        self._engine = self._runtime.deserialize_cuda_engine((directory / "model.plan").read_bytes())
        if self._engine is None:
            raise RuntimeError(
                f"{library} {trt.__version__} cannot load model.plan; it must be built by this version for this GPU, and "
                "engine.json says what it was built by and for"
            )
        self._context = self._engine.create_execution_context()
        if self._context is None:
            raise RuntimeError("the GPU has not enough memory for the engine's activations")

    def _run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        given = {name: np.ascontiguousarray(array) for name, array in inputs.items()}
        for name, array in given.items():
            if not self._context.set_input_shape(name, array.shape):
                raise ValueError(f"input {name}: the engine's profile has no shape {list(array.shape)}")
            address = self._cuda.buffer(name, array.nbytes)
            self._context.set_tensor_address(name, address)
            self._cuda.send(address, array)
        outputs = {name: self._output(name) for name in self._outputs}
        if not self._context.execute_async_v3(self._cuda.stream):
            raise RuntimeError("TensorRT could not run the engine; the server's log says why")
        for name, array in outputs.items():
            self._cuda.receive(array, self._cuda.buffer(name, array.nbytes))
        self._cuda.wait()
        return outputs

    def _output(self, name: str) -> Array:
        """An array for an output, whose shape follows from the inputs, and device memory for it."""
        shape = tuple(self._context.get_tensor_shape(name))
        if any(size < 0 for size in shape):
            raise RuntimeError(f"output {name} has a shape that depends on values: {list(shape)}")
        array: Array = np.empty(shape, np.dtype(self._outputs[name]["dtype"]))
        self._context.set_tensor_address(name, self._cuda.buffer(name, array.nbytes))
        return array

    def close(self) -> None:
        """Free what is on the GPU."""
        self._context = self._engine = None
        self._cuda.close()


def _library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise RuntimeError(f"this model needs {name}, which is not installed: {_INSTALL[name]}") from error

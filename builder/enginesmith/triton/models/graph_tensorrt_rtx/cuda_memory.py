"""The few calls of the CUDA runtime that an engine needs: memory, copies, one stream. Needs libcudart only.

Self-contained: it is copied into the version directory of the served model. Signatures are those of ``cuda_runtime_api.h``.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy.typing as npt

Array = npt.NDArray[Any]
_LIBRARIES = ("libcudart.so.13", "libcudart.so.12", "libcudart.so")
_TO_DEVICE, _TO_HOST = 1, 2


class CudaError(RuntimeError):
    """CUDA is missing or refused a call."""


class Cuda:
    """One GPU and one stream on it."""

    def __init__(self, device: int) -> None:
        """
        Raises:
            CudaError: there is no CUDA runtime library, or no such GPU.
        """
        self._library = _load()
        self._call("cudaSetDevice", ctypes.c_int(device))
        stream = ctypes.c_void_p()
        self._call("cudaStreamCreate", ctypes.byref(stream))
        # The default stream would be 0, which is None to ctypes.
        self.stream: int = stream.value or 0
        self._buffers: dict[str, tuple[int, int]] = {}

    def buffer(self, name: str, size_bytes: int) -> int:
        """The address of device memory of at least ``size_bytes``; the same one for ``name`` while it is large enough."""
        address, capacity = self._buffers.get(name, (0, -1))
        if capacity < size_bytes:
            if address:
                self._call("cudaFree", ctypes.c_void_p(address))
                del self._buffers[name]
            made = ctypes.c_void_p()
            # Even an empty tensor needs an address.
            self._call("cudaMalloc", ctypes.byref(made), ctypes.c_size_t(max(size_bytes, 1)))
            address = made.value or 0
            self._buffers[name] = (address, size_bytes)
        return address

    def send(self, address: int, array: Array) -> None:
        """Copy a contiguous ``array``, which must live until ``wait``, to device memory."""
        self._copy(address, array.ctypes.data, array.nbytes, _TO_DEVICE)

    def receive(self, array: Array, address: int) -> None:
        """Copy device memory into a contiguous ``array``; it is there after ``wait``."""
        self._copy(array.ctypes.data, address, array.nbytes, _TO_HOST)

    def wait(self) -> None:
        """Return when all that was asked for is done."""
        self._call("cudaStreamSynchronize", ctypes.c_void_p(self.stream))

    def close(self) -> None:
        """Free the memory and the stream."""
        for address, _ in self._buffers.values():
            self._call("cudaFree", ctypes.c_void_p(address))
        self._buffers.clear()
        self._call("cudaStreamDestroy", ctypes.c_void_p(self.stream))

    def _copy(self, target: int, source: int, size_bytes: int, direction: int) -> None:
        self._call(
            "cudaMemcpyAsync",
            ctypes.c_void_p(target),
            ctypes.c_void_p(source),
            ctypes.c_size_t(size_bytes),
            ctypes.c_int(direction),
            ctypes.c_void_p(self.stream),
        )

    def _call(self, name: str, *arguments: Any) -> None:
        status = getattr(self._library, name)(*arguments)
        if status:
            explain = self._library.cudaGetErrorString
            explain.restype = ctypes.c_char_p
            raise CudaError(f"{name} failed: {bytes(explain(status) or b'?').decode()} (error {status})")


def _load() -> ctypes.CDLL:
    for name in _LIBRARIES:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise CudaError(
        f"no CUDA runtime library: none of {', '.join(_LIBRARIES)} can be loaded; this model needs an NVIDIA GPU and CUDA"
    )

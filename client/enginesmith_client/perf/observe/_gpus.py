"""NVIDIA's GPUs of this machine, through NVML where its Python bindings (``nvidia-ml-py``) and a driver are there."""

from __future__ import annotations

import importlib
from typing import Any


class Gpus:
    """The GPUs that this machine has; none where NVML says nothing."""

    def __init__(self) -> None:
        self._nvml: Any = None
        self._handles: list[Any] = []
        try:
            nvml = importlib.import_module("pynvml")
        except ImportError:
            return
        try:
            nvml.nvmlInit()
            self._handles = [nvml.nvmlDeviceGetHandleByIndex(one) for one in range(nvml.nvmlDeviceGetCount())]
        except nvml.NVMLError:
            return
        self._nvml = nvml

    def names(self) -> list[str]:
        """What each is called, with its memory."""
        return [self._name(handle) for handle in self._handles]

    def driver(self) -> str | None:
        """The version of the driver."""
        return str(self._nvml.nvmlSystemGetDriverVersion()) if self._nvml else None

    def usage(self) -> tuple[float, int] | None:
        """Utilization in percent and used memory in bytes, both summed over the GPUs; None without any.

        Utilization is NVML's: the share of its last sampling period (up to a second) in which a kernel ran.
        """
        if not self._handles:
            return None
        try:
            percent = sum(self._nvml.nvmlDeviceGetUtilizationRates(one).gpu for one in self._handles)
            used = sum(self._nvml.nvmlDeviceGetMemoryInfo(one).used for one in self._handles)
        except self._nvml.NVMLError:
            return None
        return float(percent), int(used)

    def _name(self, handle: Any) -> str:
        name = self._nvml.nvmlDeviceGetName(handle)
        total_bytes = self._nvml.nvmlDeviceGetMemoryInfo(handle).total
        return f"{name if isinstance(name, str) else name.decode()}, {total_bytes / 2**30:.0f} GiB"

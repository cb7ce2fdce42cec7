"""The machine and the software that a result was measured with."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

import psutil

_FLAGS = (
    "avx",
    "avx2",
    "fma",
    "f16c",
    "avx512f",
    "avx512bw",
    "avx512_vnni",
    "avx_vnni",
    "avx512_bf16",
    "amx_int8",
)
"""The instruction sets that matrix kernels choose between."""
_DISTRIBUTIONS = (
    "enginesmith",
    "onnxruntime",
    "torch",
    "transformers",
    "nvidia-modelopt",
    "numpy",
    "tokenizers",
    "nvidia-pytriton",
    "tritonclient",
)


def machine() -> dict[str, Any]:
    """CPU, memory and kernel; nothing that names the machine itself."""
    cpu = _cpu()
    flags = set(cpu.get("flags", "").split())
    return {
        "cpu": cpu.get("model name", platform.processor()),
        "cpu_flags": [flag for flag in _FLAGS if flag in flags],
        "cores": os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "kernel": platform.release(),
        "libc": " ".join(platform.libc_ver()),
    }


def versions() -> dict[str, str]:
    """Python and the distributions that decide the figures; those that are not installed are left out."""
    found = {"python": platform.python_version()}
    for name in _DISTRIBUTIONS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def load_average() -> tuple[float, float, float]:
    """Of the last 1, 5 and 15 minutes."""
    return os.getloadavg()


def _cpu() -> dict[str, str]:
    """The first processor in /proc/cpuinfo."""
    path = Path("/proc/cpuinfo")
    first = path.read_text(encoding="utf-8").split("\n\n")[0] if path.exists() else ""
    pairs = (line.partition(":") for line in first.splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}

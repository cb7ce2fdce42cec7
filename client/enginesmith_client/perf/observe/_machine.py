"""The machine and the software that a result was measured with; nothing that names the machine itself."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

from enginesmith_client.perf.observe._gpus import Gpus

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
DISTRIBUTIONS = ("enginesmith-client", "enginesmith", "tritonclient", "grpcio", "numpy", "nvidia-pytriton")


def machine() -> dict[str, Any]:
    """CPU, memory, kernel and NVIDIA GPUs of the machine that this process runs on."""
    cpu = _cpu()
    flags = set(cpu.get("flags", "").split())
    gpus = Gpus()
    return {
        "cpu": cpu.get("model name", platform.processor()),
        "cpu_flags": [flag for flag in _FLAGS if flag in flags],
        "cores": os.cpu_count(),
        "cores_usable": _usable_cores(),
        "memory_bytes": psutil.virtual_memory().total,
        "kernel": platform.release(),
        "libc": " ".join(platform.libc_ver()),
        "gpus": gpus.names(),
        "gpu_driver": gpus.driver(),
    }


def versions(distributions: Sequence[str] = DISTRIBUTIONS) -> dict[str, str]:
    """Python and the distributions that decide the figures; those that are not installed are left out."""
    found = {"python": platform.python_version()}
    for name in distributions:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _usable_cores() -> int | None:
    """Those that this process may run on, where the system can say."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def _cpu() -> dict[str, str]:
    """The first processor in /proc/cpuinfo."""
    path = Path("/proc/cpuinfo")
    first = path.read_text(encoding="utf-8").split("\n\n")[0] if path.exists() else ""
    pairs = (line.partition(":") for line in first.splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}

"""The machine and the software that a result was measured with."""

from __future__ import annotations

import os

from enginesmith_client.perf.observe import _machine, _processes

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

machine = _machine.machine
machine_cpu_s = _processes.machine_cpu_s


def versions() -> dict[str, str]:
    """Python and the distributions that decide the figures; those that are not installed are left out."""
    return _machine.versions(_DISTRIBUTIONS)


def stolen_share(before: tuple[float, float, float]) -> float:
    """What the hypervisor gave to other machines of all CPU time since ``machine_cpu_s`` said ``before``, 0 to 1."""
    _, total_s, stolen_s = machine_cpu_s()
    return (stolen_s - before[2]) / (total_s - before[1])


def load_average() -> tuple[float, float, float]:
    """Of the last 1, 5 and 15 minutes."""
    return os.getloadavg()

"""The machine and the software that a result was measured with."""

from __future__ import annotations

import os

import psutil

from enginesmith_client.perf.observe import _machine

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


def versions() -> dict[str, str]:
    """Python and the distributions that decide the figures; those that are not installed are left out."""
    return _machine.versions(_DISTRIBUTIONS)


class StolenTime:
    """Counts the CPU time that the hypervisor gave to other machines while this one wanted it, from now on."""

    def __init__(self) -> None:
        self._before = psutil.cpu_times()

    def share(self) -> float:
        """Of all CPU time since, 0 to 1; 0 where the system does not say."""
        now = psutil.cpu_times()
        passed = sum(now[:8]) - sum(self._before[:8])  # The rest of the fields are parts of these.
        return (
            float((getattr(now, "steal", 0.0) - getattr(self._before, "steal", 0.0)) / passed)
            if passed
            else 0.0
        )


def load_average() -> tuple[float, float, float]:
    """Of the last 1, 5 and 15 minutes."""
    return os.getloadavg()

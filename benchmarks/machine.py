"""The machine and the software that a result was measured with."""

from __future__ import annotations

import os

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


def load_average() -> tuple[float, float, float]:
    """Of the last 1, 5 and 15 minutes."""
    return os.getloadavg()

"""TensorRT for RTX under TensorRT's name: as much of the path of standard TensorRT as runs without NVIDIA's containers.

Builder, parser and network are real; they build ahead of time for SM89 whatever the caller says. Engines cannot be read,
because there is no GPU. ``install`` makes a directory for PYTHONPATH; ``hide`` makes one that takes modules away.
"""

from __future__ import annotations

from pathlib import Path

_MODULE = """
import tensorrt_rtx as _rtx
from tensorrt_rtx import *

__version__ = "{version}"


class Builder(_rtx.Builder):
    def create_builder_config(self):
        config = super().create_builder_config()
        config.num_compute_capabilities = 1
        config.set_compute_capability(_rtx.ComputeCapability.SM89, 0)
        return config
"""
_HIDE = """
import sys


class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {names!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)


sys.meta_path.insert(0, Hidden())
"""


def install(directory: Path, *, version: str) -> Path:
    """A distribution ``tensorrt`` of this version; returns what PYTHONPATH needs."""
    package = directory / "tensorrt"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(_MODULE.format(version=version))
    metadata = directory / f"tensorrt-{version}.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: tensorrt\nVersion: {version}\n")
    return directory


def hide(directory: Path, *modules: str) -> Path:
    """For PYTHONPATH: a Python in which ``modules`` are not installed."""
    directory.mkdir(parents=True)
    (directory / "sitecustomize.py").write_text(_HIDE.format(names=set(modules)))
    return directory


def show_gpu(directory: Path, line: str) -> Path:
    """An ``nvidia-smi`` in ``directory`` that lists one GPU; returns what PATH needs."""
    directory.mkdir(parents=True)
    program = directory / "nvidia-smi"
    program.write_text(f"#!/bin/sh\necho '{line}'\n")
    program.chmod(0o755)
    return directory

"""A directory with the spec of a module that nobody may run: what is tested happens before."""

from __future__ import annotations

from pathlib import Path

import yaml


def write_graph_project(directory: Path, *, scheme: str, **parts: object) -> Path:
    """The spec ``tiny`` with one variant named as its scheme; ``parts`` are added to the document. Returns the spec's path."""
    (directory / "net.py").write_text("def make(): raise AssertionError('nothing may run')")
    document = {
        "name": "tiny",
        "task": "tensors",
        "source": {"module": "net.py:make"},
        "inputs": [{"name": "image", "shape": ["batch", 3]}],
        "outputs": ["scores"],
        "variants": {scheme: {"scheme": scheme}},
        **parts,
    }
    path = directory / "tiny.yaml"
    path.write_text(yaml.safe_dump(document))
    return path

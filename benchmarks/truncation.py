"""Checkpoints derived from a checkpoint: its first layers only, and the same with a trace of noise.

Tensors are streamed, one at a time. Embeddings with noise are stored as float32, whatever they were stored as.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from enginesmith.checkpoints.tensors import CONFIG_FILE, QUANTIZATION_FILE, SINGLE_FILE, CheckpointTensors
from enginesmith.checkpoints.writer import PlannedTensor, write_safetensors

EMBEDDINGS = "model.embed_tokens.weight"
_LAYER = re.compile(r"^model\.layers\.(\d+)\.")


@dataclass(frozen=True)
class Noise:
    """Embeddings are multiplied by 1 + ``relative`` x N(0, 1), element by element."""

    relative: float
    seed: int = 0


def layer_count(checkpoint: Path) -> int:
    """How many decoder layers the checkpoint has."""
    return int(CheckpointTensors(checkpoint).config["num_hidden_layers"])


def write_truncated(checkpoint: Path, out: Path, *, layers: int, noise: Noise | None = None) -> Path:
    """The checkpoint of the first ``layers`` decoder layers, in the new directory ``out``.

    Embeddings, final norm and head are those of the whole model. ``hf_quant_config.json`` is kept as it is.
    """
    tensors = CheckpointTensors(checkpoint)
    out.mkdir(parents=True)
    config = tensors.config | {"num_hidden_layers": layers}
    if "layer_types" in config:
        config["layer_types"] = config["layer_types"][:layers]
    (out / CONFIG_FILE).write_text(json.dumps(config, indent=2), encoding="utf-8")
    if tensors.quantization is not None:
        (out / QUANTIZATION_FILE).write_bytes((checkpoint / QUANTIZATION_FILE).read_bytes())
    kept = [name for name in tensors.names() if _layer_of(name) < layers]
    plan = [
        PlannedTensor(
            name, "F32" if noise and name == EMBEDDINGS else tensors.dtype(name), tensors.shape(name)
        )
        for name in kept
    ]
    pieces = _pieces(tensors, kept, noise)
    write_safetensors(out / SINGLE_FILE, plan, pieces=pieces, metadata={"format": "pt"})
    return out


def _layer_of(name: str) -> int:
    """The decoder layer that a tensor belongs to; -1 for what lies outside of them."""
    match = _LAYER.match(name)
    return int(match[1]) if match else -1


def _pieces(tensors: CheckpointTensors, names: list[str], noise: Noise | None) -> Iterator[npt.NDArray[Any]]:
    for name in names:
        values = tensors.read(name)
        if noise and name == EMBEDDINGS:
            random = np.random.default_rng(noise.seed)
            factors = 1 + noise.relative * random.standard_normal(values.shape)
            values = (values.astype(np.float64) * factors).astype(np.float32)
        yield values

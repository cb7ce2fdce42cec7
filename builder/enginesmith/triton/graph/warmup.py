"""Requests that an engine answers before it is ready, made of real samples.

Triton reads each input of a warm-up request from a file in the model's directory ``warmup`` and repeats that row as often
as the request's ``batch_size`` (``ModelWarmup`` of model_config.proto). A file is named by its content, so that versions
of a model can share the directory and none changes under another.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from enginesmith.errors import StoreError
from enginesmith.triton.config import WarmupInput, WarmupSample
from enginesmith.triton.graph.configs import DATA_TYPES
from enginesmith.triton.graph.deployment import Deployment

Array = npt.NDArray[Any]
Row = Mapping[str, Array]
"""One sample: an array without the batch for each input."""
_MASK = "attention_mask"


def read_batches(samples: Path) -> list[dict[str, Array]]:
    """The batches of a ``sample`` artifact: arrays [batch, ...] by input.

    Raises:
        StoreError: there are none, or one cannot be read.
    """
    batches = []
    for path in sorted((samples / "batches").glob("*.npz")):
        try:
            with np.load(path, allow_pickle=False) as arrays:
                batches.append({name: arrays[name] for name in arrays.files})
        except (OSError, ValueError) as error:
            raise StoreError(f"cannot read {path}: {error}", hint="build again") from error
    if not batches:
        raise StoreError(f"there are no batches in {samples}", hint="build again")
    return batches


def warmup_of(deployment: Deployment, samples: Path) -> tuple[list[WarmupSample], dict[str, bytes]]:
    """The warm-up requests of the engine, and the content of each file that they name."""
    if not deployment.serving.warmup:
        return [], {}
    row = _longest_row(read_batches(samples), deployment)
    largest = deployment.serving.max_batch_size
    rows = {"sample": row}
    if deployment.text and deployment.pad_to:
        rows = {f"length-{length}": _fitted(row, length, deployment) for length in deployment.pad_to}
    requests, files = [], {}
    for name, values in rows.items():
        inputs = {}
        for tensor in deployment.signature.inputs:
            array = np.ascontiguousarray(values[tensor.name])
            content = array.tobytes()
            file = f"{hashlib.sha256(content).hexdigest()[:32]}.bin"
            files[file] = content
            inputs[tensor.name] = WarmupInput(DATA_TYPES[tensor.dtype], array.shape, file)
        for batch_size in sorted({1, largest}):
            requests.append(WarmupSample(f"{name}-batch-{batch_size}", batch_size, inputs))
    return requests, files


def _longest_row(batches: list[dict[str, Array]], deployment: Deployment) -> Row:
    """The sample with the most tokens that are not padding, without its padding; else the first one."""
    if _MASK not in batches[0]:
        return {name: array[0] for name, array in batches[0].items()}
    batch = max(batches, key=lambda one: int(one[_MASK].sum(axis=1).max()))
    index = int(batch[_MASK].sum(axis=1).argmax())
    length = min(int(batch[_MASK][index].sum()), deployment.longest)
    return {name: array[index][:length] for name, array in batch.items()}


def _fitted(row: Row, length: int, deployment: Deployment) -> Row:
    """``row`` as the tokenization stage would pad it to ``length``, or its beginning."""
    fitted: dict[str, Array] = {}
    for name, values in row.items():
        padding = deployment.signature.pad_id if name == "input_ids" else 0
        fitted[name] = np.full(length, padding, values.dtype)
        fitted[name][: len(values)] = values[:length]
    return fitted

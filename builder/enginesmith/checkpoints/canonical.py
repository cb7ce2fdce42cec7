"""A Hugging Face directory copied or converted into the canonical checkpoint of the ``fetch`` step.

Owns which files a canonical checkpoint has. The source is only read: a store entry must not change when its user
edits the original, so files are cloned (copy-on-write) or copied, never linked.
"""

from __future__ import annotations

import fcntl
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy.typing as npt

from enginesmith.checkpoints.tensors import (
    CONFIG_FILE,
    INDEX_FILE,
    QUANTIZATION_FILE,
    SINGLE_FILE,
    CheckpointTensors,
    read_json_object,
)
from enginesmith.checkpoints.tokenizer import copy_sentence_transformer, copy_tokenizer
from enginesmith.checkpoints.validate import (
    WEIGHT_DTYPES,
    CheckpointSummary,
    summarize_checkpoint,
    validate_checkpoint,
)
from enginesmith.checkpoints.writer import (
    SAFETENSORS_DTYPES,
    PlannedTensor,
    WeightDtype,
    converted,
    rows_per_piece,
    write_safetensors,
)
from enginesmith.errors import SourceError

Report = Callable[[float | None, str], None]
"""Receives progress: a fraction in [0, 1] or None, and a note."""

COPIED_FILES = (CONFIG_FILE, QUANTIZATION_FILE, "generation_config.json")

_FICLONE = 0x40049409  # linux/fs.h: let a file share another's blocks until one of them is written.


def canonical_from_directory(
    source: Path, out: Path, *, dtype: WeightDtype | None, report: Report, as_it_came: bool = False
) -> CheckpointSummary:
    """Fill ``out`` with the canonical form of the checkpoint in ``source``: what it holds.

    With ``dtype``, weights are converted tensor by tensor; without, their bytes stay as they are. ``as_it_came``
    takes any architecture: shards and index must be whole, the tensors in them are the runtime's business.

    Raises:
        SourceError: the checkpoint is damaged, incomplete or not supported; nothing useful is left in ``out``.
    """
    checked = summarize_checkpoint if as_it_came else validate_checkpoint
    checked(source)
    tensors = CheckpointTensors(source)
    for name in COPIED_FILES:
        if (source / name).exists():
            clone_or_copy(source / name, out / name)
    copy_tokenizer(source, out, copy=clone_or_copy)
    if as_it_came:
        copy_sentence_transformer(source, out, copy=clone_or_copy)
    stored = {tensors.dtype(name) for name in tensors.names()}
    if dtype is None or stored == {SAFETENSORS_DTYPES[dtype]}:
        _copy_weights(tensors, out, report)
    else:
        if tensors.quantization is not None:
            raise SourceError(
                f"{source} is quantized ({tensors.quantization.get('quant_algo')}), so its weights cannot become {dtype}",
                hint="leave dtype out of the source",
            )
        _convert_weights(tensors, out, dtype=dtype, report=report)
    return checked(out)


def clone_or_copy(source: Path, target: Path) -> None:
    """Make ``target`` a file with the bytes of ``source`` that no later write to ``source`` can change."""
    with source.open("rb") as reading, target.open("wb") as writing:
        try:
            fcntl.ioctl(writing.fileno(), _FICLONE, reading.fileno())
        except OSError:  # Most file systems cannot clone; copying gives the same bytes.
            pass
        else:
            return
    shutil.copyfile(source, target)


def _copy_weights(tensors: CheckpointTensors, out: Path, report: Report) -> None:
    files = tensors.files()
    for number, file in enumerate(files):
        report(number / len(files), f"copying {file.name}")
        clone_or_copy(file, out / file.name)
    if _is_sharded(tensors):
        clone_or_copy(tensors.directory / INDEX_FILE, out / INDEX_FILE)


def _convert_weights(tensors: CheckpointTensors, out: Path, *, dtype: WeightDtype, report: Report) -> None:
    """Write every shard again with its floating tensors in ``dtype``; shards keep their names and tensors."""
    target = SAFETENSORS_DTYPES[dtype]
    files = tensors.files()
    total_bytes = 0
    for number, file in enumerate(files):
        report(number / len(files), f"converting {file.name} to {dtype}")
        names = [name for name in tensors.names() if tensors.entry(name).file == file]
        plan = [PlannedTensor(name, target, tensors.shape(name)) for name in names]
        total_bytes += sum(tensor.nbytes for tensor in plan)
        pieces = _converted_pieces(tensors, names, target)
        write_safetensors(out / file.name, plan, pieces=pieces, metadata={"format": "pt"})
    if _is_sharded(tensors):
        weight_map = {name: tensors.entry(name).file.name for name in tensors.names()}
        write_json(out / INDEX_FILE, {"metadata": {"total_size": total_bytes}, "weight_map": weight_map})
    config = read_json_object(out / CONFIG_FILE)
    config.pop("torch_dtype", None)  # transformers 4 spelled the key so.
    write_json(out / CONFIG_FILE, config | {"dtype": dtype})


def _converted_pieces(
    tensors: CheckpointTensors, names: list[str], target: str
) -> Iterator[npt.NDArray[Any]]:
    for name in names:
        assert tensors.dtype(name) in WEIGHT_DTYPES, name
        shape = tensors.shape(name)
        step = rows_per_piece(shape)
        for start in range(0, shape[0], step):
            rows = tensors.read_rows(name, start, min(start + step, shape[0]))
            yield converted(rows, target, name=name)


def _is_sharded(tensors: CheckpointTensors) -> bool:
    return tensors.files() != [tensors.directory / SINGLE_FILE]


def write_json(path: Path, document: dict[str, Any]) -> None:
    """Write ``document`` as transformers writes its JSON files: indented, keys sorted."""
    path.write_text(json.dumps(document, indent=2, sort_keys=True) + "\n", encoding="utf-8")

"""Lazy access to the tensors of a Hugging Face checkpoint directory, without torch.

Owns the safetensors format (8-byte little-endian header length, JSON header, raw bytes), the shard index, and
the refusal of files that are damaged: a ``CheckpointTensors`` that was constructed names only tensors whose
bytes are all there. Knows nothing of architectures; ``enginesmith.checkpoints.validate`` judges those.

The safetensors package is not used for reading because its numpy side knows neither bfloat16 nor float8.
Format: https://huggingface.co/docs/safetensors (the "Format" section).
"""

from __future__ import annotations

import difflib
import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from enginesmith.errors import SourceError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
CONFIG_FILE = "config.json"
QUANTIZATION_FILE = "hf_quant_config.json"

NUMPY_DTYPES: Mapping[str, np.dtype[Any]] = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "I16": np.dtype("<i2"),
    "U16": np.dtype("<u2"),
    "I32": np.dtype("<i4"),
    "U32": np.dtype("<u4"),
    "I64": np.dtype("<i8"),
    "U64": np.dtype("<u8"),
    "F16": np.dtype("<f2"),
    "F32": np.dtype("<f4"),
    "F64": np.dtype("<f8"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
}
"""NumPy's dtype for each safetensors dtype that can be read."""

PICKLED_HINT = (
    "pickled weights (pytorch_model*.bin) can run code when they are read; convert them where you trust them: "
    "python -c \"from transformers import AutoModelForCausalLM as M; M.from_pretrained('OLD', dtype='auto')"
    ".save_pretrained('NEW')\", copy the tokenizer files beside them and give NEW as the path"
)

_MAX_HEADER_BYTES = 100_000_000  # The reference implementation's own limit.
_DAMAGED_HINT = "fetch this file again; a copy or download that was cut off looks like this"


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies: ``begin`` and ``end`` are byte offsets in ``file``."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        """Size of the tensor's data in bytes."""
        return self.end - self.begin


class CheckpointTensors:
    """The tensors of a checkpoint directory by name. Only headers are read until a tensor is asked for.

    Raises:
        SourceError: no safetensors weights, a shard is missing or truncated, or index and shards disagree.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._entries = _entries_of(directory)

    def names(self) -> list[str]:
        """All tensor names, sorted."""
        return sorted(self._entries)

    def files(self) -> list[Path]:
        """The safetensors files that hold the tensors, sorted."""
        return sorted({entry.file for entry in self._entries.values()})

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __len__(self) -> int:
        return len(self._entries)

    def entry(self, name: str) -> TensorEntry:
        """Where tensor ``name`` lies; a SourceError that names the nearest tensor when there is none."""
        try:
            return self._entries[name]
        except KeyError:
            close = difflib.get_close_matches(name, self._entries, n=1)
            raise SourceError(
                f"checkpoint {self.directory} has no tensor {name!r} among its {len(self._entries)} tensors",
                hint=f"the nearest name is {close[0]!r}" if close else None,
            ) from None

    def dtype(self, name: str) -> str:
        """The stored dtype in safetensors' spelling, e.g. ``BF16``, ``I8``, ``F8_E4M3``."""
        return self.entry(name).dtype

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape; ``()`` for a scalar."""
        return self.entry(name).shape

    def nbytes(self, name: str) -> int:
        """Size of the stored data in bytes."""
        return self.entry(name).nbytes

    def read(self, name: str) -> npt.NDArray[Any]:
        """A writable copy of tensor ``name`` in its stored dtype (ml_dtypes for bfloat16 and float8).

        The bytes are read, not mapped: pages of a mapped file would count as this process's memory for as long as
        the checkpoint is open, which is the whole checkpoint after one pass.
        """
        entry = self.entry(name)
        return _read_bytes(entry, entry.begin, entry.end).view(NUMPY_DTYPES[entry.dtype]).reshape(entry.shape)

    def read_rows(self, name: str, start: int, stop: int) -> npt.NDArray[Any]:
        """A writable copy of ``tensor[start:stop]``; only those rows are read. ``0 <= start <= stop <= shape[0]``."""
        entry = self.entry(name)
        assert entry.shape, f"{name} is a scalar, it has no rows"
        assert 0 <= start <= stop <= entry.shape[0], f"rows {start}:{stop} of {name} {entry.shape}"
        row_bytes = NUMPY_DTYPES[entry.dtype].itemsize * math.prod(entry.shape[1:])
        rows = _read_bytes(entry, entry.begin + start * row_bytes, entry.begin + stop * row_bytes)
        return rows.view(NUMPY_DTYPES[entry.dtype]).reshape(stop - start, *entry.shape[1:])

    @cached_property
    def config(self) -> dict[str, Any]:
        """The parsed ``config.json``."""
        return read_json_object(self.directory / CONFIG_FILE)

    @cached_property
    def quantization(self) -> dict[str, Any] | None:
        """The ``quantization`` section of ModelOpt's ``hf_quant_config.json``; None for an unquantized checkpoint."""
        path = self.directory / QUANTIZATION_FILE
        if not path.exists():
            return None
        section = read_json_object(path).get("quantization")
        if not isinstance(section, dict):
            raise SourceError(
                f"{path} has no section 'quantization'",
                hint="ModelOpt's export writes one; export the checkpoint again",
            )
        return section


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in the file at ``path``, or a SourceError that says why there is none."""
    try:
        document = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise SourceError(
            f"{path.name} is missing in {path.parent}", hint="a Hugging Face checkpoint directory has one"
        ) from error
    except OSError as error:
        raise SourceError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise SourceError(f"{path} is not valid JSON: {error}", hint=_DAMAGED_HINT) from error
    if not isinstance(document, dict):
        raise SourceError(f"{path} must hold a JSON object, seen: {type(document).__name__}")
    return document


def read_header(path: Path) -> dict[str, TensorEntry]:
    """The tensors of one safetensors file, from its header alone, after checking that every byte is there.

    Raises:
        SourceError: the file is missing, is not safetensors, or its length differs from what its header promises.
    """
    try:
        with path.open("rb") as file:
            seen_bytes = path.stat().st_size
            header_bytes = int.from_bytes(file.read(8), "little")
            if seen_bytes < 8 or not 2 <= header_bytes <= _MAX_HEADER_BYTES:
                raise SourceError(
                    f"{path} is not a safetensors file: it has {seen_bytes} bytes and its header length reads {header_bytes}",
                    hint=_DAMAGED_HINT,
                )
            if seen_bytes < 8 + header_bytes:
                raise SourceError(
                    f"{path} is truncated in its header: expected at least {8 + header_bytes} bytes, seen {seen_bytes}",
                    hint=_DAMAGED_HINT,
                )
            text = file.read(header_bytes)
    except FileNotFoundError as error:
        raise SourceError(
            f"shard {path.name} is missing in {path.parent}",
            hint="fetch the missing file; the directory must be complete",
        ) from error
    except OSError as error:
        raise SourceError(f"cannot read {path}: {error.strerror}") from error
    entries = _entries_from_header(path, text, 8 + header_bytes)
    expected_bytes = max((entry.end for entry in entries.values()), default=8 + header_bytes)
    if seen_bytes != expected_bytes:
        state = "truncated" if seen_bytes < expected_bytes else "longer than its header says"
        raise SourceError(
            f"{path} is {state}: expected {expected_bytes} bytes, seen {seen_bytes}", hint=_DAMAGED_HINT
        )
    return entries


def _entries_from_header(path: Path, text: bytes, data_begin: int) -> dict[str, TensorEntry]:
    try:
        header = json.loads(text, object_pairs_hook=_object_without_duplicates)
    except ValueError as error:
        raise SourceError(f"{path} has a damaged safetensors header: {error}", hint=_DAMAGED_HINT) from error
    if not isinstance(header, dict):
        raise SourceError(
            f"{path} has a damaged safetensors header: it is not a JSON object", hint=_DAMAGED_HINT
        )
    entries = {
        name: _entry(path, name, value, data_begin=data_begin)
        for name, value in header.items()
        if name != "__metadata__"
    }
    position = data_begin
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != position:
            raise SourceError(
                f"{path} has a damaged safetensors header: tensor {name} begins at byte {entry.begin}, expected {position}",
                hint=_DAMAGED_HINT,
            )
        position = entry.end
    return entries


def _entry(path: Path, name: str, value: Any, *, data_begin: int) -> TensorEntry:
    """One header entry, checked: known dtype, shape of whole numbers, and as many bytes as both imply."""
    match value:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [int(begin), int(end)]} if all(
            type(dim) is int and dim >= 0 for dim in shape
        ):
            pass
        case _:
            raise SourceError(
                f"{path} has a damaged safetensors header: tensor {name} is described by {value!r}",
                hint=_DAMAGED_HINT,
            )
    if dtype not in NUMPY_DTYPES:
        raise SourceError(
            f"{path}: tensor {name} has dtype {dtype}, which cannot be read; readable: {', '.join(NUMPY_DTYPES)}"
        )
    needed = NUMPY_DTYPES[dtype].itemsize * math.prod(shape)
    if end - begin != needed:
        raise SourceError(
            f"{path}: tensor {name} ({dtype} {shape}) needs {needed} bytes, its header gives it {end - begin}",
            hint=_DAMAGED_HINT,
        )
    return TensorEntry(path, dtype, tuple(shape), data_begin + begin, data_begin + end)


def _object_without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    twice = [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]
    if twice:
        raise ValueError(f"{twice[0]!r} is written twice")
    return dict(pairs)


def _entries_of(directory: Path) -> dict[str, TensorEntry]:
    # The order is transformers' own: one whole file wins over an index left beside it.
    if (directory / SINGLE_FILE).exists():
        return read_header(directory / SINGLE_FILE)
    if (directory / INDEX_FILE).exists():
        return _entries_from_index(directory)
    raise SourceError(
        f"no safetensors weights in {directory}: neither {SINGLE_FILE} nor {INDEX_FILE} is there",
        hint=_hint_for_other_weights(directory),
    )


def _hint_for_other_weights(directory: Path) -> str:
    if not directory.is_dir():
        return "the directory does not exist; give the directory that holds config.json"
    pickled = sorted(path.name for path in directory.glob("pytorch_model*.bin"))
    if pickled:
        return f"{pickled[0]} is not read: {PICKLED_HINT}"
    return "give the directory that holds config.json and the safetensors files"


def _entries_from_index(directory: Path) -> dict[str, TensorEntry]:
    """The entries of a sharded checkpoint; every tensor is in the one shard that the index names, and in no other."""
    path = directory / INDEX_FILE
    weight_map = read_json_object(path).get("weight_map")
    if (
        not isinstance(weight_map, dict)
        or not weight_map
        or not all(isinstance(file, str) for file in weight_map.values())
    ):
        raise SourceError(
            f"{path} has no usable 'weight_map' from tensor names to file names", hint=_DAMAGED_HINT
        )
    entries: dict[str, TensorEntry] = {}
    for file in sorted(set(weight_map.values())):
        if Path(file).name != file:
            raise SourceError(
                f"{path} names shard {file!r}; a shard must be a plain file name in the same directory"
            )
        for name, entry in read_header(directory / file).items():
            if name in entries:
                raise SourceError(
                    f"tensor {name} is stored twice, in {entries[name].file.name} and {file}",
                    hint="one of the shards belongs to another checkpoint",
                )
            entries[name] = entry
    missing = sorted(
        name for name, file in weight_map.items() if name not in entries or entries[name].file.name != file
    )
    if missing:
        raise SourceError(
            f"{path.name} says that {missing[0]} is in {weight_map[missing[0]]}, where it is not ({len(missing)} such tensors)",
            hint=_DAMAGED_HINT,
        )
    unlisted = sorted(entries.keys() - weight_map.keys())
    if unlisted:
        raise SourceError(
            f"{entries[unlisted[0]].file.name} holds tensor {unlisted[0]}, which {path.name} does not list ({len(unlisted)} such tensors)"
        )
    return entries


def _read_bytes(entry: TensorEntry, begin: int, end: int) -> npt.NDArray[np.uint8]:
    data = np.fromfile(entry.file, dtype=np.uint8, count=end - begin, offset=begin)
    if data.size != end - begin:
        raise SourceError(
            f"{entry.file} became shorter while it was read: expected {end - begin} bytes at {begin}, seen {data.size}"
        )
    return data

"""Writing all ranks at once from one pass over the source, in bounded memory.

The header of each rank's file is known from the plan, so every byte has its place before any is read. Source tensors
are read in the order in which they lie on the disk; each block is read once and goes to all ranks that hold a part
of it. Whole rows that are only copied never enter this process: the kernel moves them (``copy_file_range``).
Memory: two blocks for each worker, whatever the model's size.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from enginesmith.checkpoints.tensors import NUMPY_DTYPES, CheckpointTensors, TensorEntry
from enginesmith.engines.tensorrt_llm.layout import (
    Fill,
    Largest,
    RankTensor,
    Recode,
    Rectangle,
    matrix_shape,
)
from enginesmith.engines.tensorrt_llm.plan import ConversionPlan
from enginesmith.engines.tensorrt_llm.recoding import Scales, recoded
from enginesmith.errors import OperatorError, SourceError

BLOCK_BYTES = 16 << 20
"""How much of a source tensor a worker holds at a time."""
PARTIAL = ".partial"
"""Suffix of a rank's file until every rank is complete."""
_NOT_COPIED_BY_KERNEL = (errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM)

Progress = Callable[[float], None]


@dataclass(frozen=True)
class _Destination:
    """Where the first row of a rectangle's part lies: a rank's file, and an offset in it."""

    rank: int
    offset: int
    columns: range


@dataclass(frozen=True)
class _Move:
    """Rows of one source tensor, and everywhere they go."""

    source: str
    entry: TensorEntry
    rows: range
    dtype: str
    recode: Recode | None
    destinations: tuple[_Destination, ...]

    @property
    def begin(self) -> int:
        """Where the first row lies in the source file."""
        return self.entry.begin + self.rows.start * _row_bytes(self.entry)


def write_ranks(
    plan: ConversionPlan,
    tensors: CheckpointTensors,
    *,
    out: Path,
    scales: Scales,
    workers: int,
    progress: Progress,
) -> list[Path]:
    """Write ``rank{i}.safetensors`` for every rank into ``out``; their paths.

    The files get their names together, when all are complete; on any failure none is left.

    Raises:
        SourceError: a source file became shorter while it was read.
        OperatorError: the disk is full, or a file cannot be written.
    """
    finished = [out / f"rank{index}.safetensors" for index in range(len(plan.ranks))]
    partial = [path.with_name(path.name + PARTIAL) for path in finished]
    headers = [_header(rank) for rank in plan.ranks]
    _check_space(out, plan.weight_bytes + sum(map(len, headers)))
    try:
        with ExitStack() as files:
            writer = _Writer(
                files, tensors, partial, scales=scales, total=plan.weight_bytes, progress=progress
            )
            for index, (rank, header) in enumerate(zip(plan.ranks, headers, strict=True)):
                writer.reserve(index, header, sum(tensor.nbytes for tensor in rank))
            writer.run(_moves(plan, tensors, headers), workers=workers)
            writer.write_numbers(_numbers(plan, headers))
        for fresh, final in zip(partial, finished, strict=True):
            os.replace(fresh, final)
    except OSError as error:
        raise OperatorError(
            f"cannot write the TensorRT-LLM checkpoint in {out}: {error.strerror or error}",
            hint=f"it needs {plan.weight_bytes / 2**30:.1f} GiB; free space there, or raise the limit on file sizes",
        ) from error
    finally:
        for path in partial:
            path.unlink(missing_ok=True)
    return finished


def _check_space(out: Path, needed_bytes: int) -> None:
    free_bytes = shutil.disk_usage(out).free
    if free_bytes < needed_bytes:
        raise OperatorError(
            f"{out} has {free_bytes / 2**30:.1f} GiB free, the TensorRT-LLM checkpoint needs {needed_bytes / 2**30:.1f} GiB",
            hint="free space there",
        )


def _header(rank: Sequence[RankTensor]) -> bytes:
    """The beginning of a rank's file: everything before the data, padded to 8 bytes."""
    header: dict[str, Any] = {}
    end = 0
    for tensor in rank:
        begin, end = end, end + tensor.nbytes
        header[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _placed(plan: ConversionPlan, headers: Sequence[bytes]) -> Iterator[tuple[int, int, RankTensor, Any]]:
    """Every piece with its rank and its offset in that rank's file."""
    for index, rank in enumerate(plan.ranks):
        offset = len(headers[index])
        for tensor in rank:
            width = NUMPY_DTYPES[tensor.dtype].itemsize
            for piece in tensor.pieces:
                yield index, offset, tensor, piece
                offset += piece.elements * width


def _moves(plan: ConversionPlan, tensors: CheckpointTensors, headers: Sequence[bytes]) -> list[_Move]:
    """All that is read from the source, in the order in which it lies there, cut into blocks."""
    found: dict[tuple[Any, ...], list[_Destination]] = defaultdict(list)
    for index, offset, tensor, piece in _placed(plan, headers):
        if isinstance(piece, Rectangle) and piece.elements:
            key = (piece.source, piece.rows, tensor.dtype, piece.recode)
            found[key].append(_Destination(index, offset, piece.columns))
    moves = [
        _Move(source, tensors.entry(source), rows, dtype, recode, tuple(destinations))
        for (source, rows, dtype, recode), destinations in found.items()
    ]
    moves = [block for move in moves for block in _blocks(move)]
    return sorted(moves, key=lambda move: (str(move.entry.file), move.begin))


def _blocks(move: _Move) -> Iterator[_Move]:
    """``move`` in steps of at most ``BLOCK_BYTES``, but of one row at least."""
    step = max(1, BLOCK_BYTES // _row_bytes(move.entry))
    width = NUMPY_DTYPES[move.dtype].itemsize
    for start in range(move.rows.start, move.rows.stop, step):
        rows = range(start, min(start + step, move.rows.stop))
        done = start - move.rows.start
        shifted = tuple(
            _Destination(place.rank, place.offset + done * len(place.columns) * width, place.columns)
            for place in move.destinations
        )
        yield _Move(move.source, move.entry, rows, move.dtype, move.recode, shifted)


def _numbers(
    plan: ConversionPlan, headers: Sequence[bytes]
) -> Iterator[tuple[int, int, str, Fill | Largest]]:
    for index, offset, tensor, piece in _placed(plan, headers):
        if isinstance(piece, Fill | Largest):
            yield index, offset, tensor.dtype, piece


def _row_bytes(entry: TensorEntry) -> int:
    return max(1, NUMPY_DTYPES[entry.dtype].itemsize * matrix_shape(entry)[1])


class _Writer:
    """Open files of a running conversion, and how far it is."""

    def __init__(
        self,
        files: ExitStack,
        tensors: CheckpointTensors,
        paths: Sequence[Path],
        *,
        scales: Scales,
        total: int,
        progress: Progress,
    ) -> None:
        self._tensors = tensors
        self._scales = scales
        self._total = max(1, total)
        self._progress = progress
        self._done = 0
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._ranks = [_opened(files, path, os.O_RDWR | os.O_CREAT | os.O_TRUNC) for path in paths]
        self._sources: Mapping[Path, int] = {path: _opened_source(files, path) for path in tensors.files()}

    def reserve(self, rank: int, header: bytes, data_bytes: int) -> None:
        """Write the header of a rank's file and give the file its final size."""
        self._write(rank, 0, header)
        os.ftruncate(self._ranks[rank], len(header) + data_bytes)

    def run(self, moves: Iterable[_Move], *, workers: int) -> None:
        """Carry out ``moves``, in order but for what ``workers`` do at the same time. The first failure ends it."""
        with ThreadPoolExecutor(max_workers=workers) as pool:
            queue = iter(moves)
            taking = threading.Lock()
            try:
                for job in as_completed(pool.submit(self._work, queue, taking) for _ in range(workers)):
                    job.result()
            finally:
                self._stopped.set()  # After a failure or an interrupt the others end with their block.

    def write_numbers(self, numbers: Iterable[tuple[int, int, str, Fill | Largest]]) -> None:
        """Write what no source tensor holds."""
        for rank, offset, dtype, piece in numbers:
            value = (
                piece.value
                if isinstance(piece, Fill)
                else max(piece.floor, *(self._scales.scalars[name] for name in piece.sources))
            )
            data = np.full(piece.elements, value, np.float32).astype(NUMPY_DTYPES[dtype])
            self._write(rank, offset, data.view(np.uint8).data)
            self._report(data.nbytes)

    def _work(self, queue: Iterator[_Move], taking: threading.Lock) -> None:
        while not self._stopped.is_set():
            with taking:
                move = next(queue, None)
            if move is None:
                return
            self._move(move)

    def _move(self, move: _Move) -> None:
        columns = matrix_shape(move.entry)[1]
        whole = all(len(place.columns) == columns for place in move.destinations)
        if whole and move.recode is None:
            for place in move.destinations:
                self._copy(move, place)
            return
        block = self._read(move).reshape(len(move.rows), columns)
        if move.recode is not None:
            block = recoded(
                block, move.recode, move.dtype, scales=self._scales, rows=move.rows, name=move.source
            )
        for place in move.destinations:
            part = np.ascontiguousarray(block[:, place.columns.start : place.columns.stop])
            self._write(place.rank, place.offset, part.reshape(-1).view(np.uint8).data)
            self._report(part.nbytes)

    def _read(self, move: _Move) -> npt.NDArray[Any]:
        wanted = len(move.rows) * _row_bytes(move.entry)
        data = np.empty(wanted, np.uint8)
        seen = 0
        while seen < wanted:
            count = os.preadv(self._sources[move.entry.file], [data[seen:].data], move.begin + seen)
            if count == 0:
                raise _truncated(move, wanted)
            seen += count
        return data.view(NUMPY_DTYPES[move.entry.dtype])

    def _copy(self, move: _Move, place: _Destination) -> None:
        """Move whole rows without bringing them into this process, where the file system can."""
        wanted = len(move.rows) * _row_bytes(move.entry)
        source, target = self._sources[move.entry.file], self._ranks[place.rank]
        done = 0
        while done < wanted:
            try:
                count = os.copy_file_range(
                    source, target, wanted - done, move.begin + done, place.offset + done
                )
            except OSError as error:
                if error.errno not in _NOT_COPIED_BY_KERNEL:
                    raise
                self._write(place.rank, place.offset, self._read(move).view(np.uint8).data)
                break
            if count == 0:
                raise _truncated(move, wanted)
            done += count
        self._report(wanted)

    def _write(self, rank: int, offset: int, data: Any) -> None:
        view = memoryview(data).cast("B")
        while view:
            count = os.pwrite(self._ranks[rank], view, offset)
            view, offset = view[count:], offset + count

    def _report(self, count: int) -> None:
        with self._lock:
            self._done += count
            self._progress(min(1.0, self._done / self._total))


def _truncated(move: _Move, wanted: int) -> SourceError:
    return SourceError(
        f"{move.entry.file} became shorter while it was read: expected {wanted} bytes at {move.begin}",
        hint="something else writes to the checkpoint; fetch it again",
    )


def _opened(files: ExitStack, path: Path, flags: int) -> int:
    descriptor = os.open(path, flags | os.O_CLOEXEC, 0o644)
    files.callback(os.close, descriptor)
    return descriptor


def _opened_source(files: ExitStack, path: Path) -> int:
    try:
        return _opened(files, path, os.O_RDONLY)
    except OSError as error:
        raise SourceError(f"cannot read {path}: {error.strerror}") from error

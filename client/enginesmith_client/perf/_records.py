"""What became of every request of a run: the raw material from which each figure can be computed again.

A file of records is JSON lines, the first of which names the format. It is written while the run goes on, so a run that
dies leaves what it measured.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, TypeAlias

from enginesmith_client.perf._errors import ResultsError

FORMAT = "enginesmith-bench-records"
VERSION = 1
# Small, because a load is on its way while it is written out.
_BUFFER_BYTES = 1 << 16
_FLUSH_S = 1.0
_line = json.JSONEncoder(separators=(",", ":")).encode

OutcomeKind: TypeAlias = Literal[
    "ok", "deadline", "overloaded", "connect", "not_ready", "invalid", "server", "cancelled"
]
"""``ok``, or the class of the client's error."""


@dataclass(frozen=True, slots=True)
class Record:
    """One request. Times are nanoseconds of the monotonic clock since the run's origin."""

    number: int
    """In the order in which the requests were due."""
    due_ns: int
    """When it should have been sent. In a closed loop that is when it was sent."""
    sent_ns: int
    ended_ns: int
    """The last response, or the failure."""
    outcome: OutcomeKind = "ok"
    error: str = ""
    """What the server or the client said of a failure."""
    rows: int = 1
    """Of the batch that the request carried."""
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    """Of the whole answer, as the server counted them; else the pieces of the stream."""
    piece_ns: tuple[int, ...] = ()
    """When each response of a stream came that had something in it. The first is the first token."""

    @property
    def latency_ns(self) -> int:
        """From when the request was due: what a user waited, whatever kept the generator from sending it."""
        return self.ended_ns - self.due_ns

    @property
    def lag_ns(self) -> int:
        """How late the generator was."""
        return self.sent_ns - self.due_ns

    @property
    def ttft_ns(self) -> int | None:
        """Time to first token, from when the request was due; None where the answer was no stream."""
        return self.piece_ns[0] - self.due_ns if self.piece_ns else None

    @property
    def ok(self) -> bool:
        """Whether it was answered."""
        return self.outcome == "ok"


class RecordWriter:
    """Appends records to a file, in the order in which they are given."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("w", encoding="utf-8", buffering=_BUFFER_BYTES)
        self._flushed_s = time.monotonic()
        self._file.write(json.dumps({"format": FORMAT, "version": VERSION}) + "\n")

    def write(self, record: Record) -> None:
        """Append one. It is with the operating system a second later at the latest, if another one follows."""
        self._file.write(_line(_plain(record)) + "\n")
        now_s = time.monotonic()
        if now_s - self._flushed_s >= _FLUSH_S:
            self._file.flush()
            self._flushed_s = now_s

    def close(self) -> None:
        """Write out what is buffered."""
        self._file.close()

    def __enter__(self) -> RecordWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def read_records(path: Path) -> list[Record]:
    """The records of a file, ordered by number. A last line that was cut off in the middle is left out.

    Raises:
        ResultsError: the file is missing, or is not one of records, or of another version.
    """
    return sorted(_read(path), key=lambda record: record.number)


def _read(path: Path) -> Iterator[Record]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    except (OSError, UnicodeDecodeError) as error:
        raise ResultsError(f"{path} cannot be read: {error}") from error
    _check_header(path, lines[0] if lines else "")
    for number, line in enumerate(lines[1:], start=2):
        try:
            yield _record(json.loads(line))
        except (ValueError, TypeError, KeyError) as error:
            if number == len(lines) and not line.endswith("\n"):
                return
            raise ResultsError(f"{path}, line {number}: not a record ({error})") from error


def _check_header(path: Path, line: str) -> None:
    try:
        header = json.loads(line)
        found = (header["format"], header["version"])
    except (ValueError, TypeError, KeyError) as error:
        raise ResultsError(
            f"{path} is not a file of benchmark records: its first line names no format"
        ) from error
    if found != (FORMAT, VERSION):
        raise ResultsError(
            f"{path} holds {found[0]} of version {found[1]}; this program reads {FORMAT} of version {VERSION}",
            hint="measure again with this version, or read it with the version that wrote it",
        )


def _plain(record: Record) -> dict[str, Any]:
    """Without what is as by default."""
    fields: dict[str, Any] = {
        "number": record.number,
        "due_ns": record.due_ns,
        "sent_ns": record.sent_ns,
        "ended_ns": record.ended_ns,
        "outcome": record.outcome,
    }
    if record.error:
        fields["error"] = record.error
    if record.rows != 1:
        fields["rows"] = record.rows
    if record.prompt_tokens is not None:
        fields["prompt_tokens"] = record.prompt_tokens
    if record.output_tokens is not None:
        fields["output_tokens"] = record.output_tokens
    if record.piece_ns:
        fields["piece_ns"] = record.piece_ns
    return fields


def _record(fields: dict[str, Any]) -> Record:
    return Record(**(fields | {"piece_ns": tuple(fields.get("piece_ns", ()))}))

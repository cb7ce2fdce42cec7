"""What became of every request of a run: the raw material from which each figure can be computed again.

A file of records is JSON lines, the first of which names the format. It is written while the run goes on, so a run that
dies leaves what it measured.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from enginesmith_client.perf._saved_files import Format, LineWriter, parsing, read_lines

FORMAT = Format("enginesmith-bench-records", holds="benchmark records")
_FLUSH_S = 1.0

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


_record = parsing(Record)


class RecordWriter(LineWriter):
    """Appends records to a file, in the order in which they are given. Errors as ``LineWriter``."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, FORMAT, flush_s=_FLUSH_S)

    def write(self, record: Record) -> None:
        """Append one."""
        self.append(_plain(record))


def read_records(path: Path) -> list[Record]:
    """The records of a file, ordered by number. A last line that was cut off in the middle is left out.

    Raises:
        ResultsError: the file is missing, or is not one of records, or of another version.
    """
    return sorted(read_lines(path, FORMAT, _record, item="a record"), key=lambda record: record.number)


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

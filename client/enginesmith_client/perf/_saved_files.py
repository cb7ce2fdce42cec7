"""Files of results: each says what it holds and in which version, and whatever keeps one from being written or read is an error.

Documents are JSON and appear at once or not at all; files of lines (JSON, one a line) grow while a run goes on, so a run that
dies leaves what it measured. Knows nothing of what is in them.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from enginesmith_client.perf._errors import ResultsError

LOCK_FILE = ".lock"
KINDS = {
    "comparison.json": "a comparison",
    "plan.json": "a comparison",
    "sweep.json": "a sweep",
    "suite.json": "a suite",
    "run.json": "a run",
}
"""What a directory of results holds, by the file that tells."""
# Small, because a load is on its way while it is written out.
_BUFFER_BYTES = 1 << 16
_line = json.JSONEncoder(separators=(",", ":")).encode

Dataclass = TypeVar("Dataclass")
Item = TypeVar("Item")
Writer = TypeVar("Writer", bound="LineWriter")
# Making one costs more than reading a run with it.
_ADAPTERS: dict[type, TypeAdapter[Any]] = {}


@dataclass(frozen=True)
class Format:
    """What a file says that it is."""

    name: str
    version: int = 1
    holds: str = "benchmark results"
    """For people."""

    @property
    def header(self) -> dict[str, Any]:
        """The keys in which a file says it."""
        return {"format": self.name, "version": self.version}

    def require(self, path: Path, header: Any) -> None:
        """Return when ``header``, as found in ``path``, is this one.

        Raises:
            ResultsError: it is none, or that of another format or version.
        """
        if not isinstance(header, Mapping) or not {"format", "version"} <= header.keys():
            raise ResultsError(f"{path} is not a file of {self.holds}: it names no format")
        found = (header["format"], header["version"])
        if found != (self.name, self.version):
            raise ResultsError(
                f"{path} holds {found[0]} of version {found[1]}; this program reads {self.name} of version {self.version}",
                hint="measure again with this version, or read it with the version that wrote it",
            )


class LineWriter:
    """Appends lines to a file of ``kind``, each with the operating system ``flush_s`` later at the latest, if another one follows.

    Raises:
        ResultsError: at any time: the file cannot be written. What was written before stays.
    """

    def __init__(self, path: Path, kind: Format, *, flush_s: float) -> None:
        self._path, self._flush_s = path, flush_s
        self._flushed_s = time.monotonic()
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("w", encoding="utf-8", buffering=_BUFFER_BYTES)
        self.append(kind.header)

    def append(self, fields: Mapping[str, Any]) -> None:
        """One line."""
        try:
            self._file.write(_line(fields) + "\n")
            now_s = time.monotonic()
            if now_s - self._flushed_s >= self._flush_s:
                self._file.flush()
                self._flushed_s = now_s
        except OSError as error:
            raise _unwritable(self._path, error) from error

    def close(self) -> None:
        """Write out what is buffered."""
        with writing(self._path):
            self._file.close()

    def __enter__(self: Writer) -> Writer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # What went wrong first is what must be told.
        with contextlib.suppress(*(() if kind is None else (ResultsError,))):
            self.close()


def read_lines(path: Path, kind: Format, parse: Callable[[str], Item], *, item: str) -> list[Item]:
    """What ``parse`` makes of each line that a ``LineWriter`` wrote. A last line that was cut off in the middle is left out.

    Args:
        parse: raises ValueError for a line that is none of these.
        item: what a line is called, with its article.

    Raises:
        ResultsError: the file is missing, of another format or version, or has a line that is no ``item``.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    except (OSError, UnicodeDecodeError) as error:
        raise ResultsError(f"{path} cannot be read: {error}") from error
    try:
        header = json.loads(lines[0]) if lines else None
    except ValueError:
        header = None
    kind.require(path, header)
    items = []
    for number, line in enumerate(lines[1:], start=2):
        try:
            items.append(parse(line))
        except ValueError as error:
            if number == len(lines) and not line.endswith("\n"):
                break
            raise ResultsError(f"{path}, line {number}: not {item} ({error})") from error
    return items


def parsing(kind: type[Item]) -> Callable[[str], Item]:
    """What makes a dataclass of a line, for ``read_lines``."""
    adapter = TypeAdapter(kind)

    def parse(line: str) -> Item:
        try:
            return adapter.validate_json(line)
        except ValidationError as error:
            first = error.errors()[0]
            raise ValueError(": ".join([*map(str, first["loc"]), first["msg"]])) from error

    return parse


def write_document(path: Path, kind: Format, content: Mapping[str, Any]) -> None:
    """Write JSON that says what it is; the file appears at once or not at all.

    Raises:
        ResultsError: it cannot be written.
    """
    text = json.dumps(kind.header | dict(content), indent=1, allow_nan=False) + "\n"
    with appearing(path) as staging:
        staging.write_text(text, encoding="utf-8")


def read_document(path: Path, kind: Format) -> dict[str, Any]:
    """What ``write_document`` wrote.

    Raises:
        ResultsError: it is missing, damaged, something else, or of another version.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ResultsError(f"{path} is not there", hint="give the directory of a finished run") from error
    except (OSError, ValueError) as error:
        said = error.strerror if isinstance(error, OSError) else f"it is no whole JSON ({error})"
        raise ResultsError(
            f"{path} cannot be read as benchmark results: {said}",
            hint="a file that was cut or changed cannot be repaired: measure again",
        ) from error
    kind.require(path, document)
    return {key: value for key, value in document.items() if key not in kind.header}


def from_plain(kind: type[Dataclass], plain: Mapping[str, Any]) -> Dataclass:
    """A dataclass from its plain JSON values.

    Raises:
        ResultsError: a field is missing or of another type.
    """
    try:
        if kind not in _ADAPTERS:
            _ADAPTERS[kind] = TypeAdapter(kind)
        read: Dataclass = _ADAPTERS[kind].validate_json(json.dumps(plain))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ResultsError(
            f"saved results cannot be read as {kind.__name__}: {where}: {first['msg']}"
        ) from error
    return read


def timestamp() -> str:
    """This moment as results name it: UTC, ISO 8601."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")  # noqa: UP017 - the client runs on 3.10


@contextlib.contextmanager
def appearing(path: Path) -> Iterator[Path]:
    """Where to write what is to be ``path``: it is there, whole, when the block has ended well, and not before.

    Raises:
        ResultsError: it cannot be written.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        staging = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            yield staging
            os.replace(staging, path)
        finally:
            staging.unlink(missing_ok=True)


@contextlib.contextmanager
def only_writer(directory: Path, *, results_file: str = "") -> Iterator[None]:
    """Make ``directory``, and keep all others from measuring into it while the block runs.

    Args:
        results_file: what will hold the results; one of ``KINDS``, whose others must not be there then.

    Raises:
        ResultsError: another process (or thread) measures into it, it holds results of another kind, or it cannot be written.
    """
    _check_kind(directory, results_file)
    with writing(directory):
        directory.mkdir(parents=True, exist_ok=True)
        lock = (directory / LOCK_FILE).open("a", encoding="utf-8")
    with lock:
        if not _locked(lock.fileno()):
            raise ResultsError(
                f"something else is measuring into {directory} right now",
                hint="wait until it is done, or give another directory",
            )
        yield


def _check_kind(directory: Path, results_file: str) -> None:
    wanted = KINDS.get(results_file)
    there = next(
        (kind for name, kind in KINDS.items() if kind != wanted and (directory / name).exists()), None
    )
    if wanted is not None and there is not None:
        raise ResultsError(
            f"{directory} holds {there} already, and cannot hold {wanted} too", hint="give another directory"
        )


def _locked(descriptor: int) -> bool:
    """Lock an open file until it is closed; False where somebody else has it."""
    if sys.platform == "win32":
        return True
    import fcntl

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True  # A file system that has no locks cannot keep anybody out.
    return True


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """What keeps ``path`` from being written in the block is a ``ResultsError``."""
    try:
        yield
    except OSError as error:
        raise _unwritable(path, error) from error


def _unwritable(path: Path, error: OSError) -> ResultsError:
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return ResultsError(
        f"{path} cannot be written: {error.strerror or error}",
        hint=f"{'make room there' if full else 'allow it'}, or give another directory; what was written until then is kept",
    )

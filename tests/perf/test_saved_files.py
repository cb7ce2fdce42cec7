"""Files of results: what is on disk when writing fails, and who may write."""

import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from enginesmith_client.perf._errors import ResultsError
from enginesmith_client.perf._records import Record, RecordWriter, read_records
from enginesmith_client.perf._saved_files import (
    Format,
    appearing,
    only_writer,
    read_document,
    write_document,
)

NOTES = Format("notes", 2)


@contextmanager
def files_of_at_most(size_bytes: int) -> Iterator[None]:
    """As on a disk that is full: no file of this process may grow beyond that."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def write_many(path: Path) -> None:
    with RecordWriter(path) as writer:
        for number in range(10_000):
            writer.write(Record(number, 1, 2, 3))


def test_records_that_fit_are_kept_when_the_disk_is_full(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    with (
        files_of_at_most(100_000),
        pytest.raises(ResultsError, match=r"records\.jsonl cannot be written: .*\n.*until then is kept"),
    ):
        write_many(path)
    kept = [record.number for record in read_records(path)]
    assert kept == list(range(len(kept)))
    assert len(kept) > 1000


def test_a_disk_that_is_full_is_noticed_at_the_end_at_the_latest() -> None:
    with (
        pytest.raises(ResultsError, match="/dev/full cannot be written: No space left"),
        RecordWriter(Path("/dev/full")),
    ):
        pass  # fmt: skip


def test_what_went_wrong_first_is_what_is_told() -> None:
    with pytest.raises(KeyboardInterrupt), RecordWriter(Path("/dev/full")):
        raise KeyboardInterrupt


WRONG_TIME = '{"number":1,"due_ns":"soon","sent_ns":2,"ended_ns":3}'
WRONG_PIECES = '{"number":1,"due_ns":1,"sent_ns":2,"ended_ns":3,"piece_ns":"abc"}'


@pytest.mark.parametrize(
    "line", ["[]", "5", '{"number": 1}', '{"number": 1, "name": "x"}', "{", WRONG_TIME, WRONG_PIECES]
)
def test_a_line_that_is_no_record_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "records.jsonl"
    with RecordWriter(path) as writer:
        writer.write(Record(0, 1, 2, 3))
    path.write_text(f"{path.read_text()}{line}\n")
    with pytest.raises(ResultsError, match="line 3: not a record"):
        read_records(path)


def test_a_document_says_what_it_is_and_is_whole_or_not_there(tmp_path: Path) -> None:
    path = tmp_path / "deeper" / "notes.json"
    write_document(path, NOTES, {"a": [1]})
    assert read_document(path, NOTES) == {"a": [1]}
    with files_of_at_most(100), pytest.raises(ResultsError, match=r"notes\.json cannot be written"):
        write_document(path, NOTES, {"a": list(range(1000))})
    assert read_document(path, NOTES) == {"a": [1]}
    assert [one.name for one in path.parent.iterdir()] == ["notes.json"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "cannot be read as benchmark results: it is no whole JSON .Expecting value: line 1"),
        ("[]", "is not a file of benchmark results: it names no format"),
        ('{"format": "notes"}', "is not a file of benchmark results: it names no format"),
        ('{"format": "notes", "version": 1}', "holds notes of version 1; this program reads notes of version 2"),
        ('{"format": "others", "version": 2}', "holds others of version 2; this program reads notes"),
    ],
)  # fmt: skip
def test_a_document_of_something_else_is_refused(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "notes.json"
    path.write_text(text)
    with pytest.raises(ResultsError, match=words):
        read_document(path, NOTES)


def test_a_file_that_fails_half_way_does_not_appear(tmp_path: Path) -> None:
    def failing() -> None:
        with appearing(tmp_path / "page.html") as staging:
            staging.write_text("half")
            raise ValueError

    with pytest.raises(ValueError):  # noqa: PT011 - any will do
        failing()
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_cannot_be_made_is_an_error_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ResultsError, match="cannot be written"), only_writer(tmp_path / "file" / "out"):
        pass


HOLDER = """
import sys
from pathlib import Path
from enginesmith_client.perf._saved_files import only_writer
with only_writer(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_one_process_at_a_time_measures_into_a_directory_and_a_dead_one_does_not(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(ResultsError, match="something else is measuring into"), only_writer(tmp_path):
            pass
        holder.kill()
        holder.wait()
    with only_writer(tmp_path):
        pass

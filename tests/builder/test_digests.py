"""Digests: equal content gives equal digests, and the memory of them never answers for changed files."""

from __future__ import annotations

import hashlib
import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from enginesmith.digests import FileDigests, file_digest, source_digest, tree_digest
from enginesmith.errors import SourceError, StoreError, ToolchainError

_LONG_AGO_NS = 1_600_000_000 * 10**9


def _write(path: Path, content: bytes, *, mtime_ns: int = _LONG_AGO_NS) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    os.utime(path, ns=(mtime_ns, mtime_ns))
    return path


def test_file_digest_is_sha256(tmp_path: Path) -> None:
    content = b"x" * 5_000_000
    assert file_digest(_write(tmp_path / "a", content)) == hashlib.sha256(content).hexdigest()


def test_known_file_is_not_read_again(tmp_path: Path) -> None:
    path = _write(tmp_path / "a", b"first")
    with FileDigests(tmp_path / "db") as digests:
        digest = digests.digest(path)
        # Same size, time and inode: only the memory can give the old digest.
        with path.open("r+b") as file:
            file.write(b"other")
        os.utime(path, ns=(_LONG_AGO_NS, _LONG_AGO_NS))
        assert digests.digest(path) == digest


@pytest.mark.parametrize("change", ["size", "mtime", "inode"])
def test_changed_file_is_read_again(tmp_path: Path, change: str) -> None:
    path = _write(tmp_path / "a", b"first")
    with FileDigests(tmp_path / "db") as digests:
        before = digests.digest(path)
        if change == "inode":
            os.replace(_write(tmp_path / "b", b"other"), path)
        else:
            _write(
                path,
                b"longer text" if change == "size" else b"other",
                mtime_ns=_LONG_AGO_NS + (change == "mtime"),
            )
        assert digests.digest(path) != before


def test_file_written_just_now_is_not_remembered(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"fresh")
    with FileDigests(tmp_path / "db") as digests:
        digests.digest(path)
        assert digests.remembered(path, path.stat()) is None


def test_memory_is_shared_by_processes(tmp_path: Path) -> None:
    paths = [_write(tmp_path / f"file{number}", str(number).encode()) for number in range(20)]
    script = (
        "import sys; from pathlib import Path; from enginesmith.digests import FileDigests\n"
        "with FileDigests(Path(sys.argv[1])) as digests:\n"
        "    for path in sys.argv[2:]: digests.digest(Path(path))"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "db"), *map(str, paths)]
    processes = [subprocess.Popen(command) for _ in range(3)]
    assert [process.wait() for process in processes] == [0, 0, 0]
    with FileDigests(tmp_path / "db") as digests:
        assert all(digests.remembered(path, path.stat()) == file_digest(path) for path in paths)


def test_damaged_memory_is_named(tmp_path: Path) -> None:
    (tmp_path / "db").write_bytes(b"this is not a database" * 100)
    with FileDigests(tmp_path / "db") as digests, pytest.raises(StoreError, match="delete that file"):
        digests.digest(_write(tmp_path / "a", b"x"))


def test_memory_on_a_full_disk_costs_only_time(tmp_path: Path) -> None:
    with FileDigests(tmp_path / "db") as digests:
        path = _write(tmp_path / "a", b"x")
        digests.digest(path)
        (pages,) = sqlite3.connect(tmp_path / "db").execute("PRAGMA page_count").fetchone()
        digests._connection.execute(f"PRAGMA max_page_count = {pages}")  # type: ignore[union-attr]
        many = [_write(tmp_path / f"{'long' * 50}{number}", b"x") for number in range(60)]
        assert {digests.digest(path) for path in many} == {file_digest(path)}


_NAMES = st.text(alphabet="abc", min_size=1, max_size=3)


@given(
    left=st.dictionaries(_NAMES, st.binary(max_size=4), max_size=4),
    right=st.dictionaries(_NAMES, st.binary(max_size=4), max_size=4),
)
def test_tree_digests_are_equal_exactly_when_trees_are(
    tmp_path_factory: pytest.TempPathFactory, left: dict[str, bytes], right: dict[str, bytes]
) -> None:
    roots = []
    for tree in (left, right):
        roots.append(tmp_path_factory.mktemp("tree"))
        for name, content in tree.items():
            _write(roots[-1] / name / "file", content)
    assert (tree_digest(roots[0]) == tree_digest(roots[1])) == (left == right)


def test_tree_digest_ignores_caches_and_hidden_files(tmp_path: Path) -> None:
    _write(tmp_path / "a.py", b"x")
    before = tree_digest(tmp_path)
    _write(tmp_path / "__pycache__" / "a.pyc", b"compiled")
    _write(tmp_path / ".git" / "HEAD", b"ref")
    assert tree_digest(tmp_path) == before


def test_tree_digest_follows_links_to_files_but_not_to_directories(tmp_path: Path) -> None:
    target = _write(tmp_path / "blobs" / "b", b"x")
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "a").symlink_to(target)
    _write(tmp_path / "plain" / "a", b"x")
    assert tree_digest(tmp_path / "linked") == tree_digest(tmp_path / "plain")
    (tmp_path / "plain" / "more").symlink_to(tmp_path / "blobs")
    with pytest.raises(SourceError, match="link to a directory"):
        tree_digest(tmp_path / "plain")


def test_source_digest_covers_a_whole_package_and_imports_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("__init__.py", "part/__init__.py", "part/one.py", "part/template.jinja"):
        _write(tmp_path / "explosive" / name, b"raise SystemExit('imported')")
    before = {name: source_digest(name) for name in ("explosive", "explosive.part", "explosive.part.one")}
    _write(tmp_path / "explosive" / "part" / "template.jinja", b"changed")
    assert source_digest("explosive.part") != before["explosive.part"]
    assert source_digest("explosive") != before["explosive"]
    assert source_digest("explosive.part.one") == before["explosive.part.one"]
    assert not any(name.startswith("explosive") for name in sys.modules)


def test_source_digest_names_a_missing_module() -> None:
    with pytest.raises(ToolchainError, match=r"enginesmith\.nowhere was not found"):
        source_digest("enginesmith.nowhere")

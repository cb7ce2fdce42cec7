"""The store: what was committed is there, whole, or not at all."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from filelock import Timeout

from enginesmith.collect import collect_garbage
from enginesmith.errors import StoreError
from enginesmith.records import remember_root
from enginesmith.store import Artifact, ArtifactStore, Damage

KEY = "ab" * 32
OTHER = "cd" * 32


class _Recording(ArtifactStore):
    def __init__(self, root: Path) -> None:
        self.warnings: list[str] = []
        super().__init__(root, warn=self.warnings.append)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[_Recording]:
    store = _Recording(tmp_path / "store")
    yield store
    store.digests.close()


def _put(store: ArtifactStore, key: str = KEY, text: str = "content", **facts: Any) -> Artifact:
    with store.staging(key) as staging:
        (staging.files / "sub").mkdir()
        (staging.files / "sub" / "a.txt").write_text(text)
        (staging.files / "b.bin").write_bytes(b"\0" * 1000)
        return staging.commit(
            kind="fetch", parts={"kind": "fetch"}, facts=facts, duration_s=1.5, peak_rss_bytes=7
        )


def _leftovers(store: ArtifactStore) -> list[Path]:
    return list((store.root / "staging").glob("*")) + list((store.root / "artifacts").glob("*/*"))


def test_committed_artifact_is_found_with_everything_recorded(store: _Recording) -> None:
    committed = _put(store, facts_are="kept")
    found = ArtifactStore(store.root).get(KEY, verify="full")
    assert found == committed
    assert found is not None
    assert (found.path / "sub" / "a.txt").read_text() == "content"
    assert (found.facts, found.duration_s, found.peak_rss_bytes) == ({"facts_are": "kept"}, 1.5, 7)
    assert found.size_bytes == 1007
    assert list((store.root / "staging").iterdir()) == []


def test_artifact_files_are_read_only(store: _Recording) -> None:
    artifact = _put(store)
    modes = {path.stat().st_mode & 0o777 for path in artifact.path.rglob("*") if path.is_file()}
    assert modes == {0o444}


def test_unknown_key_is_none_and_makes_nothing(store: _Recording) -> None:
    assert store.get(KEY) is None
    assert not store.root.exists()


def test_what_is_not_committed_leaves_nothing(store: _Recording) -> None:
    def fail_half_way() -> None:
        with store.staging(KEY) as staging:
            (staging.files / "half").write_text("x")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail_half_way()
    assert _leftovers(store) == []
    assert store.get(KEY) is None


def _flip(path: Path, *, keep_time: bool = False) -> None:
    status = path.stat()
    path.chmod(0o644)
    content = path.read_bytes()
    path.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    if keep_time:
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize(
    "damage", ["flipped", "truncated", "missing", "extra", "link", "no manifest", "bad manifest"]
)
def test_damaged_entry_is_quarantined_named_and_rebuilt(store: _Recording, damage: str) -> None:
    artifact = _put(store)
    victim, manifest = artifact.path / "sub" / "a.txt", artifact.path.parent / "manifest.json"
    named = victim
    match damage:
        case "flipped":
            _flip(victim)
        case "truncated":
            os.truncate(victim, 3)
        case "missing":
            victim.unlink()
        case "extra":
            named = victim.with_name("intruder")
            named.write_text("x")
        case "link":
            os.replace(victim, store.root / "elsewhere")
            victim.symlink_to(store.root / "elsewhere")
        case "no manifest":
            manifest.unlink()
            named = manifest
        case "bad manifest":
            manifest.chmod(0o644)
            manifest.write_text(json.dumps({"key": KEY}))
            named = manifest
    assert isinstance(store.inspect(KEY), Damage)
    assert artifact.path.exists(), "inspecting must not move anything"

    assert store.get(KEY) is None
    assert len(store.warnings) == 1
    assert str(named) in store.warnings[0]
    assert store.is_quarantined(KEY)
    assert len(list((store.root / "quarantine").iterdir())) == 1
    _put(store)
    assert store.get(KEY, verify="full") is not None


def test_only_full_verification_sees_bytes_changed_behind_the_file_times(store: _Recording) -> None:
    artifact = _put(store)
    _flip(artifact.path / "sub" / "a.txt", keep_time=True)
    assert isinstance(store.inspect(KEY, verify="quick"), Artifact)
    assert isinstance(store.inspect(KEY, verify="full"), Damage)


def test_cache_files_of_python_are_not_damage(store: _Recording) -> None:
    artifact = _put(store)
    (artifact.path / "sub" / "__pycache__").mkdir()
    (artifact.path / "sub" / "__pycache__" / "a.pyc").write_bytes(b"x")
    assert store.get(KEY) is not None


def test_entry_under_another_key_is_damage(store: _Recording) -> None:
    _put(store)
    shutil.copytree(store.entry(KEY), store.entry(OTHER))
    damage = store.inspect(OTHER)
    assert isinstance(damage, Damage)
    assert "another key" in damage.reason


def test_link_cannot_be_committed(store: _Recording) -> None:
    with store.staging(KEY) as staging:
        (staging.files / "a").symlink_to("/etc/hostname")
        with pytest.raises(StoreError, match="is a link"):
            staging.commit(kind="fetch", parts={}, facts={}, duration_s=0, peak_rss_bytes=0)
    assert _leftovers(store) == []


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_disk_full_while_committing_is_one_error_and_no_entry(
    store: _Recording, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, call, full)
    with pytest.raises(
        StoreError, match=r"disk is full.*room for 1,007 bytes, [\d,]+ bytes are free.*\n.*gc"
    ):
        _put(store)
    monkeypatch.undo()
    assert _leftovers(store) == []
    _put(store)
    assert store.get(KEY) is not None


def test_disk_that_is_really_full_is_one_error_and_no_entry(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", disk], capture_output=True
    ).returncode:
        pytest.skip("mounting a small file system is not permitted here")
    try:
        store = ArtifactStore(disk / "store")
        with store.staging(KEY) as staging:
            with (staging.files / "big").open("wb", buffering=0) as file:
                while file.write(bytes(4096)) == 4096 and shutil.disk_usage(disk).free:
                    pass
            with pytest.raises(StoreError, match="disk is full"):
                staging.commit(
                    kind="fetch", parts={"x": "y" * 9000}, facts={}, duration_s=0, peak_rss_bytes=0
                )
        assert _leftovers(store) == []
        _put(store)
        assert store.get(KEY) is not None
        store.digests.close()
    finally:
        subprocess.run(["umount", disk], check=True)


_BUILDER = """
import os, sys
from pathlib import Path
from enginesmith.store import ArtifactStore
root, key, release = sys.argv[1:]
with ArtifactStore(Path(root)).staging(key, on_wait=lambda: print("waiting", flush=True)) as staging:
    if staging.existing:
        print("found", flush=True)
        raise SystemExit
    (staging.files / "a").write_text("x")
    print("staged", flush=True)
    if release != "-":
        Path(release).read_text()
    staging.commit(kind="fetch", parts={}, facts={}, duration_s=0, peak_rss_bytes=0)
    print("committed", flush=True)
"""


def _builder(store: ArtifactStore, release: Path | str = "-") -> subprocess.Popen[str]:
    command = [sys.executable, "-c", _BUILDER, str(store.root), KEY, str(release)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def _line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def test_second_builder_waits_for_the_first_and_finds_its_artifact(store: _Recording, tmp_path: Path) -> None:
    release = tmp_path / "release"
    os.mkfifo(release)
    with _builder(store, release) as first:
        assert _line(first) == "staged"
        with _builder(store, release) as second:
            assert _line(second) == "waiting"
            release.write_text("go")
            assert _line(first) == "committed"
            assert _line(second) == "found"
    assert (first.returncode, second.returncode) == (0, 0)


def test_killed_builder_frees_its_lock_and_its_staging_is_removed(store: _Recording, tmp_path: Path) -> None:
    release = tmp_path / "release"
    os.mkfifo(release)
    with _builder(store, release) as killed:
        assert _line(killed) == "staged"
        store.clean_staging()
        assert len(_leftovers(store)) == 1, "a living builder keeps its staging"
        killed.kill()
    assert len(_leftovers(store)) == 1
    store.clean_staging()
    assert _leftovers(store) == []
    with _builder(store) as again:
        assert [_line(again), _line(again)] == ["staged", "committed"]


@pytest.mark.parametrize(("call", "number"), [("fsync", 1), ("fsync", 3), ("replace", 1)])
def test_builder_killed_while_committing_leaves_no_entry(store: _Recording, call: str, number: int) -> None:
    kill = f"from tiny_steps import kill_in_call\nkill_in_call({call!r}, {number})\n"
    command = [sys.executable, "-c", kill + _BUILDER, str(store.root), KEY, "-"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    assert subprocess.run(command, env=environment, stdout=subprocess.DEVNULL).returncode == -signal.SIGKILL
    assert store.inspect(KEY) is None
    _put(store)
    assert isinstance(store.inspect(KEY, verify="full"), Artifact)
    assert list((store.root / "staging").iterdir()) == []


def test_waiting_for_a_lock_can_be_cancelled(store: _Recording, tmp_path: Path) -> None:
    release = tmp_path / "release"
    os.mkfifo(release)
    waited: list[str] = []
    with _builder(store, release) as holder:
        assert _line(holder) == "staged"
        waiting = store.staging(KEY, on_wait=lambda: waited.append("yes"), cancelled=lambda: bool(waited))
        with pytest.raises(Timeout), waiting:
            pass
        holder.kill()
    assert waited == ["yes"]


def test_damage_is_left_alone_while_a_builder_works_on_the_key(store: _Recording) -> None:
    artifact = _put(store)
    (artifact.path / "b.bin").unlink()
    with store.lock(KEY, timeout_s=0):
        assert store.get(KEY) is None
        assert store.entry(KEY).exists()
    assert store.get(KEY) is None
    assert not store.entry(KEY).exists()


def _remember(store: ArtifactStore, name: str, keys: tuple[str, ...]) -> None:
    remember_root(store, name, spec_path=None, places={"v": keys}, all_places=frozenset({"", "v"}))


def test_gc_keeps_what_a_plan_needs_and_reports_the_rest(store: _Recording) -> None:
    _put(store)
    _put(store, OTHER)
    _remember(store, "spec", (KEY,))
    preview = collect_garbage(store, dry_run=True)
    assert (preview.removed, store.get(OTHER) is None) == ((OTHER,), False)
    report = collect_garbage(store)
    assert (report.removed, report.kept, report.busy) == ((OTHER,), 1, ())
    assert report.freed_bytes == preview.freed_bytes > 1007
    assert store.get(KEY) is not None
    assert store.get(OTHER) is None


def test_gc_forgets_a_spec_on_request_only(store: _Recording) -> None:
    _put(store)
    _remember(store, "old", (KEY,))
    assert collect_garbage(store).removed == ()
    with pytest.raises(StoreError, match=r"no plan of typo; it has: old"):
        collect_garbage(store, forget=["typo"])
    assert collect_garbage(store, forget=["old"]).removed == (KEY,)
    with pytest.raises(StoreError, match="it has: none"):
        collect_garbage(store, forget=["old"])


def test_gc_leaves_new_and_locked_entries(store: _Recording) -> None:
    _put(store)
    assert collect_garbage(store, older_than_days=1).kept == 1
    with store.lock(KEY, timeout_s=0):
        assert collect_garbage(store).busy == (KEY,)
    assert collect_garbage(store).removed == (KEY,)


def test_gc_removes_quarantined_entries_and_old_staging(store: _Recording) -> None:
    artifact = _put(store)
    (artifact.path / "b.bin").unlink()
    store.get(KEY)
    (store.root / "staging" / f"{OTHER}.0000").mkdir()
    (removed,) = collect_garbage(store).removed
    assert removed.startswith(KEY)
    assert not store.is_quarantined(KEY)
    assert _leftovers(store) == []


def test_gc_refuses_when_a_record_is_unreadable(store: _Recording) -> None:
    _put(store)
    _remember(store, "spec", ())
    (record,) = (store.root / "roots").iterdir()
    record.write_text("{")
    with pytest.raises(StoreError, match=str(record)):
        collect_garbage(store)
    assert store.get(KEY) is not None


def test_plan_of_one_variant_keeps_what_the_others_had(store: _Recording) -> None:
    _put(store)
    everything = frozenset({"", "a", "b"})
    remember_root(store, "s", spec_path=None, places={"a": (KEY,), "b": (OTHER,)}, all_places=everything)
    remember_root(store, "s", spec_path=None, places={"b": ("ef" * 32,)}, all_places=everything)
    assert collect_garbage(store).removed == ()
    remember_root(store, "s", spec_path=None, places={"b": ()}, all_places=everything - {"a"})
    assert collect_garbage(store).removed == (KEY,)

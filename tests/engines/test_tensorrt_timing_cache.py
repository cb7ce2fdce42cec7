"""The timing cache file: whole or gone, never half, whoever writes at the same time."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from enginesmith.engines.tensorrt.timing_cache import add_to_timing_cache, read_timing_cache


def union(fresh: bytes, kept: bytes) -> bytes:
    """A cache of these tests: a set of words."""
    return b" ".join(sorted({*fresh.split(), *kept.split()}))


def test_what_was_added_is_read_and_the_next_builder_adds_to_it(tmp_path: Path) -> None:
    path = tmp_path / "caches" / "sm86.cache"
    assert read_timing_cache(path) == b""
    add_to_timing_cache(path, b"conv", union)
    size = add_to_timing_cache(path, b"matmul", union)
    assert read_timing_cache(path) == b"conv matmul"
    assert size == path.stat().st_size


@pytest.mark.parametrize("damage", [b"", b"garbage", b"enginesmith timing cache 1 0000\nconv"])
def test_damaged_cache_is_thrown_away_with_a_warning(
    damage: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "sm86.cache"
    path.write_bytes(damage)
    assert read_timing_cache(path) == b""
    assert f"the timing cache {path} is damaged" in capsys.readouterr().err
    assert not path.exists()
    add_to_timing_cache(path, b"conv", union)
    assert read_timing_cache(path) == b"conv"


@pytest.mark.parametrize("position", [0, 40, -1])
def test_one_flipped_byte_anywhere_is_damage(position: int, tmp_path: Path) -> None:
    path = tmp_path / "sm86.cache"
    add_to_timing_cache(path, b"a measurement of some kernel", union)
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(bytes(content))
    assert read_timing_cache(path) == b""


def test_failed_combination_leaves_the_old_cache_and_no_litter(tmp_path: Path) -> None:
    path = tmp_path / "sm86.cache"
    add_to_timing_cache(path, b"conv", union)

    def refuse(fresh: bytes, kept: bytes) -> bytes:
        raise RuntimeError(f"{fresh!r} and {kept!r} are of different GPUs")

    with pytest.raises(RuntimeError, match="different GPUs"):
        add_to_timing_cache(path, b"matmul", refuse)
    assert read_timing_cache(path) == b"conv"
    assert {file.name for file in tmp_path.iterdir()} <= {"sm86.cache", "sm86.cache.lock"}


_ADD_MANY = """
import sys
from pathlib import Path
from enginesmith.engines.tensorrt.timing_cache import add_to_timing_cache
union = lambda fresh, kept: b" ".join(sorted({*fresh.split(), *kept.split()}))
for index in range(40):
    add_to_timing_cache(Path(sys.argv[1]), f"{sys.argv[2]}{index}".encode(), union)
"""


def test_builders_at_once_lose_nothing_of_each_other(tmp_path: Path) -> None:
    path = tmp_path / "sm86.cache"
    builders = [
        subprocess.Popen([sys.executable, "-c", _ADD_MANY, str(path), name]) for name in ("a", "b", "c")
    ]
    assert [builder.wait() for builder in builders] == [0, 0, 0]
    expected = {f"{name}{index}".encode() for name in "abc" for index in range(40)}
    assert set(read_timing_cache(path).split()) == expected

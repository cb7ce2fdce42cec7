"""Disks that fill up, sources that shrink, processes that are killed: nothing is left that looks complete."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from trtllm_shards import Geometry, random_checkpoint

from enginesmith.engines.tensorrt_llm.convert import convert_checkpoint
from enginesmith.engines.tensorrt_llm.mapping import Mapping
from enginesmith.errors import OperatorError, SourceError

GEOMETRY = Geometry(layers=2, heads=8, kv_heads=4, head_dim=32, hidden=512, ffn=2048, vocab=4000)

CONVERT = """
import os, resource, sys
from pathlib import Path
from enginesmith.engines.tensorrt_llm.convert import convert_checkpoint
from enginesmith.engines.tensorrt_llm.mapping import Mapping
from enginesmith.errors import EnginesmithError

source, out, mode = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
if mode == "limited":
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))

def progress(fraction):
    if mode == "killed" and fraction > 0.3:
        print("writing", flush=True)
        sys.stdin.read()  # Until the test kills this process.

try:
    convert_checkpoint(source, out, mapping=Mapping(2), workers=2, progress=progress)
except EnginesmithError as error:
    print(f"{type(error).__name__}: {error}", file=sys.stderr)
    sys.exit(error.exit_code)
"""


# Not getrusage's ru_maxrss: a process that was forked from this one inherits its peak.
PRINT_PEAK = """
status = Path("/proc/self/status").read_text()
print(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:")))
"""


def process(source: Path, out: Path, mode: str) -> subprocess.Popen[str]:
    """A conversion in a process of its own."""
    command = [sys.executable, "-c", CONVERT, str(source), str(out), mode]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True)


def test_a_process_killed_while_it_writes_leaves_nothing_that_looks_complete(tmp_path: Path) -> None:
    source, out = random_checkpoint(tmp_path / "source", GEOMETRY), tmp_path / "out"
    with process(source, out, "killed") as running:
        assert running.stdout is not None
        assert running.stdout.readline() == "writing\n"
        running.send_signal(signal.SIGKILL)
        running.wait()
    left = {path.name for path in out.iterdir()}
    assert left == {"rank0.safetensors.partial", "rank1.safetensors.partial"}
    # The next attempt is not disturbed by what is left.
    convert_checkpoint(source, out, mapping=Mapping(2))
    assert {path.name for path in out.iterdir()} == {"config.json", "rank0.safetensors", "rank1.safetensors"}


def test_a_second_writer_is_refused_and_the_first_loses_nothing(tmp_path: Path) -> None:
    source, out = random_checkpoint(tmp_path / "source", GEOMETRY), tmp_path / "out"
    with process(source, out, "killed") as first:
        assert first.stdout is not None
        assert first.stdout.readline() == "writing\n"
        with pytest.raises(OperatorError, match="another process is writing a TensorRT-LLM checkpoint in"):
            convert_checkpoint(source, out, mapping=Mapping(1))
        _, errors = first.communicate()  # Closes what it waits for.
    assert (first.returncode, errors) == (0, "")
    convert_checkpoint(source, tmp_path / "alone", mapping=Mapping(2))
    alone = {path.name: path.read_bytes() for path in (tmp_path / "alone").iterdir()}
    assert {path.name: path.read_bytes() for path in out.iterdir()} == alone


def test_a_file_size_limit_is_one_error_and_leaves_nothing(tmp_path: Path) -> None:
    source, out = random_checkpoint(tmp_path / "source", GEOMETRY), tmp_path / "out"
    with process(source, out, "limited") as running:
        _, errors = running.communicate()
    assert running.returncode == 1
    assert errors.startswith(
        f"OperatorError: cannot write the TensorRT-LLM checkpoint in {out}: File too large"
    )
    assert "Traceback" not in errors
    assert list(out.iterdir()) == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Path:
    """A file system of 8 MiB, where this user may mount one."""
    directory = tmp_path / "disk"
    directory.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(directory)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("needs the right to mount a small file system")
    return directory


@pytest.fixture
def unmounted(small_disk: Path):  # type: ignore[no-untyped-def]
    """The small disk, unmounted afterwards."""
    yield small_disk
    subprocess.run(["umount", str(small_disk)], check=True)


def test_a_disk_that_is_too_small_is_refused_before_writing(tmp_path: Path, unmounted: Path) -> None:
    source = random_checkpoint(tmp_path / "source", GEOMETRY)
    with pytest.raises(OperatorError, match=r"GiB free, the TensorRT-LLM checkpoint needs .* GiB"):
        convert_checkpoint(source, unmounted / "out", mapping=Mapping(2))
    assert list((unmounted / "out").iterdir()) == []


def test_a_disk_that_fills_up_while_writing_is_one_error_and_leaves_nothing(
    tmp_path: Path, unmounted: Path
) -> None:
    geometry = Geometry(layers=1, heads=4, kv_heads=2, head_dim=32, hidden=256, ffn=1024, vocab=4000)
    source = random_checkpoint(tmp_path / "source", geometry)
    filler = unmounted / "other"

    def fill(fraction: float) -> None:
        if not filler.exists():
            with filler.open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, 7 << 20)

    with pytest.raises(OperatorError, match="No space left on device"):
        convert_checkpoint(source, unmounted / "out", mapping=Mapping(2), progress=fill)
    assert list((unmounted / "out").iterdir()) == []


@pytest.mark.parametrize("tensor", [1, 2], ids=["rows", "columns"])
def test_a_source_cut_off_while_it_is_read_is_named(tmp_path: Path, tensor: int) -> None:
    source, out = random_checkpoint(tmp_path / "source", GEOMETRY), tmp_path / "out"

    def cut(fraction: float) -> None:
        os.truncate(source / "model.safetensors", 1 << 20)

    with pytest.raises(SourceError, match=r"model\.safetensors became shorter while it was read"):
        convert_checkpoint(source, out, mapping=Mapping(tensor), progress=cut)
    assert list(out.iterdir()) == []


def test_a_failing_progress_callback_ends_the_conversion(tmp_path: Path) -> None:
    source, out = random_checkpoint(tmp_path / "source", GEOMETRY), tmp_path / "out"

    def interrupted(fraction: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert_checkpoint(source, out, mapping=Mapping(2), workers=3, progress=interrupted)
    assert list(out.iterdir()) == []


def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    """A model eight times as large takes no more memory: what a worker holds is bounded."""
    peaks = []
    for layers in (2, 16):
        source = random_checkpoint(
            tmp_path / f"source{layers}",
            Geometry(layers=layers, heads=8, kv_heads=8, head_dim=64, hidden=1024, ffn=2048),
        )
        script = CONVERT + PRINT_PEAK
        done = subprocess.run(
            [sys.executable, "-c", script, str(source), str(tmp_path / f"out{layers}"), "plain"],
            capture_output=True,
            text=True,
            check=True,
        )
        peaks.append(int(done.stdout) * 1024)
    sizes = [(tmp_path / f"source{layers}" / "model.safetensors").stat().st_size for layers in (2, 16)]
    assert sizes[1] - sizes[0] > 100 << 20
    assert peaks[1] - peaks[0] < 16 << 20

"""What ``benchmarks/gpu.py`` does before there is anything to measure: the kit, its parts, and machines that lack something."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("gpu")


@pytest.fixture
def kit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A kit with two models of few bytes."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    directory = tmp_path / "kit"
    for name in ("wheels/one.whl", "models/int4/model.onnx", "models/fp16/model.onnx"):
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(name.encode() * 2000)
    importlib.import_module("gpu_kit").write_index(directory)
    return directory


def cut(kit: Path, parts: Path, *leave_out: str) -> int:
    count: int = importlib.import_module("gpu_kit").cut(kit, parts, part_bytes=20_000, leave_out=leave_out)
    return count


def placed(program: Path, source: str) -> Path:
    program.write_text(f"#!/bin/sh\n{source}\n")
    program.chmod(0o755)
    return program


def test_parts_put_together_are_the_kit(gpu: ModuleType, kit: Path, tmp_path: Path) -> None:
    assert cut(kit, tmp_path / "parts") > 3
    gpu.join(tmp_path / "parts", tmp_path / "again")

    def contents(root: Path) -> dict[str, bytes]:
        return {str(file.relative_to(root)): file.read_bytes() for file in root.rglob("*") if file.is_file()}

    assert contents(tmp_path / "again") == contents(kit)


def test_a_model_may_be_left_out_of_the_parts(gpu: ModuleType, kit: Path, tmp_path: Path) -> None:
    cut(kit, tmp_path / "parts", "fp16")
    gpu.join(tmp_path / "parts", tmp_path / "again")
    assert [one.name for one in (tmp_path / "again" / "models").iterdir()] == ["int4"]


@pytest.mark.parametrize("lost", [0, 1, -1])
def test_a_lost_part_is_noticed(gpu: ModuleType, kit: Path, tmp_path: Path, lost: int) -> None:
    cut(kit, tmp_path / "parts")
    sorted((tmp_path / "parts").glob("*/part"))[lost].unlink()
    with pytest.raises(gpu.MissingError, match=r"\d+ parts are no whole kit"):
        gpu.join(tmp_path / "parts", tmp_path / "again")


def test_a_damaged_file_of_the_kit_is_named(gpu: ModuleType, kit: Path) -> None:
    (kit / "wheels" / "one.whl").write_bytes(b"other")
    with pytest.raises(gpu.MissingError, match=r"one\.whl: not the bytes that kit\.json names"):
        gpu.check_kit(kit)


def test_a_missing_file_of_the_kit_is_named(gpu: ModuleType, kit: Path) -> None:
    (kit / "wheels" / "one.whl").unlink()
    with pytest.raises(gpu.MissingError, match=r"one\.whl: missing in the kit"):
        gpu.check_kit(kit)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ("echo 'NVIDIA T4, 535.104.05, 15360 MiB, 7.5, 1590 MHz'", r"driver 535\.104\.05 is older than 580"),
        ("echo 'no devices were found' >&2; exit 6", "status 6: no devices were found"),
    ],
)
def test_a_gpu_that_cannot_be_used_is_told_with_its_reason(
    gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, answer: str, message: str
) -> None:
    placed(tmp_path / "nvidia-smi", answer)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin")
    with pytest.raises(gpu.MissingError, match=message):
        gpu.gpu()


def test_what_nvidia_smi_says_is_kept(
    gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    placed(tmp_path / "nvidia-smi", "echo 'NVIDIA H100 80GB HBM3, 580.159.04, 81559 MiB, 9.0, 1980 MHz'")
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin")
    assert gpu.gpu() == {
        "name": "NVIDIA H100 80GB HBM3",
        "driver_version": "580.159.04",
        "memory.total": "81559 MiB",
        "compute_cap": "9.0",
        "clocks.max.sm": "1980 MHz",
    }


def test_a_machine_that_lacks_all_is_told_all_of_it_at_once(kit: Path, tmp_path: Path) -> None:
    (kit / "wheels" / "one.whl").unlink()
    importlib.import_module("gpu_kit").write_index(kit)
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "gpu.py"), "--kit", str(kit), "--out", str(tmp_path / "out")],
        env={"PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    steps = {step["name"]: step for step in summary["steps"]}

    assert done.returncode == 1
    assert "no nvidia-smi on PATH" in steps["gpu"]["note"]
    assert "no wheels" in steps["install"]["note"]
    assert "cuda" in steps
    assert not any(": engine" in name for name in steps)
    assert str(tmp_path) not in (tmp_path / "out" / "summary.json").read_text()

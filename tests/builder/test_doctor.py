"""``enginesmith doctor``: what it finds is what is there, and the exit status says whether the CPU path works."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from click.testing import CliRunner, Result

from enginesmith.cli_doctor import doctor
from enginesmith.doctor import PURPOSES, Diagnosis, Finding, diagnose
from enginesmith.platforms import TOOLCHAINS

H100 = "NVIDIA H100 80GB HBM3, 9.0, 81559, 590.44.01"


def load_standin() -> ModuleType:
    """The stand-in of the engines' tests; their directory is not on this one's path."""
    path = Path(__file__).parents[1] / "engines" / "trtllm_build_standin.py"
    specification = importlib.util.spec_from_file_location("trtllm_build_standin", path)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory that is the whole PATH: nothing is installed but what a test puts there."""
    directory = tmp_path / "bin"
    directory.mkdir()
    monkeypatch.setenv("PATH", str(directory))
    monkeypatch.delenv("ENGINESMITH_TRTLLM_BUILD", raising=False)
    return directory


def script(path: Path, body: str) -> None:
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)


def found(diagnosis: Diagnosis) -> Mapping[str, Finding]:
    return {finding.name: finding for finding in diagnosis.findings}


def run(store: Path, *arguments: str) -> Result:
    return CliRunner().invoke(doctor, arguments, obj=store, standalone_mode=False)


def test_machine_with_a_cpu_only_can_do_the_cpu_path(tmp_path: Path, programs: Path) -> None:
    diagnosis = diagnose(tmp_path / "not" / "there" / "yet")
    assert diagnosis.can("cpu")
    assert not diagnosis.can("engines")
    seen = found(diagnosis)
    assert (seen["gpu"].state, seen["trtllm-build"].state) == ("missing", "missing")
    assert "26.07-trtllm-python-py3" in seen["trtllm-build"].advice
    assert seen["tritonserver"].seen == "2.51.0, of nvidia-pytriton 0.7.0"
    assert seen["numpy"].seen.startswith("1.")
    assert diagnosis.toolchain.tag == "26.07"
    assert all(
        finding.advice for finding in diagnosis.findings if finding.state != "ok" and finding.name != "driver"
    )


def test_machine_with_gpu_and_compiler_can_build_engines(tmp_path: Path, programs: Path) -> None:
    load_standin().install(programs, gpu=H100)
    diagnosis = diagnose(tmp_path)
    assert diagnosis.can("engines")
    seen = found(diagnosis)
    assert seen["gpu"].seen == "1 x NVIDIA H100 80GB HBM3 (SM90, 80 GiB); in a target: h100"
    assert seen["driver"].seen == "590.44.01"
    assert seen["trtllm-build"].seen.startswith("1.2.1, ")


def test_old_driver_chooses_the_toolchain_that_it_allows(tmp_path: Path, programs: Path) -> None:
    script(programs / "nvidia-smi", f"echo '{H100.replace('590.44.01', '580.95.05')}'")
    diagnosis = diagnose(tmp_path)
    assert found(diagnosis)["driver"].state == "wrong"
    assert "toolchain 26.07 lists driver 590.44.01" in found(diagnosis)["driver"].advice
    assert diagnosis.toolchain.tag == "26.02"


def test_installed_compiler_decides_the_row(
    tmp_path: Path, programs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load_standin().install(programs, gpu=H100)
    monkeypatch.setenv("STANDIN_VERSION", "1.1.0")
    assert diagnose(tmp_path).toolchain.tag == "26.02"


@pytest.mark.parametrize("version", ["1.3.0", "0.21.0", "9.9.9"])
def test_compiler_of_a_version_without_engines_here_is_wrong(
    version: str, tmp_path: Path, programs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load_standin().install(programs, gpu=H100)
    monkeypatch.setenv("STANDIN_VERSION", version)
    finding = found(diagnose(tmp_path))["trtllm-build"]
    assert (finding.state, finding.needed_for) == ("wrong", ("engines",))
    assert version in finding.seen


def test_tensorrt_for_rtx_needs_no_gpu_and_tensorrt_says_which_image_has_it(
    tmp_path: Path, programs: Path
) -> None:
    diagnosis = diagnose(tmp_path)
    assert diagnosis.can("tensorrt_rtx")
    assert not diagnosis.can("tensorrt")
    seen = found(diagnosis)
    assert (seen["tensorrt_rtx"].state, seen["polygraphy"].state) == ("ok", "ok")
    assert seen["tensorrt"].state == "missing"
    assert "tritonserver:26.07-py3 has TensorRT 11.1.0.106" in seen["tensorrt"].advice


def test_broken_parts_are_wrong_and_not_missing(tmp_path: Path, programs: Path) -> None:
    script(programs / "trtllm-build", "echo no GPU driver >&2; exit 1")
    script(programs / "docker", "exit 1")
    script(programs / "mpirun", "exit 1")
    script(programs / "nvidia-smi", "echo 'NVIDIA GeForce GT 710, 3.5, 2000, 470.57.02'")
    seen = found(diagnose(tmp_path))
    for name in ("trtllm-build", "containers", "mpirun", "gpu"):
        assert seen[name].state == "wrong", name


def test_container_tool_with_a_daemon_is_ok(tmp_path: Path, programs: Path) -> None:
    script(programs / "podman", "echo 5.4.0")
    finding = found(diagnose(tmp_path))["containers"]
    assert (finding.state, finding.seen) == ("ok", "podman 5.4.0")


def test_stock_server_says_its_own_version(tmp_path: Path, programs: Path) -> None:
    (tmp_path / "tritonserver" / "bin").mkdir(parents=True)
    script(tmp_path / "tritonserver" / "bin" / "tritonserver", "exit 0")
    (tmp_path / "tritonserver" / "TRITON_VERSION").write_text("2.71.0\n")
    (programs / "tritonserver").symlink_to(tmp_path / "tritonserver" / "bin" / "tritonserver")
    assert found(diagnose(tmp_path))["tritonserver"].seen.startswith("2.71.0, ")


def test_missing_distribution_is_named_with_its_extra(
    tmp_path: Path, programs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A finder that hides one installed distribution, as if it had never been installed.
    class Hiding:
        def __init__(self, finder: Any) -> None:
            self.finder = finder

        def find_spec(self, *arguments: Any, **keys: Any) -> Any:
            return self.finder.find_spec(*arguments, **keys)

        def find_distributions(self, context: Any) -> Any:
            if context.name in ("gguf", "numpy"):
                return iter(())
            return self.finder.find_distributions(context)

    finders = [
        Hiding(finder) if hasattr(finder, "find_distributions") else finder for finder in sys.meta_path
    ]
    monkeypatch.setattr(sys, "meta_path", finders)
    diagnosis = diagnose(tmp_path)
    assert not diagnosis.can("cpu")
    seen = found(diagnosis)
    assert (seen["enginesmith[build]"].state, seen["enginesmith[build]"].seen) == ("missing", "without gguf")
    assert seen["enginesmith[build]"].advice == "pip install 'enginesmith[build]'"
    assert seen["numpy"].state == "missing"
    assert seen["tritonserver"].state == "wrong"
    assert run(tmp_path).return_value == 1


def test_text_has_a_line_for_every_finding_purpose_and_toolchain(tmp_path: Path, programs: Path) -> None:
    result = run(tmp_path)
    assert result.return_value == 0
    lines = result.stdout.splitlines()
    assert all(any(finding.name in line for line in lines) for finding in diagnose(tmp_path).findings)
    assert all(any(meaning in line for line in lines) for meaning in PURPOSES.values())
    assert [line.split()[0] for line in lines if line.startswith("> ")] == [">"]
    (row,) = [line.split() for line in lines if line.startswith("> 26.07")]
    assert row[1:] == ["26.07", "1.2.1", "2.71.0", "10.14.1.48", "13.1.0.036", "590.44.01", "yes", "yes"]
    (unconfirmed,) = [line for line in lines if line.startswith("  26.06")]
    assert "not known" in unconfirmed


def test_json_says_the_same(tmp_path: Path, programs: Path) -> None:
    result = run(tmp_path, "--json")
    document = json.loads(result.stdout)
    assert result.return_value == 0
    assert document["can"] == {
        "cpu": True,
        "engines": False,
        "llmapi": False,
        "tensorrt": False,
        "tensorrt_rtx": True,
        "multi_gpu": False,
        "containers": False,
        "measuring": document["can"]["measuring"],
    }
    assert [row["tag"] for row in document["toolchains"]] == list(TOOLCHAINS)
    assert {finding["state"] for finding in document["findings"]} <= {"ok", "missing", "wrong"}

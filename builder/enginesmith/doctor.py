"""What this machine has, and what that means for which target. Starts nothing but programs that say their version.

Owns the list of findings. Judges by the same functions that a build uses (``find_server``, ``find_compiler``), so that the
two cannot disagree.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement
from packaging.version import Version

from enginesmith.engines.tensorrt.library import EXTRA as TENSORRT_EXTRA
from enginesmith.engines.tensorrt.library import LIBRARIES, same_version
from enginesmith.engines.tensorrt_llm.toolchain import (
    COMPILER_VARIABLE,
    SeenGpu,
    describe_gpu,
    find_compiler,
    is_model,
    visible_gpus,
)
from enginesmith.errors import ToolchainError
from enginesmith.platforms import GPUS, TOOLCHAINS, TRITON_IMAGES, Toolchain, toolchain_with
from enginesmith.triton.installation import find_server

State = Literal["ok", "missing", "wrong"]
Purpose = Literal[
    "cpu", "engines", "llmapi", "tensorrt", "tensorrt_rtx", "multi_gpu", "containers", "measuring"
]

PURPOSES: dict[Purpose, str] = {
    "cpu": "everything on a CPU: quantize, convert, rehearse, serve with ONNX Runtime",
    "engines": "building and serving TensorRT-LLM engines on this machine",
    "llmapi": "serving with TensorRT-LLM's LLM API on this machine",
    "tensorrt": "building TensorRT plans of encoders and other graphs on this machine",
    "tensorrt_rtx": "building TensorRT for RTX engines of them, ahead of time, with or without a GPU",
    "multi_gpu": "launching on several GPUs",
    "containers": "`make image`, and TensorRT-LLM engines in NVIDIA's container on this machine",
    "measuring": "benchmarks of served models",
}
_OLDEST_PYTHON = (3, 11)
_LEAST_MEMORY_GIB = 4.0
_LEAST_DISK_GIB = 5.0
# nvidia-pytriton does not say which tritonserver it carries; measured.
_SERVER_OF_WHEEL = {"0.7.0": "2.51.0"}
_PROBE_TIMEOUT_S = 20.0


@dataclass(frozen=True)
class Finding:
    """One thing that was looked for."""

    name: str
    state: State
    seen: str
    needed_for: tuple[Purpose, ...]
    advice: str = ""
    """What to do, where it is not ok."""


@dataclass(frozen=True)
class Diagnosis:
    """All findings of one machine."""

    findings: tuple[Finding, ...]
    gpus: tuple[SeenGpu, ...]
    toolchain: Toolchain
    """The row of the table that fits this machine: the installed one, else the newest that its driver allows."""

    def can(self, purpose: Purpose) -> bool:
        """Whether nothing is missing or wrong for this purpose."""
        return all(finding.state == "ok" for finding in self.findings if purpose in finding.needed_for)


def diagnose(store_root: Path) -> Diagnosis:
    """Look at this machine. ``store_root`` is where builds would be kept; it need not exist."""
    gpus = visible_gpus()
    compiler, installed = _compiler()
    findings = (
        _python(),
        _extra("build", "cpu"),
        _extra("serve", "cpu"),
        _extra("tensorrt", "tensorrt_rtx"),
        _numpy(),
        _server(),
        _memory(),
        _disk(store_root),
        _perf_analyzer(),
        _gpu(gpus),
        _driver(gpus, installed),
        compiler,
        _llmapi_package(),
        _polygraphy(),
        _tensorrt(),
        _tensorrt_rtx(),
        _mpirun(),
        _container_tool(),
    )
    return Diagnosis(findings, gpus, _fitting(gpus, installed))


def _python() -> Finding:
    oldest = ".".join(map(str, _OLDEST_PYTHON))
    return Finding(
        "python",
        "ok" if sys.version_info[:2] >= _OLDEST_PYTHON else "wrong",
        platform.python_version(),
        ("cpu",),
        f"use Python {oldest} or newer",
    )


def _extra(extra: str, purpose: Purpose) -> Finding:
    """Whether the distributions of an extra of enginesmith are installed in versions that it allows."""
    absent, other = [], []
    for text in importlib.metadata.requires("enginesmith") or []:
        requirement = Requirement(text)
        if requirement.marker is None or not requirement.marker.evaluate({"extra": extra}):
            continue
        if requirement.marker.evaluate({"extra": ""}):
            continue  # A plain dependency with a marker of its own.
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            absent.append(requirement.name)
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            other.append(f"{requirement.name} {version} (allowed: {requirement.specifier})")
    name, advice = f"enginesmith[{extra}]", f"pip install 'enginesmith[{extra}]'"
    if absent:
        return Finding(name, "missing", f"without {', '.join(sorted(absent))}", (purpose,), advice)
    if other:
        return Finding(name, "wrong", "; ".join(sorted(other)), (purpose,), advice)
    return Finding(name, "ok", "complete", (purpose,))


def _numpy() -> Finding:
    try:
        version = importlib.metadata.version("numpy")
    except importlib.metadata.PackageNotFoundError:
        return Finding("numpy", "missing", "not installed", ("cpu",), "pip install 'numpy<2'")
    old = Version(version) < Version("2")
    advice = "pip install 'numpy<2': with numpy 2 the wheel's tritonserver crashes on text inputs"
    return Finding("numpy", "ok" if old else "wrong", version, ("cpu",), advice)


def _server() -> Finding:
    try:
        server = find_server()
    except ToolchainError as error:
        found = "no tritonserver found" not in error.message
        return Finding(
            "tritonserver", "wrong" if found else "missing", error.message, ("cpu",), error.hint or ""
        )
    if server.origin == "wheel":
        wheel = importlib.metadata.version("nvidia-pytriton")
        version = f"{_SERVER_OF_WHEEL.get(wheel, 'version not known')}, of nvidia-pytriton {wheel}"
    else:
        file = server.executable.resolve().parent.parent / "TRITON_VERSION"
        version = file.read_text(encoding="utf-8").strip() if file.is_file() else "version not known"
        version += f", {server.executable}"
    return Finding("tritonserver", "ok", version, ("cpu",))


def _memory() -> Finding:
    import psutil

    gib = psutil.virtual_memory().total / 2**30
    enough = gib >= _LEAST_MEMORY_GIB
    advice = f"{_LEAST_MEMORY_GIB:g} GiB are enough for a small model; quantizing needs the model in memory"
    return Finding(
        "memory",
        "ok" if enough else "wrong",
        f"{gib:.1f} GiB, {os.cpu_count()} cores",
        ("cpu",),
        "" if enough else advice,
    )


def _disk(store_root: Path) -> Finding:
    place = store_root.absolute()
    while not place.exists():
        place = place.parent
    gib = shutil.disk_usage(place).free / 2**30
    enough = gib >= _LEAST_DISK_GIB
    advice = "free some, e.g. with `enginesmith gc`, or give another place with --store"
    return Finding(
        "disk",
        "ok" if enough else "wrong",
        f"{gib:.0f} GiB free at {place}",
        ("cpu",),
        "" if enough else advice,
    )


def _perf_analyzer() -> Finding:
    """One that is there; none is downloaded for a diagnosis."""
    from enginesmith_client.perf._errors import ToolError
    from enginesmith_client.perf.perf_analyzer._tool import candidates

    refusals = []
    try:
        for candidate in candidates():
            try:
                version = candidate.version()
            except ToolError as error:
                refusals.append(error.message)
            else:
                return Finding("perf_analyzer", "ok", version, ("measuring",))
    except ToolError as error:
        refusals.append(error.message)
    state: State = "wrong" if refusals else "missing"
    advice = "the first benchmark fetches one, if pip reaches a package index"
    return Finding("perf_analyzer", state, "; ".join(refusals) or "not here yet", ("measuring",), advice)


def _gpu(gpus: tuple[SeenGpu, ...]) -> Finding:
    purposes: tuple[Purpose, ...] = ("engines", "llmapi", "tensorrt")
    advice = "without one, everything but GPU engines works here; see `enginesmith rehearse`"
    if not gpus:
        return Finding("gpu", "missing", "nvidia-smi shows none", purposes, advice)
    described = sorted({describe_gpu(gpu) for gpu in gpus})
    seen = f"{len(gpus)} x {', '.join(described)}"
    known = sorted({gpu.name for gpu in GPUS.values() if any(is_model(seen_, gpu) for seen_ in gpus)})
    if not known:
        return Finding(
            "gpu", "wrong", seen, purposes, f"a target can name these GPUs only: {', '.join(GPUS)}"
        )
    return Finding("gpu", "ok", f"{seen}; in a target: {' or '.join(known)}", purposes)


def _driver(gpus: tuple[SeenGpu, ...], installed: Toolchain | None) -> Finding:
    purposes: tuple[Purpose, ...] = ("engines", "llmapi")
    if not gpus:
        return Finding("driver", "missing", "no GPU, no driver", purposes, "")
    wanted, driver = (installed or _newest()), gpus[0].driver
    fits = _major(driver) >= _major(wanted.driver)
    advice = (
        f"toolchain {wanted.tag} lists driver {wanted.driver}; data-center GPUs may do with an older one (CUDA "
        "compatibility), others need it"
    )
    return Finding("driver", "ok" if fits else "wrong", driver, purposes, "" if fits else advice)


def _compiler() -> tuple[Finding, Toolchain | None]:
    try:
        compiler = find_compiler()
    except ToolchainError as error:
        return Finding("trtllm-build", "wrong", error.message, ("engines",), error.hint or ""), None
    image = _newest().image
    if compiler is None:
        seen = f"not on PATH, {COMPILER_VARIABLE} is not set"
        return Finding("trtllm-build", "missing", seen, ("engines",), f"it is in {image}"), None
    row = toolchain_with(compiler.version)
    seen = f"{compiler.version}, {compiler.executable}"
    if row is None or not row.has_engines:
        advice = f"no known toolchain with engines has this version; {image} has {_newest().tensorrt_llm}"
        return Finding("trtllm-build", "wrong", seen, ("engines",), advice), row
    return Finding("trtllm-build", "ok", seen, ("engines",)), row


def _llmapi_package() -> Finding:
    try:
        version = importlib.metadata.version("tensorrt_llm")
    except importlib.metadata.PackageNotFoundError:
        advice = f"it is in {_newest().image}"
        return Finding("tensorrt_llm", "missing", "not in this Python environment", ("llmapi",), advice)
    old = Version(version) < Version("1.2.0")
    return Finding(
        "tensorrt_llm", "wrong" if old else "ok", version, ("llmapi",), "use 1.2.0 or newer" if old else ""
    )


def _polygraphy() -> Finding:
    purposes: tuple[Purpose, ...] = ("tensorrt", "tensorrt_rtx")
    try:
        version = importlib.metadata.version("polygraphy")
    except importlib.metadata.PackageNotFoundError:
        return Finding("polygraphy", "missing", "not in this Python environment", purposes, TENSORRT_EXTRA)
    return Finding("polygraphy", "ok", version, purposes)


def _tensorrt() -> Finding:
    """TensorRT's Python module, and which image it is of. A target decides by its toolchain which version it needs."""
    version = LIBRARIES["tensorrt"].installed_version()
    known = [row for row in TRITON_IMAGES.values() if row.tensorrt]
    if version is None:
        advice = (
            f"{known[0].image} has TensorRT {known[0].tensorrt}; no package index without NVIDIA's has it"
        )
        return Finding("tensorrt", "missing", "not in this Python environment", ("tensorrt",), advice)
    rows = [row.image for row in known if row.tensorrt and same_version(row.tensorrt, version)]
    return Finding("tensorrt", "ok", f"{version}, that of {rows[0]}" if rows else version, ("tensorrt",))


def _tensorrt_rtx() -> Finding:
    version = LIBRARIES["tensorrt_rtx"].installed_version()
    if version is None:
        advice = f"{TENSORRT_EXTRA} (Linux on x86-64)"
        seen = "not in this Python environment"
        return Finding("tensorrt_rtx", "missing", seen, ("tensorrt_rtx",), advice)
    return Finding("tensorrt_rtx", "ok", version, ("tensorrt_rtx",))


def _mpirun() -> Finding:
    return _program(
        "mpirun",
        ("mpirun", "--version"),
        "multi_gpu",
        advice="needed on the machine that serves with several GPUs; NVIDIA's image has it",
        line=lambda text: text.strip().splitlines()[0],
    )


def _container_tool() -> Finding:
    """Docker or Podman, with a daemon that answers."""
    for tool in ("docker", "podman"):
        if not shutil.which(tool):
            continue
        version = _said((tool, "version", "--format", "{{.Server.Version}}"))
        if version and version.strip():
            return Finding("containers", "ok", f"{tool} {version.strip()}", ("containers",))
        advice = f"start {tool}, or ask for access to it"
        return Finding(
            "containers",
            "wrong",
            f"{tool} is here, its daemon does not answer",
            ("containers",),
            advice,
        )
    return Finding("containers", "missing", "neither docker nor podman", ("containers",), "install one")


def _program(
    name: str, command: tuple[str, ...], purpose: Purpose, *, advice: str, line: Callable[[str], str]
) -> Finding:
    if not shutil.which(command[0]):
        return Finding(name, "missing", "not on PATH", (purpose,), advice)
    text = _said(command)
    if not text or not text.strip():
        return Finding(name, "wrong", f"{command[0]} does not run", (purpose,), advice)
    return Finding(name, "ok", line(text), (purpose,))


def _said(command: tuple[str, ...]) -> str | None:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=_PROBE_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def _newest() -> Toolchain:
    return next(iter(TOOLCHAINS.values()))


def _fitting(gpus: tuple[SeenGpu, ...], installed: Toolchain | None) -> Toolchain:
    if installed is not None or not gpus:
        return installed or _newest()
    allowed = [
        row for row in TOOLCHAINS.values() if row.has_engines and _major(row.driver) <= _major(gpus[0].driver)
    ]
    return allowed[0] if allowed else _newest()


def _major(driver: str) -> int:
    head = driver.split(".")[0]
    return int(head) if head.isdecimal() else 0

"""Finds a tritonserver on this machine and says how to run it.

Two kinds exist. A *stock* server (NVIDIA's container, or one built from source) brings its own Python and its
own backends. The *wheel* ``nvidia-pytriton`` carries the same program and the Python backend for machines that
have neither, but as loose parts: the stub that runs the models must be put beside the backend, and must find
libpython and the libraries of the wheel. This module knows those parts; it never starts anything.
"""

from __future__ import annotations

import ctypes.util
import importlib.metadata
import importlib.util
import os
import shutil
import sys
import sysconfig
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from enginesmith.errors import ToolchainError

STOCK_EXECUTABLE = Path("/opt/tritonserver/bin/tritonserver")
_GET_ONE = (
    "pip install 'enginesmith[serve]', or run inside nvcr.io/nvidia/tritonserver and pass --server auto"
)


@dataclass(frozen=True)
class ServerInstallation:
    """A tritonserver that can be run here."""

    executable: Path
    origin: Literal["stock", "wheel"]
    backend_directory: Path | None = None
    """Where the backends are, or None where the executable knows by itself."""
    cache_directory: Path | None = None
    """Where the response caches are, or None where the executable knows by itself."""
    library_path: tuple[Path, ...] = ()
    """Directories that the server's processes need on ``LD_LIBRARY_PATH``."""

    def environment(self, base: Mapping[str, str], python_path: Sequence[Path] = ()) -> dict[str, str]:
        """The environment to run the server in: ``base`` plus what this installation needs.

        ``python_path`` comes first in the ``PYTHONPATH`` of the models.
        """
        environment = dict(base)
        if self.origin == "wheel":
            # The stub takes its site-packages from the python3 that is first on PATH.
            _prepend(environment, "PATH", [Path(sys.executable).parent])
        _prepend(environment, "LD_LIBRARY_PATH", self.library_path)
        _prepend(environment, "PYTHONPATH", python_path)
        return environment


def find_server(choice: str = "auto") -> ServerInstallation:
    """The tritonserver to use.

    ``choice`` is "auto" (one on ``PATH``, else the one of NVIDIA's container, else the wheel's) or the path of
    an executable.

    Raises:
        ToolchainError: there is none, or the environment cannot run the wheel's.
    """
    if choice != "auto":
        return _describe(_given_executable(choice))
    on_path = shutil.which("tritonserver")
    if on_path:
        return _describe(Path(on_path))
    if os.access(STOCK_EXECUTABLE, os.X_OK):
        return _describe(STOCK_EXECUTABLE)
    specification = importlib.util.find_spec("pytriton")
    for location in (specification.submodule_search_locations or ()) if specification else ():
        executable = Path(location, "tritonserver", "bin", "tritonserver")
        if executable.is_file():
            return _describe(executable)
    raise ToolchainError(
        f"no tritonserver found: not on PATH, not at {STOCK_EXECUTABLE}, and nvidia-pytriton is not installed",
        hint=_GET_ONE,
    )


def _given_executable(choice: str) -> Path:
    executable = Path(choice).expanduser().absolute()
    if not executable.is_file():
        seen = "a directory" if executable.is_dir() else "missing"
        raise ToolchainError(
            f"--server {choice}: not a file (it is {seen})",
            hint="give the path of a tritonserver executable, or auto",
        )
    if not os.access(executable, os.X_OK):
        raise ToolchainError(
            f"--server {choice}: the file is not executable", hint=f"chmod +x {choice}, or pass auto"
        )
    return executable


def _describe(executable: Path) -> ServerInstallation:
    root = executable.resolve().parent.parent
    if not (root / "python_backend_stubs").is_dir():
        return ServerInstallation(executable, "stock")
    _require_old_numpy()
    libraries = root.parent.parent / "nvidia_pytriton.libs"
    return ServerInstallation(
        executable,
        "wheel",
        backend_directory=_assembled_backends(root),
        cache_directory=root / "caches",
        library_path=(*_libpython_directories(), libraries),
    )


def _require_old_numpy() -> None:
    """The stubs in the wheel are built against numpy 1 and crash on BYTES tensors under numpy 2."""
    try:
        version = importlib.metadata.version("numpy")
    except importlib.metadata.PackageNotFoundError as error:
        raise ToolchainError(
            "the tritonserver of nvidia-pytriton needs numpy<2; none is installed", hint=_GET_ONE
        ) from error
    if int(version.split(".")[0]) >= 2:
        raise ToolchainError(
            f"the tritonserver of nvidia-pytriton needs numpy<2, installed is {version}: its Python backend crashes on text inputs",
            hint="pip install 'numpy<2' in this environment, or pass --server PATH to another tritonserver",
        )


def _libpython_directories() -> tuple[Path, ...]:
    """The directory of this Python's shared library, which the stub is linked to; empty if the loader knows it."""
    python = f"python{sys.version_info.major}.{sys.version_info.minor}"
    name = f"lib{python}.so.1.0"
    for directory in (Path(sysconfig.get_config_var("LIBDIR") or "/"), Path(sys.base_prefix, "lib")):
        if (directory / name).exists():
            return (directory,)
    if ctypes.util.find_library(python):
        return ()
    raise ToolchainError(
        f"the Python backend of nvidia-pytriton needs {name}, which this Python does not have",
        hint=f"install the system package lib{python}, or a Python that was built with --enable-shared",
    )


def _assembled_backends(root: Path) -> Path:
    """A backend directory with the stub of the running Python in place: the wheel keeps the two apart.

    Made once per wheel and Python version in the user's cache, and visible only when complete.
    """
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    stub = root / "python_backend_stubs" / python / "triton_python_backend_stub"
    if not stub.is_file():
        available = ", ".join(sorted(entry.name for entry in stub.parent.parent.iterdir()))
        raise ToolchainError(
            f"nvidia-pytriton has no Python backend for Python {python}; it has {available}",
            hint="use one of those Python versions",
        )
    version = importlib.metadata.version("nvidia-pytriton")
    target = cache_directory() / f"triton-backends-{version}-{stub.stat().st_size:x}-py{python}"
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as staging:
        complete = Path(staging, "backends")
        shutil.copytree(
            root / "backends" / "python", complete / "python", ignore=shutil.ignore_patterns("__pycache__")
        )
        placed = shutil.copy2(stub, complete / "python")
        os.chmod(placed, 0o755)
        try:
            complete.rename(target)
        except OSError:
            # Another process was faster; its copy is the same.
            if not target.is_dir():
                raise
    return target


def cache_directory() -> Path:
    """Where this user's machine-specific, re-creatable files go."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "enginesmith"


def _prepend(environment: dict[str, str], variable: str, directories: Sequence[Path]) -> None:
    present = environment.get(variable)
    parts = [str(directory) for directory in directories] + ([present] if present else [])
    if parts:
        environment[variable] = os.pathsep.join(parts)

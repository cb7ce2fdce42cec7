"""Finds a perf_analyzer that runs on this machine, or puts one together.

NVIDIA's program comes in many ways and each has its own reason not to run here, so one that does not run says why and
the next is tried: the one that ENGINESMITH_PERF_ANALYZER names (which alone counts, if it is set), one on ``PATH``, the one
in the wheel ``perf-analyzer`` (from 2.58; built for glibc 2.38), and one assembled in the user's cache from two wheels:
``tritonclient==2.51.0`` for manylinux1 is the last that carries the program in a form that older systems (glibc from 2.35)
can run, and ``nvidia-pytriton`` has the two libraries that it needs, under other names.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from enginesmith_client.perf._errors import ToolError

VARIABLE = "ENGINESMITH_PERF_ANALYZER"
OLDEST_VERSION, NEWEST_VERSION = (2, 51), (2, 60)
"""What the options and files of this package were checked against. Newer ones are used; runs say so."""
_REQUIREMENT = (
    "tritonclient==2.51.0 --hash=sha256:c485bb0123bdf310f90bc8b03d3489b28df2ffed55b30c7eee0b795b48113d52"
)
_MEMBER_SUFFIX = ".data/data/bin/perf_analyzer"
_LIBRARIES = {"libb64.so.0d": "libb64-*.so.0d", "libcudart.so.12": "libcudart-*.so.12*"}
_BY_HAND = (
    f"set {VARIABLE} to a perf_analyzer executable, or to tritonclient-2.51.0-py3-none-manylinux1_x86_64.whl"
)
_VERSION = re.compile(r"Perf Analyzer Version (\d+)\.(\d+)\S*")
_PROBE_TIMEOUT_S = 60.0
_DOWNLOAD_TIMEOUT_S = 600.0


@dataclass(frozen=True)
class PerfAnalyzer:
    """A perf_analyzer, whether or not it runs on this machine."""

    executable: Path
    library_path: Path | None = None

    def environment(self) -> dict[str, str]:
        """The environment to run it in."""
        environment = dict(os.environ)
        if self.library_path:
            present = environment.get("LD_LIBRARY_PATH")
            environment["LD_LIBRARY_PATH"] = os.pathsep.join(filter(None, [str(self.library_path), present]))
        return environment

    def version(self) -> str:
        """What it says about itself: ``2.51.0 (commit unknown)``.

        Raises:
            ToolError: it does not run here, in its own words, or its version is too old or unreadable.
        """
        try:
            done = subprocess.run(
                [self.executable, "--version"],
                env=self.environment(),
                capture_output=True,
                text=True,
                errors="replace",
                timeout=_PROBE_TIMEOUT_S,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            reason = (
                error.strerror if isinstance(error, OSError) else f"no answer within {_PROBE_TIMEOUT_S:g} s"
            )
            raise ToolError(f"{self.executable} does not run here: {reason}", hint=_BY_HAND) from error
        said = (done.stdout + done.stderr).strip()
        found = _VERSION.search(said)
        if found is None:
            raise ToolError(self._refusal(said, done.returncode), hint=_BY_HAND)
        version = (int(found[1]), int(found[2]))
        if version < OLDEST_VERSION:
            raise ToolError(
                f"{self.executable} is perf_analyzer {version[0]}.{version[1]}; needed: {_dotted(OLDEST_VERSION)} or newer",
                hint=_BY_HAND,
            )
        return said[found.start() :].removeprefix("Perf Analyzer Version ").splitlines()[0].strip()

    def _refusal(self, said: str, status: int) -> str:
        """Why it does not run. A missing library or a newer glibc is said by the loader, a line for each."""
        lines = [line.removeprefix(f"{self.executable}: ") for line in said.splitlines() if line.strip()]
        if not lines:
            return f"{self.executable} does not run here: exit status {status}, and it says nothing"
        more = f" (and {len(lines) - 1} lines more)" if len(lines) > 1 else ""
        return f"{self.executable} does not run here: {lines[0]}{more}"


def find_perf_analyzer() -> PerfAnalyzer:
    """The first perf_analyzer that runs; the last resort needs pip and a package index the first time.

    Raises:
        ToolError: there is none; says why for every one that was tried.
    """
    reasons = []
    for candidate in candidates():
        try:
            candidate.version()
        except ToolError as error:
            if os.environ.get(VARIABLE):
                raise
            reasons.append(error.message)
        else:
            return candidate
    try:
        assembled = _assembled()
        assembled.version()
    except ToolError as error:
        seen = "".join(f"\n  | {reason}" for reason in [*reasons, error.message])
        raise ToolError(f"there is no perf_analyzer that runs here{seen}", hint=_BY_HAND) from error
    return assembled


def candidates() -> Iterator[PerfAnalyzer]:
    """Every perf_analyzer that is there already, best first; none is downloaded.

    Raises:
        ToolError: ENGINESMITH_PERF_ANALYZER names a wheel that holds none.
    """
    if named := os.environ.get(VARIABLE):
        yield _named(Path(named).expanduser())
        return
    if on_path := shutil.which("perf_analyzer"):
        yield PerfAnalyzer(Path(on_path))
    # The wheel's own launcher is on PATH only in an activated environment, and does not pass the exit status on.
    specification = importlib.util.find_spec("perf_analyzer")
    for location in (specification.submodule_search_locations or ()) if specification else ():
        executable = Path(location, "bin", "perf_analyzer")
        if executable.is_file():
            yield PerfAnalyzer(executable)
    directory = _directory()
    if directory.is_dir():
        yield PerfAnalyzer(directory / "perf_analyzer", directory)


def is_untried(version: str) -> bool:
    """Whether ``version`` is newer than what this package was checked against."""
    found = re.match(r"(\d+)\.(\d+)", version)
    return found is None or (int(found[1]), int(found[2])) > NEWEST_VERSION


def supported_versions() -> str:
    """In words: ``2.51 to 2.60``."""
    return f"{_dotted(OLDEST_VERSION)} to {_dotted(NEWEST_VERSION)}"


def _dotted(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"


def _directory() -> Path:
    """Where the assembled one is: among this user's machine-specific, re-creatable files."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "enginesmith"
    return cache / "perf_analyzer-2.51.0"


def _named(path: Path) -> PerfAnalyzer:
    if path.suffix != ".whl":
        return PerfAnalyzer(path)
    return _assembled(path)


def _assembled(wheel: Path | None = None) -> PerfAnalyzer:
    """One put together in the cache, from ``wheel`` or from one that pip downloads."""
    directory = _directory()
    if wheel is not None or not directory.is_dir():
        directory.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".perf_analyzer-", dir=directory.parent) as staging:
            _assemble(wheel or _download(Path(staging)), Path(staging, "complete"), directory)
    return PerfAnalyzer(directory / "perf_analyzer", directory)


def _download(directory: Path) -> Path:
    """The wheel, from the package index that pip is configured for, if it has the known digest."""
    requirements = directory / "requirements.txt"
    requirements.write_text(_REQUIREMENT + "\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "download", "--no-deps"]
    command += ["--only-binary", ":all:", "--platform", "manylinux1_x86_64", "--dest", str(directory)]
    try:
        done = subprocess.run(
            [*command, "--require-hashes", "--requirement", str(requirements)],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_DOWNLOAD_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise ToolError(
            f"pip did not download perf_analyzer within {_DOWNLOAD_TIMEOUT_S:g} s", hint=_BY_HAND
        ) from error
    wheels = list(directory.glob("tritonclient-*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        raise ToolError(f"pip could not download perf_analyzer: {done.stderr.strip()[-500:]}", hint=_BY_HAND)
    return wheels[0]


def _assemble(wheel: Path, staging: Path, directory: Path) -> None:
    """Put the program and its libraries into ``directory``, complete when visible."""
    staging.mkdir()
    try:
        with zipfile.ZipFile(wheel) as archive:
            (member,) = [name for name in archive.namelist() if name.endswith(_MEMBER_SUFFIX)]
            (staging / "perf_analyzer").write_bytes(archive.read(member))
    except (OSError, zipfile.BadZipFile, ValueError) as error:
        raise ToolError(
            f"{wheel} is not a wheel with one perf_analyzer in it: {error}", hint=_BY_HAND
        ) from error
    (staging / "perf_analyzer").chmod(0o755)
    libraries = _pytriton_libraries()
    for name, pattern in _LIBRARIES.items():
        found = sorted(libraries.glob(pattern))
        if not found:
            raise ToolError(f"{libraries} has no {pattern}", hint="pip install nvidia-pytriton==0.7.0")
        shutil.copy2(found[0], staging / name)
    try:
        staging.rename(directory)
    except OSError:
        # Somebody else was faster, or it is there from before: either is the same program.
        if not directory.is_dir():
            raise


def _pytriton_libraries() -> Path:
    specification = importlib.util.find_spec("pytriton")
    if specification is None or specification.origin is None:
        raise ToolError(
            "perf_analyzer needs libraries that come with nvidia-pytriton, which is not installed",
            hint="pip install nvidia-pytriton==0.7.0",
        )
    return Path(specification.origin).parent.parent / "nvidia_pytriton.libs"

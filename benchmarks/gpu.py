"""The standard profile on a machine with an NVIDIA GPU and no network, from the kit that ``gpu_kit.py`` made.

Needs Python 3.12 with pip, and the repository around it; nothing else is imported here, because nothing else may be
installed. Takes the wheels into a directory of their own, looks at the GPU and at CUDA's libraries, and has
``gpu_measure.py`` measure there. A step that cannot be done says what is missing; the steps that need it are left out, and
the others are done. Results: summary.json, report.html and results.tar.gz in ``--out`` (default: $OUT, else
benchmarks/results/gpu). ``--provider cpu`` rehearses it with the model cpu-int4 in this very environment, or with ``--install`` from the wheels.

Not yet run on a GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
LIBRARIES = ("libcudart.so.13", "libcublasLt.so.13", "libcublas.so.13", "libcurand.so.10", "libcufft.so.12")
"""What onnxruntime-gpu 1.31 and onnxruntime-genai-cuda 0.18 are linked to, in an order that loads them."""
LEAST_DRIVER = 580
"""The driver branch of CUDA 13.0 (CUDA toolkit release notes)."""
_QUERY = ("name", "driver_version", "memory.total", "compute_cap", "clocks.max.sm")
_SIZE_LIMIT = 15 << 20


@dataclass(frozen=True)
class Done:
    """One step and how it ended."""

    name: str
    ok: bool
    seconds: float
    note: str
    command: str = ""


class MissingError(Exception):
    """This machine lacks something; the message says what, and what to do."""


@dataclass(frozen=True)
class Budget:
    """The time that all steps share."""

    ends_s: float

    @property
    def left_s(self) -> float:
        """Seconds that are left; at least one, so that a late step fails by its own time-out."""
        return max(1.0, self.ends_s - time.monotonic())


def join(parts: Path, kit: Path) -> None:
    """Put the parts that ``gpu_kit.py --parts`` cut together again, and check every byte.

    Raises:
        MissingError: a part or a file is missing or damaged.
    """
    pieces = sorted(parts.glob("*/part")) or sorted(parts.glob("part-*"))
    if not pieces:
        raise MissingError(f"{parts}: no parts; carry those of gpu_kit.py --parts there")
    kit.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile() as whole:
        for piece in pieces:
            with piece.open("rb") as opened:
                shutil.copyfileobj(opened, whole)
        whole.seek(0)
        try:
            with tarfile.open(fileobj=whole, mode="r:") as archive:
                archive.extractall(kit, filter="data")
        except tarfile.TarError as error:
            raise MissingError(f"{parts}: {len(pieces)} parts are no whole kit ({error})") from error
    try:
        check_kit(kit)
    except MissingError as error:
        raise MissingError(f"{parts}: {len(pieces)} parts are no whole kit ({error})") from error


def check_kit(kit: Path) -> None:
    """Every file of the kit is what ``kit.json`` says; models may be left out as a whole.

    Raises:
        MissingError: one is not.
    """
    if not (kit / "kit.json").is_file():
        raise MissingError(
            f"{kit}: no kit.json; make gpu-wheels makes the kit on a machine with a package registry"
        )
    for name, wanted in json.loads((kit / "kit.json").read_text(encoding="utf-8")).items():
        file = kit / name
        if not file.is_file():
            if name.startswith("models/") and not file.parent.exists():
                continue
            raise MissingError(f"{file}: missing in the kit; make gpu-wheels again")
        with file.open("rb") as opened:
            if hashlib.file_digest(opened, "sha256").hexdigest() != wanted["sha256"]:
                raise MissingError(f"{file}: not the bytes that kit.json names; carry the kit again")


def install(kit: Path, home: Path) -> Path:
    """A virtual environment in ``home`` with the wheels of the kit and this repository; returns its interpreter.

    tritonserver's Python backend takes its packages from the ``python3`` that is first on ``PATH``, not from
    ``PYTHONPATH``. pip is that of the running Python: on bare machines a new environment cannot have one of its own.

    Raises:
        MissingError: this Python or pip does not take them.
    """
    wheels = sorted((kit / "wheels").glob("*.whl"))
    if not wheels:
        raise MissingError(f"{kit}/wheels: no wheels; make gpu-wheels fetches them")
    _call("venv", "--without-pip", str(home))
    site = home / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    options = ["--quiet", "--no-index", "--no-deps", "--no-compile", "--no-cache-dir"]
    options += ["--disable-pip-version-check", "--upgrade", "--target", str(site)]
    _call("pip", "install", *options, *map(str, wheels))
    (site / "repository.pth").write_text(f"{ROOT / 'builder'}\n{ROOT / 'client'}\n", encoding="utf-8")
    return home / "bin" / "python3"


def _call(module: str, *arguments: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        python = ".".join(map(str, sys.version_info[:2]))
        raise MissingError(f"{module} of Python {python} failed: {done.stderr.strip()[-2000:]}")


def gpu() -> dict[str, str]:
    """What nvidia-smi says of the first GPU.

    Raises:
        MissingError: there is none, or its driver is too old.
    """
    program = shutil.which("nvidia-smi")
    if program is None:
        raise MissingError("no nvidia-smi on PATH: this machine has no NVIDIA driver")
    command = [program, f"--query-gpu={','.join(_QUERY)}", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    lines = done.stdout.strip().splitlines()
    if done.returncode != 0 or not lines:
        raise MissingError(
            f"nvidia-smi ended with status {done.returncode}: {(done.stdout + done.stderr).strip()}"
        )
    found = dict(zip(_QUERY, (cell.strip() for cell in lines[0].split(",")), strict=True))
    if int(found["driver_version"].split(".")[0]) < LEAST_DRIVER:
        raise MissingError(
            f"driver {found['driver_version']} is older than {LEAST_DRIVER}, the first for CUDA 13, which onnxruntime-gpu 1.31 needs"
        )
    return found


def library_directories(home: Path) -> list[Path]:
    """Where CUDA's libraries are among the Python packages, those installed here and those of the running Python.

    NVIDIA's wheels put them into ``nvidia/*/lib``.
    """
    found: list[Path] = []
    for root in [*home.glob("lib/python*/site-packages"), *map(Path, sys.path)]:
        found += [directory for directory in sorted(root.glob("nvidia/*/lib")) if directory not in found]
    return found


def require_libraries(directories: Sequence[Path]) -> str:
    """Load CUDA's libraries as the runtime will.

    Raises:
        MissingError: names those that are not there.
    """
    missing = []
    for name in LIBRARIES:
        candidates = [str(directory / name) for directory in directories if (directory / name).exists()]
        try:
            ctypes.CDLL((candidates or [name])[0], mode=ctypes.RTLD_GLOBAL)
        except OSError:
            missing.append(name)
    if missing:
        raise MissingError(
            f"CUDA's libraries {', '.join(missing)} are not there; make gpu-wheels with --cuda-libraries brings them"
        )
    return ", ".join(LIBRARIES)


def environment(directories: Sequence[Path]) -> dict[str, str]:
    """The environment in which the runtime finds CUDA's libraries."""
    found = dict(os.environ)
    libraries = [*map(str, directories), *filter(None, [found.get("LD_LIBRARY_PATH")])]
    if libraries:
        found["LD_LIBRARY_PATH"] = os.pathsep.join(libraries)
    return found


class Session:
    """The steps of one run, in order, and what they found."""

    def __init__(self, given: argparse.Namespace, work: Path) -> None:
        self._given = given
        self._work = work
        self._budget = Budget(time.monotonic() + given.budget_s)
        self._environment: Mapping[str, str] = dict(os.environ)
        self._python = Path(sys.executable)
        self.done: list[Done] = []
        self.found: dict[str, Any] = {}

    def run(self) -> None:
        """Everything that can be done here."""
        kit = self._given.kit
        if self._given.parts:
            self._step("join", lambda: join(self._given.parts, kit))
        elif not self._step("kit", lambda: check_kit(kit)):
            return
        if not self._prepare(kit):
            return
        for model in self._given.model:
            if (kit / "models" / model).is_dir():
                self._measure(kit, model)
            else:
                self._note(f"{model}: model", "not in the kit", ok=False)

    def _prepare(self, kit: Path) -> bool:
        """The GPU, the packages and CUDA's libraries; all three are looked at, so that one run tells all that is missing."""
        home, on_gpu, ready = self._work / "venv", self._given.provider == "cuda", True
        if on_gpu:
            ready = self._step("gpu", lambda: self.found.update(gpu=gpu()))
        if on_gpu or self._given.install:
            ready = self._step("install", lambda: setattr(self, "_python", install(kit, home))) and ready
        if on_gpu:
            directories = library_directories(home)
            ready = self._step("cuda", lambda: require_libraries(directories)) and ready
            self._environment = environment(directories)
        return ready

    def _measure(self, kit: Path, model: str) -> None:
        """The engine by itself, then behind tritonserver."""
        name, results = f"smollm2-135m-genai-{model}", self._work / "results"
        repository = self._work / "repository" / model
        files = ["--model", str(kit / "models" / model), "--tokenizer", str(kit / "tokenizer")]
        quick = ["--quick"] if self._given.quick else []
        measured = results / f"engine-{model}.json"
        measured.parent.mkdir(parents=True, exist_ok=True)
        arguments = [*files, "--repository", str(repository), "--name", name, "--out", str(measured), *quick]
        if not self._command(f"{model}: engine", [str(HERE / "gpu_measure.py"), *arguments]):
            return
        self.found[f"engine {model}"] = json.loads(measured.read_text(encoding="utf-8"))
        bench = ["-m", "enginesmith.cli", "bench", name, "--repository", str(repository)]
        short = ["--duration-s", "6"] if self._given.quick else ["--duration-s", "30"]
        standard, sweep = results / f"standard-{model}", results / f"sweep-{model}"
        levels = "1,4" if self._given.quick else "1,4,16,64"
        self._bench(f"{model}: standard", [*bench, "--profile", "standard", *short, "--out", str(standard)])
        self._bench(
            f"{model}: sweep", [*bench, "--sweep", f"concurrency={levels}", *short, "--out", str(sweep)]
        )

    def _bench(self, name: str, arguments: Sequence[str]) -> None:
        """Exit status 1 with a report is a measurement: one that missed its SLO or may not be believed, as it says."""
        report = Path(arguments[-1]) / "report.html"
        self._command(
            name, arguments, allowed=lambda status: status == 0 or (status == 1 and report.is_file())
        )

    def _step(self, name: str, work: Callable[[], object]) -> bool:
        begun_s = time.monotonic()
        try:
            note = work()
            assert note is None or isinstance(note, str)
        except (MissingError, OSError, subprocess.SubprocessError) as error:
            self._note(name, str(error), ok=False, begun_s=begun_s)
            return False
        self._note(name, note or "", ok=True, begun_s=begun_s)
        return True

    def _command(
        self,
        name: str,
        arguments: Sequence[str],
        *,
        allowed: Callable[[int], bool] = lambda status: status == 0,
    ) -> bool:
        command = [str(self._python), *arguments]
        begun_s, log = (
            time.monotonic(),
            self._work / "results" / f"{name.replace(': ', '-').replace(' ', '-')}.log",
        )
        with log.open("w", encoding="utf-8") as opened:
            try:
                status = subprocess.run(
                    command, env=self._environment, stdout=opened, stderr=subprocess.STDOUT,
                    timeout=self._budget.left_s, check=False, cwd=self._work,
                ).returncode  # fmt: skip
                note = f"status {status}"
            except subprocess.TimeoutExpired:
                status, note = -1, "ended: the time for all steps was over"
        ok = allowed(status)
        tail = "" if ok else "\n" + "\n".join(log.read_text(encoding="utf-8").splitlines()[-20:])
        self._note(name, note + tail, ok=ok, begun_s=begun_s, command=" ".join(map(str, arguments)))
        return ok

    def _note(
        self, name: str, note: str, *, ok: bool, begun_s: float | None = None, command: str = ""
    ) -> None:
        seconds = 0.0 if begun_s is None else round(time.monotonic() - begun_s, 1)
        self.done.append(Done(name, ok, seconds, note, command))
        print(f"{'ok  ' if ok else 'FAIL'} {seconds:6.1f} s  {name}  {note}", flush=True)


def keep(session: Session, given: argparse.Namespace, work: Path) -> Path:
    """Write what was found into ``--out``: few files, none of them big."""
    out: Path = given.out
    out.mkdir(parents=True, exist_ok=True)
    summary = {
        "benchmark": "gpu",
        "note": "a rehearsal on the CPU: no figure of a GPU" if given.provider == "cpu" else "",
        "provider": given.provider,
        "quick": given.quick,
        "python": sys.version.split()[0],
        **session.found,
        "steps": [asdict(done) for done in session.done],
    }
    text = json.dumps(summary, indent=1).replace(str(work), "WORK").replace(str(ROOT), "REPOSITORY")
    (out / "summary.json").write_text(text.replace(str(given.kit), "KIT") + "\n", encoding="utf-8")
    results = work / "results"
    if results.is_dir():
        with tarfile.open(out / "results.tar.gz", "w:gz") as archive:
            archive.add(results, "results")
        for report in sorted(results.glob("*/report.html"))[:5]:
            if report.stat().st_size < _SIZE_LIMIT:
                shutil.copyfile(report, out / f"{report.parent.name}.html")
    return out


def main() -> int:
    """Run what the command line asks for; 0 if every step was done."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default_out = os.environ.get("OUT") or str(HERE / "results" / "gpu")
    parser.add_argument("--kit", type=Path, default=ROOT / "build" / "gpu-kit", metavar="DIR")
    parser.add_argument("--parts", type=Path, metavar="DIR", help="where the kit was carried to, in parts")
    parser.add_argument("--out", type=Path, default=Path(default_out), metavar="DIR")
    parser.add_argument("--model", nargs="*", help="[default: int4 fp16; cpu-int4 with --provider cpu]")
    parser.add_argument("--provider", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument(
        "--install", action="store_true", help="with --provider cpu: from the kit's wheels, too"
    )
    parser.add_argument("--quick", action="store_true", help="short; not for the record")
    parser.add_argument("--budget-s", type=float, default=540, help="for all steps together")
    given = parser.parse_args()
    given.kit = given.kit.absolute()
    given.model = given.model or (["cpu-int4"] if given.provider == "cpu" else ["int4", "fp16"])
    with tempfile.TemporaryDirectory(prefix="gpu-bench-", ignore_cleanup_errors=True) as directory:
        work = Path(directory)
        session = Session(given, work)
        with contextlib.suppress(KeyboardInterrupt):
            session.run()
        print(f"results in {keep(session, given, work)}")
    return 0 if session.done and all(done.ok for done in session.done) else 1


if __name__ == "__main__":
    sys.exit(main())

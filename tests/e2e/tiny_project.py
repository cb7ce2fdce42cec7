"""A tiny project on disk and the program as its users run it: a process with arguments, two streams and a status."""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import yaml

SPEC: Mapping[str, Any] = {
    "name": "tiny",
    "source": {"path": "checkpoint"},
    "calibration": {"samples": 4, "length": 32},
    "variants": {
        "bf16": {"scheme": "none"},
        "int8-sq": {"scheme": "int8_sq"},
        "int8-wo": {"scheme": "int8_wo"},
        "int4-awq": {"scheme": "int4_awq", "group_size": 32},
        "fp8": {"scheme": "fp8"},
    },
    "serving": {"max_batch_size": 4, "max_sequence_length": 256, "default_max_tokens": 16},
    # Random weights say nothing that quantization could spoil; the limits on the lowering stay as they are.
    "verify": {"tokens": 256, "window": 32, "probe_tokens": 8, "quality": {}, "max_repeated_run": 1024},
}
VARIANTS = tuple(SPEC["variants"])
MODELS = tuple(f"{SPEC['name']}-{variant}" for variant in VARIANTS)

_STEP_LINE = re.compile(r"^\[\d+/\d+\] +(\w+) +(\S+) +(.*)$", re.MULTILINE)
_PATIENCE_S = 120.0

StepPlace = tuple[str, str]
"""Kind and variant of a step; ``-`` where all variants share it."""


@dataclass(frozen=True)
class Finished:
    """A command that has ended."""

    status: int
    out: str
    err: str

    @property
    def steps(self) -> dict[StepPlace, str]:
        """How each step ended: ``cached``, ``built``, ``FAILED`` or ``skipped``."""
        return steps_in(self.err)

    @property
    def built(self) -> set[StepPlace]:
        """The steps that ran."""
        return {place for place, state in self.steps.items() if state == "built"}

    def assert_ok(self) -> Finished:
        """This, when the command succeeded."""
        assert self.status == 0, self.err
        return self

    def assert_one_error(self, status: int, *words: str) -> None:
        """It failed as promised: one message that says ``words``, nothing on stdout, no traceback."""
        assert self.status == status, self.err
        assert len(re.findall("^error: ", self.err, re.MULTILINE)) == 1, self.err
        assert "Traceback" not in self.err
        assert self.out == ""
        for word in words:
            assert word in self.err, f"{word!r} is not in:\n{self.err}"


def steps_in(err: str) -> dict[StepPlace, str]:
    """The steps that a build has reported on stderr, with the last state of each."""
    states = {}
    for kind, variant, what in _STEP_LINE.findall(err):
        word = what.split(":")[0].split()[0]
        states[kind, variant] = word if word in ("cached", "FAILED", "skipped", "another") else "built"
    return states


@dataclass(frozen=True)
class Project:
    """A directory with a spec and a checkpoint, a store and a repository."""

    directory: Path
    spec: Path
    store: Path
    repository: Path
    environment: Mapping[str, str]

    @classmethod
    def create(cls, directory: Path) -> Project:
        """A project without a checkpoint and with nothing built."""
        temporary = directory / "tmp"
        temporary.mkdir(parents=True)
        environment = {name: value for name, value in os.environ.items() if name != "ENGINESMITH_STORE"}
        environment["TMPDIR"] = str(temporary)  # Logs that failures keep belong to the test.
        project = cls(
            directory, directory / "tiny.yaml", directory / "store", directory / "repository", environment
        )
        project.spec.write_text(yaml.safe_dump(dict(SPEC), sort_keys=False))
        return project

    def edited(self, changes: Mapping[str, Any], *, name: str = "edited.yaml") -> Project:
        """The same project with another spec: ``changes`` by dotted key; None removes the key."""
        document = copy.deepcopy(yaml.safe_load(self.spec.read_text()))
        for path, value in changes.items():
            *parents, last = path.split(".")
            node = document
            for parent in parents:
                node = node.setdefault(parent, {})
            if value is None:
                node.pop(last)
            else:
                node[last] = value
        spec = self.directory / name
        spec.write_text(yaml.safe_dump(document, sort_keys=False))
        return replace(self, spec=spec)

    def copied(self, directory: Path) -> Project:
        """A project of its own that has everything which is built here."""
        shutil.copytree(self.directory, directory)
        moved = {
            name: directory / getattr(self, name).relative_to(self.directory)
            for name in ("spec", "store", "repository")
        }
        environment = {**self.environment, "TMPDIR": str(directory / "tmp")}
        return Project(directory, environment=environment, **moved)

    def command(self, *arguments: object) -> list[str]:
        """The command line for ``arguments``, on this project's store."""
        program = [sys.executable, "-m", "enginesmith.cli", "--store", str(self.store)]
        return [*program, *(str(argument) for argument in arguments)]

    def run(self, *arguments: object, stdin: bytes = b"", **environment: str) -> Finished:
        """Run a command to its end. ``environment`` is added to this project's."""
        done = subprocess.run(
            self.command(*arguments),
            input=stdin,
            capture_output=True,
            env={**self.environment, **environment},
            cwd=self.directory,
        )
        return Finished(done.returncode, done.stdout.decode(), done.stderr.decode())

    @contextmanager
    def running(self, *arguments: object) -> Iterator[Running]:
        """A command that runs in the background; killed with all its children when the block is left."""
        if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
            # Tests that a shell runs in the background ignore Ctrl-C, and what they start would inherit that.
            signal.signal(signal.SIGINT, signal.default_int_handler)
        process = subprocess.Popen(
            self.command(*arguments),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=self.environment,
            cwd=self.directory,
            text=True,
        )
        running = Running(process)
        try:
            yield running
        finally:
            running.end()

    def build(self, *arguments: object) -> Finished:
        """Run ``build`` on the spec."""
        return self.run("build", self.spec, *arguments)

    def keys(self) -> dict[StepPlace, str]:
        """The key of every step of the spec."""
        return {(step["kind"], step["variant"] or "-"): step["key"] for step in self.plan()}

    def plan(self) -> list[dict[str, Any]]:
        """What ``plan`` says of every step."""
        steps: list[dict[str, Any]] = json.loads(
            self.run("plan", self.spec, "--explain", "--json").assert_ok().out
        )["steps"]
        return steps

    def entry(self, key: str) -> Path:
        """Where the store keeps the artifact of ``key``."""
        return self.store / "artifacts" / key[:2] / key

    def forget(self, *keys: str) -> None:
        """Take artifacts out of the store, as if their steps had never run."""
        for key in keys:
            shutil.rmtree(self.entry(key))

    def artifacts(self) -> set[str]:
        """The keys of all artifacts."""
        return {entry.name for entry in self.store.glob("artifacts/*/*")}

    def leftovers(self) -> list[Path]:
        """What unfinished steps left in the store."""
        staging = self.store / "staging"
        return list(staging.iterdir()) if staging.exists() else []


class Running:
    """A command in the background."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.pid = process.pid
        self._family: dict[int, psutil.Process] = {}

    def read_until(self, words: str) -> str:
        """What it says on stderr, up to the line that holds ``words``."""
        assert self.process.stderr is not None
        said = ""
        for line in self.process.stderr:
            said += line
            if words in line:
                return said
        raise AssertionError(f"it ended without saying {words!r}:\n{said}")

    def family(self) -> list[psutil.Process]:
        """Its children and theirs, now and before, as far as they were seen."""
        if self.process.poll() is None:
            for child in psutil.Process(self.pid).children(recursive=True):
                self._family.setdefault(child.pid, child)
        return list(self._family.values())

    def await_child(self, words: str) -> psutil.Process:
        """Its child or grandchild whose command line holds ``words``, as soon as there is one."""
        deadline = time.monotonic() + _PATIENCE_S
        while time.monotonic() < deadline and self.process.poll() is None:
            for child in self.family():
                try:
                    if any(words in argument for argument in child.cmdline()):
                        return child
                except psutil.Error:
                    continue
            time.sleep(0.005)  # The system tells nobody of a grandchild's birth.
        raise AssertionError(f"no child with {words!r} in its command line (status {self.process.poll()})")

    def finish(self) -> Finished:
        """Wait for its end; what it has said since ``read_until``."""
        out, err = self.process.communicate(timeout=_PATIENCE_S)
        return Finished(self.process.returncode, out, err)

    def assert_no_process_left(self) -> None:
        """Nothing that it started runs any more."""
        _, alive = psutil.wait_procs(self.family(), timeout=30)
        assert not alive

    def assert_alone(self) -> None:
        """Nothing that it started runs any more, and no server of it has left anything in shared memory."""
        self.assert_no_process_left()
        for pid in (self.pid, *self._family):
            assert not shared_memory_of(pid)

    def end(self) -> None:
        """Kill it and what it started."""
        for child in self.family():
            try:
                child.kill()
            except psutil.NoSuchProcess:
                continue
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdout, self.process.stderr):
            if stream is not None:
                stream.close()


@dataclass(frozen=True)
class Built:
    """A built project and what its build said."""

    project: Project
    first_build: Finished


@dataclass(frozen=True)
class Served:
    """A running ``enginesmith serve`` and where it listens."""

    command: Running
    grpc_url: str
    http_url: str


def shared_memory_of(pid: int) -> list[Path]:
    """What the servers of a process have in shared memory."""
    return list(Path("/dev/shm").glob(f"enginesmith-{pid}-*"))

"""Runs one step in a process of its own: the builder's side of ``enginesmith.worker``.

Owns the process: its environment, its log, its end. Knows nothing of plans or of the store's layout.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from enginesmith import errors
from enginesmith.errors import EnginesmithError, StepFailedError

_LOG_TAIL_LINES = 20
_INTERRUPT_GRACE_S = 10.0
_RSS_UNIT_BYTES = 1 if sys.platform == "darwin" else 1024

OnProgress = Callable[[float | None, str], None]


class DiskFullInWorkerError(Exception):
    """The step met a full disk; the store knows how to say it."""


class BuildStoppedError(Exception):
    """The step was ended because the build is stopping."""


@dataclass(frozen=True)
class StepRequest:
    """What a worker needs to run a step."""

    title: str
    """For messages: kind and variant."""
    function: str
    params: Mapping[str, Any]
    inputs: Mapping[str, Path]
    out: Path
    scratch: Path
    file: Path
    """Where the request itself is written."""
    log: Path
    online: bool
    """Whether the step may ask the Hugging Face hub."""


@dataclass(frozen=True)
class StepRun:
    """A step that succeeded, and what it took."""

    facts: Mapping[str, Any]
    duration_s: float
    peak_rss_bytes: int


class Runner:
    """Starts workers and can end all of them at once. Safe to use from several threads."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._running: set[int] = set()
        self._stopping = threading.Event()

    @property
    def stopping(self) -> bool:
        """Whether ``stop`` was called."""
        return self._stopping.is_set()

    def run(self, request: StepRequest, on_progress: OnProgress) -> StepRun:
        """Run a step to its end and return its facts, duration and peak memory.

        Raises:
            EnginesmithError: the one that the step raised, or StepFailedError with the end of the log.
            DiskFullInWorkerError: the step could not write.
            BuildStoppedError: ``stop`` was called.
        """
        document = {
            "function": request.function,
            "params": dict(request.params),
            "inputs": {role: str(path) for role, path in request.inputs.items()},
            "out": str(request.out),
            "scratch": str(request.scratch),
        }
        request.file.write_text(json.dumps(document), encoding="utf-8")
        request.log.parent.mkdir(parents=True, exist_ok=True)
        with request.log.open("ab") as log:
            log.write(f"=== {request.title}, {time.strftime('%Y-%m-%d %H:%M:%S')}\n".encode())
            log.flush()
            log_start = log.tell()
            started = time.monotonic()
            status, peak_rss_bytes, answer = self._run_process(request, log, on_progress)
        duration_s = time.monotonic() - started
        if answer.get("answer") == "done" and status == 0:
            return StepRun(answer["facts"], duration_s, peak_rss_bytes)
        if self.stopping:
            raise BuildStoppedError(request.title)
        raise _failure(request, status, peak_rss_bytes, answer, _tail(request.log, log_start))

    def stop(self) -> None:
        """Interrupt every worker, and kill those that have not ended after a grace period."""
        self._stopping.set()
        self._signal_all(signal.SIGINT)
        deadline = time.monotonic() + _INTERRUPT_GRACE_S
        try:
            while self._running and time.monotonic() < deadline:
                time.sleep(0.02)
        finally:  # Also when the user is impatient.
            self._signal_all(signal.SIGKILL)

    def _run_process(
        self, request: StepRequest, log: IO[bytes], on_progress: OnProgress
    ) -> tuple[int, int, Mapping[str, Any]]:
        """Exit status (negative: the signal), peak memory in bytes, and the last answer."""
        progress_read, progress_write = os.pipe()
        lifeline_read, lifeline_write = os.pipe()
        answer: dict[str, Any] = {}
        reader = threading.Thread(target=_read_answers, args=(progress_read, answer, on_progress))
        try:
            try:
                process = self._start(request, log, (progress_write, lifeline_read))
            finally:
                os.close(progress_write)
                os.close(lifeline_read)
                reader.start()  # With no process it ends at once, and closes its end.
            # Look before reaping: until then nothing else can get the number of this process or its group.
            os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
            with self._guard:
                with suppress(PermissionError, ProcessLookupError):
                    os.killpg(
                        process.pid, signal.SIGKILL
                    )  # A server that the step started must not outlive it.
                _, status, usage = os.wait4(process.pid, 0)
                process.returncode = os.waitstatus_to_exitcode(status)
                self._running.discard(process.pid)
        finally:
            reader.join()
            os.close(lifeline_write)
        return process.returncode, usage.ru_maxrss * _RSS_UNIT_BYTES, answer

    def _start(
        self, request: StepRequest, log: IO[bytes], descriptors: tuple[int, int]
    ) -> subprocess.Popen[bytes]:
        environment = dict(os.environ, PYTHONFAULTHANDLER="1")
        if not request.online:
            environment["HF_HUB_OFFLINE"] = "1"
        command = [
            sys.executable,
            "-P",
            "-m",
            "enginesmith.worker",
            str(request.file),
            *map(str, descriptors),
        ]
        with self._guard:
            if self.stopping:
                raise BuildStoppedError(request.title)
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment,
                pass_fds=descriptors,
                start_new_session=True,  # Ctrl-C reaches the builder only, which ends its workers in order.
            )
            self._running.add(process.pid)
        return process

    def _signal_all(self, number: signal.Signals) -> None:
        with self._guard:
            for pid in self._running:
                with suppress(ProcessLookupError):
                    os.killpg(pid, number) if number == signal.SIGKILL else os.kill(pid, number)


def _read_answers(descriptor: int, last: dict[str, Any], on_progress: OnProgress) -> None:
    with os.fdopen(descriptor, encoding="utf-8", errors="replace") as lines:
        for line in lines:
            try:
                message = json.loads(line)
            except ValueError:
                continue  # The last line of a killed worker may be cut.
            if message["answer"] == "progress":
                on_progress(message["fraction"], message["note"])
            else:
                last.update(message)


def _failure(
    request: StepRequest, status: int, peak_rss_bytes: int, answer: Mapping[str, Any], tail: str
) -> EnginesmithError | DiskFullInWorkerError:
    match answer.get("kind"):
        case "known":
            return _error_class(answer["class"])(answer["message"], hint=answer["hint"])
        case "disk_full":
            return DiskFullInWorkerError(answer["message"])
        case "unknown":
            reason = f"failed: {answer['message']}"
        case _:
            reason = _how_it_died(status, peak_rss_bytes)
    shown = f"\n  the end of its log:\n{tail}" if tail else ""
    return StepFailedError(f"step {request.title} {reason}{shown}", hint=f"the whole log is {request.log}")


def _how_it_died(status: int, peak_rss_bytes: int) -> str:
    number = -status if status < 0 else status - 128
    if status in (-signal.SIGKILL, 128 + signal.SIGKILL):
        return (
            f"was killed by signal 9 (SIGKILL), most likely because the machine ran out of memory; "
            f"it had used {peak_rss_bytes / 2**20:.0f} MiB"
        )
    if status < 0 or number in signal.valid_signals():
        return f"was ended by signal {number} ({signal.Signals(number).name})"
    return f"ended with exit status {status} and no answer"


def _error_class(name: str) -> type[EnginesmithError]:
    found = getattr(errors, name, StepFailedError)
    return found if isinstance(found, type) and issubclass(found, EnginesmithError) else StepFailedError


def _tail(log: Path, start: int) -> str:
    with log.open("rb") as file:
        file.seek(start)
        lines = file.read().decode("utf-8", "replace").splitlines()
    return "\n".join(f"    {line}" for line in lines[-_LOG_TAIL_LINES:])

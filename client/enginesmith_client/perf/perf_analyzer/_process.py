"""Runs perf_analyzer, follows what it prints, and ends it: at a limit, when the server is lost, at Ctrl-C.

An interrupt makes perf_analyzer export what it measured; the next makes it leave at once. Both were seen of 2.51: with
windows it ends within one of them; with a request count it waits for ever, so that it has to be killed.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from enginesmith_client.perf._errors import ToolError

_STEP_S = 0.25
_PASS = re.compile(
    r"^ *Pass \[\d+\] (?:throughput: (?P<rate>\S+) infer/sec\. .*?latency: (?P<us>\d+) usec|cb::Error: (?P<error>.*))"
)
SERVER_LOST = re.compile(
    r"failed to connect|Connection refused|Socket closed|Connection reset", re.IGNORECASE
)


@dataclass(frozen=True)
class Pass:
    """One of perf_analyzer's windows, as it prints them."""

    rows_per_s: float
    avg_us: float
    error: str = ""
    """Why there is nothing else."""

    @property
    def finished(self) -> bool:
        """Whether it came to its end, with answers or without."""
        return not self.error or "No valid requests" in self.error


@dataclass(frozen=True)
class Limits:
    """When perf_analyzer is told to end."""

    passes: int | None
    """Windows that it may take to become stable."""
    seconds: float
    """Of the whole process."""
    grace_s: float
    """How long it may take to end."""


@dataclass(frozen=True)
class Ended:
    """How it went."""

    status: int
    because: str
    """Why it was told to end: ``max_s``, ``server lost``, ``interrupted``. Empty: it ended by itself."""
    passes: tuple[Pass, ...]
    passes_after_end: int
    """How many of them came after it was told to."""
    output: str
    elapsed_s: float

    @property
    def whole_passes(self) -> tuple[Pass, ...]:
        """Those that were not cut off by its end, nor by a server that was gone."""
        before = self.passes[: len(self.passes) - self.passes_after_end]
        return tuple(one for one in before if one.finished)


def run_watched(
    command: Sequence[str],
    *,
    environment: Mapping[str, str],
    log: Path,
    limits: Limits,
    on_step: Callable[[float, Sequence[Pass]], None],
) -> Ended:
    """Run ``command`` in a process group of its own to its end; what it prints is appended to ``log``.

    ``on_step`` gets the seconds since the start and the windows so far, some times a second. Ctrl-C ends perf_analyzer;
    a second one, or one that comes before it finished a window, is raised.

    Raises:
        ToolError: the program cannot be started.
    """
    offset = log.stat().st_size if log.exists() else 0
    started_s = time.monotonic()
    with log.open("ab") as output:
        try:
            process = subprocess.Popen(
                command,
                env=dict(environment),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            raise ToolError(f"{command[0]} cannot be started: {error}") from error
    watch = _Watch(process, _Follower(log, offset), limits, on_step, started_s)
    try:
        return watch.to_the_end()
    finally:
        # Not once it is reaped: its number may be another's by then.
        if process.poll() is None:
            _send(process, signal.SIGKILL)
            process.wait()


def _send(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    """A signal to the whole group: the program on PATH may be a launcher of the real one."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


@dataclass
class _Follower:
    """Reads on in a file that grows."""

    path: Path
    offset: int
    text: str = ""
    passes: list[Pass] = field(default_factory=list)
    _done: int = 0

    def read(self) -> None:
        """Take in what was added; a line counts when it is whole."""
        with self.path.open("rb") as file:
            file.seek(self.offset)
            added = file.read()
        self.offset += len(added)
        self.text += added.decode("utf-8", errors="replace")
        end = self.text.rfind("\n") + 1
        for line in self.text[self._done : end].splitlines():
            if found := _PASS.match(line):
                self.passes.append(
                    Pass(float(found["rate"] or 0), float(found["us"] or 0), found["error"] or "")
                )
        self._done = end


@dataclass
class _Watch:
    process: subprocess.Popen[bytes]
    follower: _Follower
    limits: Limits
    on_step: Callable[[float, Sequence[Pass]], None]
    started_s: float
    _because: str = ""
    _passes_at_end: int = 0

    def to_the_end(self) -> Ended:
        """Wait, and tell it to end when a limit is reached."""
        try:
            self._wait_or_reason()
        except KeyboardInterrupt:
            if not self.follower.passes:
                raise
            self._because = "interrupted"
        if self._because:
            self._end()
        self.follower.read()
        passes = tuple(self.follower.passes)
        return Ended(
            status=self.process.wait(),
            because=self._because,
            passes=passes,
            passes_after_end=len(passes) - self._passes_at_end if self._because else 0,
            output=self.follower.text,
            elapsed_s=time.monotonic() - self.started_s,
        )

    def _wait_or_reason(self) -> None:
        while not self._finished(_STEP_S):
            self.follower.read()
            elapsed_s = time.monotonic() - self.started_s
            self.on_step(elapsed_s, self.follower.passes)
            self._because = self._reason(elapsed_s)
            if self._because:
                return

    def _reason(self, elapsed_s: float) -> str:
        passes = self.follower.passes
        if passes and SERVER_LOST.search(passes[-1].error):
            return "server lost"
        if elapsed_s > self.limits.seconds or len(passes) >= (self.limits.passes or math.inf):
            return "max_s"
        return ""

    def _end(self) -> None:
        """Interrupt it; if it does not end in time, it is killed."""
        self.follower.read()
        self._passes_at_end = len(self.follower.passes)
        _send(self.process, signal.SIGINT)
        if not self._finished(self.limits.grace_s):
            _send(self.process, signal.SIGKILL)

    def _finished(self, timeout_s: float) -> bool:
        try:
            self.process.wait(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            return False
        return True

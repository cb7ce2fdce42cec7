"""The command line as the tests of its verbs call it: in this process, or in one of its own that can be killed."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from perf_models import PerfServer

from enginesmith import cli

SHORT = """
name: short
load: {loop: closed, concurrency: 32}
measure: {window_s: 0.5, windows: 1, max_s: 0.5, warmup_s: 0.1, drain_s: 5, timeout_s: 20}
"""
"""Enough for figures of ``steady20`` that are not void: some 300 requests."""


@dataclass(frozen=True)
class Said:
    """What a command line came to."""

    status: int
    out: str
    err: str

    @property
    def measured(self) -> bool:
        """Whether it ran through: on a machine that is busy with other things the harness may call that void."""
        return self.status == 0 or (self.status == 1 and ": void: " in self.err)


@dataclass(frozen=True)
class Bench:
    """Calls verbs of enginesmith on the server of the session."""

    server: PerfServer
    capsys: pytest.CaptureFixture[str]
    profile: Path

    def __call__(self, *arguments: object) -> Said:
        """Any verb."""
        status = cli.run([str(argument) for argument in arguments])
        captured = self.capsys.readouterr()
        assert "Traceback" not in captured.err
        return Said(status, captured.out, captured.err)

    def measure(self, model: str, *arguments: object) -> Said:
        """``bench`` with the short profile, metrics included."""
        return self("bench", model, "--profile", self.profile, *self.at_server(), *arguments)

    def at_server(self) -> list[str]:
        """The options that name the server."""
        return ["--url", f"grpc://{self.server.grpc_url}", "--metrics-url", self.server.metrics_url]


@contextmanager
def measuring(*arguments: object) -> Iterator[subprocess.Popen[str]]:
    """``enginesmith`` as a process that has begun to measure; its later output is still to be read."""
    command = [sys.executable, "-m", "enginesmith.cli", *map(str, arguments)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        said = []
        for line in process.stderr:
            said.append(line)
            if "measuring" in line:
                break
        else:
            pytest.fail("".join(said))
        try:
            yield process
        finally:
            if process.poll() is None:
                process.kill()

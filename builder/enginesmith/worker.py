"""The process that runs one step: ``python -m enginesmith.worker REQUEST PROGRESS_FD LIFELINE_FD``.

Reads the request that ``enginesmith.runner`` wrote, runs the step function, and answers in JSON lines on PROGRESS_FD.
Ends with its whole process group when LIFELINE_FD closes, which is when the builder is gone. Knows nothing of the store.
"""

from __future__ import annotations

import errno
import importlib
import json
import math
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from enginesmith import errors

_DISK_FULL_TEXTS = ("No space left on device", "Disk quota exceeded")


@dataclass(frozen=True)
class WorkerContext:
    """The ``StepContext`` of a step that runs in this process."""

    params: Mapping[str, Any]
    inputs: Mapping[str, Path]
    out: Path
    scratch: Path
    answers: Answers

    def progress(self, fraction: float | None, note: str = "") -> None:
        """Report progress: ``fraction`` in [0, 1], or None when it is unknown."""
        clipped = (
            None if fraction is None or not math.isfinite(fraction) else min(max(float(fraction), 0.0), 1.0)
        )
        self.answers.send({"answer": "progress", "fraction": clipped, "note": note})


class Answers:
    """Writes JSON lines to the builder, whole ones also from several threads."""

    def __init__(self, descriptor: int) -> None:
        self._file = os.fdopen(descriptor, "w", encoding="utf-8")
        self._guard = threading.Lock()

    def send(self, message: Mapping[str, Any]) -> None:
        line = json.dumps(message) + "\n"
        with self._guard:
            self._file.write(line)
            self._file.flush()


def main(arguments: list[str]) -> int:
    """Run the step of a request; the exit status is 0 when it succeeded."""
    request_path, progress_fd, lifeline_fd = Path(arguments[0]), int(arguments[1]), int(arguments[2])
    for descriptor in (progress_fd, lifeline_fd):
        os.set_inheritable(
            descriptor, False
        )  # A program that the step starts must not keep the builder waiting.
    threading.Thread(target=_end_with_builder, args=(lifeline_fd,), daemon=True).start()
    answers = Answers(progress_fd)
    # A builder in the background has inherited, and passes on, that interrupts are ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        facts = _run(json.loads(request_path.read_bytes()), answers)
        answers.send({"answer": "done", "facts": facts})
    except KeyboardInterrupt:
        return 130
    except Exception as error:  # noqa: BLE001 - the process boundary: every failure becomes an answer.
        traceback.print_exc()
        answers.send({"answer": "error", **_described(error)})
        return 1
    return 0


def _run(request: Mapping[str, Any], answers: Answers) -> Mapping[str, Any]:
    module, _, name = request["function"].partition(":")
    context = WorkerContext(
        params=request["params"],
        inputs={role: Path(path) for role, path in request["inputs"].items()},
        out=Path(request["out"]),
        scratch=Path(request["scratch"]),
        answers=answers,
    )
    facts = getattr(importlib.import_module(module), name)(context)
    try:
        json.dumps(facts, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise errors.StepFailedError(
            f"{request['function']} returned facts that are not plain JSON: {error}"
        ) from error
    return dict(facts)


def _described(error: Exception) -> dict[str, Any]:
    """The error as the builder raises it again. ``kind`` tells it which of its own words to use."""
    kind: Literal["known", "disk_full", "unknown"] = "unknown"
    if isinstance(error, errors.EnginesmithError):
        name = next(base.__name__ for base in type(error).__mro__ if base.__module__ == errors.__name__)
        return {"kind": "known", "class": name, "message": error.message, "hint": error.hint}
    if any(_is_disk_full(cause) for cause in _causes(error)):
        kind = "disk_full"
    return {"kind": kind, "message": f"{type(error).__name__}: {error}".removesuffix(": ")}


def _is_disk_full(error: BaseException) -> bool:
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    # Libraries with native code (safetensors) raise errors of their own with the system's text.
    return any(text in str(error) for text in _DISK_FULL_TEXTS)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _end_with_builder(lifeline_fd: int) -> None:
    os.read(lifeline_fd, 1)  # Nothing is ever written: this returns when the builder's end closes.
    os.killpg(os.getpgrp(), signal.SIGKILL)


def _end(status: int) -> None:
    """End the process, also where code that the step ran left threads behind that never end."""
    left = [thread for thread in threading.enumerate() if not thread.daemon]
    if left == [threading.main_thread()]:
        sys.exit(status)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(status)


if __name__ == "__main__":
    _end(main(sys.argv[1:]))

"""How a build looks on stderr: one line per finished step, and on a terminal what is running now.

Knows events, not how they come about. stdout is never touched: it belongs to data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TextIO

from enginesmith.build import BuildEvent
from enginesmith.report_parts import bytes_text

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

OnEvent = Callable[[BuildEvent], None]


@contextmanager
def build_display(stream: TextIO) -> Iterator[OnEvent]:
    """A receiver of build events that shows them on ``stream``: with a live bar on a terminal, else plain lines."""
    if stream.isatty():
        with _live_display(stream) as on_event:
            yield on_event
    else:
        yield _PlainDisplay(stream)


def event_line(event: BuildEvent) -> str | None:
    """The line for an event that ends a step or makes it wait, or None: ``[3/6] quantize  int4-awq  14.2s  86 MiB``."""
    match event.state:
        case "cached":
            what = "cached"
        case "built":
            assert event.artifact is not None, "what is built is there"
            what = f"{event.artifact.duration_s:.1f}s  {bytes_text(event.artifact.size_bytes)}"
        case "failed":
            what = "FAILED"
        case "skipped":
            what = "skipped: a step that it needs failed"
        case "waiting":
            what = "another build is making this step; waiting for it"
        case _:
            return None
    place = f"[{event.number}/{event.total}]"
    return f"{place:<7} {event.step.kind:<15}  {event.step.place or '-':<14}  {what}"


class _PlainDisplay:
    """Lines for logs and pipes."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __call__(self, event: BuildEvent) -> None:
        if line := event_line(event):
            print(line, file=self._stream, flush=True)


@contextmanager
def _live_display(stream: TextIO) -> Iterator[OnEvent]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}", markup=False),
    )
    with Progress(*columns, console=Console(file=stream), transient=True) as progress:
        yield _LiveDisplay(progress)


class _LiveDisplay:
    """A bar for each running step, above it the lines of the finished ones."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._tasks: dict[str, TaskID] = {}

    def __call__(self, event: BuildEvent) -> None:
        key = event.step.key
        if event.state == "started":
            title = f"{event.step.kind} {event.step.place}"
            self._tasks[key] = self._progress.add_task(title, total=None, note="")
        elif event.state == "progress":
            total = None if event.fraction is None else 1.0
            self._progress.update(self._tasks[key], note=event.note, total=total, completed=event.fraction)
        elif event.state in ("cached", "built", "failed", "skipped") and key in self._tasks:
            self._progress.remove_task(self._tasks.pop(key))
        if line := event_line(event):
            self._progress.console.print(line, markup=False, highlight=False)


@contextmanager
def work_display(stream: TextIO) -> Iterator[Callable[[float | None, str], None]]:
    """A receiver of ``(fraction, note)`` that shows one piece of work: a live bar on a terminal, else its notes as lines."""
    if not stream.isatty():
        shown: list[str] = []

        def print_once(_fraction: float | None, note: str) -> None:
            if note and note not in shown[-1:]:
                shown.append(note)
                print(note, file=stream, flush=True)

        yield print_once
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (BarColumn(), TimeElapsedColumn(), TextColumn("{task.description}", markup=False))
    with Progress(*columns, console=Console(file=stream), transient=True) as progress:
        task = progress.add_task("", total=1.0)

        def update(fraction: float | None, note: str) -> None:
            if fraction is not None and fraction >= 1.0:
                progress.stop()
                progress.console.print(note, markup=False, highlight=False)
                return
            progress.update(task, description=note, completed=fraction or 0.0)

        yield update

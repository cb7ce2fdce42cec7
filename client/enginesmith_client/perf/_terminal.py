"""A run while it goes on, for people: a live view on a terminal, else a line every few seconds.

Progress comes from the event loop that sends the requests, so it is only stored there. The live view is drawn by a
thread of its own, twice a second, as plain text: a drawing takes about 0.7 ms of the interpreter, where a table of rich takes
6 ms, in which no request could be sent; and a terminal that stands still does not hold the load.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, TextIO

from enginesmith_client.perf._progress import OnProgress, Progress
from enginesmith_client.perf._quantities import quantity

if TYPE_CHECKING:
    from rich.text import Text

HISTORY_S = 60
LINES_EVERY_S = 5.0
_BLOCKS = "▁▂▃▄▅▆▇█"
_REFRESH_PER_S = 2
_BAR_WIDTH = 30

Clock = Callable[[], float]


@contextmanager
def live_display(stream: TextIO, *, clock: Clock = time.monotonic) -> Iterator[OnProgress]:
    """A receiver of progress that shows it on ``stream``: drawn over and over on a terminal, else as lines.

    On a terminal the drawing disappears at the end; a line for each part that was finished stays.
    """
    if not stream.isatty():
        yield ProgressLines(stream, clock=clock)
        return
    from rich.console import Console
    from rich.live import Live

    console = Console(file=stream)
    view = LiveView(clock=clock, on_finished=lambda line: console.print(line, markup=False, highlight=False))
    with Live(
        console=console,
        get_renderable=view.drawing,
        refresh_per_second=_REFRESH_PER_S,
        transient=True,
        redirect_stdout=False,
        redirect_stderr=False,
    ):
        yield view


def progress_line(progress: Progress) -> str:
    """One moment in a line: ``[2/5] chat, 8 at a time  measuring 12 of 60 s  45.1 req/s  p50 12.3 ms  ...``."""
    parts = [_place(progress), progress.title, f"{progress.phase}{_time(progress)}", *_figures(progress)]
    return "  ".join(part for part in parts if part)


def sparkline(values: Sequence[float | None]) -> str:
    """A block for each value, the highest for the greatest, the lowest for 0; a blank for None."""
    greatest = max((value for value in values if value is not None), default=0.0)
    if greatest <= 0:
        return "".join(" " if value is None else _BLOCKS[0] for value in values)
    return "".join(
        " " if value is None else _BLOCKS[min(round(value / greatest * (len(_BLOCKS) - 1)), len(_BLOCKS) - 1)]
        for value in values
    )


class ProgressLines:
    """Lines for logs and pipes: when something new begins, and every few seconds."""

    def __init__(self, stream: TextIO, *, clock: Clock = time.monotonic) -> None:
        self._stream = stream
        self._clock = clock
        self._shown: tuple[object, ...] = ()
        self._shown_s = 0.0

    def __call__(self, progress: Progress) -> None:
        what = (progress.part, progress.title, progress.phase)
        now_s = self._clock()
        if what == self._shown and now_s - self._shown_s < LINES_EVERY_S:
            return
        self._shown, self._shown_s = what, now_s
        print(progress_line(progress), file=self._stream, flush=True)


class LiveView:
    """What is drawn of the newest progress and of the last minute; filled by one thread and drawn by another."""

    def __init__(self, *, clock: Clock = time.monotonic, on_finished: Callable[[str], None]) -> None:
        self._clock = clock
        self._on_finished = on_finished
        self._now: Progress | None = None
        self._throughput: deque[float | None] = deque(maxlen=HISTORY_S)
        self._p99_ms: deque[float | None] = deque(maxlen=HISTORY_S)
        self._second = 0

    def __call__(self, progress: Progress) -> None:
        before = self._now
        if before is not None and (before.part, before.title) != (progress.part, progress.title):
            self._throughput.clear()
            self._p99_ms.clear()
        second = int(self._clock())
        if progress.phase in ("warming up", "measuring", "draining") and second != self._second:
            self._second = second
            self._throughput.append(progress.requests_per_s)
            self._p99_ms.append(progress.p99_ms)
        self._now = progress
        if progress.phase == "done" and (before is None or before.phase != "done"):
            self._on_finished(progress_line(progress))

    def drawing(self) -> Text:
        """The newest moment, in at most six lines of text."""
        from rich.text import Text

        now = self._now
        # A drawing as wide as the terminal would be wrapped, and a wrapped one cannot be drawn over.
        text = Text(no_wrap=True, overflow="ellipsis")
        if now is None or now.phase == "done":
            return text
        text.append(f"{now.title}  ", "bold").append(f"{_place(now)}\n", "dim")
        text.append(f"{now.phase:<11}")
        if now.planned_s:
            text.append_text(_bar(now.elapsed_s / now.planned_s)).append("  ")
        text.append(f"{_time(now).strip()}\n", "dim")
        if now.phase == "preparing":
            return text
        _row(text, "requests", quantity(now.requests_per_s, "per_s"), sparkline(list(self._throughput)))
        if now.tokens_per_s is not None:
            _row(text, "tokens", quantity(now.tokens_per_s, "per_s"), "")
        _row(text, "p50", quantity(now.p50_ms, "ms"), "")
        _row(text, "p99", quantity(now.p99_ms, "ms"), sparkline(list(self._p99_ms)))
        text.append(f"{now.answered:,} answered, {now.in_flight:,} in flight, ", "dim")
        return text.append(f"{now.failed:,} failed", "bold red" if now.failed else "dim")


def _row(text: Text, name: str, value: str, line: str) -> None:
    text.append(f"{name:<11}", "dim").append(f"{value:>11}  ").append(f"{line}\n", "cyan")


def _bar(fraction: float) -> Text:
    from rich.text import Text

    done = round(min(max(fraction, 0.0), 1.0) * _BAR_WIDTH)
    return Text("━" * done, "green").append("━" * (_BAR_WIDTH - done), "bright_black")


def _place(progress: Progress) -> str:
    number, total = progress.part
    return f"[{number}/{total}]" if total > 1 else ""


def _time(progress: Progress) -> str:
    if progress.phase in ("preparing", "done"):
        return ""
    known = progress.planned_s is not None and progress.elapsed_s <= progress.planned_s
    planned = f" of at most {max(1, progress.planned_s):.0f}" if known and progress.planned_s else ""
    return f" {progress.elapsed_s:.0f}{planned} s"


def _figures(progress: Progress) -> Iterator[str]:
    if progress.phase == "preparing":
        return
    yield f"{progress.answered:,} answered"
    if progress.phase == "done":
        # The other figures are those of the last second, which nobody should take for those of the run.
        yield f"{progress.failed:,} failed"
        return
    if progress.requests_per_s is not None:
        yield f"{quantity(progress.requests_per_s, 'plain')} requests/s"
    if progress.tokens_per_s is not None:
        yield f"{quantity(progress.tokens_per_s, 'plain')} tokens/s"
    if progress.p50_ms is not None:
        yield f"p50 {quantity(progress.p50_ms, 'ms')}"
    if progress.p99_ms is not None:
        yield f"p99 {quantity(progress.p99_ms, 'ms')}"
    yield f"{progress.in_flight:,} in flight"
    if progress.failed:
        yield f"{progress.failed:,} failed"

"""What is seen of a run while it goes on: lines in a log, a drawing on a terminal."""

import io
import os
import pty
import re
import threading
from dataclasses import dataclass, replace

import pytest

from enginesmith_client.perf._progress import Progress
from enginesmith_client.perf._terminal import LiveView, ProgressLines, live_display, progress_line, sparkline

MOMENT = Progress(
    phase="measuring",
    title="chat, 8 at a time",
    elapsed_s=12.3,
    planned_s=60.0,
    answered=1234,
    failed=0,
    in_flight=8,
    requests_per_s=45.123,
    tokens_per_s=811.6,
    p50_ms=12.34,
    p99_ms=1310.0,
)


@dataclass
class Clock:
    """A clock that stands where it is put."""

    now_s: float = 100.0

    def __call__(self) -> float:
        return self.now_s


def test_a_line_has_every_figure_with_its_unit() -> None:
    line = progress_line(replace(MOMENT, part=(2, 5), failed=3))
    assert line == (
        "[2/5]  chat, 8 at a time  measuring 12 of at most 60 s  1,234 answered  45.1 requests/s  812 tokens/s  "
        "p50 12.3 ms  p99 1.31 s  8 in flight  3 failed"
    )


def test_what_is_not_known_yet_is_not_in_the_line() -> None:
    line = progress_line(Progress("preparing", "chat", 0.0, None, 0, 0, 0))
    assert line == "chat  preparing"


def test_lines_come_every_few_seconds_and_whenever_something_begins() -> None:
    stream, clock = io.StringIO(), Clock()
    lines = ProgressLines(stream, clock=clock)
    for after_s, moment in (
        (0, replace(MOMENT, phase="warming up")),
        (1, MOMENT),
        (1, replace(MOMENT, answered=1300)),
        (4.5, replace(MOMENT, answered=1400)),
        (0.1, replace(MOMENT, answered=1500)),
        (0.1, replace(MOMENT, part=(2, 2))),
    ):
        clock.now_s += after_s
        lines(moment)
    seen = stream.getvalue().splitlines()
    assert [
        re.findall(r"(\[.*\])?.*(warming up|measuring).*?([\d,]+) answered", line)[0] for line in seen
    ] == [
        ("", "warming up", "1,234"),
        ("", "measuring", "1,234"),
        ("", "measuring", "1,400"),
        ("[2/2]", "measuring", "1,234"),
    ]


def test_without_a_terminal_there_are_no_control_characters() -> None:
    stream = io.StringIO()
    with live_display(stream) as on_progress:
        on_progress(MOMENT)
    assert stream.getvalue() == progress_line(MOMENT) + "\n"


@pytest.mark.parametrize(
    ("values", "blocks"),
    [
        ([], ""),
        ([0.0, 0.0], "▁▁"),
        ([0.0, 5.0, 10.0], "▁▅█"),
        ([None, 10.0, None], " █ "),
        ([10.0, 10.0], "██"),
    ],
)
def test_sparkline_goes_from_zero_to_the_greatest(values: list[float | None], blocks: str) -> None:
    assert sparkline(values) == blocks


def test_the_drawing_keeps_a_minute_of_each_part() -> None:
    clock = Clock()
    view = LiveView(clock=clock, on_finished=lambda line: None)
    for second in range(90):
        clock.now_s = 100 + second
        view(replace(MOMENT, requests_per_s=float(second)))
        view(replace(MOMENT, requests_per_s=float(second)))
    row = next(line for line in view.drawing().plain.splitlines() if line.startswith("requests"))
    assert len(re.findall("[▁▂▃▄▅▆▇█]", row)) == 60
    view(replace(MOMENT, title="the next one"))
    row = next(line for line in view.drawing().plain.splitlines() if line.startswith("requests"))
    assert len(re.findall("[▁▂▃▄▅▆▇█]", row)) <= 1


def test_each_finished_part_leaves_one_line() -> None:
    finished: list[str] = []
    view = LiveView(on_finished=finished.append)
    for part in (1, 2):
        view(replace(MOMENT, part=(part, 2)))
        for _ in range(2):
            view(replace(MOMENT, part=(part, 2), phase="done"))
    assert [line[:5] for line in finished] == ["[1/2]", "[2/2]"]
    assert view.drawing().plain == ""


def test_on_a_terminal_it_is_drawn_and_taken_away() -> None:
    leader, follower = pty.openpty()
    seen = bytearray()
    drawn = threading.Event()

    def read() -> None:
        while True:
            try:
                chunk = os.read(leader, 4096)
            except OSError:
                return
            seen.extend(chunk)
            if b"1,234 answered" in seen:
                drawn.set()

    reader = threading.Thread(target=read)
    reader.start()
    with os.fdopen(follower, "w", encoding="utf-8") as terminal:
        with live_display(terminal) as on_progress:
            on_progress(MOMENT)
            assert drawn.wait(20), bytes(seen)
            on_progress(replace(MOMENT, phase="done"))
        terminal.flush()
    reader.join(20)
    os.close(leader)
    text = seen.decode()
    assert "chat, 8 at a time" in text
    assert "\x1b[2K" in text, "lines are erased"
    assert "chat, 8 at a time  done  1,234 answered  0 failed\r" in text
    assert text.count("\x1b[2K") >= 7, "all lines of the drawing are"

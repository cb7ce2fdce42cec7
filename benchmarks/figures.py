"""What benchmarks measure: repeated ratios, the bars they are held to, and the line of JSON each script ends in.

Owns the statistics (a median with its lowest and highest run, never one run alone) and how they are shown. Knows
nothing of what is measured.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

from enginesmith.errors import EnginesmithError
from enginesmith_client import TritonClientError

NOT_MEASURED = "not measured"
_PIPE_WIDTH = 160


@dataclass(frozen=True)
class Spread:
    """Repeated measurements of one figure."""

    median: float
    low: float
    high: float
    runs: int

    def __str__(self) -> str:
        """The median and, where there were several runs, their range."""
        if self.runs == 1:
            return f"{self.median:.2f}"
        return f"{self.median:.2f} ({self.low:.2f}-{self.high:.2f})"


def spread_of(values: Sequence[float]) -> Spread:
    """Median, lowest and highest of ``values``."""
    return Spread(statistics.median(values), min(values), max(values), len(values))


def spread_of_ratios(values: Sequence[float], peers: Sequence[float]) -> Spread:
    """The spread of ``values[i] / peers[i]``: what was measured in one round is compared with that round's peer only."""
    return spread_of([value / peer for value, peer in zip(values, peers, strict=True)])


@dataclass(frozen=True)
class Bar:
    """One requirement and what was measured. ``measured`` is None where it was not."""

    name: str
    relation: Literal["at least", "at most"]
    limit: float
    measured: float | None
    unit: str = ""
    low: float | None = None
    high: float | None = None

    @property
    def met(self) -> bool | None:
        """Whether the median is on the right side of the limit; None where nothing was measured."""
        if self.measured is None:
            return None
        return self.measured >= self.limit if self.relation == "at least" else self.measured <= self.limit

    def as_json(self) -> dict[str, Any]:
        """Plain JSON values, with the verdict."""
        return asdict(self) | {"met": self.met}


def bar_of_spread(
    name: str,
    spread: Spread | None,
    *,
    relation: Literal["at least", "at most"],
    limit: float,
    unit: str = "x",
) -> Bar:
    """The bar whose measured figure is the median of ``spread``."""
    if spread is None:
        return Bar(name, relation, limit, None, unit)
    return Bar(name, relation, limit, spread.median, unit, spread.low, spread.high)


@dataclass(frozen=True)
class Outcome:
    """All that one benchmark found."""

    benchmark: str
    settings: Mapping[str, Any]
    figures: Mapping[str, Any]
    bars: Sequence[Bar]
    programs: Mapping[str, str] = field(default_factory=dict)
    """Versions of the programs that took part and are not Python distributions of this environment."""

    def as_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self) | {"bars": [bar.as_json() for bar in self.bars]}


def report(outcome: Outcome) -> None:
    """Print the bars as a table, and the whole outcome as the last line of stdout."""
    if outcome.bars:
        rows = [bar_cells(bar.as_json()) for bar in outcome.bars]
        print_table(f"{outcome.benchmark}: bars", ("bar", "measured", "runs", "limit", "verdict"), rows)
    print(json.dumps(outcome.as_json(), allow_nan=False, default=str))


def bar_cells(bar: Mapping[str, Any]) -> tuple[str, str, str, str, str]:
    """A bar's JSON as cells for people: name, median, range of the runs, limit, verdict."""
    unit = bar["unit"]
    verdicts = {None: NOT_MEASURED, True: "met", False: "MISSED"}
    measured = NOT_MEASURED if bar["measured"] is None else f"{_shown(bar['measured'])}{unit}"
    between = " to " if (bar["low"] or 0) < 0 else "-"
    runs = "" if bar["low"] is None else f"{_shown(bar['low'])}{between}{_shown(bar['high'])}{unit}"
    return bar["name"], measured, runs, f"{bar['relation']} {bar['limit']:g}{unit}", verdicts[bar["met"]]


def _shown(value: float) -> str:
    return f"{value:.2f}" if abs(value) >= 1 else f"{value:.3g}"


def print_table(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table on stdout; the first column is text, the others are figures."""
    table = Table(title=title, title_justify="left", min_width=len(title))
    for index, heading in enumerate(headings):
        table.add_column(heading, justify="right" if index else "left", no_wrap=index == 0)
    for row in rows:
        table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else _PIPE_WIDTH).print(table)


def say(text: str) -> None:
    """One line of progress, on stderr."""
    print(text, file=sys.stderr, flush=True)


def run_benchmark(measure: Callable[[], Outcome]) -> int:
    """Measure and report; the exit status."""

    def measure_and_report() -> int:
        report(measure())
        return 0

    return exit_status(measure_and_report)


def exit_status(work: Callable[[], int]) -> int:
    """What ``work`` returns; an expected failure becomes one message on stderr and its exit status."""
    try:
        return work()
    except EnginesmithError as error:
        say(f"error: {error}")
        return error.exit_code
    except TritonClientError as error:
        say(f"error: {error}")
        return 1
    except KeyboardInterrupt:
        say("interrupted; nothing was recorded")
        return 130

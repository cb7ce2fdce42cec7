"""What it means that perf_analyzer measured nothing, or nothing steady: its output in, an error or words out."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from enginesmith_client._errors import ConnectError, ModelNotReady, TritonClientError
from enginesmith_client.perf._errors import MeasurementError, ToolError
from enginesmith_client.perf.perf_analyzer._process import SERVER_LOST, Ended, Pass

JUDGED_WINDOWS = 3
"""Consecutive windows that perf_analyzer compares; it has no option for it."""
STEADIER = "raise measure.window_s, measure.max_s or measure.stability_percent, or set measure.max_requests"
_UNKNOWN_MODEL = re.compile(r"Request for unknown model: ([^\n]*?)(?: is not found)?\s*$", re.MULTILINE)
_FAILED_REQUEST = re.compile(r"Thread \[\d+\] had error: (.*?)(?=\nThread \[|\Z)", re.DOTALL)


def disagreement(ended: Ended, *, stability_percent: float) -> str:
    """In words: which windows there were, and that they do not agree."""
    return f"no {JUDGED_WINDOWS} windows in a row agree within {stability_percent:g}%: {seen(ended.whole_passes)}"


def seen(passes: Sequence[Pass]) -> str:
    """The last windows in words."""
    if not passes:
        return "not one window was finished"
    shown = [
        f"{one.rows_per_s:g}/s at {one.avg_us / 1000:g} ms" if not one.error else "nothing"
        for one in passes[-6:]
    ]
    count = f"{len(passes)} window{'s' if len(passes) > 1 else ''}"
    return f"{count}, {'the last ' if len(passes) > len(shown) else ''}{', '.join(shown)}"


def failure_of(
    ended: Ended, *, model: str, address: str, log: Path, window_s: float, stability_percent: float
) -> TritonClientError:
    """The error for a run that left no figures, by what perf_analyzer printed; ``log`` is where that is."""
    said = ended.output
    tail = "\n".join(f"  | {line}" for line in said.splitlines()[-12:] if line.strip())
    whole = f"\n  | the whole output: {log}"
    if unknown := _UNKNOWN_MODEL.search(said):
        return ModelNotReady(
            f"{address} does not serve the model {unknown[1]}", hint="load it, or name another"
        )
    if ended.because == "server lost" or SERVER_LOST.search(said):
        return ConnectError(
            f"perf_analyzer lost the server {address} while measuring {model}; "
            f"windows before that: {seen([one for one in ended.passes if not one.error])}\n{tail}{whole}",
            hint="look at the server's log; generator: enginesmith keeps the records of a run that loses its server",
        )
    if failed := _FAILED_REQUEST.search(said):
        return MeasurementError(
            f"a request to {model} failed, at which perf_analyzer ends: {failed[1].strip()}{whole}",
            hint="generator: enginesmith goes on and counts failures",
        )
    if "No valid requests recorded" in said:
        return ToolError(
            f"perf_analyzer found windows of {window_s:g} s without an answer of {model}: {seen(ended.passes)}{whole}",
            hint="raise measure.window_s above the time that one answer takes, or set measure.max_requests",
        )
    if "stable measurement" in said:
        return ToolError(
            f"perf_analyzer got no stable measurement of {model}: {disagreement(ended, stability_percent=stability_percent)}{whole}",
            hint=STEADIER,
        )
    if ended.because:
        return ToolError(
            f"perf_analyzer measured {model} for {ended.elapsed_s:.0f} s and was ended ({ended.because}); it left no records\n{tail}{whole}",
            hint="raise measure.max_s, or ask for fewer requests",
        )
    return ToolError(
        f"perf_analyzer could not measure {model} (exit status {ended.status})\n{tail}{whole}",
        hint="see its output and the server's log",
    )

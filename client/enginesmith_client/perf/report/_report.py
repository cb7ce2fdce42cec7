"""Reports of saved results: what a directory holds, as a page, as Markdown, as JSON.

The last part of the flow: it reads what runs, sweeps, suites and comparisons have left on disk, and measures nothing.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from enginesmith_client.perf._errors import ResultsError
from enginesmith_client.perf._run_files import RUN_FILE, load_run
from enginesmith_client.perf.compare._comparison import COMPARISON_FILE
from enginesmith_client.perf.many._suite import SUITE_FILE
from enginesmith_client.perf.many._sweep import SWEEP_FILE
from enginesmith_client.perf.report._comparison import report_of_comparison
from enginesmith_client.perf.report._html import html_of
from enginesmith_client.perf.report._markdown import markdown_of
from enginesmith_client.perf.report._model import Report
from enginesmith_client.perf.report._run import report_of_run
from enginesmith_client.perf.report._suite import report_of_suite
from enginesmith_client.perf.report._sweep import report_of_sweep

FORMAT = "enginesmith-bench-report"
VERSION = 1


def report_of(directory: Path) -> Report:
    """What is to be said of the results in ``directory``: a comparison, a sweep, a suite or a run.

    Raises:
        ResultsError: there are none, they are damaged, or of another version.
    """
    for name, report in _REPORTS.items():
        if (directory / name).is_file():
            return report(directory)
    raise ResultsError(
        f"{directory} holds no results: none of {', '.join(_REPORTS)} is there",
        hint="give the directory that a run, a sweep, a suite or a comparison wrote",
    )


def html(directory: Path) -> str:
    """One page that opens from disk and needs nothing but itself. Errors as ``report_of``."""
    return html_of(report_of(directory))


def markdown(directory: Path) -> str:
    """The same without the plots, for a terminal or the summary of a CI job. Errors as ``report_of``."""
    return markdown_of(report_of(directory))


def as_json(directory: Path) -> dict[str, Any]:
    """The same as plain JSON values: verdict, tables, the data of every plot, and the saved results themselves.

    ``json.dumps(..., allow_nan=False)`` takes it. Errors as ``report_of``.
    """
    plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(report_of(directory)), default=sorted))
    return {"format": FORMAT, "version": VERSION} | plain


def _run(directory: Path) -> Report:
    return report_of_run(load_run(directory))


_REPORTS: Mapping[str, Callable[[Path], Report]] = {
    COMPARISON_FILE: report_of_comparison,
    SWEEP_FILE: report_of_sweep,
    SUITE_FILE: report_of_suite,
    RUN_FILE: _run,
}
"""By the file that tells. In this order: a directory of many runs has none of its own."""

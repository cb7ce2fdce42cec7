"""The perf harness: drives load against a model of a Triton server, judges its own numbers, compares and draws them.

Needs the extra ``perf``. Knows nothing of how the model was built. A run goes through these parts::

    _profile (what to measure) -> workload (requests of the model) -> load, or perf_analyzer (records)
        -> observe (server and machine meanwhile) -> judge (figures, and may they be believed?) -> _run_files (kept)
    many (sweeps, suites), compare (two of them): runs of runs -> report

The names here are what a program needs; each is imported when it is first asked for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from enginesmith_client.perf._errors import MeasurementError, ProfileError, ResultsError, ToolError
    from enginesmith_client.perf._figures import Figures, Quantiles
    from enginesmith_client.perf._profile import Profile
    from enginesmith_client.perf._profile_file import profile_from_file
    from enginesmith_client.perf._progress import Progress
    from enginesmith_client.perf._records import Record, read_records
    from enginesmith_client.perf._run import recompute, run_profile
    from enginesmith_client.perf._run_files import Check, Run, SavedRun, load_run
    from enginesmith_client.perf._target import Target
    from enginesmith_client.perf.compare._comparison import CompareOptions, Comparison, load_comparison
    from enginesmith_client.perf.compare._live import compare_live
    from enginesmith_client.perf.compare._saved import compare_saved
    from enginesmith_client.perf.many._ladder import Ladder, ladder_from_text
    from enginesmith_client.perf.many._suite import load_suite, load_suite_result, run_suite
    from enginesmith_client.perf.many._sweep import Sweep, load_sweep, sweep
    from enginesmith_client.perf.report._report import as_json, html, markdown, report_of

_HOMES = {
    "_errors": ("MeasurementError", "ProfileError", "ResultsError", "ToolError"),
    "_figures": ("Figures", "Quantiles"),
    "_profile": ("Profile",),
    "_profile_file": ("profile_from_file",),
    "_progress": ("Progress",),
    "_records": ("Record", "read_records"),
    "_run": ("recompute", "run_profile"),
    "_run_files": ("Check", "Run", "SavedRun", "load_run"),
    "_target": ("Target",),
    "compare._comparison": ("CompareOptions", "Comparison", "load_comparison"),
    "compare._live": ("compare_live",),
    "compare._saved": ("compare_saved",),
    "many._ladder": ("Ladder", "ladder_from_text"),
    "many._suite": ("load_suite", "load_suite_result", "run_suite"),
    "many._sweep": ("Sweep", "load_sweep", "sweep"),
    "report._report": ("as_json", "html", "markdown", "report_of"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "Check",
    "CompareOptions",
    "Comparison",
    "Figures",
    "Ladder",
    "MeasurementError",
    "Profile",
    "ProfileError",
    "Progress",
    "Quantiles",
    "Record",
    "ResultsError",
    "Run",
    "SavedRun",
    "Sweep",
    "Target",
    "ToolError",
    "as_json",
    "compare_live",
    "compare_saved",
    "html",
    "ladder_from_text",
    "load_comparison",
    "load_run",
    "load_suite",
    "load_suite_result",
    "load_sweep",
    "markdown",
    "profile_from_file",
    "read_records",
    "recompute",
    "report_of",
    "run_profile",
    "run_suite",
    "sweep",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME_OF[name]}"), name)

"""Saved runs with chosen figures, for what is computed from many runs. Written through the real writers."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from enginesmith_client.perf._figures import Figures, Quantiles
from enginesmith_client.perf._profile import ClosedLoad, OpenLoad, Profile
from enginesmith_client.perf._progress import OnProgress, Progress
from enginesmith_client.perf._records import Record, RecordWriter
from enginesmith_client.perf._run_files import (
    RECORDS_FILE,
    RUN_FILE,
    Check,
    Run,
    SavedRun,
    SloVerdict,
    Window,
    load_run,
    save_run,
)
from enginesmith_client.perf._target import Target

CLOSED = Profile(name="test", load=ClosedLoad(concurrency=4))


def times(p50: float, *, count: int = 400) -> Quantiles:
    """A distribution whose figures all follow from its median."""
    return Quantiles(count, 1.02 * p50, p50, 1.2 * p50, 1.3 * p50, 1.6 * p50, None, 2.0 * p50)


def figures(
    *, p50_ms: float = 10.0, requests_per_s: float = 100.0, count: int = 400, **others: Any
) -> Figures:
    """Those of a closed loop without streams."""
    return Figures(
        duration_s=4.0,
        requests=count,
        errors=others.pop("errors", {}),
        requests_per_s=requests_per_s,
        rows_per_s=requests_per_s,
        offered_per_s=others.pop("offered_per_s", None),
        latency_ms=times(p50_ms, count=count),
        **others,
    )


def stream_figures(*, ttft_ms: float = 50.0, tpot_ms: float = 10.0, tokens_per_s: float = 400.0) -> Figures:
    """Those of a closed loop of streams."""
    return figures(
        ttft_ms=times(ttft_ms),
        tpot_ms=times(tpot_ms),
        itl_ms=times(tpot_ms),
        output_tokens_per_s=tokens_per_s,
    )


def saved_run(
    directory: Path,
    of: Figures,
    *,
    profile: Profile = CLOSED,
    model: str = "m",
    records: Sequence[Record] = (),
    checks: tuple[Check, ...] = (),
    slo: tuple[SloVerdict, ...] = (),
    **others: Any,
) -> SavedRun:
    """A run in ``directory`` with these figures; ``others`` are fields of ``Run``."""
    with RecordWriter(directory / RECORDS_FILE) as writer:
        for record in records:
            writer.write(record)
    run = Run(
        title="a run",
        model=model,
        model_version="1",
        url="grpc://127.0.0.1:8001",
        profile=profile.as_json(),
        profile_digest="0",
        started="2026-11-01T10:00:00+00:00",
        generator="enginesmith",
        status="complete",
        ended_because="steady",
        window=Window(0, 4_000_000_000, True),
        figures=of,
        checks=checks,
        slo=slo,
        machine={"cpu": "a cpu", "cores": 2},
        versions={},
        workload={"kind": "tensors"},
    )
    return save_run(directory, replace(run, **others))


def void_check(words: str = "the clock jumped") -> Check:
    return Check("clock", "void", words)


@dataclass
class RecordedRuns:
    """Stands where ``run_profile`` stands and gives runs whose figures were decided before; notes what it was asked."""

    figures_of: Callable[[Target, Profile], Figures | BaseException]
    fields: Callable[[Target, Profile], Mapping[str, Any]] = lambda target, profile: {}
    asked: list[tuple[str, str]] = field(default_factory=list)
    """Model and name of the directory of every run that was really made, in order."""
    profiles: list[Profile] = field(default_factory=list)

    def __call__(
        self,
        target: Target,
        profile: Profile,
        *,
        directory: Path,
        title: str = "",
        on_progress: OnProgress,
        reuse: bool = False,
    ) -> SavedRun:
        if reuse and (directory / RUN_FILE).exists():
            return load_run(directory)
        self.asked.append((target.model, directory.name))
        self.profiles.append(profile)
        on_progress(Progress("measuring", title, 0.0, None, 0, 0, 0))
        found = self.figures_of(target, profile)
        if isinstance(found, BaseException):
            raise found
        others = dict(self.fields(target, profile))
        return saved_run(directory, found, profile=profile, model=target.model, **others)


def load_of(profile: Profile) -> float:
    """Requests in flight, or per second."""
    if isinstance(profile.load, OpenLoad):
        assert profile.load.rate_per_s is not None
        return profile.load.rate_per_s
    return profile.load.concurrency


def example_in(page: str) -> str:
    """The Python of a page of the documentation."""
    text = (Path(__file__).parents[2] / "docs" / page).read_text()
    return "\n".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL))

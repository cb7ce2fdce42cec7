"""Runs a load against a server, as the tests of the generator do."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from perf_models import tensor_request

from enginesmith_client.perf._profile import Profile
from enginesmith_client.perf._progress import OnProgress, ignore_progress
from enginesmith_client.perf._records import Record
from enginesmith_client.perf._target import Target
from enginesmith_client.perf.load._loops import Loop, run_load
from enginesmith_client.perf.load._prepared import Due, Prepared
from enginesmith_client.perf.load._wire import Wire


@dataclass(frozen=True)
class SameRequest:
    """A workload of one request."""

    prepared: Prepared

    def request(self, number: int, due: Due | None = None) -> Prepared:
        return self.prepared


def profile(load: dict[str, Any], *, start: str = "warm", **measure: Any) -> Profile:
    """Short: no warm-up, 0.3 s, whether or not it is steady."""
    short = {
        "window_s": 0.3,
        "windows": 1,
        "max_s": 0.3,
        "warmup_s": 0,
        "warmup_requests": 0,
        "timeout_s": 20,
    }
    return Profile.model_validate({"load": load, "measure": short | measure, "start": start})


def closed(concurrency: int) -> dict[str, Any]:
    return {"loop": "closed", "concurrency": concurrency}


def constant(rate_per_s: float, **options: Any) -> dict[str, Any]:
    return {"loop": "open", "arrivals": {"kind": "constant"}, "rate_per_s": rate_per_s} | options


async def loaded(
    target: Target,
    wanted: Profile,
    *,
    request: Prepared | None = None,
    on_progress: OnProgress = ignore_progress,
    stop: asyncio.Event | None = None,
    write: Callable[[Record], None] | None = None,
) -> tuple[Loop, list[Record]]:
    """The load and its records, in the order of their numbers."""
    records: list[Record] = []
    wire = Wire(target, timeout_s=wanted.measure.timeout_s, headers=wanted.requests.headers)
    try:
        loop = await run_load(
            wire,
            SameRequest(request or tensor_request(target.model)),
            wanted,
            rate_per_s=None,
            write=write or records.append,
            on_progress=on_progress,
            stop=stop,
            title="a test",
        )
    finally:
        await wire.close()
    return loop, sorted(records, key=lambda record: record.number)


def load(target: Target, wanted: Profile, **options: Any) -> tuple[Loop, list[Record]]:
    """``loaded`` in an event loop of its own."""
    return asyncio.run(loaded(target, wanted, **options))

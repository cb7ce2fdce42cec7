"""How late the open-loop generator sends its requests, beside two peers that do the same load in the same rounds.

A real tritonserver on the same machine serves a model that returns what it gets, so the server's work and the
generator's compete for the cores, as they do for whoever measures on one machine. Every sender gets the same Poisson
arrivals. The peers send from one task that sleeps until the next request is due and start a task for each request:
``grpc.aio`` with ready messages, and ``tritonclient.grpc.aio``, which makes them. The send-lag is from when a request was
due to when its library took the bytes; for tritonclient, which does not tell, until it was called.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import shutil
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc.aio  # type: ignore[import-untyped]
import numpy as np
import tritonclient.grpc
import tritonclient.grpc.aio
from figures import Bar, Outcome, Spread, bar_of_spread, print_table, run_benchmark, say, spread_of

from enginesmith.triton.server import TritonServer
from enginesmith_client.perf._profile import MeasurePart, OpenLoad, Profile
from enginesmith_client.perf._progress import ignore_progress
from enginesmith_client.perf._records import RecordWriter, read_records
from enginesmith_client.perf._target import Target
from enginesmith_client.perf.load._arrivals import due_times
from enginesmith_client.perf.load._loops import Loop, run_load
from enginesmith_client.perf.load._prepared import Due, Prepared
from enginesmith_client.perf.load._wire import Wire

MAX_LAG_MS = {1500: 2.0, 3000: 5.0}
"""99th percentile of the send-lag, by requests per second."""
MODEL = "tiny"
MODELS = Path(__file__).parent.parent / "tests" / "perf" / "models"
TIMEOUT_S = 60.0
WARMUP_S = 1.0

Send = Callable[[], Awaitable[Any]]
Sender = Callable[[str, float, "Settings", int], tuple[list[int], int]]
"""Of an address, a rate, settings and a seed: lags in nanoseconds, and how many requests were answered in time."""
Lags = dict[str, list[float]]


@dataclass(frozen=True)
class Settings:
    """How long and how often to measure."""

    rounds: int
    seconds: float


RECORD = Settings(rounds=7, seconds=10.0)
QUICK = Settings(rounds=1, seconds=3.0)


@dataclass(frozen=True)
class _OneRequest:
    """A workload of one request."""

    prepared: Prepared

    def request(self, number: int, due: Due | None = None) -> Prepared:  # noqa: ARG002 - as the generator asks
        """Always the same."""
        return self.prepared


def measure(settings: Settings) -> Outcome:
    """All senders at both rates."""
    with tempfile.TemporaryDirectory(prefix="enginesmith-bench-") as directory:
        shutil.copytree(MODELS / MODEL, Path(directory) / "repository" / MODEL)
        with TritonServer(Path(directory) / "repository") as server:
            server.wait_ready()
            programs = {"tritonserver": server.server_version()}
            lags, answered = _rounds(server.grpc_url, settings)
    p99s = {name: spread_of(values) for name, values in lags.items()}
    rates = {name: spread_of(values) for name, values in answered.items()}
    _show(p99s, rates)
    bars: list[Bar] = []
    for rate, limit in MAX_LAG_MS.items():
        bars.append(
            bar_of_spread(
                f"send-lag p99 at {rate}/s",
                p99s[f"enginesmith {rate}/s"],
                relation="at most",
                limit=limit,
                unit=" ms",
            )
        )
        held = spread_of([value / rate for value in answered[f"enginesmith {rate}/s"]])
        bars.append(bar_of_spread(f"answered at {rate}/s", held, relation="at least", limit=0.97))
    figures = {"lag_p99_ms": p99s, "answered_per_s": rates}
    return Outcome(
        "generator", {"rounds": settings.rounds, "seconds": settings.seconds}, figures, bars, programs
    )


def _rounds(grpc_url: str, settings: Settings) -> tuple[Lags, Lags]:
    """Milliseconds of the 99th percentile of the lag, and answers per second, of each sender by round."""
    lags: Lags = {}
    answered: Lags = {}
    for rate in MAX_LAG_MS:
        for number in range(settings.rounds):
            say(f"{rate}/s: round {number + 1}/{settings.rounds}")
            for name in list(SENDERS)[:: 1 if number % 2 else -1]:
                lag_ns, count = SENDERS[name](grpc_url, rate, settings, number)
                lags.setdefault(f"{name} {rate}/s", []).append(float(np.percentile(lag_ns, 99)) / 1e6)
                answered.setdefault(f"{name} {rate}/s", []).append(count / settings.seconds)
    return lags, answered


def _ours(grpc_url: str, rate: float, settings: Settings, seed: int) -> tuple[list[int], int]:
    """The lags of the requests that were due in the measurement, and how many of them were answered."""
    profile = Profile(
        load=OpenLoad(loop="open", rate_per_s=rate, max_in_flight=1_000_000),
        measure=MeasurePart(
            window_s=settings.seconds,
            windows=1,
            max_s=settings.seconds,
            warmup_s=WARMUP_S,
            timeout_s=TIMEOUT_S,
        ),
        seed=seed,
    )
    with tempfile.TemporaryDirectory(prefix="enginesmith-bench-") as directory:
        path = Path(directory) / "records.jsonl"
        # To a file, as in every run: that costs time as well.
        with RecordWriter(path) as writer:
            window = asyncio.run(_load(grpc_url, profile, writer)).window
        records = read_records(path)
    measured = [record for record in records if window.start_ns <= record.due_ns < window.end_ns]
    ended = sum(record.ok and window.start_ns <= record.ended_ns < window.end_ns for record in records)
    return [record.lag_ns for record in measured], ended


async def _load(grpc_url: str, profile: Profile, writer: RecordWriter) -> Loop:
    wire = Wire(Target(MODEL, f"grpc://{grpc_url}"), timeout_s=TIMEOUT_S, headers={})
    try:
        return await run_load(
            wire,
            _OneRequest(Prepared(_message())),
            profile,
            rate_per_s=None,
            write=writer.write,
            on_progress=ignore_progress,
        )
    finally:
        await wire.close()


async def _bare(grpc_url: str, rate: float, settings: Settings, seed: int) -> tuple[list[int], int]:
    channel = grpc.aio.insecure_channel(grpc_url)
    sent_ns: list[int] = []

    def taken(message: bytes) -> bytes:
        sent_ns.append(time.monotonic_ns())
        return message

    infer = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer", taken)
    message = _message()

    async def send() -> None:
        await infer(message, timeout=TIMEOUT_S)

    try:
        due_ns, ended_ns = await _open_loop(send, rate, settings, seed)
    finally:
        await channel.close()
    return _measured(due_ns, sent_ns, ended_ns, settings)


async def _peer(grpc_url: str, rate: float, settings: Settings, seed: int) -> tuple[list[int], int]:
    client = tritonclient.grpc.aio.InferenceServerClient(grpc_url)
    array = np.zeros((1, 4), np.float32)
    sent_ns: list[int] = []

    async def send() -> None:
        tensor = tritonclient.grpc.InferInput("in", [1, 4], "FP32")
        tensor.set_data_from_numpy(array)
        sent_ns.append(time.monotonic_ns())
        await client.infer(MODEL, [tensor], client_timeout=TIMEOUT_S)

    try:
        due_ns, ended_ns = await _open_loop(send, rate, settings, seed)
    finally:
        await client.close()
    return _measured(due_ns, sent_ns, ended_ns, settings)


async def _open_loop(send: Send, rate: float, settings: Settings, seed: int) -> tuple[list[int], list[int]]:
    """When each request was due and when each answer came, in nanoseconds of the monotonic clock."""
    load = OpenLoad(loop="open", rate_per_s=rate)
    until_ns = round((WARMUP_S + settings.seconds) * 1e9)
    due_ns = [
        due.at_ns
        for due in itertools.takewhile(
            lambda due: due.at_ns < until_ns, due_times(load, rate_per_s=None, seed=seed)
        )
    ]
    ended_ns: list[int] = []
    waiting: set[asyncio.Task[None]] = set()

    async def ask() -> None:
        await send()
        ended_ns.append(time.monotonic_ns())

    await send()
    ended_ns.clear()
    origin_ns = time.monotonic_ns()
    for at_ns in due_ns:
        await asyncio.sleep(max(0.0, (origin_ns + at_ns - time.monotonic_ns()) / 1e9))
        task = asyncio.create_task(ask())
        waiting.add(task)
        task.add_done_callback(waiting.discard)
    if waiting:
        await asyncio.wait(set(waiting))
    return [origin_ns + at_ns for at_ns in due_ns], ended_ns


def _measured(
    due_ns: list[int], sent_ns: list[int], ended_ns: list[int], settings: Settings
) -> tuple[list[int], int]:
    """Without the warm-up. The first of ``sent_ns`` is the call before the load."""
    start_ns = due_ns[0] + round(WARMUP_S * 1e9)
    end_ns = start_ns + round(settings.seconds * 1e9)
    lags = [sent - due for due, sent in zip(due_ns, sent_ns[1:], strict=True) if due >= start_ns]
    return lags, sum(start_ns <= ended < end_ns for ended in ended_ns)


SENDERS: Mapping[str, Sender] = {
    "enginesmith": _ours,
    "grpc.aio": lambda *load: asyncio.run(_bare(*load)),
    "tritonclient": lambda *load: asyncio.run(_peer(*load)),
}


def _message() -> bytes:
    message = tritonclient.grpc.service_pb2.ModelInferRequest(model_name=MODEL)
    message.inputs.add(name="in", datatype="FP32", shape=[1, 4])
    message.raw_input_contents.append(np.zeros((1, 4), np.float32).tobytes())
    return bytes(message.SerializeToString())


def _show(p99s: Mapping[str, Spread], rates: Mapping[str, Spread]) -> None:
    rows = [[name, str(p99s[name]), str(rates[name])] for name in p99s]
    print_table(
        "send-lag: median of the rounds' 99th percentiles",
        ("sender and rate", "p99 ms", "answered per s"),
        rows,
    )


def main() -> int:
    """Measure as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few and short rounds, to see that it works")
    given = parser.parse_args()
    return run_benchmark(lambda: measure(QUICK if given.quick else RECORD))


if __name__ == "__main__":
    sys.exit(main())

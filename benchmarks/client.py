"""What a call of the client costs beside the same call of tritonclient, through a real tritonserver.

The model returns what it gets. A round measures both clients one after the other, first the one and then the other in
turn, with 1 and with 16 threads that share one client object, as an application does. Both make the request from a numpy
array and read the answer as one, and both have a deadline. The import is measured in processes of its own, in turn with
one that imports numpy only, which is what the package imports; both find their bytecode compiled, as an installation does.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tritonclient.grpc
from figures import (
    Bar,
    Outcome,
    Spread,
    bar_of_spread,
    print_table,
    run_benchmark,
    say,
    spread_of,
    spread_of_ratios,
)

from enginesmith.triton.server import TritonServer
from enginesmith_client import Client

MAX_OVERHEAD = 1.05
"""Median time of a call against tritonclient's."""
MAX_OVERHEAD_US = 40.0
MAX_IMPORT_S = 0.15
CONCURRENCIES = (1, 16)
MODEL = "echo"
MODELS = Path(__file__).parent.parent / "tests" / "client" / "models"
TIMEOUT_S = 60.0
_IMPORT = "import time; s = time.perf_counter(); import {}; print(time.perf_counter() - s)"

Ask = Callable[[], Any]


@dataclass(frozen=True)
class Settings:
    """How long and how often to measure."""

    rounds: int
    calls: int
    """Of each client in a round, over all threads."""
    imports: int


RECORD = Settings(rounds=21, calls=1600, imports=15)
QUICK = Settings(rounds=3, calls=320, imports=3)


def measure(settings: Settings) -> Outcome:
    """Calls at each concurrency, then imports."""
    with tempfile.TemporaryDirectory(prefix="enginesmith-bench-") as directory:
        repository = Path(directory)
        for file in ("config.pbtxt", "1/model.py"):
            (repository / MODEL / "1").mkdir(parents=True, exist_ok=True)
            (repository / MODEL / file).write_bytes((MODELS / MODEL / file).read_bytes())
        with TritonServer(repository) as server:
            server.wait_ready()
            version = server.server_version()
            calls = {at: _calls(server.grpc_url, at, settings) for at in CONCURRENCIES}
    imports = _imports(settings.imports)
    bars = [bar for at in CONCURRENCIES for bar in _bars(at, calls[at])]
    bars.append(
        bar_of_spread(
            "import enginesmith_client",
            imports["enginesmith_client"],
            relation="at most",
            limit=MAX_IMPORT_S,
            unit=" s",
        )
    )
    _show(calls)
    figures = {"calls": {str(at): calls[at] for at in CONCURRENCIES}, "import_s": imports}
    described = {"rounds": settings.rounds, "calls": settings.calls, "imports": settings.imports}
    return Outcome("client", described, figures, bars, {"tritonserver": version})


def _calls(grpc_url: str, concurrency: int, settings: Settings) -> Mapping[str, Spread]:
    """Median microseconds of a call of both clients by round, and how they compare."""
    array = np.arange(16, dtype=np.float32).reshape(1, 16)
    with Client(grpc_url, timeout_s=TIMEOUT_S) as client:
        peer = tritonclient.grpc.InferenceServerClient(grpc_url)
        askers: dict[str, Ask] = {"client": _ask(client, array), "tritonclient": _ask_peer(peer, array)}
        medians: dict[str, list[float]] = {name: [] for name in askers}
        for ask in askers.values():
            _median_us(ask, concurrency=concurrency, calls=settings.calls)
        for number in range(settings.rounds):
            say(f"{concurrency} in flight: round {number + 1}/{settings.rounds}")
            for name in list(askers)[:: 1 if number % 2 else -1]:
                medians[name].append(_median_us(askers[name], concurrency=concurrency, calls=settings.calls))
        peer.close()
    ours, theirs = medians["client"], medians["tritonclient"]
    return {
        "client_us": spread_of(ours),
        "tritonclient_us": spread_of(theirs),
        "ratio": spread_of_ratios(ours, theirs),
        "added_us": spread_of([one - other for one, other in zip(ours, theirs, strict=True)]),
    }


def _ask(client: Client, array: Any) -> Ask:
    return lambda: client.infer(MODEL, {"in_FP32": array}, outputs=["out_FP32"])["out_FP32"]


def _ask_peer(client: Any, array: Any) -> Ask:
    def ask() -> Any:
        tensor = tritonclient.grpc.InferInput("in_FP32", list(array.shape), "FP32")
        tensor.set_data_from_numpy(array)
        wanted = tritonclient.grpc.InferRequestedOutput("out_FP32")
        return client.infer(MODEL, [tensor], outputs=[wanted], client_timeout=TIMEOUT_S).as_numpy("out_FP32")

    return ask


def _median_us(ask: Ask, *, concurrency: int, calls: int) -> float:
    """The median time of a call, of ``calls`` made by ``concurrency`` threads at once."""
    together = threading.Barrier(concurrency)

    def work(_: int) -> list[float]:
        times = []
        together.wait()
        for _ in range(calls // concurrency):
            started_s = time.perf_counter()
            ask()
            times.append(time.perf_counter() - started_s)
        return times

    with ThreadPoolExecutor(concurrency) as pool:
        return statistics.median(took for times in pool.map(work, range(concurrency)) for took in times) * 1e6


def _imports(times: int) -> Mapping[str, Spread]:
    """Seconds that an import takes in a process of its own; the first ones, which compile the files, are not counted."""
    seconds: dict[str, list[float]] = {"enginesmith_client": [], "numpy": []}
    with tempfile.TemporaryDirectory(prefix="enginesmith-bench-") as compiled:
        # Where the environment forbids to keep bytecode, an editable installation would be compiled each time.
        environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": compiled}
        for number in range(times + 1):
            for name, taken in seconds.items():
                command = [sys.executable, "-c", _IMPORT.format(name)]
                done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
                if number:
                    taken.append(float(done.stdout))
    return {name: spread_of(taken) for name, taken in seconds.items()}


def _bars(concurrency: int, figures: Mapping[str, Spread]) -> Sequence[Bar]:
    name = f"infer with {concurrency} in flight against tritonclient"
    return [
        bar_of_spread(name, figures["ratio"], relation="at most", limit=MAX_OVERHEAD),
        bar_of_spread(
            f"{name}: added", figures["added_us"], relation="at most", limit=MAX_OVERHEAD_US, unit=" us"
        ),
    ]


def _show(calls: Mapping[int, Mapping[str, Spread]]) -> None:
    columns = ("client_us", "tritonclient_us", "ratio", "added_us")
    rows = [[str(at), *(str(figures[column]) for column in columns)] for at, figures in calls.items()]
    print_table("microseconds of a call: median of the rounds' medians", ("in flight", *columns), rows)


def main() -> int:
    """Measure as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few and short rounds, to see that it works")
    given = parser.parse_args()
    return run_benchmark(lambda: measure(QUICK if given.quick else RECORD))


if __name__ == "__main__":
    sys.exit(main())

"""Requests through a tritonserver that is killed and restarted while they run: what becomes of every single one.

Threads and tasks, over gRPC and HTTP, send numbered requests to a model that writes down each number that it works on.
Meanwhile the server gets SIGKILL twice and is started again. In the end every number has exactly one outcome, an answer
with its own number or a typed error; without ``Retry(idempotent=True)`` the model has worked on none of them twice;
and the process has no more threads, sockets and shared memory than before.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import itertools
import os
import re
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import numpy as np
import numpy.typing as npt
from figures import Bar, Outcome, print_table, run_benchmark, say

from enginesmith.triton.ports import claim_ports
from enginesmith.triton.server import TritonServer
from enginesmith_client import AsyncClient, Client, ConnectError, InferResult, Retry, TritonClientError
from enginesmith_client._address import Protocol

WORKERS = {"threads": 8, "tasks": 32}
TIMEOUT_S = 60.0
SETTLING_S = 10.0
"""gRPC ends its threads and sockets in the background after a channel is closed."""
_CLIENT_MEMORY = re.compile(rf"enginesmith-{os.getpid()}-[0-9a-f]+")
"""A server of this process has names with one part more, and removes them when it is stopped."""
_MODEL = """
import os
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def initialize(self, args):
        self.journal = os.open({journal!r}, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def execute(self, requests):
        return [self.answer(request) for request in requests]

    def answer(self, request):
        number = pb_utils.get_input_tensor_by_name(request, "number")
        os.write(self.journal, b"%d\\n" % number.as_numpy()[0])
        return pb_utils.InferenceResponse([pb_utils.Tensor("same", number.as_numpy())])
"""
_CONFIG = """
backend: "python"
input [ { name: "number" data_type: TYPE_INT64 dims: [ 1 ] } ]
output [ { name: "same" data_type: TYPE_INT64 dims: [ 1 ] } ]
instance_group [ { count: 2 kind: KIND_CPU } ]
"""


@dataclass(frozen=True)
class Scenario:
    """One way to send the requests."""

    workers: str
    protocol: Protocol
    requests: int
    idempotent: bool = False
    shared_memory: bool = False
    """Whether tensors travel through shared memory."""

    def __str__(self) -> str:
        """In words, for people."""
        more = (", shared memory" if self.shared_memory else "") + (", idempotent" if self.idempotent else "")
        return f"{self.workers}, {self.protocol}{more}"

    @property
    def shared_memory_bytes(self) -> int | None:
        """As ``Client`` takes it."""
        return 1 if self.shared_memory else None

    @property
    def retry(self) -> Retry:
        """The rules of its client: they wait out a restart; what was on its way when the server died is another matter."""
        return Retry(
            attempts=1000,
            backoff_s=0.05,
            max_backoff_s=0.5,
            budget_burst=100_000.0,
            idempotent=self.idempotent,
        )


@dataclass
class Record:
    """What became of the requests of one scenario, by number; ``progress`` is called after each."""

    progress: Callable[[int], None]
    answers: Counter[int] = field(default_factory=Counter)
    errors: dict[int, list[TritonClientError]] = field(default_factory=dict)
    untyped: list[str] = field(default_factory=list)
    mixed_up: list[str] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def note(self, number: int, outcome: InferResult | BaseException) -> None:
        """Keep the outcome of one request."""
        with self._lock:
            if isinstance(outcome, TritonClientError):
                self.errors.setdefault(number, []).append(outcome)
            elif isinstance(outcome, BaseException):
                self.untyped.append(f"{number}: {outcome!r}")
            else:
                self.answers[number] += 1
                if outcome.id != str(number) or outcome["same"].tolist() != [number]:
                    self.mixed_up.append(f"{number}: {outcome.id!r} {outcome['same'].tolist()}")
            done = self.answers.total() + len(self.errors) + len(self.untyped)
        self.progress(done)


class MortalServer:
    """A tritonserver on fixed ports that can be killed and started again."""

    def __init__(self, directory: Path) -> None:
        self.journal = directory / "journal"
        self.ports = claim_ports({"http": 0, "grpc": 0})
        self.restarts_s: list[float] = []
        self._repository = directory / "repository"
        version = self._repository / "numbers" / "1"
        version.mkdir(parents=True)
        (version / "model.py").write_text(_MODEL.format(journal=str(self.journal)))
        (version.parent / "config.pbtxt").write_text(_CONFIG)
        self._server = self._started()

    def kill_and_restart(self) -> None:
        """SIGKILL, and a new server on the same ports; returns when it is ready."""
        begun_s = time.monotonic()
        os.kill(self._server.pid, signal.SIGKILL)
        self._server.stop()
        self._server = self._started()
        self.restarts_s.append(time.monotonic() - begun_s)

    def worked_on(self) -> Counter[int]:
        """How often the model worked on each number since this was asked last."""
        text = self.journal.read_text() if self.journal.exists() else ""
        os.truncate(self.journal, 0)
        return Counter(map(int, text.split()))

    def stop(self) -> None:
        """End it."""
        self._server.stop()

    def _started(self) -> TritonServer:
        server = TritonServer(self._repository, http_port=self.ports["http"], grpc_port=self.ports["grpc"])
        server.start()
        server.wait_ready()
        return server


def inputs_of(number: int) -> dict[str, npt.NDArray[np.int64]]:
    """The inputs of the request with this number."""
    return {"number": np.array([number], np.int64)}


def send_from_threads(scenario: Scenario, url: str, record: Record) -> None:
    """Send all requests through one client that threads share."""
    numbers = iter(range(scenario.requests))

    def work(client: Client) -> None:
        # ``next`` of a range iterator is one bytecode: no number is given out twice.
        for number in iter(lambda: next(numbers, None), None):
            try:
                answer = client.infer("numbers", inputs_of(number), request_id=str(number))
            except BaseException as error:  # noqa: BLE001 - every outcome is recorded, and judged at the end
                record.note(number, error)
            else:
                record.note(number, answer)

    with Client(
        url, timeout_s=TIMEOUT_S, retry=scenario.retry, shared_memory_bytes=scenario.shared_memory_bytes
    ) as client:
        client.metadata("numbers")
        threads = [threading.Thread(target=work, args=(client,)) for _ in range(WORKERS["threads"])]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


def send_from_tasks(scenario: Scenario, url: str, record: Record) -> None:
    """Send all requests through one client that tasks share."""
    numbers = iter(range(scenario.requests))

    async def work(client: AsyncClient) -> None:
        for number in numbers:
            try:
                answer = await client.infer("numbers", inputs_of(number), request_id=str(number))
            except BaseException as error:  # noqa: BLE001 - every outcome is recorded, and judged at the end
                record.note(number, error)
            else:
                record.note(number, answer)

    async def all_of_them() -> None:
        async with AsyncClient(
            url, timeout_s=TIMEOUT_S, retry=scenario.retry, shared_memory_bytes=scenario.shared_memory_bytes
        ) as client:
            await client.metadata("numbers")
            await asyncio.gather(*(work(client) for _ in range(WORKERS["tasks"])))

    asyncio.run(all_of_them())


def suffer(scenario: Scenario, server: MortalServer) -> dict[str, Any]:
    """Send the requests of a scenario, kill the server at a third and at two thirds of them, and judge."""
    deaths = [scenario.requests // 3, 2 * scenario.requests // 3]
    reached = [threading.Event() for _ in deaths]

    def progress(done: int) -> None:
        for count, event in zip(deaths, reached, strict=True):
            if done >= count:
                event.set()

    def kill() -> None:
        for event in reached:
            event.wait()
            server.kill_and_restart()

    record = Record(progress)
    server.worked_on()
    killer = threading.Thread(target=kill)
    begun_s = time.monotonic()
    killer.start()
    send = send_from_threads if scenario.workers == "threads" else send_from_tasks
    send(scenario, f"{scenario.protocol}://127.0.0.1:{server.ports[scenario.protocol]}", record)
    seconds = time.monotonic() - begun_s
    killer.join()
    return _judged(scenario, record, server.worked_on()) | {"seconds": round(seconds, 2)}


def _judged(scenario: Scenario, record: Record, worked_on: Counter[int]) -> dict[str, Any]:
    outcomes = Counter(record.answers)
    for number, errors in record.errors.items():
        outcomes[number] += len(errors)
    failures = Counter(type(error).__name__ for errors in record.errors.values() for error in errors)
    unsure = [
        error
        for errors in record.errors.values()
        for error in errors
        if not (isinstance(error, ConnectError) and error.unsent)
    ]
    return {
        "requests": scenario.requests,
        "answered": len(record.answers),
        "failed": dict(failures),
        "failed on the way": len(unsure),
        "lost": sum(number not in outcomes for number in range(scenario.requests)),
        "twice": sum(count > 1 for count in outcomes.values()),
        "mixed up": len(record.mixed_up),
        "untyped": record.untyped[:5],
        "worked on twice": sum(count > 1 for count in worked_on.values()),
        "answered but not worked on": sum(number not in worked_on for number in record.answers),
    }


@dataclass(frozen=True)
class Resources:
    """What a process holds."""

    threads: tuple[str, ...]
    sockets: int
    shared_memory: tuple[str, ...]


def held() -> Resources:
    """What this process holds now."""
    sockets = 0
    for descriptor in Path("/proc/self/fd").iterdir():
        try:
            sockets += os.readlink(descriptor).startswith("socket:")
        except FileNotFoundError:
            continue  # The one that the directory was read through.
    ours = [path.name for path in Path("/dev/shm").iterdir() if _CLIENT_MEMORY.fullmatch(path.name)]
    return Resources(
        tuple(sorted(thread.name for thread in threading.enumerate())), sockets, tuple(sorted(ours))
    )


def leaked(before: Resources) -> dict[str, int]:
    """What is held beyond ``before``, after as much time as libraries take to clean up in the background."""
    give_up_s = time.monotonic() + SETTLING_S
    while True:
        # An error holds its frames, and they hold the error: such a circle keeps a channel until it is collected.
        gc.collect()
        now = held()
        more = {
            "threads": max(0, len(now.threads) - len(before.threads)),
            "sockets": max(0, now.sockets - before.sockets),
            "shared memory": len(set(now.shared_memory) - set(before.shared_memory)),
        }
        if not any(more.values()) or time.monotonic() > give_up_s:
            return more
        time.sleep(0.05)


def all_scenarios(requests: int) -> Iterator[Scenario]:
    """Everything that is measured."""
    for workers, protocol in itertools.product(WORKERS, get_args(Protocol)):
        for idempotent in (False, True):
            yield Scenario(workers, protocol, requests, idempotent=idempotent)
    for workers in WORKERS:
        yield Scenario(workers, "grpc", requests, shared_memory=True)


def measure(arguments: argparse.Namespace) -> Outcome:
    """Run every scenario on one server."""
    chosen = [
        scenario
        for scenario in all_scenarios(arguments.requests)
        if str(scenario) in (arguments.only or [str(scenario)])
    ]
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(prefix="resilience-") as directory:
        server = MortalServer(Path(directory))
        try:
            _warm_up(server)
            for scenario in chosen:
                say(f"{scenario}: {scenario.requests} requests, two kills")
                before = held()
                found[str(scenario)] = suffer(scenario, server) | {"leaked": leaked(before)}
        finally:
            server.stop()
    return _outcome(arguments, found, restarts_s=server.restarts_s)


def _warm_up(server: MortalServer) -> None:
    """Make what libraries make once and keep: threads that poll, sockets that wake them."""
    for protocol in get_args(Protocol):
        url = f"{protocol}://127.0.0.1:{server.ports[protocol]}"
        for workers, send in (("threads", send_from_threads), ("tasks", send_from_tasks)):
            send(Scenario(workers, protocol, requests=10), url, Record(lambda _: None))


def _outcome(
    arguments: argparse.Namespace, found: dict[str, dict[str, Any]], *, restarts_s: list[float]
) -> Outcome:
    headings = ("requests", "answered", "failed", "lost", "twice", "mixed up", "worked on twice", "seconds")
    rows = [
        [name, *(str(sum(one[key].values()) if key == "failed" else one[key]) for key in headings)]
        for name, one in found.items()
    ]
    print_table("resilience: what became of every request", ("", *headings), rows)
    bars = [bar for name, one in found.items() for bar in _bars(name, one)]
    left = [path for path in Path("/dev/shm").iterdir() if f"-{os.getpid()}-" in path.name]
    bars.append(Bar("left in /dev/shm in the end", "at most", 0.0, float(len(left))))
    settings = {"requests": arguments.requests, "kills": 2, "workers": WORKERS, "timeout_s": TIMEOUT_S}
    restarts = [round(seconds, 2) for seconds in restarts_s]
    return Outcome("resilience", settings, {"scenarios": found, "restarts_s": restarts}, bars)


def _bars(name: str, one: dict[str, Any]) -> Iterator[Bar]:
    """What must not have happened in a scenario."""
    counts = {key: one[key] for key in ("lost", "twice", "mixed up", "answered but not worked on")}
    counts["errors without a type of ours"] = len(one["untyped"])
    counts |= {f"leaked {what}": count for what, count in one["leaked"].items()}
    if name.endswith("idempotent"):
        counts["failed"] = sum(one["failed"].values())
    else:
        counts["worked on twice"] = one["worked on twice"]
    for key, count in counts.items():
        yield Bar(f"{name}: {key}", "at most", 0.0, float(count))


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    names = [str(scenario) for scenario in all_scenarios(0)]
    parser.add_argument("--requests", type=int, default=10_000, help="of each scenario (default: 10000)")
    parser.add_argument(
        "--only", nargs="+", choices=names, metavar="SCENARIO", help=f"of: {'; '.join(names)}"
    )
    parser.add_argument("--quick", action="store_const", dest="requests", const=600, help="600 requests")
    arguments = parser.parse_args()
    return run_benchmark(lambda: measure(arguments))


if __name__ == "__main__":
    sys.exit(main())

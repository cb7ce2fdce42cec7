"""What processes and the machine consumed, as counters since they began. Linux; what a system does not tell is None.

The memory of a server is the sum of the resident sets of its processes. Pages that several of them have mapped (shared
memory between tritonserver and its Python models, libraries) count in each, so it is an upper bound; the exact share
(PSS) would hold the server up while its page tables are walked.
"""

from __future__ import annotations

import contextlib
import ipaddress
import time
from pathlib import Path

import psutil

from enginesmith_client._address import address_from_url
from enginesmith_client.perf._target import Target

_LOOKS_UNTIL_CHILDREN_ARE_SOUGHT = 10
"""Finding the children of a process takes some 10 ms, which a generator of load beside it would feel."""
_SERVER = "tritonserver"


class ProcessTree:
    """A process and all that it starts. Processes that have ended keep counting with the CPU they had used."""

    def __init__(self, root: psutil.Process) -> None:
        """Raises ``psutil.Error`` where the process is gone or may not be looked at."""
        self.identity = f"{root.pid} since {root.create_time():.2f}"
        self._root = root
        self._members: list[psutil.Process] = []
        self._cpu_s: dict[tuple[int, float], float] = {}
        self._looks = 0

    def look(self) -> tuple[float, int] | None:
        """CPU seconds and resident bytes; None when the root is gone."""
        if self._looks % _LOOKS_UNTIL_CHILDREN_ARE_SOUGHT == 0:
            with contextlib.suppress(psutil.Error):
                self._members = self._root.children(recursive=True)
        self._looks += 1
        rss_bytes = self._count(self._root)
        # A process that was killed and not waited for yet is still there, with nothing in it.
        if not rss_bytes:
            return None
        rss_bytes += sum(self._count(member) or 0 for member in self._members)
        return sum(self._cpu_s.values()), rss_bytes

    def _count(self, process: psutil.Process) -> int | None:
        """Note the CPU time of one; returns its resident bytes, None when it is gone."""
        try:
            with process.oneshot():
                times = process.cpu_times()
                self._cpu_s[process.pid, process.create_time()] = times.user + times.system
                return int(process.memory_info().rss)
        except psutil.Error:
            return None


class ServerProcesses:
    """tritonserver and its processes, if it runs on this machine."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self._tree: ProcessTree | None = None
        self.unseen = ""
        """Why nothing is seen of it, in words; empty when it is."""
        self._find(target.server_pid)

    @property
    def identity(self) -> str | None:
        """Which process it is; another one is another server."""
        return self._tree.identity if self._tree else None

    def look(self, *, answers: bool) -> tuple[float, int] | None:
        """CPU seconds and resident bytes; None when nothing is seen of it.

        A server that is gone is looked for again once something ``answers`` in its place.
        """
        if self._tree is None:
            if not (answers and self.unseen == _GONE):
                return None
            self._find(None)
        seen = self._tree.look() if self._tree else None
        if seen is None:
            self._tree, self.unseen = None, self.unseen or _GONE
        return seen

    def _find(self, pid: int | None) -> None:
        self._tree, self.unseen = None, ""
        try:
            process = psutil.Process(pid) if pid is not None else self._listening()
            self._tree = ProcessTree(process) if process else None
        except psutil.Error as error:
            self.unseen = f"the server's process cannot be looked at: {error}"

    def _listening(self) -> psutil.Process | None:
        """The process that listens on the port of the target; None, with ``unseen`` set, where it is not to be seen."""
        address = address_from_url(self._target.url)
        if not _is_local(address.host):
            self.unseen = f"the server runs on another machine ({address.host})"
            return None
        pids = {
            connection.pid
            for connection in psutil.net_connections("tcp")
            if connection.status == psutil.CONN_LISTEN
            and connection.laddr
            and connection.laddr.port == address.port
        } - {None}
        if not pids:
            self.unseen = f"no process of this user listens on port {address.port}"
            return None
        process = psutil.Process(min(pid for pid in pids if pid is not None))
        if process.name() != _SERVER:
            self.unseen = f"{process.name()} listens on port {address.port}, not {_SERVER}"
            return None
        return process


_GONE = "the server's process has ended"


class OwnProcesses:
    """This process, and a tool of measurement that it started."""

    def __init__(self, tool: str = "perf_analyzer") -> None:
        self._tool = tool
        self._cpu_s: dict[int, float] = {}

    def cpu_s(self) -> float:
        """All threads together."""
        for pid in _started_by_this_process():
            with contextlib.suppress(psutil.Error):
                process = psutil.Process(pid)
                if process.name() == self._tool:
                    times = process.cpu_times()
                    self._cpu_s[pid] = times.user + times.system
        return time.process_time() + sum(self._cpu_s.values())


def machine_cpu_s() -> tuple[float, float, float]:
    """Busy, all and stolen CPU seconds of all cores together, since the machine started."""
    times = psutil.cpu_times()
    idle_s = times.idle + getattr(times, "iowait", 0.0)
    stolen_s = float(getattr(times, "steal", 0.0))
    # On Linux ``guest`` is a part of ``user``.
    total_s = sum(times) - getattr(times, "guest", 0.0) - getattr(times, "guest_nice", 0.0)
    return total_s - idle_s - stolen_s, total_s, stolen_s


def swap_in_pages() -> int | None:
    """Pages that the machine read back from swap since it started."""
    try:
        text = Path("/proc/vmstat").read_text(encoding="ascii")
    except OSError:
        return None
    return next((int(line.split()[1]) for line in text.splitlines() if line.startswith("pswpin ")), None)


def suspended_s() -> float:
    """How long the machine was suspended since it started: the monotonic clock stands still then, that of boot does not."""
    boot = getattr(time, "CLOCK_BOOTTIME", None)
    return time.clock_gettime(boot) - time.clock_gettime(time.CLOCK_MONOTONIC) if boot is not None else 0.0


def wall_ahead_s() -> float:
    """The wall clock minus the monotonic one."""
    return (time.time_ns() - time.monotonic_ns()) / 1e9


def _started_by_this_process() -> list[int]:
    """Children, as the kernel lists them for every thread; none where it was built without that list."""
    pids: list[int] = []
    for listed in Path("/proc/self/task").glob("*/children"):
        with contextlib.suppress(OSError):
            pids.extend(int(pid) for pid in listed.read_text(encoding="ascii").split())
    return pids


def _is_local(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        if ipaddress.ip_address(host).is_loopback:
            return True
    except ValueError:
        return False
    own = psutil.net_if_addrs().values()
    return any(host == address.address for addresses in own for address in addresses)

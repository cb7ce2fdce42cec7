"""Rules about what sent the requests: whether it kept up, and what else its machine did."""

from __future__ import annotations

import mmap
from collections.abc import Sequence

from enginesmith_client.perf._profile import ClosedLoad
from enginesmith_client.perf._quantities import byte_size, duration
from enginesmith_client.perf._records import Record
from enginesmith_client.perf._run_files import Check
from enginesmith_client.perf.judge._evidence import Evidence
from enginesmith_client.perf.judge._metrics import quantiles_ms
from enginesmith_client.perf.observe._samples import Sample

LAG_VOID_MS, LAG_VOID_SHARE = 5.0, 0.10
LAG_WARNING_MS, LAG_WARNING_SHARE = 2.0, 0.05
LEAST_RATE_SHARE = 0.98
BUSY_PERCENT = 85.0
OWN_VOID_SHARE, OWN_WARNING_SHARE = 0.15, 0.08
SHORT_OF_CPU_SHARE, LEAST_BUSY_PERCENT = 0.85, 10.0
OTHERS_PERCENT, STOLEN_PERCENT, FULL_PERCENT = 10.0, 2.0, 90.0
LEAST_OBSERVED_S = 0.5
WALL_JUMP_S, SUSPENDED_S = 0.5, 0.05
SWAP_WARNING_BYTES, SWAP_VOID_BYTES = 1 << 20, 64 << 20

_PERF_ANALYZER = "measure it with perf_analyzer (--generator perf_analyzer), whose figure is the one to trust"


def generator_lag(seen: Evidence) -> Check | None:
    """Requests of an open loop were sent later than they were due."""
    lag = quantiles_ms([one.lag_ns for one in seen.judged]) if not seen.closed else None
    if lag is None:
        return None
    worst_ms = lag.p99 if lag.p99 is not None else lag.max
    named = "99% of the requests" if lag.p99 is not None else "all requests"
    void_ms = max(LAG_VOID_MS, LAG_VOID_SHARE * seen.p50_ms)
    warning_ms = max(LAG_WARNING_MS, LAG_WARNING_SHARE * seen.p50_ms)
    rate_share = _rate_share(seen.judged)
    late = (
        f"{named} were sent up to {duration(worst_ms)} after they were due "
        f"(median latency {duration(seen.p50_ms)})"
    )
    if rate_share < LEAST_RATE_SHARE:
        words = (
            f"the generator kept {100 * rate_share:.1f}% of the rate that was asked for; {late}: this is its own limit, "
            "not the server's. Ask for a lower rate, or run it on a machine of its own"
        )
        return Check("generator-lag", "void", words)
    if worst_ms > void_ms:
        words = (
            f"{late}, more than {duration(void_ms)}: the latencies are those of the generator. "
            "Ask for a lower rate, or run it on a machine of its own"
        )
        return Check("generator-lag", "void", words)
    if worst_ms > warning_ms:
        return Check("generator-lag", "warning", f"{late}; the latencies, which count from then, contain it")
    return None


def client_cpu(seen: Evidence) -> Check | None:
    """What a request costs this program is a good part of what was measured, or it was the bottleneck."""
    ended = [one for one in seen.records if seen.window.start_ns <= one.ended_ns < seen.window.end_ns]
    # Work on the pieces of a stream goes on while the server makes the next: only one piece's worth is in a time.
    unit, name, time_ms = "request", "latency", seen.p50_ms
    if seen.figures.ttft_ms is not None:
        unit, name, time_ms = "piece of a stream", "time to the first token", seen.figures.ttft_ms.p50
    if seen.client_cpu_s is None or not ended or not time_ms or seen.window_s <= 0:
        return None
    cpu_ms = 1e3 * seen.client_cpu_s / sum(len(one.piece_ns) or 1 for one in ended)
    busy_percent = 100 * seen.client_cpu_s / seen.window_s
    share = cpu_ms * _waiting_turns(seen, busy_percent) / time_ms
    taken = _taken_from_server(seen) if busy_percent > LEAST_BUSY_PERCENT else 0.0
    words = f"this program spent {duration(cpu_ms)} of CPU on each {unit} and was busy {busy_percent:.0f}% of the time; "
    if taken > share:
        words += f"server and generator were short of CPU, and it took {100 * taken:.0f}% of what they had"
    else:
        words += f"about {100 * min(share, 1.0):.0f}% of the median {name} of {duration(time_ms)} is its own"
    share = max(share, taken)
    if busy_percent > BUSY_PERCENT or share > OWN_VOID_SHARE:
        if seen.closed:
            words += f": on a model this fast Python measures itself; {_PERF_ANALYZER}"
            return Check("client-cpu", "void", words)
        return Check("client-cpu", "warning", f"{words}: the latencies are upper bounds of the server's")
    if share > OWN_WARNING_SHARE:
        return Check("client-cpu", "warning", f"{words}; to be exact, {_PERF_ANALYZER}")
    return None


def _taken_from_server(seen: Evidence) -> float:
    """The part of the CPU time left to server and generator that the generator used; 0 where they did not use all of it."""
    if seen.around is None:
        return 0.0
    before, after = seen.around
    if before.server_cpu_s is None or after.server_cpu_s is None:
        return 0.0
    ours_s = after.client_cpu_s - before.client_cpu_s
    both_s = ours_s + after.server_cpu_s - before.server_cpu_s
    others_s = max(0.0, after.machine_busy_s - before.machine_busy_s - both_s)
    left_s = after.machine_total_s - before.machine_total_s - others_s
    return ours_s / both_s if both_s > 0 and both_s > SHORT_OF_CPU_SHARE * left_s else 0.0


def machine_cpu(seen: Evidence) -> Check | None:
    """Others used the CPUs of this machine."""
    if seen.around is None:
        return None
    before, after = seen.around
    machine_s = after.machine_total_s - before.machine_total_s
    if machine_s <= 0 or after.at_ns - before.at_ns < LEAST_OBSERVED_S * 1e9:
        return None
    stolen_percent = 100 * (after.machine_stolen_s - before.machine_stolen_s) / machine_s
    found = [_others(before, after, machine_s)]
    if stolen_percent > STOLEN_PERCENT:
        found.append(
            f"the hypervisor gave {stolen_percent:.0f}% of this machine's CPU time to other machines: measure again when it is "
            "quiet, or elsewhere"
        )
    words = "; ".join(one for one in found if one)
    return Check("machine-cpu", "warning", words) if words else None


def _others(before: Sample, after: Sample, machine_s: float) -> str:
    """In words, what other processes used of the machine; empty where that is little."""
    busy_s = after.machine_busy_s - before.machine_busy_s
    if before.server_cpu_s is None or after.server_cpu_s is None:
        percent = 100 * busy_s / machine_s
        if percent <= FULL_PERCENT:
            return ""
        return (
            f"the machine of the generator was busy at {percent:.0f}%, and how much of that is the server is not seen: "
            "the generator may have had to wait"
        )
    ours_s = after.client_cpu_s - before.client_cpu_s + after.server_cpu_s - before.server_cpu_s
    others_percent = 100 * (busy_s - ours_s) / machine_s
    if others_percent <= OTHERS_PERCENT:
        return ""
    return (
        f"other processes used {others_percent:.0f}% of this machine's CPUs, server and generator "
        f"{100 * ours_s / machine_s:.0f}%: end them and measure again"
    )


def clock(seen: Evidence) -> Check | None:
    """The machine was suspended, or its wall clock was set."""
    within = seen.seen_in_window()
    suspended_s = within[-1].suspended_s - within[0].suspended_s if within else 0.0
    if suspended_s > SUSPENDED_S:
        words = f"the machine was suspended for {suspended_s:.1f} s while it measured: measure again"
        return Check("clock", "void", words)
    moved_s = seen.wall_moved_s
    if moved_s is None and within:
        moved_s = within[-1].wall_ahead_s - within[0].wall_ahead_s
    if moved_s is None or abs(moved_s) <= WALL_JUMP_S:
        return None
    words = f"the wall clock jumped by {moved_s:+.1f} s against the monotonic one"
    if seen.generator == "perf_analyzer":
        words += ", and perf_analyzer takes its times from it: measure again"
        return Check("clock", "void", words)
    words += "; latencies come from the monotonic one, so only times of day are wrong, unless the machine stood still"
    return Check("clock", "warning", words)


def swapping(seen: Evidence) -> Check | None:
    """The machine read memory back from swap."""
    within = seen.seen_in_window()
    pages = [one.swap_in_pages for one in within if one.swap_in_pages is not None]
    swapped_bytes = (pages[-1] - pages[0]) * mmap.PAGESIZE if pages else 0
    if swapped_bytes < SWAP_WARNING_BYTES:
        return None
    words = (
        f"the machine read {byte_size(swapped_bytes)} back from swap while it measured: its memory is too small for what "
        "runs on it; end something, or serve less at once"
    )
    return Check("swapping", "void" if swapped_bytes >= SWAP_VOID_BYTES else "warning", words)


def _rate_share(judged: Sequence[Record]) -> float:
    """The rate at which requests were sent, of that at which they were due: below 1 while the generator falls behind."""
    if len(judged) < 2:
        return 1.0
    first, last = min(judged, key=lambda one: one.due_ns), max(judged, key=lambda one: one.due_ns)
    due_ns, sent_ns = last.due_ns - first.due_ns, last.sent_ns - first.sent_ns
    return due_ns / sent_ns if sent_ns > 0 else 1.0


def _waiting_turns(seen: Evidence, busy_percent: float) -> float:
    """How many requests' worth of this program's work stands between a request and its answer, on average.

    The larger of two estimates, and never more than there are in flight: a queue with one server at this utilization,
    ``1 / (1 - u)`` (M/M/1); and answers of a batch, which come together, so that the middle one waits for half of them.
    """
    idle = max(0.05, 1 - busy_percent / 100)
    batch = (seen.figures.server.mean_batch if seen.figures.server else None) or 1.0
    load = seen.profile.load
    most = load.concurrency if isinstance(load, ClosedLoad) else float("inf")
    return min(most, max(1 / idle, (batch + 1) / 2))

"""Rules about the server: whether it was one and the same, ours alone, and did the work."""

from __future__ import annotations

from itertools import pairwise

from enginesmith_client.perf._records import Record
from enginesmith_client.perf._run_files import Check
from enginesmith_client.perf.judge._evidence import Evidence
from enginesmith_client.perf.observe._samples import Sample

MOST_DIFFERENCE_SHARE = 0.02
_EDGE_NS = 50_000_000
_FEWEST_DIFFERENT = 2


def server_restarted(seen: Evidence) -> Check | None:
    """The server or the model began anew, or ended."""
    within = seen.seen_in_window()
    known = [one for one in within if one.server is not None]
    for one, following in pairwise(within):
        if one.server is not None and following.server is None:
            words = f"the server's process ended before {following.at_ns / 1e9:.1f} s; its log says why"
            if following.at_ns < seen.window.end_ns:
                return Check("server-restarted", "void", f"{words}. The rest of the window had no server")
            return Check("server-restarted", "warning", f"{words}. The window ends there")
    for one, following in pairwise(known):
        if one.server != following.server:
            words = f"another server's process answered from {following.at_ns / 1e9:.1f} s on"
            return Check(
                "server-restarted", "void", f"{words}: the figures are of two servers; measure again"
            )
    counted = [one for one in within if one.statistics is not None]
    for one, following in pairwise(counted):
        if _went_back(one, following):
            words = f"the server's statistics began anew before {following.at_ns / 1e9:.1f} s: it was restarted, or the model"
            return Check("server-restarted", "void", f"{words} loaded or unloaded; measure again")
    return None


def server_not_seen(seen: Evidence) -> Check | None:
    """No statistics within the window."""
    if seen.around is not None:
        return None
    words = (
        "the server's statistics were not seen at both ends of the window: queue, compute and batch sizes are not known, and "
        "whether it restarted neither"
    )
    return Check("server-not-seen", "warning", words)


def counts_differ(seen: Evidence) -> Check | None:
    """The server counted other requests than ours. perf_analyzer's records are not all that it sent."""
    if seen.around is None or seen.generator != "enginesmith":
        return None
    before, after = seen.around
    if before.statistics is None or after.statistics is None or _went_back(before, after):
        return None
    counted = after.statistics.requests - before.statistics.requests
    ours = sum(before.at_ns <= one.ended_ns < after.at_ns for one in seen.records)
    unsure = sum(not one.ok or _under_way(one, before) or _under_way(one, after) for one in seen.records)
    if abs(counted - ours) <= unsure + _FEWEST_DIFFERENT + MOST_DIFFERENCE_SHARE * ours:
        return None
    words = f"the server counted {counted} requests of this model while this program had {ours} answers"
    if counted > ours:
        words += ": others use it at the same time, and its figures are of both"
    else:
        words += ": another server or version behind the same address answers some"
    return Check("counts-differ", "warning", words)


def response_cache(seen: Evidence) -> Check | None:
    """Some answers were not computed."""
    if seen.around is None or seen.around[0].statistics is None or seen.around[1].statistics is None:
        return None
    before, after = seen.around[0].statistics, seen.around[1].statistics
    hits, requests = after.cache_hits - before.cache_hits, after.requests - before.requests
    if hits <= 0 or requests <= 0:
        return None
    words = (
        f"the response cache answered {100 * hits / requests:.0f}% of the requests, and only {seen.profile.requests.different} "
        "different ones were sent: the figures are those of the cache; turn it off, or send more different requests "
        "(requests.different)"
    )
    return Check("response-cache", "warning", words)


def _under_way(record: Record, sample: Sample) -> bool:
    """Whether the server may have counted a request on the other side of a sample than we: it does so when it sends the
    answer or a little later, we when it is here, and what failed here may have been answered there."""
    unsure_ns = _EDGE_NS + round(sample.took_ms * 1e6)
    return record.sent_ns <= sample.at_ns + unsure_ns and record.ended_ns >= sample.at_ns - unsure_ns


def _went_back(one: Sample, following: Sample) -> bool:
    assert one.statistics is not None
    assert following.statistics is not None
    before, after = one.statistics, following.statistics
    return after.requests < before.requests or after.executions < before.executions

"""Rules about the requests themselves: whether there are enough, and whether they are of one kind."""

from __future__ import annotations

from collections import Counter

import numpy as np

from enginesmith_client.perf._run_files import Check
from enginesmith_client.perf.judge._evidence import Evidence
from enginesmith_client.perf.judge._metrics import NEEDED

LEAST_REQUESTS = 30
LEAST_GROWTH, LEAST_GROWTH_SHARE = 5, 0.02
MOST_TOKENS_A_PIECE = 1.1
_LONGEST_ERROR = 200
_LOOKS = 300


def nothing_answered(seen: Evidence) -> Check | None:
    """Not one answer belongs to the window."""
    if any(one.ok for one in seen.judged):
        return None
    words = f"not one of {len(seen.judged)} requests was answered within the window"
    if seen.judged:
        words += f": {_first_error(seen)}"
    return Check("nothing-answered", "void", words)


def too_few_samples(seen: Evidence) -> Check | None:
    """Too few answers to say what is typical, or for the quantile that the SLO asks for."""
    count = sum(one.ok for one in seen.judged)
    if not count:
        return None
    more = "measure longer (measure.max_s, measure.window_s), or with more load"
    if count < LEAST_REQUESTS:
        words = f"only {count} answers; with fewer than {LEAST_REQUESTS} nothing can be said about what is typical"
        if seen.profile.start == "cold":
            return Check("samples", "warning", f"{words}; they show one cold start")
        return Check("samples", "void", f"{words}: {more}")
    slo = seen.profile.slo
    asked = any(
        limit is not None for limit in (slo.p99_latency_ms, slo.ttft_ms, slo.itl_ms, slo.min_tokens_per_s)
    )
    if asked and count < NEEDED[99.0]:
        words = (
            f"the SLO asks for the 99th percentile, and {count} answers have none (at least {NEEDED[99.0]:.0f} are needed): "
            "it was judged by the slowest"
        )
        return Check("samples", "warning", f"{words}; {more}")
    return None


def unstable(seen: Evidence) -> Check | None:
    """The windows did not agree."""
    if seen.window.steady:
        return None
    measure = seen.profile.measure
    why = seen.window.note or (
        f"no {measure.windows} windows in a row agreed within {measure.stability_percent:g}%"
    )
    words = f"throughput or median latency did not become steady: {why}. Measure longer, or look for what changes meanwhile"
    return Check("unstable", "warning", words)


def backlog(seen: Evidence) -> Check | None:
    """Requests of an open loop came faster than the server answered, so that latency is a matter of how long one measures.

    The fewest in flight of the first and the last third of the window are compared: bursts and stalls that are worked off
    do not raise them, a queue that never empties does.
    """
    if seen.closed or seen.window_s <= 0 or not seen.judged:
        return None
    due = np.sort(np.array([one.due_ns for one in seen.records]))
    ended = np.sort(np.array([one.ended_ns for one in seen.records]))
    looks = np.linspace(seen.window.start_ns, seen.window.end_ns, _LOOKS)
    waiting = np.searchsorted(due, looks, "right") - np.searchsorted(ended, looks, "right")
    first, last = int(waiting[: _LOOKS // 3].min()), int(waiting[-_LOOKS // 3 :].min())
    if last - first <= max(LEAST_GROWTH, LEAST_GROWTH_SHARE * len(seen.judged)):
        return None
    offered, answered = seen.figures.offered_per_s or 0.0, seen.figures.requests_per_s
    words = (
        f"requests piled up: at least {first} waited in the first third of the window and {last} in the last; {offered:.4g}/s "
        f"came and {answered:.4g}/s were answered. Beyond its capacity a server's latencies grow for as long as one measures"
    )
    return Check("backlog", "warning", words)


def errors(seen: Evidence) -> Check | None:
    """Some requests failed."""
    failed = Counter(one.outcome for one in seen.judged if not one.ok)
    if not failed or len(seen.judged) == sum(failed.values()):
        return None
    count = sum(failed.values())
    kinds = ", ".join(f"{number} {kind}" for kind, number in failed.most_common())
    words = (
        f"{count} of {len(seen.judged)} requests failed ({100 * count / len(seen.judged):.2g}%: {kinds}); latencies are those "
        f"of the others. {_first_error(seen)}"
    )
    return Check("errors", "warning", words)


def several_tokens_a_piece(seen: Evidence) -> Check | None:
    """ITL is between pieces, and these held more than a token."""
    streams = [one for one in seen.judged if one.ok and len(one.piece_ns) > 1 and one.output_tokens]
    pieces = sum(len(one.piece_ns) for one in streams)
    if not pieces:
        return None
    ratio = sum(one.output_tokens or 0 for one in streams) / pieces
    if ratio <= MOST_TOKENS_A_PIECE:
        return None
    words = f"a piece of a stream held {ratio:.2g} tokens on average: ITL is the time between pieces; TPOT counts tokens"
    return Check("pieces", "warning", words)


def _first_error(seen: Evidence) -> str:
    first = next((one for one in seen.judged if not one.ok), None)
    if first is None:
        return ""
    text = " ".join(first.error.split())
    cut = text if len(text) <= _LONGEST_ERROR else f"{text[:_LONGEST_ERROR]}..."
    return f"The first: {first.outcome}: {cut}" if cut else f"The first: {first.outcome}"

"""Whether the figures of a run may be believed: rules that look at what was seen beside them, and speak in words.

A check that is ``void`` says that the numbers tell nothing about the server; a ``warning`` says what they do not mean.
docs/bench-selfcheck.md explains every rule and where its threshold comes from.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from enginesmith_client.perf._figures import Figures
from enginesmith_client.perf._profile import ClosedLoad, Profile
from enginesmith_client.perf._records import Record
from enginesmith_client.perf._run_files import Check, Window
from enginesmith_client.perf.judge._checks_of_generator import (
    client_cpu,
    clock,
    generator_lag,
    machine_cpu,
    swapping,
)
from enginesmith_client.perf.judge._checks_of_results import (
    backlog,
    errors,
    nothing_answered,
    several_tokens_a_piece,
    too_few_samples,
    unstable,
)
from enginesmith_client.perf.judge._checks_of_server import (
    counts_differ,
    response_cache,
    server_not_seen,
    server_restarted,
)
from enginesmith_client.perf.judge._evidence import Evidence
from enginesmith_client.perf.judge._metrics import population
from enginesmith_client.perf.judge._server_figures import seen_around
from enginesmith_client.perf.observe._samples import Sample

if TYPE_CHECKING:
    from enginesmith_client.perf.load._loops import Loop

RULES: dict[str, Callable[[Evidence], Check | None]] = {
    "nothing-answered": nothing_answered,
    "generator-lag": generator_lag,
    "client-cpu": client_cpu,
    "machine-cpu": machine_cpu,
    "clock": clock,
    "swapping": swapping,
    "samples": too_few_samples,
    "unstable": unstable,
    "backlog": backlog,
    "errors": errors,
    "pieces": several_tokens_a_piece,
    "server-restarted": server_restarted,
    "server-not-seen": server_not_seen,
    "counts-differ": counts_differ,
    "response-cache": response_cache,
}
"""In the order in which they are told; those that void come first all the same."""


def checks_of(
    records: Sequence[Record],
    window: Window,
    figures: Figures,
    samples: Sequence[Sample],
    profile: Profile,
    *,
    loop: Loop | None,
    generator: str,
) -> tuple[Check, ...]:
    """What is wrong with a run, the worst first; nothing of a sound one.

    Args:
        records: of the whole run, as for ``figures_of``, which gave the ``figures``.
        loop: None for a run of perf_analyzer.
        generator: ``enginesmith`` or ``perf_analyzer``.
    """
    closed = isinstance(profile.load, ClosedLoad)
    evidence = Evidence(
        records=records,
        judged=population(records, window, closed=closed),
        window=window,
        figures=figures,
        samples=samples,
        around=seen_around(samples, window),
        profile=profile,
        client_cpu_s=loop.client_cpu_s if loop else None,
        wall_moved_s=loop.wall_vs_monotonic_s if loop else None,
        generator=generator,
    )
    found = [check for rule in RULES.values() if (check := rule(evidence)) is not None]
    return tuple(sorted(found, key=lambda check: check.severity != "void"))

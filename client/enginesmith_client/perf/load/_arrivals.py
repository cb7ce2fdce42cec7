"""When the requests of an open loop are due. Pure but for traces, which are files.

The same load, rate and seed give the same times on every machine.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from enginesmith_client.perf._errors import ProfileError
from enginesmith_client.perf._profile import (
    ConstantArrivals,
    OpenLoad,
    PoissonArrivals,
    TraceArrivals,
)
from enginesmith_client.perf._profile_file import content_of
from enginesmith_client.perf.load._prepared import Due

_NS = 1_000_000_000
_CHUNK = 1024
_LONGEST_S = 1e9
_KEYS = ("at_s", "prompt_tokens", "output_tokens")
TRACE_FILE = "the trace"
"""What the file is called in messages."""
_TRACE_HINT = 'each line is {"at_s": 0.25, "prompt_tokens": 80, "output_tokens": 40}, the last two optional, in the order of at_s'


def due_times(load: OpenLoad, *, rate_per_s: float | None, seed: int) -> Iterator[Due]:
    """When each request is due, in order; without an end but for traces.

    ``rate_per_s`` takes the place of the load's own, for loads whose rate is a multiple of a capacity.

    Raises:
        ProfileError: there is no rate, or the trace cannot be used.
    """
    arrivals = load.arrivals
    if isinstance(arrivals, TraceArrivals):
        return iter(
            [
                Due(round(due.at_ns / arrivals.speed), due.prompt_tokens, due.output_tokens)
                for due in read_trace(arrivals.file)
            ]
        )
    rate = rate_per_s if rate_per_s is not None else load.rate_per_s
    if rate is None or not 0 < rate < math.inf:
        raise ProfileError(
            f"{arrivals.kind} arrivals need a rate; seen: rate_per_s={rate!r}",
            hint="give rate_per_s, or capacity_factor where the capacity is measured first",
        )
    if isinstance(arrivals, ConstantArrivals):
        return (Due(round(number * _NS / rate)) for number in itertools.count())
    if isinstance(arrivals, PoissonArrivals):
        return (Due(at_ns) for at_ns in _poisson(rate, seed))
    bursts = _poisson(rate / arrivals.size, seed)
    return (Due(at_ns) for at_ns in bursts for _ in range(arrivals.size))


def read_trace(path: Path) -> tuple[Due, ...]:
    """A recorded load at its own pace.

    Raises:
        ProfileError: the file cannot be read, is empty, or a line is not what it should be; the message names the line.
    """
    try:
        lines = content_of(path, what=TRACE_FILE).decode().splitlines()
    except UnicodeDecodeError as error:
        raise ProfileError(f"{TRACE_FILE} {path} cannot be read: {error}", hint=_TRACE_HINT) from error
    dues: list[Due] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        due = _due(line, where=f"{TRACE_FILE} {path}, line {number}")
        if dues and due.at_ns < dues[-1].at_ns:
            raise ProfileError(
                f"{TRACE_FILE} {path}, line {number}: at_s is {due.at_ns / _NS:g}, before the {dues[-1].at_ns / _NS:g} "
                "of the line above",
                hint="sort the lines by at_s",
            )
        dues.append(due)
    if not dues:
        raise ProfileError(f"{TRACE_FILE} {path} holds no request", hint=_TRACE_HINT)
    return tuple(dues)


def _poisson(rate_per_s: float, seed: int) -> Iterator[int]:
    """The nanoseconds of a Poisson process."""
    generator = np.random.Generator(np.random.PCG64(seed))
    at_s = 0.0
    while True:
        times_s = at_s + np.cumsum(generator.exponential(1 / rate_per_s, _CHUNK))
        at_s = float(times_s[-1])
        yield from np.rint(times_s * _NS).astype(np.int64).tolist()


def _due(line: str, *, where: str) -> Due:
    try:
        fields = json.loads(line)
    except ValueError as error:
        raise ProfileError(f"{where} is not JSON: {error}", hint=_TRACE_HINT) from error
    if not isinstance(fields, dict):
        raise ProfileError(f"{where} is not an object; seen: {line.strip()[:80]}", hint=_TRACE_HINT)
    unknown = sorted(set(fields) - set(_KEYS))
    if unknown:
        raise ProfileError(
            f"{where}: unknown key {unknown[0]!r}; allowed: {', '.join(_KEYS)}", hint=_TRACE_HINT
        )
    at_s = fields.get("at_s")
    if isinstance(at_s, bool) or not isinstance(at_s, (int, float)) or not 0 <= at_s <= _LONGEST_S:
        raise ProfileError(
            f"{where}: at_s must be a number from 0 to {_LONGEST_S:g}; seen: {at_s!r}", hint=_TRACE_HINT
        )
    prompt_tokens, output_tokens = (_tokens(fields, key, where=where) for key in _KEYS[1:])
    return Due(round(at_s * _NS), prompt_tokens, output_tokens)


def _tokens(fields: dict[str, Any], key: str, *, where: str) -> int | None:
    value = fields.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ProfileError(
            f"{where}: {key} must be a whole number of at least 1; seen: {value!r}", hint=_TRACE_HINT
        )
    return value

"""From the flags of ``bench`` and ``compare`` to the profile that they mean: a file, and what overrides its keys."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

if TYPE_CHECKING:
    from enginesmith_client.perf._profile import Profile

_BURST_SIZE = 8
_REPLACED_RATE_PER_S = 1.0
"""Of the open loop whose arrivals a sweep over rates takes; the sweep puts its own rates there."""


@dataclass(frozen=True)
class LoadFlags:
    """What the command line says about the load and about what it must keep. None: as the profile says."""

    profile: str | None = None
    closed: int | None = None
    open_per_s: float | None = None
    arrivals: Literal["poisson", "constant", "burst"] | None = None
    generator: Literal["enginesmith", "perf_analyzer"] | None = None
    slo: tuple[str, ...] = ()
    price_per_hour: float | None = None
    duration_s: float | None = None
    prompt_tokens: int | None = None
    output_tokens: int | None = None

    def load_named(self) -> Sequence[str]:
        """The flags that say how requests come."""
        named = {
            "--closed": self.closed,
            "--open": self.open_per_s,
            "--arrivals": self.arrivals,
            "--generator": self.generator,
        }
        return [flag for flag, value in named.items() if value is not None]

    def of_sweep(self, axis: str) -> LoadFlags:
        """These flags for a sweep over ``axis``, whose loads take the place of the one that a flag could name.

        Raises:
            UsageError: a flag that would have no effect.
        """
        if self.closed is not None or self.open_per_s is not None:
            flag = "--open" if self.closed is None else "--closed"
            raise click.UsageError(f"--sweep says which loads are measured: leave out {flag}")
        if axis == "rate" and self.generator == "perf_analyzer":
            raise click.UsageError(
                "perf_analyzer measures closed loops here: sweep concurrency, or leave out --generator"
            )
        if axis == "concurrency" and self.arrivals:
            raise click.UsageError("--arrivals is about an open loop: sweep rate, or leave it out")
        return replace(self, open_per_s=_REPLACED_RATE_PER_S) if self.arrivals else self


def profile_from_flags(flags: LoadFlags) -> Profile:
    """The profile that ``flags`` name or, without one, the default, with their overrides.

    Raises:
        UsageError: flags that contradict each other.
        ProfileError: the file, or what became of it, is no profile.
    """
    from enginesmith_client.perf._profile_file import profile_from_file, profile_from_mapping

    profile = profile_from_file(_file_of(flags.profile)) if flags.profile else None
    overridden = _overridden({"name": "load"} if profile is None else profile.as_json(), flags)
    return profile_from_mapping(overridden, source="what the command line says")


def overridden(profile: Profile, flags: LoadFlags) -> Profile:
    """``profile`` with what ``flags`` say, their own profile aside.

    Raises:
        UsageError, ProfileError: as ``profile_from_flags``.
    """
    from enginesmith_client.perf._profile_file import profile_from_mapping

    return profile_from_mapping(_overridden(profile.as_json(), flags), source="what the command line says")


def _file_of(name: str) -> Path:
    """The file of a profile: the one of that name, else one that comes with the harness."""
    import enginesmith_client.perf

    builtin = Path(enginesmith_client.perf.__file__).parent / "profiles" / f"{name}.yaml"
    return builtin if not Path(name).exists() and builtin.is_file() else Path(name)


def _overridden(keys: Mapping[str, Any], flags: LoadFlags) -> dict[str, Any]:
    """The keys of a profile with those that flags replace."""
    requests = dict(keys.get("requests", {}))
    for name, tokens in (("prompt_tokens", flags.prompt_tokens), ("output_tokens", flags.output_tokens)):
        if tokens is not None:
            requests[name] = {"kind": "fixed", "tokens": tokens}
    changed = dict(keys) | {"requests": requests}
    if flags.load_named():
        changed["load"] = _load(keys.get("load", {"loop": "closed", "concurrency": 1}), flags)
    if flags.duration_s is not None:
        changed["measure"] = _measure(keys.get("measure", {}), flags.duration_s)
    if flags.slo:
        changed["slo"] = dict(keys.get("slo", {})) | _slo(flags.slo)
    if flags.price_per_hour is not None:
        changed["price"] = dict(keys.get("price") or {}) | {"per_hour": flags.price_per_hour}
    return changed


def _load(load: Mapping[str, Any], flags: LoadFlags) -> dict[str, Any]:
    if flags.closed is not None and flags.open_per_s is not None:
        raise click.UsageError("--closed and --open are two kinds of load: give one of them")
    if flags.closed is not None:
        load = {"loop": "closed", "concurrency": flags.closed} | (
            {"generator": load["generator"]} if "generator" in load else {}
        )
    if flags.open_per_s is not None:
        kept = {key: load[key] for key in ("arrivals", "max_in_flight") if key in load}
        load = {"loop": "open", "rate_per_s": flags.open_per_s} | kept
    if flags.arrivals:
        if load["loop"] != "open":
            raise click.UsageError("--arrivals is about an open loop: give --open RATE too")
        size = {"size": _BURST_SIZE} if flags.arrivals == "burst" else {}
        load = {**load, "arrivals": {"kind": flags.arrivals} | size}
    if flags.generator:
        if load["loop"] == "closed":
            load = {**load, "generator": flags.generator}
        elif flags.generator == "perf_analyzer":
            raise click.UsageError(
                "perf_analyzer measures closed loops here: give --closed N, or leave out --generator"
            )
    return dict(load)


def _measure(measure: Mapping[str, Any], duration_s: float) -> dict[str, Any]:
    """At most ``duration_s``, in windows that fit into it."""
    windows = measure.get("windows", 3)
    window_s = min(measure.get("window_s", 5.0), duration_s / windows)
    return dict(measure) | {"max_s": duration_s, "window_s": window_s}


def _slo(texts: Sequence[str]) -> dict[str, Any]:
    """From ``ttft_ms=500``, or from the ``slo`` of a spec, in their order."""
    from enginesmith.spec_file import load_spec
    from enginesmith_client.perf._profile import SloPart

    promises: dict[str, Any] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals and text.endswith((".yaml", ".yml")):
            promised = load_spec(Path(text)).slo.model_dump(exclude_none=True)
            if not promised:
                raise click.UsageError(f"--slo {text}: this spec has no slo, so nothing is promised")
            promises |= promised
            continue
        if key not in SloPart.model_fields:
            close = difflib.get_close_matches(key, SloPart.model_fields, n=1)
            raise click.UsageError(
                f"--slo {text}: {key!r} is no promise of an SLO{f'; did you mean {close[0]!r}?' if close else ''}; "
                f"give one of {', '.join(SloPart.model_fields)} with =VALUE, or the file of a spec"
            )
        promises[key] = _finite(value, text)
    return promises


def _finite(value: str, text: str) -> float:
    """The number after ``=``.

    Raises:
        UsageError: it is none, or nan, or infinite.
    """
    try:
        number = float(value)
    except ValueError as error:
        raise click.UsageError(f"--slo {text}: {value!r} is no number") from error
    if not math.isfinite(number):
        raise click.UsageError(f"--slo {text}: {value!r} is no finite number")
    return number

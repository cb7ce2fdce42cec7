"""What to measure, as a person writes it: a profile. The file is YAML; unknown keys are errors.

Times are in the unit that each key names. Everything that a run needs besides is the server and the model, so that one
profile serves for any model. docs/bench-profile.md explains every key.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Part(BaseModel):
    """A part of a profile: immutable, and every key is known."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)


class FixedLength(Part):
    """Always the same number of tokens."""

    kind: Literal["fixed"] = "fixed"
    tokens: int = Field(ge=1)


class _Cut(Part):
    """Lengths from ``low`` to ``high``."""

    @model_validator(mode="after")
    def _in_order(self) -> _Cut:
        low, high = getattr(self, "low", 1), getattr(self, "high", None)
        if high is not None and low > high:
            raise ValueError(f"low must not be above high; seen: low {low}, high {high}")
        return self


class UniformLength(_Cut):
    """Every number from ``low`` to ``high``, both included, equally often."""

    kind: Literal["uniform"]
    low: int = Field(ge=1)
    high: int = Field(ge=1)


class NormalLength(_Cut):
    """Normally distributed, rounded, cut to ``low`` and ``high``."""

    kind: Literal["normal"]
    mean: float = Field(gt=0)
    stdev: float = Field(ge=0)
    low: int = Field(default=1, ge=1)
    high: int | None = Field(default=None, ge=1)


class LognormalLength(_Cut):
    """Log-normally distributed, as lengths of real conversations about are; cut to ``low`` and ``high``."""

    kind: Literal["lognormal"]
    median: float = Field(gt=0)
    sigma: float = Field(gt=0, description="Standard deviation of the natural logarithm.")
    low: int = Field(default=1, ge=1)
    high: int | None = Field(default=None, ge=1)


class EmpiricalLength(Part):
    """Drawn from the numbers given."""

    kind: Literal["empirical"]
    tokens: tuple[Annotated[int, Field(ge=1)], ...] = Field(min_length=1)


Length = Annotated[
    FixedLength | UniformLength | NormalLength | LognormalLength | EmpiricalLength,
    Field(discriminator="kind"),
]


class RequestsPart(Part):
    """What is sent. What a model does not take part in is ignored: prompts of a model that takes tensors, say."""

    kind: Literal["auto", "text", "embed", "tensors"] = Field(
        default="auto",
        description="auto: text for a model that generates it, embed for one whose only required input is text, else tensors.",
    )
    streaming: bool | None = Field(
        default=None, description="Answers in pieces. Default: wherever the model can."
    )
    prompt_tokens: Length = FixedLength(tokens=64)
    output_tokens: Length = FixedLength(tokens=32)
    shared_prefix_tokens: int = Field(
        default=0, ge=0, description="The first tokens of every prompt, the same in all."
    )
    prompts_file: Path | None = Field(
        default=None,
        description='Prompts to send instead of made ones: .jsonl, each line {"prompt": ..., "max_tokens": ...}.',
    )
    temperature: float = Field(default=0.0, ge=0)
    texts: int = Field(default=1, ge=1, description="Texts in one request, of a model that embeds.")
    rows: int = Field(default=1, ge=1, description="Rows in the batch of one request, of a model of tensors.")
    shapes: dict[str, tuple[int, ...]] = Field(
        default_factory=dict,
        description="For inputs with dimensions of any size: their shape without the batch dimension.",
    )
    tensors_file: Path | None = Field(
        default=None, description="Inputs in the JSON of perf_analyzer's --input-data, instead of made ones."
    )
    different: int = Field(default=64, ge=1, description="Different requests that are gone round.")
    headers: dict[str, str] = Field(default_factory=dict, description="gRPC metadata of every request.")


class ClosedLoad(Part):
    """So many requests always in flight: the next is sent when one is answered."""

    loop: Literal["closed"] = "closed"
    concurrency: int = Field(ge=1)
    generator: Literal["enginesmith", "perf_analyzer"] = "enginesmith"


class ConstantArrivals(Part):
    """Evenly spaced."""

    kind: Literal["constant"]


class PoissonArrivals(Part):
    """As from many independent users."""

    kind: Literal["poisson"] = "poisson"


class BurstArrivals(Part):
    """``size`` at once; the bursts come as a Poisson process, so that the rate is kept in the mean."""

    kind: Literal["burst"]
    size: int = Field(ge=2)


class TraceArrivals(Part):
    """The times of a recorded load: .jsonl, each line {"at_s": ..., "prompt_tokens": ..., "output_tokens": ...}, the last two optional."""

    kind: Literal["trace"]
    file: Path
    speed: float = Field(default=1.0, gt=0, description="2: twice as fast as recorded.")


Arrivals = Annotated[
    ConstantArrivals | PoissonArrivals | BurstArrivals | TraceArrivals, Field(discriminator="kind")
]


class OpenLoad(Part):
    """Requests are sent when they are due, whether or not earlier ones are answered."""

    loop: Literal["open"]
    arrivals: Arrivals = PoissonArrivals()
    rate_per_s: float | None = Field(default=None, gt=0)
    capacity_factor: float | None = Field(
        default=None,
        gt=0,
        description="The rate as a multiple of the throughput that a closed loop reaches first.",
    )
    max_in_flight: int = Field(
        default=4096, ge=1, description="More waiting answers than this end the run: the server is lost."
    )

    @model_validator(mode="after")
    def _one_rate(self) -> OpenLoad:
        given = [name for name in ("rate_per_s", "capacity_factor") if getattr(self, name) is not None]
        if isinstance(self.arrivals, TraceArrivals):
            if given:
                raise ValueError(f"a trace has its own times; leave out {given[0]} (speed changes the pace)")
        elif len(given) != 1:
            raise ValueError(
                f"give exactly one of rate_per_s and capacity_factor; seen: {', '.join(given) or 'none'}"
            )
        return self


class MeasurePart(Part):
    """How long. A run first warms up, then measures windows until they agree or the time is up."""

    window_s: float = Field(default=5.0, ge=0.01)
    windows: int = Field(default=3, ge=1, description="Consecutive windows that must agree.")
    stability_percent: float = Field(
        default=10.0, gt=0, description="Throughput and median latency of each, against their mean."
    )
    max_s: float = Field(default=60.0, ge=0.01, description="Longest measurement, without warm-up.")
    max_requests: int | None = Field(default=None, ge=1, description="Ends the measurement as well.")
    warmup_s: float = Field(default=2.0, ge=0, description="Shortest warm-up.")
    warmup_requests: int = Field(
        default=1, ge=0, description="Answers that the warm-up waits for at least, for at most max_s."
    )
    timeout_s: float = Field(
        default=60.0, ge=0.001, description="Of one request. One that takes longer is an error."
    )
    drain_s: float = Field(
        default=30.0, ge=0, description="How long answers are waited for after the last request."
    )


class SloPart(Part):
    """What a request must keep to be good, and a run to pass. None: not asked for."""

    p99_latency_ms: float | None = Field(default=None, gt=0)
    ttft_ms: float | None = Field(default=None, gt=0, description="99th percentile.")
    itl_ms: float | None = Field(
        default=None, gt=0, description="Between two tokens of a request, mean; 99th percentile of requests."
    )
    min_tokens_per_s: float | None = Field(default=None, gt=0, description="Per request.")
    max_error_percent: float | None = Field(
        default=None, ge=0, le=100, description="Default: 0 beside other promises."
    )


class PricePart(Part):
    """What the machine that serves costs."""

    per_hour: float = Field(gt=0)
    currency: str = "USD"


class Profile(Part):
    """One thing to measure."""

    name: str = Field(default="profile", pattern=r"^[a-z0-9][a-z0-9_.-]{0,62}$")
    description: str = ""
    start: Literal["warm", "cold"] = Field(
        default="warm",
        description="cold: unload and load the model first, and measure from the first request on.",
    )
    requests: RequestsPart = RequestsPart()
    load: Annotated[ClosedLoad | OpenLoad, Field(discriminator="loop")] = ClosedLoad(concurrency=1)
    measure: MeasurePart = MeasurePart()
    slo: SloPart = SloPart()
    price: PricePart | None = None
    seed: int = Field(default=0, ge=0)

    def as_json(self) -> dict[str, Any]:
        """Plain JSON values, every key written out."""
        return self.model_dump(mode="json")

    def as_kept(self) -> dict[str, Any]:
        """``as_json`` without the values of headers, which may be secrets and must not be in results."""
        kept = self.as_json()
        kept["requests"]["headers"] = dict.fromkeys(self.requests.headers, "not kept")
        return kept

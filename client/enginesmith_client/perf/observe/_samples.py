"""What the server, the machine and this process did meanwhile: a line every second, from which usage and the server's
own times are computed.

Counters are kept as they were read, since whenever they began; a figure is the difference of two samples. The file is
JSON lines like that of the records, written while the run goes on.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from enginesmith_client.perf._saved_files import Format, LineWriter, parsing, read_lines

FORMAT = Format("enginesmith-bench-samples", holds="benchmark samples")


@dataclass(frozen=True, slots=True)
class ModelCounts:
    """Triton's statistics of a model since it was loaded, summed over its loaded versions.

    Source: ``ModelStatistics`` of Triton's statistics extension. Durations are totals over requests.
    """

    success: int = 0
    fail: int = 0
    inferences: int = 0
    """Rows."""
    executions: int = 0
    queue_s: float = 0.0
    queue_count: int = 0
    compute_input_s: float = 0.0
    compute_infer_s: float = 0.0
    compute_output_s: float = 0.0
    compute_count: int = 0
    cache_hits: int = 0
    """Requests that the response cache answered."""
    batches: Mapping[int, int] = field(default_factory=dict)
    """Executions by batch size."""

    @property
    def requests(self) -> int:
        """Answered or failed."""
        return self.success + self.fail


@dataclass(frozen=True, slots=True)
class Sample:
    """One look. What could not be read is None, or missing from a mapping."""

    at_ns: int
    """Since the run's origin, as in records."""
    wall_ahead_s: float
    """The wall clock minus the monotonic one; their difference says nothing, its change does."""
    suspended_s: float = 0.0
    """How long the machine has been suspended since it started (CLOCK_BOOTTIME minus CLOCK_MONOTONIC)."""
    took_ms: float = 0.0
    """How long the look itself lasted, waiting included."""
    statistics: ModelCounts | None = None
    """Of the model."""
    composing: Mapping[str, ModelCounts] = field(default_factory=dict)
    """Of the models that an ensemble is composed of, by name."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Lines of ``/metrics`` that a figure is made of, by name and labels but those of the model."""
    client_cpu_s: float = 0.0
    """Of this process and of a perf_analyzer that it started."""
    machine_busy_s: float = 0.0
    """Of all cores together, as the next two. The machine is the one that this process runs on."""
    machine_total_s: float = 0.0
    machine_stolen_s: float = 0.0
    """Taken by the hypervisor for others."""
    swap_in_pages: int | None = None
    server: str | None = None
    """Which process the server is; another one is another server. None where it is not on this machine."""
    server_cpu_s: float | None = None
    """Of tritonserver and the processes that it started, as the next."""
    server_rss_bytes: int | None = None
    gpu_percent: float | None = None
    """Of one GPU: 200 is two."""
    gpu_memory_bytes: int | None = None


_sample = parsing(Sample)


class SampleWriter(LineWriter):
    """Appends samples to a file; each is there at once, for a run that dies. Errors as ``LineWriter``."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, FORMAT, flush_s=0.0)

    def write(self, sample: Sample) -> None:
        """Append one."""
        self.append({name: value for name, value in dataclasses.asdict(sample).items() if value is not None})


def read_samples(path: Path) -> list[Sample]:
    """The samples of a file, in the order of time. A last line that was cut off in the middle is left out.

    Raises:
        ResultsError: the file is missing, or is not one of samples, or of another version.
    """
    return read_lines(path, FORMAT, _sample, item="a sample")


def around(samples: Iterable[Sample], start_ns: int, end_ns: int) -> tuple[Sample, Sample] | None:
    """The samples nearest to both ends of a window; None where there are not two different ones."""
    usable = list(samples)
    if not usable:
        return None
    before = min(usable, key=lambda sample: abs(sample.at_ns - start_ns))
    later = [one for one in usable if one.at_ns > before.at_ns]
    if not later:
        return None
    return before, min(later, key=lambda sample: abs(sample.at_ns - end_ns))

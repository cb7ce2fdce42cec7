"""What the fake server knows of one model while it runs: whether it is ready, and what it has done."""

from __future__ import annotations

import threading
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Literal

from enginesmith_client.testing._faults import Faults
from enginesmith_client.testing._models import FakeModel

_STAGES = ("compute_input", "compute_infer", "compute_output")


@dataclass
class Served:
    """One model on the server."""

    original: FakeModel
    """As it was added; unloading brings it back."""
    ready: bool = True
    reason: str = ""
    """Of a model that is not ready."""
    load_error: str | None = None
    """What loading it ends with; None: it can be loaded."""
    ever_loaded: bool = True
    faults: Faults = field(default_factory=Faults)
    succeeded: int = 0
    failed: int = 0
    batches: Counter[int] = field(default_factory=Counter)
    """Executions of each batch size."""
    compute_ns: Counter[int] = field(default_factory=Counter)
    """Virtual time of each batch size."""
    lock: threading.Lock = field(default_factory=threading.Lock)
    model: FakeModel = field(init=False)

    def __post_init__(self) -> None:
        self.model = self.original

    def count(self, *, batch_size: int, latency_s: float, outcome: Literal["success", "fail"]) -> None:
        """Count a request."""
        with self.lock:
            if outcome == "fail":
                self.failed += 1
                return
            self.succeeded += 1
            self.batches[batch_size] += 1
            self.compute_ns[batch_size] += round(latency_s * 1e9)

    def reset(self) -> None:
        """As loading does: what the model did before is forgotten."""
        with self.lock:
            self.succeeded = self.failed = 0
            self.batches.clear()
            self.compute_ns.clear()

    def index_json(self) -> list[dict[str, str]]:
        """The entries of the repository index."""
        name = self.model.name
        if not self.ever_loaded:
            return [{"name": name, "version": "", "state": "", "reason": ""}]
        state = "READY" if self.ready else "UNAVAILABLE"
        return [
            {"name": name, "version": version, "state": state, "reason": "" if self.ready else self.reason}
            for version in self.model.versions
        ]

    def statistics_json(self, version: str) -> dict[str, Any]:
        """The statistics of one version; the fake counts them together."""
        with self.lock:
            total_ns = sum(self.compute_ns.values())
            durations = dict.fromkeys(_STAGES, 0) | {
                "compute_infer": total_ns,
                "queue": 0,
                "success": total_ns,
            }
            totals = {name: {"count": self.succeeded, "ns": ns} for name, ns in durations.items()}
            return {
                "name": self.model.name,
                "version": version,
                "inference_count": sum(size * count for size, count in self.batches.items()),
                "execution_count": sum(self.batches.values()),
                "inference_stats": totals | {"fail": {"count": self.failed, "ns": 0}},
                "batch_stats": [
                    {
                        "batch_size": size,
                        "compute_input": {"count": count, "ns": 0},
                        "compute_infer": {"count": count, "ns": self.compute_ns[size]},
                        "compute_output": {"count": count, "ns": 0},
                    }
                    for size, count in sorted(self.batches.items())
                ],
            }

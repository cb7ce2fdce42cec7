"""Where the model is that is measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Target:
    """A model of a running Triton server."""

    model: str
    url: str = "grpc://127.0.0.1:8001"
    """Measurements travel over gRPC."""
    version: str = ""
    """Empty: the one that the server chooses."""
    metrics_url: str | None = None
    """``http://127.0.0.1:8002/metrics``; None: what only metrics tell is not measured."""
    server_pid: int | None = None
    """Of tritonserver, if it runs on this machine; None: it is looked for by the port."""

    def version_of(self, served: Sequence[str]) -> str:
        """The version that answers where the server serves these: the newest, unless one is named."""
        return self.version or max(served, key=_number, default="")


def _number(version: str) -> int:
    return int(version) if version.isdigit() else -1

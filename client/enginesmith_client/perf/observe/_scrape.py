"""What a server tells only at ``/metrics``: the few lines that a figure is made of."""

from __future__ import annotations

import http.client
import math
import re
from collections.abc import Collection
from urllib.parse import urlsplit

_TIMEOUT_S = 1.0
_LINE = re.compile(
    rb"^(enginesmith_llm_\w+|nv_trt_llm_(?:kv_cache_block|request)_metrics|nv_gpu_(?:utilization|memory_used_bytes))"
    rb"(?:\{([^}]*)\})?\s+(\S+)",
    re.MULTILINE,
)
"""Names of TensorRT-LLM: ``custom_metrics_reporter.cc`` of tensorrtllm_backend; of GPUs: Triton's user guide, Metrics."""
_LABEL = re.compile(rb'(\w+)="([^"]*)"')
_OF_THE_MODEL = ("model", "version")


def parse_metrics(text: bytes, models: Collection[str]) -> dict[str, float]:
    """The lines that matter of the text format of Prometheus, by name and labels: ``name{size="4"}``.

    Labels that say which model and version it is are left out, and versions are summed. Those of enginesmith are
    taken of ``models`` only; TensorRT-LLM's of any, because graphs call it under names of their own.
    """
    found: dict[str, float] = {}
    for name, labels, value in _LINE.findall(text):
        pairs = {key.decode(): one.decode() for key, one in _LABEL.findall(labels)}
        if name.startswith(b"enginesmith_") and pairs.get("model") not in models:
            continue
        rest = ",".join(f'{key}="{one}"' for key, one in sorted(pairs.items()) if key not in _OF_THE_MODEL)
        key = f"{name.decode()}{{{rest}}}" if rest else name.decode()
        number = _number(value)
        if math.isfinite(number):
            found[key] = found.get(key, 0.0) + number
    return found


def _number(text: bytes) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


class MetricsPage:
    """A connection to ``/metrics`` that is kept."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        self._connection = kind(parts.hostname or "127.0.0.1", parts.port, timeout=_TIMEOUT_S)
        self._path = parts.path or "/metrics"

    def read(self) -> bytes | None:
        """The page; None when the server does not give it."""
        try:
            self._connection.request("GET", self._path)
            response = self._connection.getresponse()
            page = response.read()
        except (OSError, http.client.HTTPException):
            self._connection.close()
            return None
        return page if response.status == http.client.OK else None

    def close(self) -> None:
        """End the connection."""
        self._connection.close()

"""The files that perf_analyzer reads and writes: the requests as JSON, its export of time stamps, its CSV.

Formats: docs/input_data.md and ``src/profile_data_exporter.cc`` of triton-inference-server/perf_analyzer, and what
versions 2.51 and 2.60 were seen to do. Knows nothing of running it.
"""

from __future__ import annotations

import base64
import csv
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from tritonclient.grpc import service_pb2
from tritonclient.utils import deserialize_bytes_tensor

from enginesmith_client.perf._errors import ProfileError, ToolError
from enginesmith_client.perf._records import Record
from enginesmith_client.perf.load._prepared import Prepared, TokenCounts

Value: TypeAlias = str | int | float | bool
InputData: TypeAlias = dict[str, list[dict[str, dict[str, Any]]]]

_IGNORED_PARAMETERS = {"triton_enable_empty_final_response", "timeout"}
"""perf_analyzer sets the first itself. It has none for the second: its requests wait as long as it takes."""
_CSV_US = {
    "avg_ms": "Avg latency",
    "p50_ms": "p50 latency",
    "p90_ms": "p90 latency",
    "p95_ms": "p95 latency",
    "p99_ms": "p99 latency",
    "queue_ms": "Server Queue",
    "compute_input_ms": "Server Compute Input",
    "compute_infer_ms": "Server Compute Infer",
    "compute_output_ms": "Server Compute Output",
    "network_ms": "Network+Server Send/Recv",
}


@dataclass(frozen=True)
class Export:
    """What perf_analyzer wrote down of every request that ended within one of its windows. Wall clock, Unix nanoseconds."""

    requests: tuple[ExportedRequest, ...]
    """In the order in which they were sent."""
    boundaries_ns: tuple[int, ...]
    """Where its windows begin and end: one more than there were windows."""


@dataclass(frozen=True)
class ExportedRequest:
    """One request. Final responses that are empty are left out."""

    sent_ns: int
    response_ns: tuple[int, ...]
    prompt_tokens: int | None
    output_tokens: int | None


def input_data_from_rows(rows: Sequence[Mapping[str, Sequence[Value]]]) -> InputData:
    """The content of ``--input-data`` for rows of one-dimensional inputs by name."""
    return {
        "data": [
            {name: {"content": list(values), "shape": [len(values)]} for name, values in row.items()}
            for row in rows
        ]
    }


def input_data_from_requests(requests: Sequence[Prepared], *, batched: bool) -> InputData:
    """The content of ``--input-data`` that makes perf_analyzer send the tensors of ``requests``, bit for bit.

    ``batched``: the first dimension of every tensor is that of the batch; each of its rows becomes an entry.

    Raises:
        ProfileError: a request holds what perf_analyzer cannot send.
    """
    return {"data": [row for request in requests for row in _rows(request, batched)]}


def batch_size(requests: Sequence[Prepared]) -> int:
    """Rows of every request.

    Raises:
        ProfileError: they differ; perf_analyzer has one batch size.
    """
    sizes = {request.rows for request in requests}
    if len(sizes) > 1:
        raise ProfileError(
            f"perf_analyzer sends batches of one size; the requests have {', '.join(map(str, sorted(sizes)))} rows",
            hint="measure with generator: enginesmith, or give every request as many rows",
        )
    return sizes.pop()


def _rows(request: Prepared, batched: bool) -> list[dict[str, dict[str, Any]]]:
    message = service_pb2.ModelInferRequest.FromString(request.message)
    if unknown := sorted(set(message.parameters) - _IGNORED_PARAMETERS):
        raise ProfileError(
            f"perf_analyzer cannot send the request parameter {unknown[0]}",
            hint="measure with generator: enginesmith",
        )
    if len(message.raw_input_contents) != len(message.inputs):
        raise ProfileError(
            "a request holds tensors that are not raw bytes; perf_analyzer cannot send it",
            hint="measure with generator: enginesmith",
        )
    count = request.rows if batched else 1
    rows: list[dict[str, dict[str, Any]]] = [{} for _ in range(count)]
    for tensor, raw in zip(message.inputs, message.raw_input_contents, strict=True):
        shape = list(tensor.shape[1:] if batched else tensor.shape)
        for row, content in zip(rows, _split(tensor.name, tensor.datatype, raw, count), strict=True):
            row[tensor.name] = content | {"shape": shape}
    return rows


def _split(name: str, datatype: str, raw: bytes, count: int) -> list[dict[str, Any]]:
    """The content of a tensor in ``count`` equal parts. Raw bytes, so that nothing is rounded; texts are texts."""
    if datatype != "BYTES":
        step = len(raw) // count
        return [
            {"b64": base64.b64encode(raw[part * step : (part + 1) * step]).decode()} for part in range(count)
        ]
    try:
        texts = [element.decode() for element in deserialize_bytes_tensor(raw)]
    except UnicodeDecodeError as error:
        raise ProfileError(
            f"input {name} holds bytes that are no UTF-8; perf_analyzer takes texts only",
            hint="measure with generator: enginesmith",
        ) from error
    step = len(texts) // count
    return [{"content": texts[part * step : (part + 1) * step]} for part in range(count)]


def read_export(path: Path, counts: TokenCounts) -> Export | None:
    """What is in ``--profile-export-file``; None where nothing was measured.

    Raises:
        ToolError: it is not what perf_analyzer 2.51 to 2.60 write.
    """
    if not path.exists():
        return None
    try:
        # Texts of a model come as they are, whether or not they are UTF-8.
        document = json.loads(path.read_text(encoding="utf-8", errors="replace"), strict=False)
        experiments = document["experiments"]
        if not experiments or not experiments[0]["requests"]:
            return None
        requests = [_request(entry, counts) for entry in experiments[0]["requests"]]
        boundaries = tuple(sorted(set(map(int, experiments[0]["window_boundaries"]))))
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise ToolError(
            f"{path} is not an export of time stamps as perf_analyzer 2.51 to 2.60 write it: {error!r}",
            hint="a model that answers with NaN or infinity makes perf_analyzer cut it off; else use one of those versions",
        ) from error
    answered = sorted((one for one in requests if one.response_ns), key=lambda one: one.sent_ns)
    return Export(tuple(answered), boundaries) if answered else None


def _request(entry: Mapping[str, Any], counts: TokenCounts) -> ExportedRequest:
    outputs = entry.get("response_outputs") or [None] * len(entry["response_timestamps"])
    # An empty final response has no outputs; perf_analyzer does not count it either.
    answers = [
        (int(at_ns), values or {})
        for at_ns, values in zip(entry["response_timestamps"], outputs, strict=True)
        if values != {}
    ]
    prompt = [_count(values, counts.prompt_output) for _, values in answers]
    tokens = [_count(values, counts.answer_output) for _, values in answers]
    said = [count for count in tokens if count is not None]
    return ExportedRequest(
        sent_ns=int(entry["timestamp"]),
        response_ns=tuple(at_ns for at_ns, _ in answers),
        prompt_tokens=next((count for count in prompt if count is not None), None),
        output_tokens=(sum(said) if counts.counts_pieces else max(said)) if said else None,
    )


def _count(values: Mapping[str, Any], name: str | None) -> int | None:
    value = values.get(name) if name else None
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def records_of(
    export: Export, *, origin_unix_ns: int, rows: int, streaming: bool, pieces_are_tokens: bool = True
) -> list[Record]:
    """One for every request of ``export``, times since ``origin_unix_ns``. Due is sent: the loop is closed."""
    records = []
    for number, request in enumerate(export.requests):
        sent_ns = request.sent_ns - origin_unix_ns
        pieces = tuple(at_ns - origin_unix_ns for at_ns in request.response_ns)
        records.append(
            Record(
                number=number,
                due_ns=sent_ns,
                sent_ns=sent_ns,
                ended_ns=pieces[-1],
                rows=rows,
                prompt_tokens=request.prompt_tokens,
                output_tokens=len(pieces)
                if request.output_tokens is None and streaming and pieces_are_tokens
                else request.output_tokens,
                piece_ns=pieces if streaming else (),
            )
        )
    return records


def read_report(path: Path) -> dict[str, float] | None:
    """The figures of ``-f``: ``rows_per_s``, latencies and the server's times in ms. None: it wrote none.

    Raises:
        ToolError: it is not a report of perf_analyzer 2.51 to 2.60.
    """
    if not path.exists():
        return None
    try:
        with path.open(newline="", encoding="utf-8") as file:
            row = next(csv.DictReader(file))
        figures = {"rows_per_s": float(row["Inferences/Second"])}
        figures |= {key: float(row[column]) / 1000 for key, column in _CSV_US.items() if row.get(column)}
        return {key: value for key, value in figures.items() if math.isfinite(value)}
    except (OSError, ValueError, KeyError, StopIteration) as error:
        raise ToolError(
            f"{path} is not a report as perf_analyzer 2.51 to 2.60 write it: {error!r}"
        ) from error

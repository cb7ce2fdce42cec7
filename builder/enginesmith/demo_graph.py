"""The demonstration of a graph model: every variant behind one real tritonserver, asked and measured.

Owns the texts, the load and the comparison table. It goes through the client, as an application would; the figures of
speed come from what the server did in this run, those of accuracy from the build.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from enginesmith.report_parts import Columns, bytes_text, formatted, table_of

if TYPE_CHECKING:
    from rich.table import Table

    from enginesmith.report_graph import GraphVariantReport
    from enginesmith_client import Client

SENTENCES = (
    "How do I bake bread at home?",
    "Flour, water, salt and yeast are all that a loaf needs.",
    "The ship left the harbour before dawn.",
    "A boat sailed out to sea early in the morning.",
    "The court dismissed the appeal.",
    "The judges turned down the request for a new trial.",
)
"""Three pairs that say nearly the same in other words."""
QUERY = SENTENCES[0]
CONCURRENCY = 16
_SINGLE_REQUESTS = 64
_CONCURRENT_REQUESTS = 16 * CONCURRENCY
_WARM_UP_REQUESTS = 8

Progress = Callable[[float | None, str], None]
Row = Mapping[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class ServedGraph:
    """What one variant did behind the server."""

    model: str
    """The one that was asked: with a text ensemble, that."""
    shown: tuple[str, ...]
    """What it answered, for people."""
    requests_per_s_single: float
    """With one request of one sample at a time."""
    requests_per_s_concurrent: float
    """With ``CONCURRENCY`` such requests at a time."""
    mean_batch: float
    """Requests per execution that the dynamic batcher formed under that load."""

    @property
    def batching_gain(self) -> float:
        """How many times more requests per second the server answers when they come at once."""
        return self.requests_per_s_concurrent / self.requests_per_s_single


def measure_served(
    client: Client,
    models: Mapping[str, str],
    *,
    task: str,
    rows: Sequence[Row],
    on_progress: Progress,
) -> Iterator[ServedGraph]:
    """Ask and load each of ``models`` in turn, so that they do not compete.

    Args:
        models: for the model that is asked, the one that executes the graph.
        task: the spec's; says what to ask of a model that takes text.
        rows: samples of the graph, sent to models that take no text. Empty: they take text.
    """
    for index, (model, engine) in enumerate(models.items()):
        on_progress(index / len(models), f"asking {model}")
        shown = () if rows else _SHOWN[task](client, model)
        ask = _request(client, model, task=task, rows=rows)
        _requests_per_s(ask, requests=_WARM_UP_REQUESTS, concurrency=1)
        on_progress((index + 0.3) / len(models), f"{model}: one request at a time")
        single = _requests_per_s(ask, requests=_SINGLE_REQUESTS, concurrency=1)
        on_progress((index + 0.6) / len(models), f"{model}: {CONCURRENCY} requests at a time")
        before = _executions(client, engine)
        concurrent = _requests_per_s(ask, requests=_CONCURRENT_REQUESTS, concurrency=CONCURRENCY)
        formed = _CONCURRENT_REQUESTS / max(1, _executions(client, engine) - before)
        yield ServedGraph(model, shown, single, concurrent, formed)


def comparison_table(reports: Sequence[GraphVariantReport], served: Sequence[ServedGraph]) -> Table:
    """One row per variant: what it gained and what it lost, all measured."""
    columns: Columns[tuple[GraphVariantReport, ServedGraph]] = (
        ("variant", lambda row: row[0].variant),
        ("size", lambda row: bytes_text(row[0].engine_bytes)),
        ("of FP32", lambda row: formatted(row[0].share_of_fp32, ".0%")),
        ("requests/s x1", lambda row: f"{row[1].requests_per_s_single:.1f}"),
        (f"requests/s x{CONCURRENCY}", lambda row: f"{row[1].requests_per_s_concurrent:.1f}"),
        ("batching gain", lambda row: f"{row[1].batching_gain:.2f}x"),
        ("mean batch", lambda row: f"{row[1].mean_batch:.1f}"),
        ("mean cosine", lambda row: formatted(row[0].mean_cosine, ".4f")),
        ("worst cosine", lambda row: formatted(row[0].min_cosine, ".4f")),
    )
    title = "what each variant gained and lost, served in this run"
    return table_of(title, list(zip(reports, served, strict=True)), columns=columns)


def _request(client: Client, model: str, *, task: str, rows: Sequence[Row]) -> Callable[[int], object]:
    """A function that sends one request of one sample, another one for another index."""

    def text(index: int) -> str:
        return SENTENCES[index % len(SENTENCES)]

    ways: Mapping[str, Callable[[int], object]] = {
        "embedding": lambda index: client.embed(model, [text(index)]),
        "classification": lambda index: client.classify(model, [text(index)]),
        "reranking": lambda index: client.rerank(model, QUERY, [text(index)]),
    }
    if rows:
        return lambda index: client.infer(model, rows[index % len(rows)])
    return ways[task]


def _requests_per_s(ask: Callable[[int], object], *, requests: int, concurrency: int) -> float:
    with ThreadPoolExecutor(concurrency) as pool:
        started_s = time.perf_counter()
        answered = sum(1 for _ in pool.map(ask, range(requests)))
        return answered / (time.perf_counter() - started_s)


def _executions(client: Client, model: str) -> int:
    """How often the model has run a batch."""
    return sum(version.execution_count for version in client.statistics(model))


def _neighbours(client: Client, model: str) -> tuple[str, ...]:
    """For every sentence the nearest of the others, with their cosine."""
    vectors = client.embed(model, SENTENCES).astype(np.float64)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    cosines = vectors @ vectors.T
    np.fill_diagonal(cosines, -1)
    width = max(map(len, SENTENCES))
    return tuple(
        f"{sentence:<{width}}  nearest ({cosines[index].max():.3f}): {SENTENCES[int(cosines[index].argmax())]}"
        for index, sentence in enumerate(SENTENCES)
    )


def _labels(client: Client, model: str) -> tuple[str, ...]:
    classes = client.classify(model, SENTENCES)
    width = max(map(len, SENTENCES))
    return tuple(
        f"{sentence:<{width}}  {one.label} ({one.score:.1%})"
        for sentence, one in zip(SENTENCES, classes, strict=True)
    )


def _ranking(client: Client, model: str) -> tuple[str, ...]:
    ranking = client.rerank(model, QUERY, SENTENCES[1:])
    return (QUERY, *(f"  {one.score:8.3f}  {one.document}" for one in ranking))


_SHOWN: Mapping[str, Callable[[Client, str], tuple[str, ...]]] = {
    "embedding": _neighbours,
    "classification": _labels,
    "reranking": _ranking,
}

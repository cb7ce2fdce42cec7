"""The demonstration of graph models: what it asks and measures, against a real tritonserver."""

import numpy as np
import pytest
from served_models import RunningServer

from enginesmith.demo_graph import CONCURRENCY, SENTENCES, ServedGraph, measure_served
from enginesmith_client import Client

pytestmark = pytest.mark.server


def served(server: RunningServer, models: dict[str, str], task: str, **changes: list) -> list[ServedGraph]:
    seen: list[float | None] = []
    with Client(server.url("grpc"), timeout_s=60) as client:
        rows = changes.get("rows", [])
        measured = list(
            measure_served(
                client, models, task=task, rows=rows, on_progress=lambda done, _: seen.append(done)
            )
        )
    assert len(seen) == 3 * len(models)
    return measured


def test_every_model_is_asked_and_its_executions_are_counted(server: RunningServer) -> None:
    (one,) = served(server, {"moods-text": "moods"}, "classification")
    assert one.model == "moods-text"
    assert [line[: len(sentence)] for line, sentence in zip(one.shown, SENTENCES, strict=True)] == list(
        SENTENCES
    )
    assert "very: curious" in one.shown[0]
    assert one.mean_batch == 1, "the model has no dynamic batching"
    assert one.batching_gain == one.requests_per_s_concurrent / one.requests_per_s_single


def test_documents_are_shown_with_the_best_first(server: RunningServer) -> None:
    (one,) = served(server, {"relevance-text": "relevance-text"}, "reranking")
    assert one.shown[0] == SENTENCES[0]
    scores = [float(line.split()[0]) for line in one.shown[1:]]
    assert scores == sorted(scores, reverse=True)


def test_models_that_take_no_text_get_samples(server: RunningServer) -> None:
    rows = [{"input_ids": np.ones((1, length), np.int64)} for length in (3, 5)]
    (one,) = served(server, {"sentences": "sentences"}, "tensors", rows=rows)
    assert one.shown == ()
    assert one.requests_per_s_concurrent > 0
    assert CONCURRENCY > 1

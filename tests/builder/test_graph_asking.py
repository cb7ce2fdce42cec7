"""What the rehearsal of a graph deployment reads of a server."""

from typing import Any, cast

import pytest
import tritonclient.grpc as grpc

from enginesmith.triton.graph import asking


class LateCounter:
    """Statistics as tritonserver gives them: a request is counted some time after its answer."""

    def __init__(self, *hits: int) -> None:
        self.hits = list(hits)

    def get_inference_statistics(self, model: str, *, as_json: bool) -> dict[str, Any]:
        hits = self.hits.pop(0) if len(self.hits) > 1 else self.hits[0]
        return {"model_stats": [{"name": model, "inference_stats": {"cache_hit": {"count": str(hits)}}}]}


def test_counts_are_read_when_they_stand_still(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asking, "_SETTLED_S", 0)
    counter = LateCounter(1, 2, 3)
    ask = asking.Asking(cast(grpc.InferenceServerClient, counter))
    assert ask.statistics("minilm").cache_hits == 3

"""Measuring a graph: what the figures say of a good engine and of each kind of broken one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from graph_engines import NAN_TOKEN, Fault, tokens, write_batches, write_engine

from enginesmith.errors import GateError
from enginesmith.graphs import measure
from enginesmith.graphs.measure import load_batches, row_alone, run
from enginesmith.graphs.signature import AxisRange, GraphTensor, Signature
from enginesmith.triton.models.graph_onnxruntime.graph_runtime import (
    GraphInputError,
    GraphRequests,
    GraphRuntime,
)

BATCHES = [tokens(3, 9, 5, 2, seed=1), tokens(4, 16, 7, 7, seed=2), tokens(6, 1, 2, 11, seed=3)]
BATCHES[1]["input_ids"][2, 0] = BATCHES[2]["input_ids"][3, 4] = NAN_TOKEN


@dataclass
class Context:
    params: dict[str, Any]
    inputs: dict[str, Path]
    out: Path
    scratch: Path = field(default_factory=Path)

    def progress(self, fraction: float | None, note: str = "") -> None: ...


@pytest.fixture(autouse=True)
def short_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "BUDGET_S", 0.0)


def measured(root: Path, *, scheme: str = "int8", **engine: Any) -> dict[str, Any]:
    """The measurements of an engine whose original is the FP32 engine itself."""
    output = {name: engine[name] for name in ("output", "width", "task") if name in engine}
    write_engine(root / "baseline", **output)
    write_batches(root / "samples" / "batches", BATCHES)
    original = GraphRuntime(root / "baseline", 1)
    write_batches(root / "export" / "reference", [original.run(batch) for batch in BATCHES])
    if scheme != "none":
        write_engine(root / "engine", **engine)
    (root / "out").mkdir()
    inputs = {name: root / name for name in ("baseline", "samples", "export")}
    inputs["engine"] = root / ("baseline" if scheme == "none" else "engine")
    params = {"task": engine.get("task", "embedding"), "scheme": scheme}
    facts = run(Context(params, inputs, root / "out"))
    document: dict[str, Any] = json.loads((root / "out" / "measurements.json").read_text())
    assert document == facts
    json.dumps(document, allow_nan=False)
    return document


def test_the_fp32_engine_equals_its_original_and_itself_in_speed(tmp_path: Path) -> None:
    figures = measured(tmp_path, scheme="none")
    assert figures["export"] == figures["quality"]
    assert figures["export"]["relative_error"] == 0
    assert figures["samples"] == 12
    assert figures["outputs"] == {"embedding": {"non_finite": 0, "constant": False}}
    assert figures["throughput"]["single"]["speedup"] == 1
    assert (
        figures["engine_bytes"] == figures["fp32_bytes"] == (tmp_path / "baseline/model.onnx").stat().st_size
    )


def test_an_engine_that_lost_precision_is_measured_against_the_original(tmp_path: Path) -> None:
    figures = measured(tmp_path, noise=0.2)
    assert figures["export"] is None
    assert 0.8 < figures["quality"]["min_cosine"] <= figures["quality"]["mean_cosine"] < 0.999
    assert figures["company"]["relative_error"] < 1e-5


def test_throughput_says_what_ran(tmp_path: Path) -> None:
    throughput = measured(tmp_path)["throughput"]
    assert throughput["single"]["batch_size"] == 1
    assert throughput["batched"]["batch_size"] == 4
    assert throughput["batched"]["shapes"]["input_ids"] in ([4, 9], [4, 11], [4, 16])
    for place in ("single", "batched"):
        one = throughput[place]
        assert one["rounds"] == measure.MIN_ROUNDS
        assert one["speedup"] == pytest.approx(one["samples_per_s"] / one["fp32_samples_per_s"])


def test_values_that_are_not_finite_are_counted(tmp_path: Path) -> None:
    figures = measured(tmp_path, fault="nan")
    affected = sum(int((batch["input_ids"] == NAN_TOKEN).any(axis=1).sum()) for batch in BATCHES)
    assert affected >= 2
    assert figures["outputs"]["embedding"]["non_finite"] == 6 * affected
    assert figures["quality"]["mean_cosine"] is None


def test_an_output_that_is_the_same_for_all_samples_is_seen(tmp_path: Path) -> None:
    assert measured(tmp_path, fault="constant")["outputs"]["embedding"]["constant"] is True


@pytest.mark.parametrize("fault", ["mixes rows", "ignores the mask"])
def test_an_engine_whose_rows_depend_on_their_neighbours_is_seen(tmp_path: Path, fault: Fault) -> None:
    company = measured(tmp_path, fault=fault)["company"]
    assert company["rows"] == 12
    assert company["relative_error"] > 0.1


def test_classification_and_reranking_have_their_own_figures(tmp_path: Path) -> None:
    classes = measured(tmp_path / "classes", task="classification", output="logits", noise=1.0)["quality"]
    assert 0 < classes["top1_agreement"] < 1
    scores = measured(tmp_path / "scores", task="reranking", output="score", width=1, noise=0.3)["quality"]
    assert 0 < scores["rank_correlation"] < 1


def test_an_original_that_is_not_finite_stops_at_once(tmp_path: Path) -> None:
    write_engine(tmp_path / "engine")
    write_batches(tmp_path / "samples" / "batches", BATCHES)
    bad = np.full((4, 6), np.nan, np.float32)
    write_batches(tmp_path / "export" / "reference", [{"embedding": bad}] * 3)
    inputs = {"engine": tmp_path / "engine", "baseline": tmp_path / "engine"}
    inputs |= {name: tmp_path / name for name in ("samples", "export")}
    with pytest.raises(GateError, match=r"embedding of the original model itself holds 72 values"):
        run(Context({"task": "embedding", "scheme": "none"}, inputs, tmp_path))


def test_a_row_alone_has_no_padding() -> None:
    row = row_alone(BATCHES[0], 2)
    assert row["input_ids"].tolist() == BATCHES[0]["input_ids"][2:3, :5].tolist()


def test_batches_come_in_order_and_are_never_unpickled(tmp_path: Path) -> None:
    write_batches(tmp_path / "batches", [{"x": np.array([index])} for index in range(11)])
    assert [int(batch["x"][0]) for batch in load_batches(tmp_path / "batches")] == list(range(11))
    np.savez(tmp_path / "batches" / "011.npz", x=np.array([object()]))
    with pytest.raises(ValueError, match="allow_pickle"):
        load_batches(tmp_path / "batches")


def test_requests_of_different_lengths_are_answered_together_as_alone(tmp_path: Path) -> None:
    runtime = GraphRuntime(write_engine(tmp_path / "engine"), 1)
    requests = [tokens(3, 5), tokens(16), tokens(1)]
    for answer, request in zip(runtime.run_requests(requests), requests, strict=True):
        np.testing.assert_allclose(answer["embedding"], runtime.run(request)["embedding"], rtol=1e-5)


class MeanOfPixels(GraphRequests):
    """A model with a mask that says nothing about one of its inputs; counts what it runs."""

    def __init__(self, directory: Path) -> None:
        mask = GraphTensor("attention_mask", "int64", ("batch", "sequence"))
        pixels = GraphTensor("pixels", "float32", ("batch", "width"))
        axes = {"sequence": AxisRange(1, 4, 8), "width": AxisRange(1, 4, 8)}
        Signature("tensors", (mask, pixels), (GraphTensor("mean", "float32", ("batch", 1)),), axes).write(
            directory
        )
        super().__init__(directory)
        self.runs = 0

    def _run(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        self.runs += 1
        return {"mean": inputs["pixels"].mean(axis=1, keepdims=True)}


def test_what_the_mask_says_nothing_about_is_not_padded(tmp_path: Path) -> None:
    model = MeanOfPixels(tmp_path)
    requests = [
        {"attention_mask": np.ones((1, length), np.int64), "pixels": np.full((1, width), 4, np.float32)}
        for length, width in ((3, 2), (5, 4), (2, 2))
    ]
    assert [answer["mean"].tolist() for answer in model.run_requests(requests)] == [[[4.0]]] * 3
    assert model.runs == 2


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        ({"input_ids": np.ones((1, 3), np.int64)}, r"\['input_ids'\].*'attention_mask', 'input_ids'"),
        ({**tokens(3), "input_ids": np.ones((1, 3), np.int32)}, "input_ids is int32; the model takes int64"),
        ({**tokens(3), "input_ids": np.ones(3, np.int64)}, r"has shape \[3\]"),
        ({**tokens(3), "input_ids": np.ones((1, 4), np.int64)}, "length 3|length 4"),
        (tokens(17), "'sequence' has length 17; the model takes 1 to 16"),
    ],
)
def test_arrays_that_do_not_fit_are_refused_by_name(tmp_path: Path, inputs: Any, said: str) -> None:
    runtime = GraphRuntime(write_engine(tmp_path / "engine"), 1)
    with pytest.raises(GraphInputError, match=said):
        runtime.run(inputs)


def test_an_engine_whose_graph_is_not_the_signatures_is_refused_when_loaded(tmp_path: Path) -> None:
    engine = write_engine(tmp_path / "engine")
    signature = engine / "signature.json"
    signature.write_text(
        signature.read_text().replace('"embedding",\n      "dtype"', '"vector",\n      "dtype"')
    )
    with pytest.raises(ValueError, match=r"outputs of model.onnx are \['embedding'\]"):
        GraphRuntime(engine, 1)

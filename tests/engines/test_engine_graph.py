"""The files of an engine: the weights file, and graphs that ONNX itself finds valid."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
import pytest
from checkpoint_factory import VOCAB_SIZE, tiny_checkpoint
from engine_cases import edit_config, edit_tensors, lowered

from enginesmith.engines.onnxruntime.graph import WeightsFile


def test_equal_tensors_are_stored_once(tmp_path: Path) -> None:
    with WeightsFile(tmp_path / "weights.bin") as weights:
        places = [weights.append(np.full(3000, value, np.float32)) for value in (1, 2, 1)]

    assert places[0] == places[2] != places[1]
    assert (tmp_path / "weights.bin").stat().st_size == 12288 + 12000  # 12,000 bytes fill three pages.


@pytest.mark.parametrize(
    "array",
    [
        np.arange(5, dtype=np.int64),
        np.array(1.5, ml_dtypes.float8_e4m3fn),
        np.arange(7).astype(ml_dtypes.bfloat16),
        np.arange(12, dtype=np.float32).reshape(3, 4).T,
    ],
)
def test_tensors_begin_on_a_page_and_hold_their_bytes(array: Any, tmp_path: Path) -> None:
    with WeightsFile(tmp_path / "weights.bin") as weights:
        weights.append(np.ones(3, np.uint8))
        offset, length = weights.append(array)

    assert offset % 4096 == 0
    raw = (tmp_path / "weights.bin").read_bytes()[offset : offset + length]
    assert raw == np.ascontiguousarray(array).tobytes()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("checkpoint"), tied=True)


@pytest.fixture(scope="module")
def engine(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return lowered(checkpoint, tmp_path_factory.mktemp("lowered") / "engine")


def session_of(engine: Path, graph: str = "exact.onnx") -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(str(engine / graph), options, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("graph", ["model.onnx", "exact.onnx"])
def test_graph_passes_the_onnx_checker_with_its_external_weights(
    engine: Path, graph: str, tmp_path: Path
) -> None:
    model = onnx.load(engine / graph, load_external_data=False)
    for node in model.graph.node:
        # onnxruntime registers this operator of its own in ONNX's domain, which ONNX's checker cannot know.
        if node.op_type == "SimplifiedLayerNormalization":
            node.domain = "com.microsoft"
    checked = tmp_path / graph
    checked.write_bytes(model.SerializeToString())
    shutil.copyfile(engine / "weights.bin", tmp_path / "weights.bin")  # the checker refuses hard links

    onnx.checker.check_model(str(checked), full_check=True)


def test_inputs_and_outputs_are_the_documented_ones(engine: Path) -> None:
    session = session_of(engine)

    cache = ["batch", 2, "capacity", 16]
    layers = [f"{layer}.{part}" for layer in (0, 1) for part in ("key", "value")]
    assert {i.name: (i.type, i.shape) for i in session.get_inputs()} == {
        "input_ids": ("tensor(int64)", ["batch", "sequence"]),
        "attention_mask": ("tensor(int64)", ["batch", "total"]),
        **{f"past_key_values.{name}": ("tensor(float)", cache) for name in layers},
    }
    assert [i.name for i in session.get_overridable_initializers()] == ["logits_to_keep"]
    assert {o.name: (o.type, o.shape) for o in session.get_outputs()} == {
        "logits": ("tensor(float)", ["batch", "kept", VOCAB_SIZE]),
        **{f"present.{name}": ("tensor(float)", cache) for name in layers},
    }


def feed_of(session: ort.InferenceSession, tokens: list[int], **more: Any) -> dict[str, Any]:
    empty = np.zeros((1, 2, 0, 16), np.float32)
    caches = {i.name: empty for i in session.get_inputs() if i.name.startswith("past")}
    ids = np.array([tokens])
    return {"input_ids": ids, "attention_mask": np.ones_like(ids), **caches, **more}


@pytest.mark.parametrize("kept", [1, 3, 6, 100])
def test_logits_to_keep_are_the_last_rows_of_all(engine: Path, kept: int) -> None:
    session, tokens = session_of(engine), [5, 6, 7, 8, 9, 10]
    everything = session.run(["logits"], feed_of(session, tokens))[0]
    assert everything.shape == (1, 6, VOCAB_SIZE)

    last = session.run(["logits"], feed_of(session, tokens, logits_to_keep=np.array([kept])))[0]

    np.testing.assert_allclose(last, everything[:, -kept:], atol=1e-5)


def test_tied_head_adds_no_second_copy_of_the_embedding(engine: Path, checkpoint: Path) -> None:
    names = {
        tensor.name for tensor in onnx.load(engine / "exact.onnx", load_external_data=False).graph.initializer
    }
    assert "embedding" in names
    assert not [name for name in names if name.startswith("lm_head")]


def test_both_graphs_of_an_unquantized_checkpoint_compute_the_same(engine: Path) -> None:
    results = [
        session.run(["logits"], feed_of(session, [5, 6, 7]))[0]
        for session in (session_of(engine, graph) for graph in ("model.onnx", "exact.onnx"))
    ]
    np.testing.assert_array_equal(*results)


def test_engine_json_says_what_a_runtime_must_know(engine: Path) -> None:
    assert json.loads((engine / "engine.json").read_text()) == {
        "format": 1,
        "runtime": "onnxruntime",
        "architecture": "LlamaForCausalLM",
        "layers": 2,
        "kv_heads": 2,
        "head_dim": 16,
        "vocab_size": VOCAB_SIZE,
        "max_positions": 1024,
        "eos_token_ids": [2],
        "quant_algo": None,
        "kv_cache_quant_algo": None,
        "accuracy_level": 1,
        "int8_head": False,
        "session_config": {},
    }


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        ({"eos_token_id": [5, 6]}, 2, [5, 6]),
        ({"eos_token_id": 0}, 2, [0]),
        ({"eos_token_id": None}, 2, [2]),
        ({}, [3, 4], [3, 4]),
        (None, 7, [7]),
        (None, None, []),
    ],
)
def test_tokens_that_end_an_answer_come_from_generation_config_first(
    generation: dict[str, Any] | None, config: Any, expected: list[int], checkpoint: Path, tmp_path: Path
) -> None:
    from enginesmith.engines.onnxruntime.lower import eos_token_ids

    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))

    assert eos_token_ids(tmp_path, {"eos_token_id": config}) == expected


def test_the_same_checkpoint_gives_the_same_bytes(checkpoint: Path, engine: Path, tmp_path: Path) -> None:
    again = lowered(checkpoint, tmp_path / "again")
    for name in ("model.onnx", "exact.onnx", "weights.bin", "engine.json"):
        assert (again / name).read_bytes() == (engine / name).read_bytes()


def test_head_stored_apart_wins_over_the_embedding(tmp_path: Path) -> None:
    # As transformers does when both tensors are there and differ.
    source = tiny_checkpoint(tmp_path / "checkpoint", tied=True)

    def add_head(tensors: dict[str, Any]) -> None:
        tensors["lm_head.weight"] = 2 * tensors["model.embed_tokens.weight"]

    tied = session_of(lowered(source, tmp_path / "tied"))
    edit_tensors(source, add_head)
    edit_config(source, tie_word_embeddings=True)
    apart = session_of(lowered(source, tmp_path / "apart"))

    feed = feed_of(tied, [5, 6, 7])
    np.testing.assert_allclose(
        apart.run(["logits"], feed)[0], 2 * tied.run(["logits"], feed)[0], rtol=1e-4, atol=1e-4
    )

"""The ``sample`` step: texts that fit, batches of other lengths, tensors from a file or random, and every bad file."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from encoder_factory import Context, sample_params, tiny_encoder
from tokenizers import Tokenizer

from enginesmith.errors import SourceError, SpecError
from enginesmith.graphs.samples import read_batches, run

IMAGE = {"name": "image", "dtype": "float32", "shape": ["batch", 3, "side"], "low": -1.0, "high": 1.0}
COUNT = {"name": "count", "dtype": "int32", "shape": ["batch"], "low": 2.0, "high": 5.0}
AXES = {"side": {"min": 2, "opt": 4, "max": 6}}


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_encoder(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def roberta(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_encoder(tmp_path_factory.mktemp("roberta"), "roberta")


def sampled(out: Path, checkpoint: Path, task: str = "embedding", **params: Any) -> dict[str, Any]:
    out.mkdir()
    return dict(run(Context(sample_params(task, **params), {"checkpoint": checkpoint}, out)))


def tensor_params(*, inputs: Any = (IMAGE, COUNT), axes: Any = AXES, **changes: Any) -> dict[str, Any]:
    location = {"corpus_path": None, "file": None}
    params = {"task": "tensors", "samples": 7, "batch_size": 3, "seed": 0, "file_sha256": None}
    return params | {"inputs": list(inputs), "axes": axes, "location": location} | changes


def from_file(tmp_path: Path, path: Path, **params: Any) -> list[Any]:
    location = {"corpus_path": None, "file": str(path)}
    out = tmp_path / "out"
    out.mkdir()
    run(Context(tensor_params(location=location, **params), {}, out))
    return read_batches(out)


def stored(path: Path, **arrays: Any) -> Path:
    np.savez(path, **arrays)
    return path


def good_arrays(count: int = 9) -> dict[str, Any]:
    return {
        "image": np.arange(count * 12, dtype=np.float32).reshape(count, 3, 4),
        "count": np.arange(count, dtype=np.int32),
    }


def rows_of(directory: Path) -> list[list[int]]:
    """The token ids of every sample, without padding."""
    return [
        ids[mask == 1].tolist()
        for batch in read_batches(directory)
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]


def test_every_row_is_exactly_its_text_tokenized(bert: Path, tmp_path: Path) -> None:
    sampled(tmp_path / "out", bert)
    texts = json.loads((tmp_path / "out" / "texts.json").read_text())["texts"]
    tokenizer = Tokenizer.from_file(str(bert / "tokenizer.json"))
    assert rows_of(tmp_path / "out") == [tokenizer.encode(text).ids for text in texts]
    assert len(texts) == len(set(texts)) == 12


def test_letters_are_made_small_where_sentence_transformers_does(bert: Path, tmp_path: Path) -> None:
    checkpoint = tmp_path / "cased"
    shutil.copytree(bert, checkpoint)
    document = json.loads((checkpoint / "tokenizer.json").read_text())
    document["normalizer"] = None
    (checkpoint / "tokenizer.json").write_text(json.dumps(document))
    for lowers in (False, True):
        (checkpoint / "sentence_bert_config.json").write_text(json.dumps({"do_lower_case": lowers}))
        out = tmp_path / str(lowers)
        sampled(out, checkpoint)
        texts = json.loads((out / "texts.json").read_text())["texts"]
        tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
        wanted = [tokenizer.encode(text.lower() if lowers else text).ids for text in texts]
        assert rows_of(out) == wanted


def test_texts_fit_and_lengths_differ_between_batches(bert: Path, tmp_path: Path) -> None:
    facts = sampled(tmp_path / "out", bert, samples=16, length=32)
    lengths = [batch["input_ids"].shape[1] for batch in read_batches(tmp_path / "out")]
    assert facts["longest_tokens"] <= 32
    assert len(set(lengths)) > 2
    assert all(batch["input_ids"].dtype == np.int64 for batch in read_batches(tmp_path / "out"))


def test_rows_are_padded_with_the_models_own_pad_token(roberta: Path, tmp_path: Path) -> None:
    sampled(tmp_path / "out", roberta)
    padding = [batch["input_ids"][batch["attention_mask"] == 0] for batch in read_batches(tmp_path / "out")]
    assert set(np.concatenate(padding).tolist()) == {1}


def test_the_same_seed_gives_the_same_samples_and_another_seed_others(bert: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        sampled(tmp_path / name, bert, seed=seed)
    assert rows_of(tmp_path / "a") == rows_of(tmp_path / "b")
    assert not {tuple(row) for row in rows_of(tmp_path / "a")} & {
        tuple(row) for row in rows_of(tmp_path / "c")
    }


def test_pairs_have_token_types_where_the_model_tells_texts_by_them(bert: Path, tmp_path: Path) -> None:
    sampled(tmp_path / "out", bert, "reranking")
    pairs = json.loads((tmp_path / "out" / "texts.json").read_text())["pairs"]
    tokenizer = Tokenizer.from_file(str(bert / "tokenizer.json"))
    encodings = [tokenizer.encode(first, second) for first, second in pairs]
    types = [
        row[mask == 1].tolist()
        for batch in read_batches(tmp_path / "out")
        for row, mask in zip(batch["token_type_ids"], batch["attention_mask"], strict=True)
    ]
    assert rows_of(tmp_path / "out") == [encoding.ids for encoding in encodings]
    assert types == [encoding.type_ids for encoding in encodings]
    assert all(1 in row for row in types)
    assert max(map(len, types)) <= 24


def test_pairs_of_a_model_with_one_token_type_have_no_token_types(roberta: Path, tmp_path: Path) -> None:
    sampled(tmp_path / "out", roberta, "reranking")
    assert set(read_batches(tmp_path / "out")[0]) == {"input_ids", "attention_mask"}


def test_a_corpus_with_too_few_texts_is_refused_with_their_number(bert: Path, tmp_path: Path) -> None:
    corpus = tmp_path / "small.txt"
    corpus.write_text("One small sentence here.\n\nAnd one more of them.\n")
    params = {"corpus": {"file": ".txt"}, "location": {"corpus_path": str(corpus), "file": None}}
    with pytest.raises(SourceError, match=r"gives 2 texts that fit into 24 tokens, 12 are needed"):
        sampled(tmp_path / "out", bert, **params)


def test_a_damaged_tokenizer_is_refused(tmp_path: Path) -> None:
    checkpoint = tiny_encoder(tmp_path / "bert")
    (checkpoint / "tokenizer.json").write_text("{}")
    with pytest.raises(SourceError, match=r"tokenizer\.json is not a tokenizer"):
        sampled(tmp_path / "out", checkpoint)


def test_random_tensors_take_every_named_length_and_stay_in_their_range(tmp_path: Path) -> None:
    run(Context(tensor_params(), {}, tmp_path))
    batches = read_batches(tmp_path)
    assert [batch["image"].shape for batch in batches] == [(3, 3, 4), (3, 3, 2), (1, 3, 6)]
    images = np.concatenate([batch["image"].reshape(-1) for batch in batches])
    counts = np.concatenate([batch["count"] for batch in batches])
    assert images.dtype == np.float32
    assert -1 <= images.min() < -0.5 < 0.5 < images.max() < 1
    assert counts.dtype == np.int32
    assert {2, 5} <= set(counts.tolist()) <= {2, 3, 4, 5}


def test_random_numbers_outside_of_the_dtype_are_refused(tmp_path: Path) -> None:
    inputs = [{"name": "pixels", "dtype": "uint8", "shape": ["batch", 2], "low": 0.0, "high": 256.0}]
    with pytest.raises(SourceError, match=r"input pixels: 0 to 256 is outside of uint8"):
        run(Context(tensor_params(inputs=inputs, axes={}), {}, tmp_path))


def test_samples_of_a_file_are_its_rows_chosen_by_seed(tmp_path: Path) -> None:
    path = stored(tmp_path / "samples.npz", **good_arrays())
    batches = from_file(tmp_path, path)
    chosen = np.concatenate([batch["count"] for batch in batches])
    assert len(set(chosen.tolist())) == 7
    for batch in batches:
        np.testing.assert_array_equal(batch["image"], good_arrays()["image"][batch["count"]])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"count": None}, "holds image; the inputs are image, count"),
        ({"other": np.zeros(9)}, "holds count, image, other"),
        ({"image": np.zeros((9, 3, 4))}, "array image is float64, the input is float32"),
        ({"image": np.zeros((9, 4), np.float32)}, r"array image has shape \[9, 4\]"),
        ({"image": np.zeros((9, 2, 4), np.float32)}, "array image has a length of 2 where the input has 3"),
        ({"image": np.zeros((9, 3, 7), np.float32)}, "axis 'side' is 7 long, allowed: 2 to 6"),
        ({"count": np.zeros(8, np.int32)}, "array count: axis 'batch' is 8 long, but 9"),
    ],
)
def test_a_file_that_does_not_fit_the_inputs_is_refused(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    arrays = {name: array for name, array in (good_arrays() | change).items() if array is not None}
    with pytest.raises(SourceError, match=message):
        from_file(tmp_path, stored(tmp_path / "samples.npz", **arrays))


def test_a_file_with_too_few_samples_is_refused(tmp_path: Path) -> None:
    path = stored(tmp_path / "samples.npz", **good_arrays(4))
    with pytest.raises(SourceError, match="holds 4 samples, 7 are needed"):
        from_file(tmp_path, path)


def test_pickled_objects_are_refused(tmp_path: Path) -> None:
    arrays = good_arrays() | {"count": np.array([{}] * 9, dtype=object)}
    with pytest.raises(SourceError, match="array count holds pickled Python objects"):
        from_file(tmp_path, stored(tmp_path / "samples.npz", **arrays))


@pytest.mark.parametrize("kept", [0, 10, 300, 600, -60])
def test_a_truncated_file_is_refused(tmp_path: Path, kept: int) -> None:
    path = stored(tmp_path / "samples.npz", **good_arrays())
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(SourceError, match=r"samples\.npz"):
        from_file(tmp_path, path)


def test_a_damaged_array_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "samples.npz"
    np.savez_compressed(path, **good_arrays())
    content = bytearray(path.read_bytes())
    content[120:160] = bytes(40)
    path.write_bytes(content)
    with pytest.raises(SourceError, match="array image is damaged"):
        from_file(tmp_path, path)


def test_a_single_array_is_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "samples.npy", np.zeros(3))
    with pytest.raises(SourceError, match="is a single array"):
        from_file(tmp_path, tmp_path / "samples.npy")


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="do not exist"):
        from_file(tmp_path, tmp_path / "samples.npz")


def onnx_file(path: Path) -> Path:
    values = [
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["N", 2, "width"]) for name in "xy"
    ]
    node = onnx.helper.make_node("Relu", ["x"], ["y"])
    graph = onnx.helper.make_graph([node], "relu", values[:1], values[1:])
    onnx.save(onnx.helper.make_model(graph), path)
    return path


def test_inputs_of_an_onnx_file_are_read_from_it(tmp_path: Path) -> None:
    location = {"corpus_path": None, "file": None, "onnx": str(onnx_file(tmp_path / "relu.onnx"))}
    axes = {"width": {"min": 3, "opt": None, "max": 5}}
    run(Context(tensor_params(inputs=(), axes=axes, location=location), {}, tmp_path))
    assert [batch["x"].shape for batch in read_batches(tmp_path)] == [(3, 2, 5), (3, 2, 3), (1, 2, 5)]


def test_a_dynamic_axis_of_an_onnx_file_without_lengths_is_named(tmp_path: Path) -> None:
    location = {"corpus_path": None, "file": None, "onnx": str(onnx_file(tmp_path / "relu.onnx"))}
    with pytest.raises(SpecError, match=r"dynamic axis 'width' \(input x\), whose lengths are missing"):
        run(Context(tensor_params(inputs=(), axes={}, location=location), {}, tmp_path))

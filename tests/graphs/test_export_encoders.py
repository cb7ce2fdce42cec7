"""Export of Hugging Face encoders: the numbers of sentence-transformers and transformers, names, and bad checkpoints."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from encoder_factory import (
    LABELS,
    Context,
    EncoderKind,
    TinyArtifacts,
    export_params,
    tiny_artifacts,
    tiny_encoder,
)

from enginesmith.checkpoints import fetch
from enginesmith.errors import SourceError
from enginesmith.graphs.export import read_references
from enginesmith.graphs.hf_models import original_of_checkpoint
from enginesmith.graphs.samples import read_batches
from enginesmith.graphs.signature import AxisRange, read_signature

Made = dict[EncoderKind, TinyArtifacts]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """The artifacts of one encoder of each kind; the first is a sentence-transformers model."""
    root = tmp_path_factory.mktemp("encoders")
    kinds: tuple[EncoderKind, ...] = ("roberta", "classifier", "reranker")
    bert = tiny_artifacts(root / "bert", pooling="mean_tokens", normalize=True)
    return {"bert": bert} | {kind: tiny_artifacts(root / kind, kind, layers=1) for kind in kinds}


def session_of(artifacts: TinyArtifacts) -> Any:
    return ort.InferenceSession(str(artifacts.export / "model.onnx"), providers=["CPUExecutionProvider"])


def outputs_of(artifacts: TinyArtifacts) -> Any:
    """The graph's output for all samples, as ONNX Runtime computes it."""
    session = session_of(artifacts)
    return np.concatenate([session.run(None, dict(batch))[0] for batch in read_batches(artifacts.samples)])


def transformers_logits(artifacts: TinyArtifacts) -> Any:
    import torch
    import transformers

    model = transformers.AutoModelForSequenceClassification.from_pretrained(artifacts.checkpoint).eval()
    with torch.no_grad():
        results = [
            model(**{name: torch.from_numpy(array) for name, array in batch.items()}).logits
            for batch in read_batches(artifacts.samples)
        ]
    return torch.cat(results).numpy()


def sentence_transformer(directory: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Of its import; the numbers are what is tested.
        from sentence_transformers import SentenceTransformer

        return SentenceTransformer(str(directory), device="cpu")


def original(checkpoint: Path, task: str = "embedding", **params: Any) -> Any:
    return original_of_checkpoint(checkpoint, export_params(task, **params))


def test_embeddings_equal_those_of_sentence_transformers(made: Made) -> None:
    texts = json.loads((made["bert"].samples / "texts.json").read_text())["texts"]
    expected = sentence_transformer(made["bert"].checkpoint).encode(texts)
    np.testing.assert_allclose(outputs_of(made["bert"]), expected, atol=1e-5)


@pytest.mark.parametrize("mode", ["cls_token", "max_tokens", "lasttoken"])
@pytest.mark.parametrize("normalize", [False, True])
def test_pooling_is_what_the_checkpoint_says(made: Made, tmp_path: Path, mode: str, normalize: bool) -> None:
    checkpoint = tiny_encoder(tmp_path, pooling=mode, normalize=normalize)
    texts = json.loads((made["bert"].samples / "texts.json").read_text())["texts"]
    expected = sentence_transformer(checkpoint).encode(texts)
    run = original(checkpoint).run
    seen = [run(batch)["embedding"] for batch in read_batches(made["bert"].samples)]
    np.testing.assert_allclose(np.concatenate(seen), expected, atol=1e-5)


def test_the_newer_name_of_pooling_is_read(made: Made, tmp_path: Path) -> None:
    checkpoint = tiny_encoder(tmp_path, pooling="mean_tokens")
    (checkpoint / "1_Pooling" / "config.json").write_text(
        '{"embedding_dimension": 32, "pooling_mode": "cls"}'
    )
    assert original(checkpoint).facts["pooling"] == "cls"


def test_the_spec_replaces_what_the_checkpoint_says(tmp_path: Path) -> None:
    checkpoint = tiny_encoder(tmp_path, pooling="mean_tokens", normalize=True)
    facts = original(checkpoint, pooling="cls", normalize=False).facts
    assert (facts["pooling"], facts["normalize"], facts["head"]) == ("cls", False, "spec")


def test_the_signature_of_an_embedding(made: Made) -> None:
    signature = read_signature(made["bert"].export)
    assert [tensor.name for tensor in signature.inputs] == ["input_ids", "attention_mask"]
    assert {tensor.shape for tensor in signature.inputs} == {("batch", "sequence")}
    assert [(tensor.name, tensor.dtype, tensor.shape) for tensor in signature.outputs] == [
        ("embedding", "float32", ("batch", 32))
    ]
    assert signature.axes == {"sequence": AxisRange(1, 16, 64)}
    assert (signature.pad_id, read_signature(made["roberta"].export).pad_id) == (0, 1)


def test_nodes_and_weights_are_named_after_the_models_layers(made: Made) -> None:
    graph = onnx.load(made["bert"].export / "model.onnx").graph
    names = [node.name for node in graph.node]
    assert len(set(names)) == len(names)
    linear = [
        f"encoder.layer.{layer}.{part}"
        for layer in range(2)
        for part in (
            "attention.self.query",
            "attention.self.key",
            "attention.self.value",
            "attention.output.dense",
            "intermediate.dense",
            "output.dense",
        )
    ]
    assert {f"{layer}/MatMul" for layer in linear} <= set(names)
    weights = {tensor.name: list(tensor.dims) for tensor in graph.initializer}
    assert weights["encoder.layer.1.intermediate.dense.weight"] == [32, 64]
    assert {f"{layer}.weight" for layer in linear} <= set(weights)
    assert not [name for name in (*names, *weights) if name.startswith(("val_", "node_", "model."))]


def test_the_graph_has_standard_operators_and_says_nothing_of_the_machine(made: Made) -> None:
    for artifacts in made.values():
        model = onnx.load(artifacts.export / "model.onnx")
        assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 20)]
        assert b"site-packages" not in (artifacts.export / "model.onnx").read_bytes()
        assert not {"GatherND", "If", "Where"} & {node.op_type for node in model.graph.node}


def test_padding_changes_nothing(made: Made) -> None:
    """RoBERTa counts positions from the padding token's id, BERT from the start."""
    for kind in ("bert", "roberta"):
        batch = read_batches(made[kind].samples)[0]
        row = int(np.argmin(batch["attention_mask"].sum(1)))
        length = int(batch["attention_mask"][row].sum())
        alone = {name: array[row : row + 1, :length] for name, array in batch.items()}
        assert length < batch["input_ids"].shape[1]
        session = session_of(made[kind])
        padded = session.run(None, dict(batch))[0][row]
        np.testing.assert_allclose(session.run(None, alone)[0][0], padded, atol=1e-5)


def test_references_are_the_original_models_outputs(made: Made) -> None:
    references = read_references(made["classifier"].export)
    seen = np.concatenate([reference["logits"] for reference in references])
    np.testing.assert_allclose(seen, transformers_logits(made["classifier"]), atol=1e-6)
    facts = json.loads((made["classifier"].export / "export.json").read_text())
    assert np.abs(outputs_of(made["classifier"]) - seen).max() < facts["max_abs_difference"] + 1e-5


def test_logits_equal_those_of_transformers_and_labels_are_kept(made: Made) -> None:
    np.testing.assert_allclose(
        outputs_of(made["classifier"]), transformers_logits(made["classifier"]), atol=1e-5
    )
    signature = read_signature(made["classifier"].export)
    assert signature.labels == LABELS
    assert [(tensor.name, tensor.shape) for tensor in signature.outputs] == [("logits", ("batch", 3))]


def test_scores_of_pairs_equal_those_of_transformers(made: Made) -> None:
    np.testing.assert_allclose(outputs_of(made["reranker"]), transformers_logits(made["reranker"]), atol=1e-5)
    signature = read_signature(made["reranker"].export)
    assert [tensor.name for tensor in signature.inputs] == ["input_ids", "attention_mask", "token_type_ids"]
    assert [(tensor.name, tensor.shape) for tensor in signature.outputs] == [("score", ("batch", 1))]


@pytest.mark.parametrize(
    ("kind", "task", "keys", "output"),
    [
        ("classifier", "classification", {}, "probabilities"),
        ("reranker", "reranking", {}, "score"),
        ("classifier", "classification", {"problem_type": "multi_label_classification"}, "probabilities"),
    ],
)
def test_probabilities_are_softmax_or_sigmoid_of_the_logits(
    made: Made, tmp_path: Path, kind: EncoderKind, task: str, keys: dict[str, Any], output: str
) -> None:
    checkpoint = tiny_encoder(tmp_path, kind, layers=1, **keys)
    batch = read_batches(made[kind].samples)[0]
    seen = original(checkpoint, task, probabilities=True).run(batch)[output]
    logits = session_of(made[kind]).run(None, dict(batch))[0]
    independent = 1 / (1 + np.exp(-logits))
    shared = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    expected = independent if keys or kind == "reranker" else shared
    np.testing.assert_allclose(seen, expected, atol=1e-5)


def test_half_precision_checkpoints_are_exported_in_float32(made: Made, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    checkpoint = tiny_encoder(tmp_path)
    tensors = load_file(checkpoint / "model.safetensors")
    halves = {name: tensor.to(torch.bfloat16) for name, tensor in tensors.items()}
    save_file(halves, checkpoint / "model.safetensors", metadata={"format": "pt"})
    output = original(checkpoint).run(read_batches(made["bert"].samples)[0])["embedding"]
    assert output.dtype == np.float32


def test_a_missing_weight_is_named(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    checkpoint = tiny_encoder(tmp_path)
    tensors = load_file(checkpoint / "model.safetensors")
    del tensors["encoder.layer.1.output.dense.bias"]
    save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SourceError, match=r"no weight encoder\.layer\.1\.output\.dense\.bias"):
        original(checkpoint)


def test_an_encoder_without_a_classifier_is_refused_for_classification(tmp_path: Path) -> None:
    with pytest.raises(
        SourceError, match=r"no weight classifier\.bias, which BertForSequenceClassification needs"
    ):
        original(tiny_encoder(tmp_path), "classification")


def test_a_module_that_is_not_known_is_refused_by_name(tmp_path: Path) -> None:
    checkpoint = tiny_encoder(tmp_path, pooling="mean_tokens")
    modules = json.loads((checkpoint / "modules.json").read_text())
    modules.append({"idx": 2, "name": "2", "path": "2_Dense", "type": "sentence_transformers.models.Dense"})
    (checkpoint / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(SourceError, match="has a module Dense, which the export does not know"):
        original(checkpoint)


@pytest.mark.parametrize(
    "settings",
    [
        {"pooling_mode_mean_sqrt_len_tokens": True},
        {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True},
        {"pooling_mode": "weightedmean"},
        {},
    ],
)
def test_a_way_of_pooling_that_is_not_known_is_refused(tmp_path: Path, settings: dict[str, Any]) -> None:
    checkpoint = tiny_encoder(tmp_path, pooling="mean_tokens")
    (checkpoint / "1_Pooling" / "config.json").write_text(json.dumps(settings))
    with pytest.raises(SourceError, match=r"config\.json pools by .*; known: one of mean"):
        original(checkpoint)


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        ("{", "not as sentence-transformers writes it"),
        ('[{"type": "a.Transformer"}]', "not as sentence-transformers writes it"),
        ('[{"type": "a.Transformer", "path": "../elsewhere"}]', "which is not a directory beside it"),
        ('[{"type": "a.Transformer", "path": ""}]', "lists Transformer; known"),
    ],
)
def test_a_damaged_list_of_modules_is_refused(tmp_path: Path, modules: str, message: str) -> None:
    checkpoint = tiny_encoder(tmp_path, pooling="mean_tokens")
    (checkpoint / "modules.json").write_text(modules)
    with pytest.raises(SourceError, match=message):
        original(checkpoint)


def test_fetching_keeps_what_makes_a_checkpoint_a_sentence_transformer(tmp_path: Path) -> None:
    source = tiny_encoder(tmp_path / "source", pooling="mean_tokens", normalize=True)
    out, scratch = tmp_path / "out", tmp_path / "scratch"
    out.mkdir()
    params = {"source": {"dtype": None}, "as_it_came": True, "location": {"path": str(source)}}
    fetch.run(Context(params, {}, out, scratch))
    for name in ("modules.json", "1_Pooling/config.json", "sentence_bert_config.json", "tokenizer.json"):
        assert (out / name).read_bytes() == (source / name).read_bytes()

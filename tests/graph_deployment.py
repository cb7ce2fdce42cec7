"""Tiny graph models, as the steps before packaging leave them: a tokenizer, samples, a signature, an engine, a verdict.

The graph is a few operators made by hand, so that nothing is trained or exported: embeddings of the tokens that the mask
keeps (and of their types, where texts come in pairs), their mean, a projection. ``tensors`` is another: x * 2 + 1.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from enginesmith.graph_params import package_params
from enginesmith.graph_spec import GraphSpec
from enginesmith.graphs.signature import AxisRange, GraphTensor, Signature

Array = npt.NDArray[Any]
WORDS = tuple("the of a to and in is river stone cloud runs falls over under bright cold seven".split())  # noqa: SIM905
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
VOCABULARY = {word: place for place, word in enumerate((*SPECIAL, *WORDS))}
LONGEST = 24
LABELS = ("calm", "cross", "very curious")
OUTPUTS = {"embedding": ("embedding", 6), "classification": ("logits", 3), "reranking": ("score", 1)}
TEXTS = tuple(" ".join(WORDS[(start + step * 3) % len(WORDS)] for step in range(length))
              for start, length in enumerate((1, 2, 3, 5, 8, 12, 15, 4)))  # fmt: skip


@dataclass
class Context:
    """A step's context without a build."""

    root: Path
    params: Mapping[str, Any]
    inputs: Mapping[str, Path]
    reports: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        for directory in (self.out, self.scratch):
            directory.mkdir(parents=True)

    @property
    def out(self) -> Path:
        return self.root / "out"

    @property
    def scratch(self) -> Path:
        return self.root / "scratch"

    def progress(self, fraction: float | None, note: str = "") -> None:
        self.reports.append(note)


def spec(task: str = "embedding", *, scheme: str = "none", **parts: Any) -> GraphSpec:
    """A spec named ``tiny`` with the variant ``v``; ``parts`` replace its sections."""
    document: dict[str, Any] = {
        "name": "tiny",
        "task": task,
        "source": {"onnx": "x.onnx"} if task == "tensors" else {"path": "checkpoint"},
        "variants": {"v": {"scheme": scheme}},
        "serving": {"max_batch_size": 4, "max_sequence_length": LONGEST},
    }
    return GraphSpec.model_validate(document | parts)


def params(
    task: str = "embedding",
    *,
    target: Mapping[str, Any] | None = None,
    scheme: str = "none",
    **serving: Any,
) -> dict[str, Any]:
    """What the plan gives the steps of one target, which is Python on a CPU unless ``target`` says otherwise."""
    limits = {"max_batch_size": 4, "max_sequence_length": LONGEST, **serving}
    made = spec(task, scheme=scheme, serving=limits, targets=[target or {"runtime": "onnxruntime"}])
    return {**package_params(made, "v", made.targets[0]), "server": "auto"}


def write_inputs(root: Path, task: str = "embedding", *, seed: int = 0) -> dict[str, Path]:
    """``root``/{checkpoint,samples,signature,engine,verdict}; another ``seed`` is a model with other weights."""
    inputs = {name: root / name for name in ("checkpoint", "samples", "signature", "engine", "verdict")}
    for directory in inputs.values():
        directory.mkdir(parents=True)
    signature = signature_of(task)
    signature.write(inputs["signature"])
    signature.write(inputs["engine"])
    onnx.save(_scaled() if task == "tensors" else _encoder(signature, seed), inputs["engine"] / "model.onnx")
    (inputs["engine"] / "engine.json").write_text(json.dumps({"provider": "cpu", "session": {}}))
    (inputs["verdict"] / "verdict.json").write_text(json.dumps({"passed": True, "checks": []}))
    (inputs["samples"] / "batches").mkdir()
    if task == "tensors":
        _write_numbers(inputs["samples"], seed)
    else:
        tokenizer().save(str(inputs["checkpoint"] / "tokenizer.json"))
        _write_texts(inputs["samples"], signature)
    return inputs


def signature_of(task: str) -> Signature:
    """What goes in and comes out."""
    if task == "tensors":
        shape = ("batch", 2, "width")
        tensors = [GraphTensor(name, "float32", shape) for name in ("pixels", "doubled")]
        return Signature(task, (tensors[0],), (tensors[1],), {"width": AxisRange(1, 4, 8)})
    names = ["input_ids", "attention_mask"] + ["token_type_ids"] * (task == "reranking")
    output, width = OUTPUTS[task]
    return Signature(
        task,
        tuple(GraphTensor(name, "int64", ("batch", "sequence")) for name in names),
        (GraphTensor(output, "float32", ("batch", width)),),
        {"sequence": AxisRange(1, 8, LONGEST)},
        labels=LABELS if task == "classification" else (),
    )


def tokenizer() -> Tokenizer:
    """One token a word, [CLS] and [SEP] around texts; it also pads and cuts, as files of checkpoints may."""
    made = Tokenizer(models.WordLevel(VOCABULARY, unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer()
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(token, VOCABULARY[token]) for token in ("[CLS]", "[SEP]")],
    )
    made.enable_truncation(7)
    made.enable_padding(length=7)
    return made


def pairs() -> list[tuple[str, str]]:
    """Pairs of texts of different lengths."""
    return [(text, TEXTS[place - 1][:20]) for place, text in enumerate(TEXTS)]


def _write_texts(samples: Path, signature: Signature) -> None:
    reader = tokenizer()
    reader.no_padding()
    reader.enable_truncation(LONGEST)
    is_pairs = signature.task == "reranking"
    given: Sequence[Any] = pairs() if is_pairs else TEXTS
    for batch in range(2):
        encodings = reader.encode_batch(list(given[4 * batch : 4 * batch + 4]))
        longest = max(len(one.ids) for one in encodings)
        arrays = {tensor.name: np.zeros((4, longest), np.int64) for tensor in signature.inputs}
        for row, one in enumerate(encodings):
            values = {
                "input_ids": one.ids,
                "attention_mask": one.attention_mask,
                "token_type_ids": one.type_ids,
            }
            for name, array in arrays.items():
                array[row, : len(one.ids)] = values[name]
        np.savez(samples / "batches" / f"{batch:03}.npz", **arrays)  # type: ignore[arg-type]
    document = {"pairs": given} if is_pairs else {"texts": given}
    (samples / "texts.json").write_text(json.dumps(document))


def _write_numbers(samples: Path, seed: int) -> None:
    random = np.random.default_rng(seed)
    for batch, width in enumerate((3, 5)):
        np.savez(samples / "batches" / f"{batch:03}.npz", pixels=random.random((4, 2, width), np.float32))


def _encoder(signature: Signature, seed: int) -> onnx.ModelProto:
    random = np.random.default_rng(seed)
    output = signature.outputs[0]
    constants: dict[str, Array] = {
        "table": random.normal(size=(len(VOCABULARY), 8)).astype(np.float32),
        "types": random.normal(size=(2, 8)).astype(np.float32),
        "weight": random.normal(size=(8, int(output.shape[1]))).astype(np.float32),
        "last": np.array([2]),
        "second": np.array([1]),
    }
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["words"]),
        helper.make_node("Cast", ["attention_mask"], ["mask_2d"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["mask_2d", "last"], ["mask"]),
    ]
    tokens = "words"
    if signature.task == "reranking":
        nodes.append(helper.make_node("Gather", ["types", "token_type_ids"], ["kinds"]))
        nodes.append(helper.make_node("Add", ["words", "kinds"], ["tokens"]))
        tokens = "tokens"
    nodes += [
        helper.make_node("Mul", [tokens, "mask"], ["kept"]),
        helper.make_node("ReduceSum", ["kept", "second"], ["sum"], keepdims=0),
        helper.make_node("ReduceSum", ["mask", "second"], ["count"], keepdims=0),
        helper.make_node("Div", ["sum", "count"], ["mean"]),
        helper.make_node("MatMul", ["mean", "weight"], [output.name]),
    ]
    return _model(nodes, signature, constants)


def _scaled() -> onnx.ModelProto:
    constants: dict[str, Array] = {"two": np.float32(2).reshape(1), "one": np.float32(1).reshape(1)}
    nodes = [
        helper.make_node("Mul", ["pixels", "two"], ["twice"]),
        helper.make_node("Add", ["twice", "one"], ["doubled"]),
    ]
    return _model(nodes, signature_of("tensors"), constants)


def _model(nodes: Sequence[Any], signature: Signature, constants: Mapping[str, Array]) -> onnx.ModelProto:
    used = {name for node in nodes for name in node.input}
    kinds = {"int64": TensorProto.INT64, "float32": TensorProto.FLOAT}
    inputs, outputs = (
        [helper.make_tensor_value_info(one.name, kinds[one.dtype], one.shape) for one in tensors]
        for tensors in (signature.inputs, signature.outputs)
    )
    initializers = [numpy_helper.from_array(value, name) for name, value in constants.items() if name in used]
    graph = helper.make_graph(list(nodes), "tiny", inputs, outputs, initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])
    model.ir_version = 10
    onnx.checker.check_model(model)
    return model

"""Tiny random encoders as Hugging Face checkpoints, and the artifacts that the first steps of a build make of them.

Weights are drawn wide, so that a swapped, transposed or unscaled tensor changes the outputs; biases are not zero, so
that no two of them are equal and one constant in the graph.
"""

from __future__ import annotations

import json
import pydoc_data.topics
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

EncoderKind = Literal["bert", "roberta", "classifier", "reranker", "roberta_reranker"]

VOCAB_SIZE = 400
LABELS = ("calm", "cross", "curious")
BERT_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
ROBERTA_TOKENS = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")
_ARCHITECTURES: Mapping[EncoderKind, str] = {
    "bert": "BertModel",
    "roberta": "RobertaModel",
    "classifier": "BertForSequenceClassification",
    "reranker": "BertForSequenceClassification",
    "roberta_reranker": "RobertaForSequenceClassification",
}
_TASKS: Mapping[EncoderKind, str] = {
    "bert": "embedding",
    "roberta": "embedding",
    "classifier": "classification",
    "reranker": "reranking",
    "roberta_reranker": "reranking",
}


@dataclass
class Context:
    """A ``StepContext`` for calling a step function in the test's own process."""

    params: Mapping[str, Any]
    inputs: Mapping[str, Path]
    out: Path
    scratch: Path = field(default_factory=Path)
    reports: list[tuple[float | None, str]] = field(default_factory=list)

    def progress(self, fraction: float | None, note: str = "") -> None:
        self.reports.append((fraction, note))


@dataclass(frozen=True)
class TinyArtifacts:
    """The artifact directories of the first steps."""

    checkpoint: Path
    samples: Path
    export: Path


def tiny_encoder(
    directory: Path,
    kind: EncoderKind = "bert",
    *,
    hidden: int = 32,
    layers: int = 2,
    positions: int = 66,
    seed: int = 0,
    pooling: str | None = None,
    normalize: bool = False,
    **config_keys: Any,
) -> Path:
    """``directory``, filled with a random checkpoint. The same arguments give the same bytes.

    ``pooling`` (``mean_tokens``, ``cls_token``, ...) also writes the files of a sentence-transformers model, with a
    Normalize module if ``normalize``. ``config_keys`` replace keys of the config, e.g. ``num_labels``.
    """
    import torch
    import transformers

    architecture = _ARCHITECTURES[kind]
    is_roberta = architecture.startswith("Roberta")
    labels = {"classifier": LABELS, "reranker": ("score",), "roberta_reranker": ("score",)}.get(kind)
    keys: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "intermediate_size": 2 * hidden,
        "max_position_embeddings": positions,
        "type_vocab_size": 1 if is_roberta else 2,
        "pad_token_id": 1 if is_roberta else 0,
        **({"id2label": dict(enumerate(labels))} if labels else {}),
        **config_keys,
    }
    config = getattr(transformers, "RobertaConfig" if is_roberta else "BertConfig")(**keys)
    model = getattr(transformers, architecture)(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.1 * noise if "LayerNorm.weight" in name else 0.15 * noise)
    model.save_pretrained(directory)
    write_tokenizer(directory, roberta=is_roberta)
    if pooling is not None:
        _write_sentence_transformer(directory, pooling, normalize=normalize, width=hidden)
    return directory


def write_tokenizer(directory: Path, *, roberta: bool = False) -> None:
    """Write the files of a WordPiece tokenizer with 400 tokens: BERT's special tokens and pairs, or RoBERTa's."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    pad, unk, begin, end = ("<pad>", "<unk>", "<s>", "</s>") if roberta else BERT_TOKENS[:4]
    names = [] if roberta else ["input_ids", "token_type_ids", "attention_mask"]
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_tokenizer_json(roberta)),
        pad_token=pad,
        unk_token=unk,
        cls_token=begin,
        sep_token=end,
        model_input_names=names or ["input_ids", "attention_mask"],
    ).save_pretrained(directory)


def sample_params(task: str, **changes: Any) -> dict[str, Any]:
    """Parameters of the ``sample`` step for a task that reads text, as the plan gives them."""
    return {
        "task": task,
        "corpus": {"builtin": "english", "sha256": "of the corpus"},
        "samples": 12,
        "length": 24,
        "batch_size": 4,
        "seed": 0,
        "location": {"corpus_path": None, "file": None},
    } | changes


def export_params(task: str, **changes: Any) -> dict[str, Any]:
    """Parameters of the ``export`` step for a checkpoint, as the plan gives them."""
    return {
        "task": task,
        "pooling": None,
        "normalize": None,
        "probabilities": False,
        "max_sequence_length": 64,
        "location": {},
    } | changes


def tiny_artifacts(root: Path, kind: EncoderKind = "bert", **checkpoint_keys: Any) -> TinyArtifacts:
    """``root``/{checkpoint,samples,export}: what the steps ``fetch``, ``sample`` and ``export`` make of a tiny encoder.

    12 samples of 4 to 24 tokens in 3 batches of 4.
    """
    from enginesmith.graphs import export, samples

    task = _TASKS[kind]
    made = TinyArtifacts(root / "checkpoint", root / "samples", root / "export")
    tiny_encoder(made.checkpoint, kind, **checkpoint_keys)
    made.samples.mkdir()
    samples.run(Context(sample_params(task), {"checkpoint": made.checkpoint}, made.samples))
    made.export.mkdir()
    (root / "scratch").mkdir()
    inputs = {"checkpoint": made.checkpoint, "samples": made.samples}
    export.run(Context(export_params(task), inputs, made.export, root / "scratch"))
    return made


def _write_sentence_transformer(directory: Path, pooling: str, *, normalize: bool, width: int) -> None:
    modules = [("", "Transformer"), ("1_Pooling", "Pooling")]
    modules += [("2_Normalize", "Normalize")] if normalize else []
    entries = [
        {
            "idx": index,
            "name": str(index),
            "path": path,
            "type": f"sentence_transformers.models.{kind}",
        }
        for index, (path, kind) in enumerate(modules)
    ]
    (directory / "modules.json").write_text(json.dumps(entries))
    modes = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens", "lasttoken")
    settings: dict[str, Any] = {f"pooling_mode_{mode}": mode == pooling for mode in modes}
    (directory / "1_Pooling").mkdir()
    (directory / "1_Pooling" / "config.json").write_text(
        json.dumps({"word_embedding_dimension": width, **settings})
    )
    (directory / "sentence_bert_config.json").write_text(
        json.dumps({"max_seq_length": 48, "do_lower_case": False})
    )


@cache
def _tokenizer_json(roberta: bool) -> str:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

    special = ROBERTA_TOKENS if roberta else BERT_TOKENS
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>" if roberta else "[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(
        vocab_size=VOCAB_SIZE, special_tokens=list(special), show_progress=False
    )
    tokenizer.train_from_iterator(pydoc_data.topics.topics.values(), trainer)
    begin, end = ("<s>", "</s>") if roberta else ("[CLS]", "[SEP]")
    between = f"{end} {end}" if roberta else end
    second = 0 if roberta else 1
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A {end}",
        pair=f"{begin} $A {between} $B:{second} {end}:{second}",
        special_tokens=[(token, special.index(token)) for token in (begin, end)],
    )
    assert tokenizer.get_vocab_size() == VOCAB_SIZE
    return tokenizer.to_str()

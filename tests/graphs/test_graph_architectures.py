"""Which checkpoint does which task, and how long its texts may be, judged from ``config.json`` alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from encoder_factory import EncoderKind, tiny_encoder

from enginesmith.errors import SpecError
from enginesmith.graph_legality import check_graph_legal
from enginesmith.graph_spec import GraphSpec

BERT: dict[str, Any] = {"architectures": ["BertModel"], "model_type": "bert", "max_position_embeddings": 512}
CLASSIFIER = BERT | {"architectures": ["BertForSequenceClassification"]}
ROBERTA = BERT | {"architectures": ["RobertaModel"], "model_type": "roberta", "pad_token_id": 1}


def spec(task: str, length: int = 64) -> GraphSpec:
    return GraphSpec.model_validate(
        {
            "name": "tiny",
            "task": task,
            "source": {"path": "checkpoint"},
            "variants": {"fp32": {"scheme": "none"}},
            "serving": {"max_sequence_length": length},
        }
    )


@pytest.mark.parametrize(
    ("kind", "task"),
    [
        ("bert", "embedding"),
        ("roberta", "embedding"),
        ("classifier", "classification"),
        ("reranker", "reranking"),
        ("roberta_reranker", "reranking"),
    ],
)
def test_an_encoder_made_for_the_task_is_accepted(tmp_path: Path, kind: EncoderKind, task: str) -> None:
    checkpoint = tiny_encoder(tmp_path, kind)
    check_graph_legal(spec(task), json.loads((checkpoint / "config.json").read_text()))


def test_an_encoder_with_the_head_it_was_trained_with_gives_embeddings() -> None:
    check_graph_legal(spec("embedding"), BERT | {"architectures": ["BertForMaskedLM"]})


@pytest.mark.parametrize(
    ("task", "config", "message"),
    [
        (
            "embedding",
            {"architectures": ["LlamaForCausalLM"], "model_type": "llama"},
            r"takes a checkpoint of architecture \*Model or \*ForMaskedLM, seen: LlamaForCausalLM",
        ),
        (
            "embedding",
            {"architectures": ["LlamaModel"], "model_type": "llama"},
            "takes an encoder, seen: LlamaModel of model_type llama; known: albert, bert",
        ),
        ("embedding", BERT | {"is_decoder": True}, "with is_decoder: true"),
        ("embedding", CLASSIFIER, "seen: BertForSequenceClassification"),
        ("embedding", {"model_type": "bert"}, "seen: None"),
        (
            "classification",
            BERT,
            r"takes a checkpoint of architecture \*ForSequenceClassification, seen: BertModel",
        ),
        (
            "reranking",
            CLASSIFIER | {"id2label": {"0": "a", "1": "b", "2": "c"}},
            "one label, its score; .* has 3",
        ),
        ("reranking", CLASSIFIER, "has 2"),
    ],
)
def test_a_checkpoint_that_does_not_do_the_task_is_refused(
    task: str, config: dict[str, Any], message: str
) -> None:
    with pytest.raises(SpecError, match=message):
        check_graph_legal(spec(task), config)


@pytest.mark.parametrize(
    ("config", "longest"), [(BERT, 512), (ROBERTA | {"max_position_embeddings": 514}, 512)]
)
def test_texts_may_be_as_long_as_the_model_has_positions(config: dict[str, Any], longest: int) -> None:
    check_graph_legal(spec("embedding", longest), config)
    with pytest.raises(SpecError, match=f"knows only {longest} positions"):
        check_graph_legal(spec("embedding", longest + 1), config)

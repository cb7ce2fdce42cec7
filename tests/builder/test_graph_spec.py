"""Specs of graph models: what is accepted, and one clear message for each thing that is not."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from enginesmith.errors import SpecError
from enginesmith.graph_spec import GraphSpec
from enginesmith.spec import ModelSpec
from enginesmith.spec_file import load_spec, parse_spec

ROOT = Path(__file__).parents[2]
ENCODER: Mapping[str, Any] = {
    "name": "tiny",
    "task": "embedding",
    "source": {"path": "checkpoint"},
    "variants": {"fp32": {"scheme": "none"}, "int8": {"scheme": "int8"}},
}
MODULE: Mapping[str, Any] = {
    "name": "tiny",
    "task": "tensors",
    "source": {"module": "net.py:make"},
    "inputs": [{"name": "image", "shape": ["batch", 3, "height", 8]}],
    "outputs": ["scores"],
    "axes": {"height": {"max": 32}},
    "variants": {"fp32": {"scheme": "none"}},
}


def parsed(document: Mapping[str, Any]) -> GraphSpec:
    spec = parse_spec(yaml.safe_dump(dict(document)), origin="test", base_dir=Path())
    assert isinstance(spec, GraphSpec)
    return spec


def test_the_task_tells_the_kinds_of_specs_apart() -> None:
    assert isinstance(load_spec(ROOT / "models" / "smollm2-135m.yaml"), ModelSpec)
    assert isinstance(load_spec(ROOT / "models" / "minilm-l6.yaml"), GraphSpec)
    with pytest.raises(SpecError, match="unknown task 'embeding'; allowed: text-generation, embedding"):
        parsed({**ENCODER, "task": "embeding"})


def test_only_text_tasks_of_checkpoints_have_a_model_that_takes_text() -> None:
    assert parsed(ENCODER).with_text_ensemble
    assert not parsed({**ENCODER, "serving": {"text": False}}).with_text_ensemble
    assert not parsed(MODULE).with_text_ensemble


WRONG: dict[str, tuple[Mapping[str, Any], str]] = {
    "two sources": (
        {**ENCODER, "source": {"path": "a", "onnx": "b"}},
        "give exactly one of path, hub, wheel, module and onnx; seen: path, onnx",
    ),
    "no source": ({**ENCODER, "source": {}}, "module and onnx; seen: none"),
    "a module for an encoder's task": (
        {**ENCODER, "source": {"module": "net.py:make"}},
        "task tensors takes a module or an ONNX file",
    ),
    "a checkpoint for the task tensors": (
        {**MODULE, "source": {"path": "checkpoint"}},
        "embedding, classification and reranking take a checkpoint",
    ),
    "a module that is no path and name": (
        {**MODULE, "source": {"module": "net:make"}},
        "source.module: String should match pattern",
    ),
    "a module without outputs": ({**MODULE, "outputs": []}, "a module needs inputs and outputs"),
    "files beside a checkpoint": (
        {**ENCODER, "source": {"path": "a", "files": ["b"]}},
        "files names what a module reads",
    ),
    "inputs of a checkpoint": ({**ENCODER, "inputs": MODULE["inputs"]}, "checkpoints know theirs"),
    "an input without a batch": (
        {**MODULE, "inputs": [{"name": "image", "shape": [3, "height"]}]},
        "input image: the first axis must be 'batch', seen: 3",
    ),
    "an axis that PyTorch cannot name": (
        {
            **MODULE,
            "inputs": [{"name": "image", "shape": ["batch", "the-height"]}],
            "axes": {"the-height": {"max": 8}},
        },
        "axes: 'the-height' is not a name for PyTorch",
    ),
    "an axis of no length": (
        {**MODULE, "inputs": [{"name": "image", "shape": ["batch", 0]}], "axes": {}},
        "input image: a length must be at least 1, seen: 0",
    ),
    "an axis that is not described": (
        {**MODULE, "axes": {}},
        "lengths of the dynamic axis 'height' are missing",
    ),
    "an axis that nothing has": (
        {**MODULE, "axes": {"height": {"max": 8}, "width": {"max": 8}}},
        "no input has an axis 'width'",
    ),
    "an axis the wrong way round": (
        {**MODULE, "axes": {"height": {"min": 9, "max": 8}}},
        "min 9, opt 8 and max 8 must not decrease",
    ),
    "one name for two tensors": ({**MODULE, "outputs": ["image"]}, "the name 'image' is used for two"),
    "random values the wrong way round": (
        {**MODULE, "inputs": [{"name": "image", "shape": ["batch"], "low": 2}], "axes": {}},
        "high 1.0 is below low 2.0",
    ),
    "texts for tensors": (
        {**MODULE, "calibration": {"corpus": {"builtin": "english"}}},
        "task tensors reads no text",
    ),
    "arrays for texts": ({**ENCODER, "calibration": {"file": "a.npz"}}, "give its samples as corpus"),
    "texts and arrays": (
        {**MODULE, "verify": {"samples": {"file": "a.npz", "corpus": {"builtin": "english"}}}},
        "give corpus or file, not both",
    ),
    "a scheme of text generation": (
        {**ENCODER, "variants": {"some": {"scheme": "int4_awq"}}},
        "Input should be 'none', 'fp16', 'bf16', 'int8' or 'fp8'",
    ),
    "exclusions found for what has none": (
        {**ENCODER, "variants": {"some": {"scheme": "fp16", "exclude": "auto"}}},
        "exclude: auto has no meaning for scheme fp16",
    ),
    "exclusions of what is not quantized": (
        {**ENCODER, "variants": {"some": {"scheme": "none", "exclude": ["encoder.*"]}}},
        "exclude has no meaning for scheme none",
    ),
    "pooling of what is no embedding": (
        {**ENCODER, "task": "classification", "pooling": "cls"},
        "pooling and normalize are for task embedding, not for classification",
    ),
    "probabilities of what has no classes": (
        {**ENCODER, "probabilities": True},
        "probabilities is for the tasks classification and reranking, not for embedding",
    ),
    "a limit of classes for an embedding": (
        {**ENCODER, "verify": {"quality": {"min_top1_agreement": 0.9}}},
        "min_top1_agreement is measured for task classification, not for embedding",
    ),
    "a variant's limit of scores for classes": (
        {
            **ENCODER,
            "task": "classification",
            "variants": {"some": {"scheme": "int8", "quality": {"min_rank_correlation": 0.9}}},
        },
        "min_rank_correlation is measured for task reranking, not for classification",
    ),
    "a preferred batch that cannot be": (
        {**ENCODER, "serving": {"dynamic_batching": {"preferred_batch_sizes": [2, 64]}}},
        "preferred_batch_sizes has 64; allowed: 1 to max_batch_size 32",
    ),
    "padding that does not grow": (
        {**ENCODER, "serving": {"pad_to": [64, 32, 256]}},
        "must be increasing lengths",
    ),
    "padding that ends early": (
        {**ENCODER, "serving": {"pad_to": [64, 128]}},
        "pad_to must end with max_sequence_length 256, seen: 128",
    ),
    "options of a provider that has none": (
        {**ENCODER, "targets": [{"runtime": "onnxruntime", "provider_options": {"a": "b"}}]},
        "cpu has none",
    ),
    "a runtime of text generation": (
        {**ENCODER, "targets": [{"runtime": "tensorrt_llm"}]},
        "unknown runtime 'tensorrt_llm'; allowed: onnxruntime, tensorrt, tensorrt_rtx",
    ),
    "Hopper for RTX": (
        {**ENCODER, "targets": [{"runtime": "tensorrt_rtx", "compute_capabilities": ["9.0"]}]},
        "Input should be '7.5', '8.0', '8.6', '8.9', '12.0' or '12.1'",
    ),
    "a misspelt key of a variant": (
        {**ENCODER, "variants": {"some": {"scheme": "int8", "smothing": 0.5}}},
        "unknown key; did you mean 'smoothing'",
    ),
    "a key of text generation": (
        {**ENCODER, "serving": {"default_max_tokens": 8}},
        "serving.default_max_tokens: unknown key",
    ),
    "a name that Triton cannot have": (
        {**ENCODER, "variants": {"Some": {"scheme": "int8"}}},
        "variant name 'Some' must match",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_spec_is_one_clear_error(wrong: str) -> None:
    document, message = WRONG[wrong]
    with pytest.raises(SpecError) as caught:
        parsed(document)
    assert message in str(caught.value)

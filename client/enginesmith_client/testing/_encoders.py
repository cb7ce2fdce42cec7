"""Scripted text encoders: what embeds, classifies and ranks, with the tensors of those that enginesmith serves. Pure."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import numpy as np

from enginesmith_client._codec import Array
from enginesmith_client._messages import ModelMetadata
from enginesmith_client.testing._models import Answers, Arrays, once, tensor

Embed: TypeAlias = Callable[[str], Sequence[float]]
Classify: TypeAlias = Callable[[str], Mapping[str, float]]
Score: TypeAlias = Callable[[str, str], float]


def embedder_interface(name: str, *, width: int, max_batch_size: int) -> ModelMetadata:
    """Texts in, one vector for each out."""
    return _interface(name, ("TEXT",), ("embedding", width), max_batch_size)


def classifier_interface(name: str, *, classes: int, max_batch_size: int) -> ModelMetadata:
    """Texts in, the probability of each class out."""
    return _interface(name, ("TEXT",), ("probabilities", classes), max_batch_size)


def reranker_interface(name: str, *, max_batch_size: int) -> ModelMetadata:
    """Pairs of texts in, a score for each out."""
    return _interface(name, ("TEXT", "TEXT_PAIR"), ("score", 1), max_batch_size)


def embedder_answers(embed: Embed) -> Answers:
    """The model that gives each text its vector."""
    return once(lambda inputs: {"embedding": _float_rows([embed(text) for text in _column(inputs, "TEXT")])})


def classifier_answers(labels: Sequence[str], classify: Classify) -> Answers:
    """The model that gives each text a probability for each label; a label that is left out has none."""

    def answer(inputs: Arrays) -> Arrays:
        scores = [classify(text) for text in _column(inputs, "TEXT")]
        unknown = sorted({label for one in scores for label in one} - set(labels))
        if unknown:
            raise AssertionError(f"the script answers with classes that the model has not: {unknown}")
        return {"probabilities": _float_rows([[one.get(label, 0.0) for label in labels] for one in scores])}

    return once(answer)


def reranker_answers(score: Score) -> Answers:
    """The model that gives each pair its score."""

    def answer(inputs: Arrays) -> Arrays:
        pairs = zip(_column(inputs, "TEXT"), _column(inputs, "TEXT_PAIR"), strict=True)
        return {"score": _float_rows([[score(query, document)] for query, document in pairs])}

    return once(answer)


def hashed_vector(text: str, width: int) -> Array:
    """A vector of length 1 that depends on nothing but the text; equal texts have equal vectors, others hardly ever."""
    seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")
    vector = np.random.default_rng(seed).standard_normal(width)
    return np.asarray(vector / np.linalg.norm(vector), np.float32)


def _interface(
    name: str, inputs: Sequence[str], output: tuple[str, int], max_batch_size: int
) -> ModelMetadata:
    return ModelMetadata(
        name,
        ("1",),
        "ensemble",
        tuple(tensor(one, "BYTES", -1, 1) for one in inputs),
        (tensor(output[0], "FP32", -1, output[1]),),
        max_batch_size,
        decoupled=False,
    )


def _column(inputs: Arrays, name: str) -> list[str]:
    return [text.decode() for text in inputs[name][:, 0]]


def _float_rows(rows: Sequence[Sequence[float]]) -> Array:
    return np.array([list(row) for row in rows], np.float32)

"""Texts as tensors: embedding, classification and reranking. Pure.

A model takes part by having the BYTES input ``TEXT`` with one text per row (for pairs also ``TEXT_PAIR``) and an output
that one of the tasks below names. Scores of classes travel as Triton's classification extension writes them, with the
names of the classes, six decimals each:
https://github.com/triton-inference-server/server/blob/main/docs/protocol/extension_classification.md
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from enginesmith_client._codec import Array, text_bytes
from enginesmith_client._errors import InvalidInput, ServerError
from enginesmith_client._messages import (
    Classification,
    InferResult,
    ModelMetadata,
    RankedDocument,
    TensorMetadata,
)

TEXT = "TEXT"
TEXT_PAIR = "TEXT_PAIR"
TEXT_MODEL_SUFFIX = "-text"
"""``<model>-text`` takes texts for ``<model>``, which takes tokens."""


@dataclass(frozen=True)
class TextTask:
    """What a method of the client is about."""

    method: str
    outputs: tuple[str, ...]
    """The outputs that can carry it."""


EMBEDDING = TextTask("embed", ("embedding",))
CLASSES = TextTask("classify", ("logits", "probabilities"))
SCORE = TextTask("rerank", ("score",))
_TASKS = (EMBEDDING, CLASSES, SCORE)


def check_texts(texts: Sequence[str], *, what: str) -> None:
    """Return if ``texts`` are some texts.

    Raises:
        InvalidInput: there is none, or one is no str or no Unicode.
    """
    if isinstance(texts, (str, bytes)) or not isinstance(texts, Sequence):
        raise InvalidInput(
            f"{what} must be a list of str; seen: {type(texts).__name__}", hint="one text: [text]"
        )
    if not texts:
        raise InvalidInput(f"{what} is empty; give at least one text")
    for index, text in enumerate(texts):
        where = what if what == "query" else f"{what}[{index}]"
        if not isinstance(text, str):
            raise InvalidInput(f"{where} must be a str; seen: {type(text).__name__}")
        text_bytes(text, what=where)


def takes_no_text(metadata: ModelMetadata, beside: str) -> InvalidInput:
    """The error for a model that takes no texts, where ``beside`` is not served either."""
    inputs = ", ".join(
        f"{tensor.name} ({tensor.datatype} {list(tensor.shape)})" for tensor in metadata.inputs
    )
    return InvalidInput(
        f"model {metadata.name!r} takes no text: it takes {inputs}; and {beside!r}, which could, is not served",
        hint="load that model, or send the model what it takes with infer",
    )


def output_for(
    metadata: ModelMetadata, task: TextTask, columns: Mapping[str, Sequence[str]]
) -> TensorMetadata:
    """The output of the model that carries the task.

    Raises:
        InvalidInput: the model is one for another task.
    """
    names = [tensor.name for tensor in metadata.outputs]
    output = next((tensor for tensor in metadata.outputs if tensor.name in task.outputs), None)
    if output is None:
        others = [f"client.{other.method}" for other in _TASKS if set(other.outputs) & set(names)]
        raise InvalidInput(
            f"model {metadata.name!r} cannot {task.method}: it must have an output {' or '.join(task.outputs)}; it has: {', '.join(names)}",
            hint=f"use {(others or ['client.infer'])[0]}",
        )
    takes_pairs = metadata.input(TEXT_PAIR) is not None
    if takes_pairs != (TEXT_PAIR in columns):
        what = "pairs of texts" if takes_pairs else "single texts, not pairs"
        raise InvalidInput(
            f"model {metadata.name!r} takes {what} and cannot {task.method}", hint="use client.infer"
        )
    return output


def batches_of(columns: Mapping[str, Sequence[str]], *, size: int) -> Iterator[dict[str, Sequence[str]]]:
    """The rows in order, at most ``size`` at a time."""
    for start in range(0, len(next(iter(columns.values()))), size):
        yield {name: texts[start : start + size] for name, texts in columns.items()}


def inputs_from_texts(metadata: ModelMetadata, columns: Mapping[str, Sequence[str]]) -> dict[str, Array]:
    """The input arrays for a batch: BYTES [rows, 1], or [1] for a model without batches."""
    return {name: _text_array(texts, batched=metadata.max_batch_size > 0) for name, texts in columns.items()}


def check_rows(result: InferResult, output: TensorMetadata, *, texts: int, batched: bool) -> None:
    """Return if the output has a row for each text.

    Raises:
        ServerError: it has not, so no row could be given to its text.
    """
    array = result.outputs.get(output.name)
    if array is None or (batched and array.shape[:1] != (texts,)):
        seen = "is missing" if array is None else f"has the shape {list(array.shape)}"
        raise ServerError(
            f"model {result.model!r} was asked for {texts} texts, and its output {output.name!r} {seen}"
        )


def embeddings_from_results(batches: Sequence[tuple[str, InferResult]]) -> Array:
    """float32 [texts, width]."""
    return np.concatenate([_rows(name, result) for name, result in batches]).astype(np.float32, copy=False)


def classifications_from_results(batches: Sequence[tuple[str, InferResult]]) -> list[Classification]:
    """One per text: probabilities as the model gives them, or made of its logits."""
    return [
        _classification(row, name, result.model) for name, result in batches for row in _rows(name, result)
    ]


def ranking_from_results(
    batches: Sequence[tuple[str, InferResult]], documents: Sequence[str]
) -> list[RankedDocument]:
    """The documents, best first; of equal ones the earlier first."""
    scores = np.concatenate([_rows(name, result) for name, result in batches]).reshape(-1)
    if len(scores) != len(documents) or not np.isfinite(scores).all():
        raise ServerError(
            f"model {batches[0][1].model!r} gave {len(scores)} scores for {len(documents)} documents, or some that are no numbers"
        )
    order = np.argsort(-scores, kind="stable")
    return [RankedDocument(int(index), float(scores[index]), documents[index]) for index in order]


def _text_array(texts: Sequence[str], *, batched: bool) -> Array:
    array = np.empty(len(texts), np.object_)
    array[:] = [text.encode() for text in texts]
    return array.reshape(-1, 1) if batched else array


def _rows(name: str, result: InferResult) -> Array:
    """[rows, values] of an output."""
    array = result.outputs[name]
    return array if array.ndim > 1 else array.reshape(1, -1)


def _classification(row: Array, output: str, model: str) -> Classification:
    """``row`` holds ``score:index`` or ``score:index:label`` of every class, highest first."""
    labels: list[str] = []
    values: list[float] = []
    for element in row:
        score, _, rest = element.decode("utf-8", "replace").partition(":")
        index, _, label = rest.partition(":")
        try:
            values.append(float(score))
        except ValueError as error:
            raise ServerError(f"the classes of model {model!r} cannot be read; seen: {element!r}") from error
        # Nothing forbids a model two classes of one name; neither may hide the other.
        labels.append(f"{label} ({index})" if label in labels else label or index)
    probabilities = np.array(values) if output == "probabilities" else _probabilities(np.array(values))
    if not np.isfinite(probabilities).all():
        raise ServerError(f"model {model!r} gave scores that are no numbers: {values}")
    scores = dict(zip(labels, probabilities.tolist(), strict=True))
    return Classification(labels[0], scores[labels[0]], scores)


def _probabilities(logits: Array) -> Array:
    """Softmax; of a single class its sigmoid."""
    if logits.size == 1:
        logits = np.append(logits, 0.0)
        return _probabilities(logits)[:1]
    with np.errstate(invalid="ignore"):  # The caller refuses what is not finite.
        exponentials = np.exp(logits - logits.max())
        probabilities: Array = exponentials / exponentials.sum()
    return probabilities

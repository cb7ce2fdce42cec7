"""Requests of a model that takes texts and gives vectors, classes or scores: batches of made texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from enginesmith_client._messages import ModelMetadata, TensorMetadata
from enginesmith_client._texts import CLASSES, EMBEDDING, SCORE, TEXT, TEXT_PAIR, inputs_from_texts
from enginesmith_client.perf._errors import ProfileError
from enginesmith_client.perf.load._prepared import TokenCounts
from enginesmith_client.perf.workload._lengths import sample
from enginesmith_client.perf.workload._payload import Arrays, RefusedError, Subject, Workload
from enginesmith_client.perf.workload._prompts import ASSUMED, made_prompts
from enginesmith_client.perf.workload._prompts_file import read_prompts


def text_inputs(metadata: ModelMetadata) -> tuple[str, ...]:
    """The inputs that each take one text a row, if that is all that the model must be given; else none."""
    required = [tensor for tensor in metadata.inputs if not tensor.optional]
    known = [tensor for tensor in metadata.inputs if tensor.name == TEXT and not required]
    texts = required or known
    alone = len(texts) == 1 or {tensor.name for tensor in texts} == {TEXT, TEXT_PAIR}
    fits = alone and all(_holds_a_text(tensor, batched=metadata.max_batch_size > 0) for tensor in texts)
    return tuple(tensor.name for tensor in texts) if fits else ()


def embed_workload(subject: Subject) -> Workload:
    """Batches of ``requests.texts`` texts.

    Raises:
        ProfileError: the model takes no texts, no batches of that size, or refuses the longest of them.
    """
    metadata = subject.metadata
    names = text_inputs(metadata)
    if not names:
        inputs = ", ".join(f"{one.name} ({one.datatype} {list(one.shape)})" for one in metadata.inputs)
        raise ProfileError(
            f"requests.kind is embed, but model {metadata.name!r} needs more than one text a row: it takes {inputs}",
            hint="leave out requests.kind, or set it to tensors",
        )
    _check_texts(subject)
    texts = _texts(subject)
    batches = [_arrays(subject, names, batch) for batch in texts.batches]
    outputs, classes = _outputs(metadata)
    _ask_longest(subject, batches, texts, outputs)
    requests = tuple(
        replace(
            subject.prepared(arrays, outputs=outputs, classes=classes),
            rows=subject.requests.texts,
            prompt_tokens=tokens,
        )
        for arrays, tokens in zip(batches, texts.tokens, strict=True)
    )
    return Workload(
        kind="embed",
        streaming=metadata.decoupled,
        counts=TokenCounts(),
        requests=requests,
        described={
            "texts": texts.words,
            "different": len(requests),
            "texts_in_a_request": subject.requests.texts,
        },
    )


@dataclass(frozen=True)
class _Texts:
    batches: Sequence[Sequence[str]]
    tokens: Sequence[int | None]
    """Of each batch, all its texts together; None: unknown."""
    words: str


def _texts(subject: Subject) -> _Texts:
    requests = subject.requests
    if requests.prompts_file is not None:
        written = [line.prompt for line in read_prompts(requests.prompts_file)]
        batches = [
            [written[(start + offset) % len(written)] for offset in range(requests.texts)]
            for start in range(0, len(written), requests.texts)
        ]
        return _Texts(batches, [None] * len(batches), f"the {len(written)} of {requests.prompts_file.name}")
    rng = np.random.default_rng([subject.seed, 0])
    tokens = sample(requests.prompt_tokens, rng, requests.different * requests.texts)
    made = made_prompts(
        [ASSUMED.words(one) for one in tokens],
        shared_words=requests.shared_prefix_tokens,
        rng=np.random.default_rng([subject.seed, 1]),
    )
    starts = range(0, len(made), requests.texts)
    return _Texts(
        [made[start : start + requests.texts] for start in starts],
        [sum(tokens[start : start + requests.texts]) for start in starts],
        f"made of common English words, one token a word assumed; {requests.different} different requests are gone round",
    )


def _check_texts(subject: Subject) -> None:
    wanted, most = subject.requests.texts, subject.metadata.max_batch_size
    # Without a batch dimension, one input of any size holds all texts.
    holds_any = not most and all(tensor.shape == (-1,) for tensor in subject.metadata.inputs)
    if wanted > max(1, most) and not holds_any:
        raise ProfileError(
            f"requests.texts is {wanted}; model {subject.target.model!r} takes at most {max(1, most)} in a request",
            hint="lower requests.texts, and let more requests run at once",
        )


def _arrays(subject: Subject, names: Sequence[str], texts: Sequence[str]) -> Arrays:
    """All inputs; the second of a pair is a text of its own, made of the first's words."""
    columns = {names[0]: texts} | {name: [_turned(text) for text in texts] for name in names[1:]}
    return inputs_from_texts(subject.metadata, columns)


def _turned(text: str) -> str:
    return " ".join(reversed(text.split()))


def _outputs(metadata: ModelMetadata) -> tuple[list[str], int]:
    """What ``Client.embed``, ``classify`` and ``rerank`` ask for: the output, and how many classes of each row."""
    for task in (EMBEDDING, CLASSES, SCORE):
        output = next((tensor for tensor in metadata.outputs if tensor.name in task.outputs), None)
        if output is not None:
            return [output.name], max(0, output.shape[-1]) if task is CLASSES else 0
    return [], 0


def _ask_longest(subject: Subject, batches: Sequence[Arrays], texts: _Texts, outputs: Sequence[str]) -> None:
    longest = max(range(len(batches)), key=lambda number: max(map(len, texts.batches[number])))
    try:
        subject.first_answer(batches[longest], outputs=outputs)
    except RefusedError as error:
        key = "requests.prompts_file" if subject.requests.prompts_file else "requests.prompt_tokens"
        raise ProfileError(
            f"model {subject.target.model!r} {'refuses' if error.refused else 'failed at'} a request with the longest text ({max(map(len, texts.batches[longest]))} characters): {error.words}",
            hint=f"change {key}; if the input is no text, give requests.kind: tensors with requests.tensors_file",
        ) from error


def text_error(subject: Subject, tokens: int) -> str | None:
    """What the model says to a text of about so many tokens; None: it takes it."""
    names = text_inputs(subject.metadata)
    made = made_prompts([ASSUMED.words(tokens)], shared_words=0, rng=np.random.default_rng([subject.seed, 3]))
    try:
        subject.first_answer(_arrays(subject, names, made), outputs=_outputs(subject.metadata)[0])
    except RefusedError as error:
        return error.words
    return None


def _holds_a_text(tensor: TensorMetadata, *, batched: bool) -> bool:
    per_row = tensor.shape[1:] if batched else tensor.shape
    return tensor.datatype == "BYTES" and per_row in ((1,), (-1,))

"""Everything that the rehearsal of a graph deployment asks.

Good requests must be answered as the engine answers without a server: alone, as the rows of one request, at once with
others. Bad ones must be refused with a reason, and must hurt nobody: neither those that share their batch nor the next.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from enginesmith.graphs.signature import GraphTensor
from enginesmith.triton.graph.asking import Answer, Asking
from enginesmith.triton.graph.configs import DATA_TYPES, text_inputs
from enginesmith.triton.graph.deployment import Deployment
from enginesmith.triton.graph.subject import Subject
from enginesmith.triton.rehearsal_report import Check

Array = npt.NDArray[Any]
_WAVES = 5
_COPIES = 4
_CONCURRENCY = 16
_NO_TOKEN = 2**31 - 1
_INVALID = "INVALID_ARGUMENT"


def run_checks(ask: Asking, subject: Subject, *, warmup_rows: int) -> list[Check]:
    """All checks, in order; one that fails does not stop the others. ``warmup_rows``: what was computed before READY."""
    deployment = subject.deployment
    checks = [
        _check_warmup(ask, deployment, warmup_rows),
        _check_metadata(ask, deployment),
        _check_plain("plain", ask, subject),
        _check_rows(ask, subject),
        *_check_at_once(ask, subject),
        *_check_refused(ask, subject),
        *_check_company_of_bad(ask, subject),
        *_check_labels(ask, subject),
        *_check_cache(ask, subject),
    ]
    if deployment.text:
        checks += [*_check_text(ask, subject), *_check_bad_text(ask, subject)]
    return [*checks, _check_plain("plain again, after the bad requests", ask, subject)]


def _check_warmup(ask: Asking, deployment: Deployment, warmup_rows: int) -> Check:
    seen = ask.statistics(deployment.name).rows
    return Check("warm-up", "rows computed before READY", str(warmup_rows), str(seen), seen == warmup_rows)


def _check_metadata(ask: Asking, deployment: Deployment) -> Check:
    signature = deployment.signature
    expected = {deployment.name: {"inputs": _io(signature.inputs), "outputs": _io(signature.outputs)}}
    if deployment.text:
        texts: list[tuple[str, str, tuple[int, ...]]] = [
            (tensor.name, "BYTES", (-1, *tensor.dims)) for tensor in text_inputs(signature)
        ]
        expected[deployment.text_name] = {"inputs": texts, "outputs": _io(signature.outputs)}
    seen = {
        model: {
            kind: [(one["name"], one["datatype"], tuple(map(int, one["shape"]))) for one in metadata[kind]]
            for kind in ("inputs", "outputs")
        }
        for model, metadata in ((model, ask.metadata(model)) for model in expected)
    }
    return Check("metadata", "names, types and shapes", str(expected), str(seen), seen == expected)


def _io(tensors: Sequence[GraphTensor]) -> list[tuple[str, str, tuple[int, ...]]]:
    return [
        (tensor.name, DATA_TYPES[tensor.dtype].removeprefix("TYPE_"), (-1, *tensor.dims))
        for tensor in tensors
    ]


def _check_plain(name: str, ask: Asking, subject: Subject) -> Check:
    model = subject.deployment.name
    return _all_of(
        _compared(name, _shown(request), ask(model, request), subject, subject.answer(request))
        for request in subject.requests
    )


def _check_rows(ask: Asking, subject: Subject) -> Check:
    """One request with several rows."""
    seen = ask(subject.deployment.name, subject.batch)
    return _compared(
        "rows of one request", _shown(subject.batch), seen, subject, subject.answer(subject.batch)
    )


def _check_at_once(ask: Asking, subject: Subject) -> list[Check]:
    """Requests of different lengths from several clients; batches must form where Triton may form them."""
    right = [subject.answer(request) for request in subject.requests]
    return _at_once(
        "at once", ask, subject, model=subject.deployment.name, requests=subject.requests, right=right
    )


def _at_once(
    name: str,
    ask: Asking,
    subject: Subject,
    *,
    model: str,
    requests: Sequence[Mapping[str, Array]],
    right: Sequence[Mapping[str, Array]],
) -> list[Check]:
    deployment = subject.deployment
    checks: list[Check] = []
    sent, before = 0, ask.statistics(deployment.name)
    for _ in range(_WAVES):
        order = list(range(len(requests))) * _COPIES
        with ThreadPoolExecutor(_CONCURRENCY) as pool:
            seen = list(pool.map(lambda index: ask(model, requests[index]), order))
        checks += [
            _compared(name, _shown(requests[index]), answer, subject, right[index])
            for index, answer in zip(order, seen, strict=True)
        ]
        sent += len(order)
        now = ask.statistics(deployment.name)
        ran, rows = now.executions - before.executions, now.rows - before.rows
        if ran < rows or not _may_form(deployment):
            break
    formed = Check(
        f"{name}: batches form",
        f"{sent} requests",
        "fewer executions than rows",
        f"{ran} executions of {rows} rows, largest batch {now.largest_batch}",
        ran < rows or not _may_form(deployment),
    )
    return [_all_of(checks), formed]


def _may_form(deployment: Deployment) -> bool:
    serving = deployment.serving
    # What the cache answers is computed once.
    return serving.dynamic_batching is not None and serving.max_batch_size > 1 and not serving.response_cache


def _turned_away(deployment: Deployment, answer: Answer) -> bool:
    """Whether the queue policy was why there is no answer."""
    batching = deployment.serving.dynamic_batching
    policy = batching.queue_policy if batching else None
    limited = policy is not None and bool(policy.max_queue_size or policy.default_timeout_us)
    return limited and "UNAVAILABLE" in str(answer.status)


def _check_refused(ask: Asking, subject: Subject) -> list[Check]:
    model, request = subject.deployment.name, subject.requests[0]
    return [
        _refused(name, _shown(bad), ask(model, bad), names=names)
        for name, bad, names in _bad_requests(subject.deployment, request)
    ]


def _bad_requests(
    deployment: Deployment, request: Mapping[str, Array]
) -> Iterator[tuple[str, dict[str, Array], str]]:
    """What is wrong, the request, and what the refusal must name."""
    first = deployment.signature.inputs[0]
    rows = deployment.serving.max_batch_size + 1
    yield "too many rows", {name: _repeated(one, rows) for name, one in request.items()}, str(rows - 1)
    other = np.float32 if first.dtype != "float32" else np.int64
    yield "another dtype", {**request, first.name: request[first.name].astype(other)}, first.name
    yield "another rank", {**request, first.name: request[first.name][..., np.newaxis]}, first.name
    yield "no rows", {name: one[:0] for name, one in request.items()}, ""
    if len(request) > 1:
        yield "an input is missing", {name: one for name, one in request.items() if name != first.name}, ""
    for axis, limits in deployment.signature.axes.items():
        long = {
            tensor.name: _stretched(request[tensor.name], tensor, axis, limits.max + 1)
            for tensor in deployment.signature.inputs
        }
        yield f"axis {axis} is too long", long, str(limits.max)


def _check_company_of_bad(ask: Asking, subject: Subject) -> list[Check]:
    """A request that the graph itself refuses, sent among good ones: a token that no vocabulary has."""
    model, good = subject.deployment.name, subject.requests
    if not any(tensor.name == "input_ids" for tensor in subject.deployment.signature.inputs):
        return []
    bad = {**good[0], "input_ids": np.full_like(good[0]["input_ids"], _NO_TOKEN)}
    requests = [bad, *good] * _COPIES
    with ThreadPoolExecutor(_CONCURRENCY) as pool:
        seen = list(pool.map(lambda request: ask(model, request), requests))
    refusals, answers = [], []
    for request, answer in zip(requests, seen, strict=True):
        if request is not bad:
            right = subject.answer(request)
            answers.append(
                _compared("in the company of bad requests", _shown(request), answer, subject, right)
            )
        elif not (_turned_away(subject.deployment, answer) or _refused_before(subject.deployment, answer)):
            refusals.append(_refused("a token that is none", _shown(bad), answer, names=""))
    return [_all_of(one) for one in (refusals, answers) if one]


def _refused_before(deployment: Deployment, answer: Answer) -> bool:
    """tritonserver 2.51 caches a refusal too, and gives who asks again an answer without outputs."""
    return deployment.serving.response_cache and answer.refusal is None and not answer.outputs


def _check_labels(ask: Asking, subject: Subject) -> list[Check]:
    """Triton's classification extension names every class, the highest first."""
    deployment, request = subject.deployment, subject.requests[0]
    labels = deployment.signature.labels
    output = next((one for one in deployment.signature.outputs if one.dims == (len(labels),)), None)
    if not labels or output is None:
        return []
    best = int(subject.answer(request)[output.name][0].argmax())
    seen = ask(deployment.name, request, classes=len(labels))
    said = [bytes(value).decode() for value in seen.outputs.get(output.name, np.zeros(0)).ravel()]
    named = [one.partition(":")[2] for one in said]
    # A class with an empty name has none for Triton.
    words = [label.split() for label in labels]
    expected = [f"{index}:{' '.join(label)}" if label else str(index) for index, label in enumerate(words)]
    passed = named[:1] == [expected[best]] and sorted(named) == sorted(expected)
    shown = f"{expected[best]} first of {sorted(expected)}"
    return [Check("label", f"classes of {output.name}", shown, str(said or seen.shown()), passed)]


def _check_cache(ask: Asking, subject: Subject) -> list[Check]:
    if not subject.deployment.serving.response_cache:
        return []
    model, request = subject.deployment.name, subject.requests[-1]
    ask(model, request)
    before = ask.statistics(model).cache_hits
    seen = ask(model, request)
    hits = ask.statistics(model).cache_hits - before
    return [
        _compared("from the cache", _shown(request), seen, subject, subject.answer(request)),
        Check("response cache", "the same request again", "1 hit", f"{hits} hits", hits == 1),
    ]


def _check_text(ask: Asking, subject: Subject) -> list[Check]:
    """Text alone, in rows and at once; its tokens must be those that the samples were made of."""
    deployment = subject.deployment
    model, texts = deployment.text_name, subject.texts
    right = [subject.answer(subject.text_inputs([text])) for text in texts]
    requests = [subject.text_request([text]) for text in texts]
    checks = [
        _all_of(
            _compared("text", repr(text)[:60], ask(model, request), subject, answer)
            for text, request, answer in zip(texts, requests, right, strict=True)
        )
    ]
    together = texts[: deployment.serving.max_batch_size]
    expected = subject.answer(subject.text_inputs(together))
    seen = ask(model, subject.text_request(together))
    checks.append(_compared("texts of one request", f"{len(together)} texts", seen, subject, expected))
    checks += _at_once("texts at once", ask, subject, model=model, requests=requests, right=right)
    return [*checks, _check_tokens(ask, subject)]


def _check_tokens(ask: Asking, subject: Subject) -> Check:
    """The samples were tokenized by another part of the build; what was not cut there must have the same tokens here."""
    checks: list[Check] = []
    for text, request in zip(subject.texts, subject.requests, strict=True):
        sampled = request["input_ids"][0].tolist()
        if not checks or (len(sampled) < subject.longest_sample and len(sampled) <= subject.text_limit):
            seen = ask(subject.deployment.tokenizer_name, subject.text_request([text]))
            ids = seen.outputs.get("input_ids", np.zeros((1, 0), np.int64))[0].tolist()
            passed = ids[: len(sampled)] == sampled
            checks.append(Check("tokens", repr(text)[:60], str(sampled), str(ids), passed))
    return _all_of(checks)


def _check_bad_text(ask: Asking, subject: Subject) -> list[Check]:
    deployment, width = subject.deployment, len(subject.texts[0])
    model, longest = deployment.text_name, deployment.longest

    def asked(text: bytes) -> Answer:
        return ask(model, subject.text_request([(text,) * width]))

    long = asked(b"word " * (longest + 1))
    if deployment.serving.truncate:
        cut = subject.answer(subject.text_inputs([("word " * (longest + 1),) * width]))
        too_long = _compared("text that is cut", f"{longest + 1} words", long, subject, cut)
    else:
        too_long = _refused("text that is too long", f"{longest + 1} words", long, names=str(longest))
    rows = deployment.serving.max_batch_size + 1
    many = ask(model, subject.text_request([subject.texts[0]] * rows))
    return [
        too_long,
        _refused("invalid UTF-8", "b'caf\\xe9 \\xff'", asked(b"caf\xe9 \xff"), names="UTF-8"),
        _refused("too many texts", f"{rows} rows", many, names=str(rows - 1)),
        _sane("empty text", asked(b"")),
        _sane("NUL in a text", asked(b"a\0b")),
        _check_text_company(ask, subject),
    ]


def _check_text_company(ask: Asking, subject: Subject) -> Check:
    """A text that is refused beside one that is not, at once."""
    model = subject.deployment.text_name
    bad = subject.text_request([(b"\xff",) * len(subject.texts[0])])
    good = subject.text_request([subject.texts[0]])
    with ThreadPoolExecutor(_CONCURRENCY) as pool:
        seen = list(pool.map(lambda request: ask(model, request), [bad, good] * _COPIES))
    right = subject.answer(subject.text_inputs([subject.texts[0]]))
    answers = [answer for answer in seen[1::2] if not _turned_away(subject.deployment, answer)]
    wrong = [one for one in answers if subject.distance(one.outputs, right) > subject.tolerance]
    said = "; ".join(answer.shown() for answer in wrong) or f"{len(answers)} right answers"
    return Check("text in the company of bad ones", "good and bad texts", "right answers", said, not wrong)


def _all_of(checks: Iterable[Check]) -> Check:
    """Equal questions about several requests as one check, which shows the first that failed."""
    every = list(checks)
    failed = [check for check in every if not check.passed]
    shown = (failed or every)[0]
    counted = f"{len(failed)} of {len(every)} wrong" if failed else f"{len(every)} requests"
    return replace(shown, asked=f"{shown.asked} ({counted})")


def _compared(name: str, asked: str, seen: Answer, subject: Subject, right: Mapping[str, Array]) -> Check:
    if seen.refusal is not None:
        passed = _turned_away(subject.deployment, seen)
        return Check(name, asked, Answer(right).shown(), seen.shown(), passed)
    distance = subject.distance(seen.outputs, right)
    return Check(
        name,
        asked,
        f"{Answer(right).shown()} within {subject.tolerance:.1e}",
        f"{seen.shown()} at {distance:.1e}",
        distance <= subject.tolerance,
    )


def _refused(name: str, asked: str, seen: Answer, *, names: str) -> Check:
    passed = (
        seen.refusal is not None
        and _INVALID in str(seen.status)
        and names in seen.refusal
        and "Traceback" not in seen.refusal
    )
    return Check(name, asked, f"a refusal as {_INVALID} that names {names!r}", seen.shown(), passed)


def _sane(name: str, seen: Answer) -> Check:
    """Tokenizers differ in what they make of it; finite numbers and a refusal are both sane, a crash is not."""
    answered = seen.refusal is None and all(np.isfinite(array).all() for array in seen.outputs.values())
    refused = seen.refusal is not None and _INVALID in str(seen.status)
    return Check(
        name, name, "finite numbers, or a refusal as an invalid argument", seen.shown(), answered or refused
    )


def _repeated(row: Array, rows: int) -> Array:
    return np.repeat(row[:1], rows, axis=0)


def _stretched(row: Array, tensor: GraphTensor, axis: str, length: int) -> Array:
    """``row`` with ``axis``, where the tensor has it, made ``length`` long by repeating its beginning."""
    for place, size in enumerate(tensor.shape):
        if size == axis:
            row = np.take(row, np.arange(length) % row.shape[place], axis=place)
    return row


def _shown(request: Mapping[str, Array]) -> str:
    return ", ".join(f"{name} {array.dtype}{list(array.shape)}" for name, array in request.items())

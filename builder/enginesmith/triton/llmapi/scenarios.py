"""What a rehearsal asks of an LLM API model, and what counts as right.

Good requests must be answered exactly as the twin answers them alone; the stand-in for TensorRT-LLM runs one
generation at a time, so company does not change an answer. Bad ones must be refused with a reason and hurt no other.
A cancelled request must really end: the stand-in's journal says after how many tokens it did.
"""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from enginesmith.triton.llmapi.asking import Asking, Inputs, Reply
from enginesmith.triton.llmapi.subject import MAX_TOKENS, SAMPLING, Subject
from enginesmith.triton.rehearsal_report import Check

_PATIENCE_S = 30.0
_POLL_S = 0.01
_PERF_OUTPUTS = ("arrival_time_ns", "first_token_time_ns", "last_token_time_ns", "kv_cache_hit_rate")


@dataclass(frozen=True)
class Journal:
    """What the stand-in writes down about its generations, and the file that makes it stand still."""

    path: Path
    hold: Path

    def entries(self, event: str) -> list[dict[str, Any]]:
        """The complete entries about ``event``, oldest first."""
        if not self.path.exists():
            return []
        lines = self.path.read_text(encoding="utf-8").rpartition("\n")[0].splitlines()
        return [entry for entry in map(json.loads, lines) if entry["event"] == event]

    def wait(self, event: str, number: int) -> dict[str, Any] | None:
        """The entry ``number`` (from 0) about ``event``, or None when it does not come in time."""
        deadline = time.monotonic() + _PATIENCE_S
        while len(entries := self.entries(event)) <= number:
            if time.monotonic() > deadline:
                return None
            time.sleep(_POLL_S)
        return entries[number]

    @contextmanager
    def held(self) -> Iterator[None]:
        """Generations stand still after their first token until they are aborted or this ends."""
        self.hold.touch()
        try:
            yield
        finally:
            self.hold.unlink()


def run_checks(
    ask: Asking, subject: Subject, journal: Journal, *, streaming: bool, instances: int
) -> list[Check]:
    """Everything that is asked, in order; a check that fails does not stop the others.

    A request that stops another by its id reaches any instance, so that is asked where there is one only.
    """
    checks = [
        *(_check_plain(f"plain {number}", ask, subject, number) for number in range(len(subject.prompts))),
        _check_with_input(ask, subject),
        *_check_at_once(ask, subject, streaming=streaming),
        _check_sampling(ask, subject),
        _check_perf_metrics(ask, subject),
        *_check_stops(ask, subject, streaming=False),
    ]
    if streaming:
        checks += [_check_stream(ask, subject, number) for number in range(len(subject.prompts))]
        checks += _check_stops(ask, subject, streaming=True)
    checks += [
        *_check_refusals(ask, subject),
        _check_cancelled(ask, subject, journal, streaming=streaming),
        *([_check_stopped_by_id(ask, subject, journal)] if instances == 1 else []),
        _check_plain("plain again, after all that", ask, subject, 0),
    ]
    return checks


def check_generate(http_url: str, model: str, subject: Subject) -> Check:
    """The first prompt through Triton's ``generate`` endpoint, as the documents tell users to ask."""
    prompt, expected = subject.prompts[0], subject.answers[0]
    body = json.dumps({key: _plain(value) for key, value in asked_for(prompt).items()})
    host, _, port = http_url.partition(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=_PATIENCE_S)
    try:
        connection.request("POST", f"/v2/models/{model}/generate", body)
        response = connection.getresponse()
        document = json.loads(response.read())
    finally:
        connection.close()
    seen = str(document.get("text_output", document))
    return Check("generate over HTTP", body, expected, seen, response.status == 200 and seen == expected)


def _plain(value: Any) -> Any:
    return value.decode() if isinstance(value, bytes) else value


def asked_for(prompt: str, **inputs: Any) -> dict[str, Any]:
    """The inputs of a usual request; ``inputs`` are added, without the prefix ``sampling_param_`` where they have it."""
    prefixed = {"exclude_input_from_output": True, "max_tokens": MAX_TOKENS, **inputs}
    whole = {
        "streaming",
        "return_finish_reason",
        "return_stop_reason",
        "return_cumulative_logprob",
        "stop_now",
    }
    named = {key if key in whole else f"sampling_param_{key}": value for key, value in prefixed.items()}
    return {"text_input": prompt.encode(), "return_finish_reason": True, **named}


def _same(name: str, asked: str, expected: str, reply: Reply) -> Check:
    ended = reply.value("finish_reason") in ("stop", "length")
    passed = reply.refusal is None and reply.text == expected and ended
    return Check(name, asked, expected, _with_reason(reply), passed)


def _with_reason(reply: Reply) -> str:
    reason = reply.value("finish_reason")
    ended = reply.refusal is not None or reason in ("stop", "length")
    return reply.shown() if ended else f"{reply.shown()} (finish_reason {reason!r})"


def _check_plain(name: str, ask: Asking, subject: Subject, number: int) -> Check:
    prompt = subject.prompts[number]
    return _same(name, prompt, subject.answers[number], ask(asked_for(prompt)))


def _check_with_input(ask: Asking, subject: Subject) -> Check:
    prompt = subject.prompts[0]
    reply = ask(asked_for(prompt, exclude_input_from_output=False))
    return _same("with its input", prompt, prompt + subject.answers[0], reply)


def _check_at_once(ask: Asking, subject: Subject, *, streaming: bool) -> list[Check]:
    numbers = [number for number in range(len(subject.prompts)) for _ in range(2)]

    def one(place: int) -> Reply:
        return ask(asked_for(subject.prompts[numbers[place]], streaming=streaming and place % 2 == 1))

    with ThreadPoolExecutor(len(numbers)) as pool:
        replies = list(pool.map(one, range(len(numbers))))
    return [
        _same("at once", subject.prompts[number], subject.answers[number], reply)
        for number, reply in zip(numbers, replies, strict=True)
    ]


def _check_stream(ask: Asking, subject: Subject, number: int) -> Check:
    prompt, expected = subject.prompts[number], subject.answers[number]
    reply = ask(asked_for(prompt, streaming=True))
    whole = all(_is_text(piece) for piece in reply.pieces)
    several = len(reply.pieces) > 1 or len(expected) < MAX_TOKENS
    same = _same("streaming", prompt, expected, reply)
    seen = " + ".join(repr(piece.decode(errors="replace")) for piece in reply.pieces)
    passed = same.passed and whole and several
    return Check(same.name, prompt, f"{expected}, in pieces of whole characters", seen or same.seen, passed)


def _is_text(piece: bytes) -> bool:
    try:
        piece.decode()
    except UnicodeDecodeError:
        return False
    return True


def _check_stops(ask: Asking, subject: Subject, *, streaming: bool) -> Iterator[Check]:
    prompt, answer = subject.prompts[0], subject.answers[0]
    for word in subject.stops:
        expected = answer[: answer.index(word)]
        inputs = asked_for(
            prompt, stop=[word.encode(), b"never in it"], return_stop_reason=True, streaming=streaming
        )
        reply = ask(inputs)
        right = reply.value("finish_reason") == "stop" and reply.value("stop_reason") == word
        same = _same("stop string, streaming" if streaming else "stop string", prompt, expected, reply)
        seen = f"{same.seen} (stop_reason {reply.value('stop_reason')!r})"
        yield Check(
            same.name,
            f"{prompt} [stop {word!r}]",
            f"{expected} (stop_reason {word!r})",
            seen,
            same.passed and right,
        )


def _check_sampling(ask: Asking, subject: Subject) -> Check:
    prompt = subject.prompts[1]
    first, second = (ask(asked_for(prompt, **SAMPLING)) for _ in range(2))
    same = _same("sampling, twice with one seed", prompt, subject.sampled, first)
    return Check(
        same.name,
        prompt,
        subject.sampled,
        f"{first.shown()}, then {second.shown()}",
        same.passed and first.text == second.text,
    )


def _check_perf_metrics(ask: Asking, subject: Subject) -> Check:
    prompt = subject.prompts[0]
    reply = ask(asked_for(prompt, return_perf_metrics=True))
    missing = [name for name in _PERF_OUTPUTS if reply.value(name) is None]
    ordered = not missing and 0 < reply.value("arrival_time_ns") <= reply.value("last_token_time_ns")
    return Check(
        "performance metrics",
        prompt,
        f"{', '.join(_PERF_OUTPUTS)} beside the answer",
        f"{reply.shown()}; missing: {', '.join(missing) or 'none'}",
        ordered and reply.text == subject.answers[0],
    )


def _check_refusals(ask: Asking, subject: Subject) -> Iterator[Check]:
    prompt = subject.prompts[0]
    bad: tuple[tuple[str, Inputs, str], ...] = (
        ("prompt too long", asked_for(subject.too_long), str(subject.prompt_limit)),
        ("invalid UTF-8", asked_for(prompt) | {"text_input": b"caf\xe9 \xff"}, "UTF-8"),
        ("stop string of invalid UTF-8", asked_for(prompt, stop=[b"\xff"]), "sampling_param_stop"),
        ("max_tokens 0", asked_for(prompt, max_tokens=0), "sampling_param_max_tokens"),
        ("max_tokens -1", asked_for(prompt, max_tokens=-1), "sampling_param_max_tokens"),
        ("temperature nan", asked_for(prompt, temperature=float("nan")), "sampling_param_temperature"),
        ("top_p 2", asked_for(prompt, top_p=2.0), "sampling_param_top_p"),
        ("two prompts", asked_for(prompt) | {"text_input": [b"one", b"two"]}, "text_input"),
        ("no prompt", {"sampling_param_max_tokens": 4}, "text_input"),
        ("stop without an id", {"text_input": b"", "stop": True}, "id"),
    )
    for name, inputs, names in bad:
        reply = ask(inputs)
        refusal = reply.refusal or ""
        passed = names in refusal and "Traceback" not in refusal and not reply.pieces
        yield Check(name, _short(inputs), f"a refusal that names {names}", reply.shown(), passed)


def _short(inputs: Inputs) -> str:
    return ", ".join(f"{name}={str(value)[:40]}" for name, value in inputs.items())


def _check_cancelled(ask: Asking, subject: Subject, journal: Journal, *, streaming: bool) -> Check:
    def cancel(pending: Any) -> None:
        pending.cancel()

    return _check_ended_early("cancelled", ask, subject, journal, cancel, streaming=streaming)


def _check_stopped_by_id(ask: Asking, subject: Subject, journal: Journal) -> Check:
    def stop(_pending: Any) -> None:
        ask({"text_input": b"", "stop": True}, request_id="to be stopped")

    return _check_ended_early("stopped by its id", ask, subject, journal, stop, streaming=False)


def _check_ended_early(
    name: str,
    ask: Asking,
    subject: Subject,
    journal: Journal,
    end: Callable[[Any], None],
    *,
    streaming: bool,
) -> Check:
    """Start a request, let ``end`` end it while its generation stands still, and read in the journal what became of it."""
    number = len(journal.entries("started"))
    client = ask.connect()
    try:
        with journal.held():
            inputs = asked_for(subject.prompts[0], streaming=streaming)
            pending = ask.start(client, inputs, request_id="to be stopped")
            journal.wait("started", number)
            end(pending)
            entry = journal.wait("finished", number)
    finally:
        client.close()
    passed = entry is not None and entry["finish_reason"] == "cancelled"
    seen = f"it ended after {entry['tokens']} tokens: {entry['finish_reason']}" if entry else "it did not end"
    return Check(name, subject.prompts[0], "the generation ends: cancelled", seen, passed)

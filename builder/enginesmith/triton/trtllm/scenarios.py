"""What a rehearsal of a TensorRT-LLM deployment asks, through the ensemble and through BLS, and what it expects.

A check that fails does not stop the others. The last asks the first again: nothing that went before may have hurt.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from enginesmith.triton.rehearsal_report import Check
from enginesmith.triton.trtllm.asking import Answer, Asking, Inputs
from enginesmith.triton.trtllm.subject import MAX_TOKENS, SAMPLING, Subject

_END_TIMEOUT_S = 30.0
_END_POLL_S = 0.02
_ECHO = "rehearse:echo"
_HOLD = "rehearse:hold"
_STREAM: Inputs = {"stream": (True,)}
_ANSWER_ONLY: Inputs = {"exclude_input_in_output": (True,)}


@dataclass(frozen=True)
class Stage:
    """One of the two models that take text, and what is special about it."""

    model: str
    ask: Asking
    subject: Subject
    whole_characters: bool
    """Streams are cut between characters and end at stop words wherever they are: BLS."""
    accumulates: bool
    may_turn_away: bool
    max_batch_size: int
    played: Path
    """Where the stand-in for the engine writes down how each generation ended."""
    cancellation_period_s: float

    def send(
        self,
        prompt: str | bytes,
        inputs: Inputs | None = None,
        *,
        request_id: str = "",
        cancel_after: int | None = None,
    ) -> Answer:
        """The answer to ``prompt``, of ``MAX_TOKENS`` at most where ``inputs`` do not say otherwise."""
        return self.ask(
            self.model,
            prompt.encode() if isinstance(prompt, str) else prompt,
            inputs={"max_tokens": (MAX_TOKENS,), **(inputs or {})},
            request_id=request_id,
            cancel_after=cancel_after,
        )

    def check(self, name: str, asked: str, expected: str, seen: Answer) -> Check:
        """The whole text must be ``expected``."""
        passed = seen.refusal is None and seen.text == expected
        return Check(f"{self.model}: {name}", asked, expected, seen.shown(), passed)

    def check_in_company(self, name: str, asked: str, expected: str, seen: Answer) -> Check:
        """The same of a request that comes together with others, which may find the queue full."""
        if self.may_turn_away and "queue" in str(seen.refusal):
            return self.fact(name, asked, "an answer, or turned away", seen=seen.shown(), passed=True)
        return self.check(name, asked, expected, seen)

    def fact(self, name: str, asked: str, expected: str, *, seen: str, passed: bool) -> Check:
        """Anything else."""
        return Check(f"{self.model}: {name}", asked, expected, seen, passed)


def run_checks(stage: Stage) -> list[Check]:
    """Everything that is asked of one model, in order."""
    return [
        _plain(stage, "plain"),
        _answer_only(stage),
        *_at_once(stage),
        *_streams(stage),
        *_many_bytes(stage),
        *_end_token(stage),
        *_words(stage),
        _sampled(stage),
        _counted(stage),
        *_refused(stage),
        *_cancelled(stage),
        *_generate(stage),
        _plain(stage, "plain again, after all that"),
    ]


def _plain(stage: Stage, name: str) -> Check:
    prompt = stage.subject.prompts[0]
    expected = stage.subject.whole(prompt, stage.subject.answer(prompt))
    return stage.check(name, prompt, expected, stage.send(prompt))


def _answer_only(stage: Stage) -> Check:
    prompt = stage.subject.prompts[0]
    seen = stage.send(prompt, _ANSWER_ONLY)
    return stage.check("without the prompt", prompt, stage.subject.decode(stage.subject.answer(prompt)), seen)


def _at_once(stage: Stage) -> Iterator[Check]:
    """All prompts as requests of their own at the same time, and as the rows of one."""
    subject = stage.subject
    expected = [subject.whole(prompt, subject.answer(prompt)) for prompt in subject.prompts]
    with ThreadPoolExecutor(len(subject.prompts)) as pool:
        answers = list(pool.map(stage.send, subject.prompts))
    for prompt, text, seen in zip(subject.prompts, expected, answers, strict=True):
        yield stage.check_in_company("at once", prompt, text, seen)
    yield from _rows(stage, expected[:2])


def _rows(stage: Stage, expected: Sequence[str]) -> Iterator[Check]:
    subject, rows = stage.subject, stage.subject.prompts[: len(expected)]
    asked, sent = " | ".join(rows), [row.encode() for row in rows]
    seen = stage.ask(stage.model, sent, inputs={"max_tokens": (MAX_TOKENS,)})
    refused_for = "batch-size" if stage.max_batch_size < len(rows) else "decoupled"
    if refused_for == "batch-size" or not stage.ask.decoupled:
        yield _is_refusal(stage, "rows of one request", asked, seen, names=refused_for)
        return
    wanted = {f"{row}: {text}" for row, text in enumerate(expected)}
    passed = seen.refusal is None and set(seen.texts) == wanted
    yield stage.fact("rows of one request", asked, " ".join(sorted(wanted)), seen=seen.shown(), passed=passed)
    if stage.whole_characters and not stage.accumulates:
        seen = stage.ask(stage.model, sent, inputs={"max_tokens": (MAX_TOKENS,), **_STREAM})
        streamed = tuple(
            "".join(text.removeprefix(f"{row}: ") for text in seen.texts if text.startswith(f"{row}: "))
            for row in range(len(rows))
        )
        texts = tuple(subject.decode(subject.answer(prompt)) for prompt in rows)
        passed = seen.refusal is None and streamed == texts
        shown = seen.shown() if seen.refusal else repr(streamed)
        yield stage.fact("rows of one stream", asked, repr(texts), seen=shown, passed=passed)


def _streams(stage: Stage) -> Iterator[Check]:
    subject, prompt = stage.subject, stage.subject.prompts[0]
    tokens = subject.answer(prompt)
    seen = stage.send(prompt, _STREAM)
    if not stage.ask.decoupled:
        yield _is_refusal(stage, "stream", prompt, seen, names="decoupled")
        return
    yield _check_stream(stage, "stream", prompt, tokens, seen)
    if len(tokens) > 1:
        yield stage.fact(
            "stream comes in pieces",
            prompt,
            "more than one response",
            seen=f"{len(seen.texts)} responses",
            passed=len(seen.texts) > 1 or not stage.whole_characters,
        )


def _check_stream(stage: Stage, name: str, asked: str, tokens: Sequence[int], seen: Answer) -> Check:
    if not stage.whole_characters:
        return stage.check(name, asked, stage.subject.decode_singly(tokens), seen)
    expected = stage.subject.decode(tokens)
    if not stage.accumulates:
        return stage.check(name, asked, expected, seen)
    grows = all(later.startswith(earlier) for earlier, later in zip(seen.texts, seen.texts[1:], strict=False))
    last = seen.texts[-1] if seen.texts else ""
    return stage.fact(
        name,
        asked,
        f"responses that grow to {expected!r}",
        seen=seen.shown(),
        passed=seen.refusal is None and grows and last == expected,
    )


def _many_bytes(stage: Stage) -> Iterator[Check]:
    """Characters of several tokens: the stand-in answers with the prompt's own, whatever the engine would say."""
    subject, prompt = stage.subject, stage.subject.many_bytes
    length = min(len(subject.encode(prompt)), subject.prompt_limit)
    tokens = subject.echo(prompt, length)
    inputs = {"max_tokens": (length,), **_ANSWER_ONLY}
    seen = stage.send(prompt, inputs, request_id=_ECHO)
    yield stage.check("characters of many bytes", prompt, subject.decode(tokens), seen)
    if stage.ask.decoupled:
        streamed = stage.send(prompt, {**inputs, **_STREAM}, request_id=_ECHO)
        yield _check_stream(stage, "stream of characters of many bytes", prompt, tokens, streamed)
        if stage.whole_characters and "\ufffd" not in subject.decode(tokens):
            cut = [text for text in streamed.texts if "\ufffd" in text]
            yield stage.fact(
                "no response ends inside a character",
                prompt,
                "none",
                seen=", ".join(cut) or "none",
                passed=not cut,
            )


def _end_token(stage: Stage) -> Iterator[Check]:
    """The stand-in repeats a prompt that holds the end token: the answer ends before it."""
    subject = stage.subject
    prompt = subject.with_end
    if prompt is None:
        return
    tokens = subject.encode(prompt)
    answer = tokens[: tokens.index(subject.end_id)]
    seen = stage.send(prompt, {"max_tokens": (2 * len(tokens),), **_ANSWER_ONLY}, request_id=_ECHO)
    yield stage.check("end token", prompt, subject.decode(answer), seen)


def _words(stage: Stage) -> Iterator[Check]:
    subject, prompt = stage.subject, stage.subject.prompts[0]
    word = subject.word
    seen = stage.send(prompt, {**_ANSWER_ONLY, "stop_words": (word.text.encode(),)})
    stopped = subject.decode(word.stopped)
    if stage.whole_characters:
        stopped = _up_to(stopped, word.text)
    yield stage.check("stop word", f"{prompt} (stop at {word.text!r})", stopped, seen)
    seen = stage.send(prompt, {**_ANSWER_ONLY, "bad_words": (word.text.encode(),)})
    yield stage.check("bad word", f"{prompt} (without {word.text!r})", subject.decode(word.without), seen)
    seen = stage.send(prompt, {**_ANSWER_ONLY, **subject.bias})
    biased = subject.decode(subject.answer(prompt, bias=word.text))
    yield stage.check("bias", f"{prompt} (more {word.text!r})", biased, seen)
    if stage.ask.decoupled and stage.whole_characters and not stage.accumulates:
        yield _spanning_stop(stage, prompt)


def _spanning_stop(stage: Stage, prompt: str) -> Check:
    """A stop word that begins in one response and ends in another is shown whole or not at all."""
    stop = stage.subject.spanning_stop(prompt)
    expected = _up_to(stage.subject.decode(stage.subject.answer(prompt, stop=stop)), stop)
    seen = stage.send(prompt, {**_STREAM, "stop_words": (stop.encode(),)})
    begins, so_far, halves = expected.find(stop), "", False
    for text in seen.texts:
        so_far += text
        halves |= begins >= 0 and begins < len(so_far) < begins + len(stop)
    return stage.fact(
        "stop word across responses",
        f"{prompt} (stop at {stop!r})",
        f"{expected!r}, never half of the stop word",
        seen=f"{seen.texts!r}"[:300] if seen.refusal is None else seen.shown(),
        passed=seen.refusal is None and so_far == expected and not halves,
    )


def _sampled(stage: Stage) -> Check:
    prompt = stage.subject.prompts[1]
    expected = stage.subject.whole(prompt, stage.subject.answer(prompt, sampled=True))
    first, second = (stage.send(prompt, SAMPLING) for _ in range(2))
    return stage.fact(
        "sampling with a seed, twice",
        prompt,
        expected,
        seen=f"{first.shown()}, then {second.shown()}",
        passed=first == second and first.refusal is None and first.text == expected,
    )


def _counted(stage: Stage) -> Check:
    prompt = stage.subject.prompts[0]
    expected = (len(stage.subject.encode(prompt)), len(stage.subject.answer(prompt)))
    counts = {"return_num_input_tokens": (True,), "return_num_output_tokens": (True,)}
    seen = stage.send(prompt, {**_ANSWER_ONLY, **counts})
    return stage.fact(
        "token counts", prompt, str(expected), seen=str(seen.counts), passed=seen.counts == expected
    )


def _refused(stage: Stage) -> Iterator[Check]:
    subject, prompt = stage.subject, stage.subject.prompts[0]
    limit = str(subject.prompt_limit)
    yield _is_refusal(stage, "prompt too long", "a long prompt", stage.send(subject.too_long), names=limit)
    invalid = b"caf\xe9 \xff"
    yield _is_refusal(stage, "invalid UTF-8", repr(invalid), stage.send(invalid), names="UTF-8")
    seen = stage.send(prompt, {"stop_words": (invalid,)})
    yield _is_refusal(stage, "invalid UTF-8 in a stop word", repr(invalid), seen, names="UTF-8")
    seen = stage.ask(stage.model, prompt.encode(), inputs={})
    yield _is_refusal(stage, "no max_tokens", "without max_tokens", seen, names="max_tokens")
    for number in (0, -3):
        seen = stage.send(prompt, {"max_tokens": (number,)})
        yield _is_refusal(stage, f"max_tokens {number}", f"max_tokens {number}", seen, names="max_tokens")
    seen = stage.ask(
        stage.model,
        prompt.encode(),
        inputs={"max_tokens": (8.0,)},
        wire_types={"max_tokens": "TYPE_FP32"},
    )
    yield _is_refusal(stage, "max_tokens as a float", "max_tokens FP32 8.0", seen, names="max_tokens")
    yield _refused_in_company(stage)


def _refused_in_company(stage: Stage) -> Check:
    """A bad request and a good one at the same time: the good one must not notice."""
    prompt = stage.subject.prompts[0]
    expected = stage.subject.whole(prompt, stage.subject.answer(prompt))
    with ThreadPoolExecutor(2) as pool:
        bad = pool.submit(stage.send, b"\xff")
        good = pool.submit(stage.send, prompt)
        seen, refused = good.result(), bad.result()
    check = stage.check_in_company("beside a bad request", prompt, expected, seen)
    if refused.refusal is None:
        return stage.fact(check.name, "b'\\xff'", "a refusal", seen=refused.shown(), passed=False)
    return check


def _is_refusal(stage: Stage, name: str, asked: str, seen: Answer, *, names: str) -> Check:
    passed = seen.refusal is not None and names in seen.refusal and "Traceback" not in seen.refusal
    return stage.fact(name, asked, f"a refusal that names {names}", seen=seen.shown(), passed=passed)


def _cancelled(stage: Stage) -> Iterator[Check]:
    """The client goes away in the middle of a stream: the generation ends, and the next request is served.

    tritonserver does not tell the models of an ensemble that its request was cancelled (seen on 2.51), so only BLS
    can stop; through the ensemble the engine generates to the end, and nothing may suffer from it but time.
    """
    if not stage.ask.decoupled:
        return
    prompt = stage.subject.prompts[2]
    request_id = f"{_HOLD if stage.whole_characters else 'rehearse'}:cancel:{stage.model}"
    room = 64
    sent = stage.send(prompt, {**_STREAM, "max_tokens": (room,)}, request_id=request_id, cancel_after=1)
    timeout_s = 0.0 if sent.refusal else _END_TIMEOUT_S + 3 * stage.cancellation_period_s
    ended = sent.shown() if sent.refusal else _how_it_ended(stage.played, request_id, timeout_s=timeout_s)
    if stage.whole_characters:
        yield stage.fact(
            "cancelled",
            f"{prompt}, cancelled after the first response",
            "the generation ends",
            seen=ended or f"still running after {timeout_s:g} s",
            passed=ended.startswith("cancelled"),
        )
    else:
        yield stage.fact(
            "client goes away",
            f"{prompt}, cancelled after the first response",
            "the generation ends, now or by itself",
            seen=ended or f"still running after {timeout_s:g} s",
            passed=bool(ended) and sent.refusal is None,
        )
    yield _plain(stage, "plain after a cancelled request")


def _how_it_ended(played: Path, request_id: str, *, timeout_s: float) -> str:
    """Waits for the stand-in to say how the generation of that request ended; empty when it does not."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        lines = played.read_text(encoding="utf-8").splitlines() if played.exists() else []
        for line in lines:
            entry = json.loads(line)
            if entry["id"].split("~")[0] == request_id:
                return f"{entry['ended']} after {entry['tokens']} tokens"
        time.sleep(_END_POLL_S)
    return ""


def _generate(stage: Stage) -> Iterator[Check]:
    """The HTTP requests of NVIDIA's documentation."""
    subject, prompt = stage.subject, stage.subject.prompts[0]
    document = {"text_input": prompt, "max_tokens": MAX_TOKENS, "bad_words": "", "stop_words": ""}
    expected = subject.whole(prompt, subject.answer(prompt))
    yield stage.check("HTTP generate", prompt, expected, stage.ask.generate(stage.model, document))
    if stage.ask.decoupled:
        seen = stage.ask.generate(stage.model, document | {"stream": True}, "generate_stream")
        yield _check_stream(stage, "HTTP generate_stream", prompt, subject.answer(prompt), seen)


def _up_to(text: str, stop: str) -> str:
    place = text.find(stop)
    return text if place < 0 else text[: place + len(stop)]

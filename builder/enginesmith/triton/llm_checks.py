"""What the rehearsal of a language model asks, in order, and what must come back.

Knows the questions; who is asked and what is right comes from outside, so that the checks themselves are tested with
servers that answer wrongly.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from enginesmith.triton.llm_asking import Answer, Ask
from enginesmith.triton.llm_subject import MAX_TOKENS, Subject
from enginesmith.triton.rehearsal_report import Check

_MOST_AT_ONCE = 64
"""Requests of the checks that load the model; more slots than this are not filled."""
_MORE_THAN_SLOTS = 2
_MOST_STREAMS = 1024
"""Where slots and queue hold more, a full queue is not rehearsed."""
_LEAVING_S = 10.0
"""How long a model may take to see that streams were cancelled."""
_BUSY = "UNAVAILABLE"
"""The status of a refusal that is nobody's fault."""
_LOG_PROB_TOLERANCE = 1e-3
"""Of log-probabilities that the same kernels computed twice."""


def run_checks(ask: Ask, subject: Subject) -> list[Check]:
    """Everything a rehearsal asks, in order; a check that fails does not stop the others."""
    prompt = subject.prompts[0].encode()
    no_numbers: dict[str, Sequence[object]] = {"temperature": [math.nan]}
    return [
        _check_greedy("greedy", ask, subject),
        _check_with_input(ask, subject),
        _check_stream(ask, subject),
        *_check_http(ask, subject),
        _check_rows(ask, subject),
        *_check_at_once(ask, subject),
        _check_sampling(ask, subject),
        _check_log_probs(ask, subject),
        *_check_chat(ask, subject),
        *_check_reuse(ask, subject),
        _check_refused("prompt too long", ask, subject.too_long.encode(), names=str(subject.prompt_limit)),
        _check_refused("invalid UTF-8", ask, b"caf\xe9 \xff", names="UTF-8"),
        _check_refused("max_tokens 0", ask, prompt, names="max_tokens", max_tokens=[0]),
        _check_refused("temperature NaN", ask, prompt, names="temperature", **no_numbers),
        _check_refused("beam search", ask, prompt, names="beam_width", beam_width=[2]),
        _check_refused("messages that are no JSON", ask, names="messages", messages=[b"hello"]),
        _check_refused(
            "prompt and messages", ask, prompt, names="messages", messages=[_messages(subject.prompts[0])]
        ),
        _check_empty_prompt(ask),
        _check_flood(ask, subject),
        _check_greedy("greedy again, after all that", ask, subject),
    ]


def _check_greedy(name: str, ask: Ask, subject: Subject) -> Check:
    prompt, expected = subject.prompts[0], subject.alone[0]
    seen = ask(prompt.encode(), max_tokens=[MAX_TOKENS])
    passed = seen.refusal is None and seen.text == expected and len(seen.responses) == 1
    return Check(name, prompt, expected, seen.shown(), passed)


def _check_with_input(ask: Ask, subject: Subject) -> Check:
    """NVIDIA's default: the prompt before the answer."""
    prompt, expected = subject.prompts[0], subject.prompts[0] + subject.alone[0]
    seen = ask(prompt.encode(), max_tokens=[MAX_TOKENS], exclude_input_in_output=[False])
    return Check(
        "prompt before the answer",
        f"{prompt} exclude_input_in_output: false",
        expected,
        seen.shown(),
        seen.refusal is None and seen.text == expected,
    )


def _check_stream(ask: Ask, subject: Subject) -> Check:
    prompt, expected = subject.prompts[0], subject.alone[0]
    seen = ask(prompt.encode(), max_tokens=[MAX_TOKENS], stream=[True])
    passed = seen.refusal is None and seen.text == expected and _is_stream(seen)
    return Check("stream", prompt, f"in pieces: {expected}", seen.shown(), passed)


def _is_stream(answer: Answer) -> bool:
    """Whether only the last response says why it ended, and tokens are counted up."""
    *before, last = answer.responses
    counts = [response.output_tokens for response in answer.responses]
    return (
        all(response.finish_reasons == ("",) for response in before)
        and last.finish_reasons in (("stop",), ("length",))
        and counts == sorted(counts)
        and 1 <= last.output_tokens <= MAX_TOKENS
        and (bool(before) or last.output_tokens == 1)
    )


def _check_http(ask: Ask, subject: Subject) -> Iterator[Check]:
    prompt, expected = subject.prompts[0], subject.alone[0]
    document = {"text_input": prompt, "max_tokens": MAX_TOKENS, "exclude_input_in_output": True}
    for name in ("HTTP /generate", "HTTP /generate_stream"):
        if name == "HTTP /generate":
            seen = ask.generate(document, "generate")
        else:
            seen = ask.generate({**document, "stream": True}, "generate_stream")
        yield Check(name, prompt, expected, seen.shown(), seen.refusal is None and seen.text == expected)
    seen = ask.generate({**document, "max_tokens": 0}, "generate")
    passed = seen.status == "HTTP 400" and "max_tokens" in (seen.refusal or "")
    yield Check(
        "HTTP /generate, max_tokens 0", prompt, "HTTP 400 that names max_tokens", seen.shown(), passed
    )


def _check_rows(ask: Ask, subject: Subject) -> Check:
    """One request with several prompts, answered in their order."""
    prompts = subject.prompts[: subject.slots]
    seen = ask(*(prompt.encode() for prompt in prompts), max_tokens=[MAX_TOKENS])
    texts = seen.last.texts
    passed = (
        seen.refusal is None
        and len(seen.responses) == 1
        and len(texts) == len(prompts)
        and all(_is_right(subject, index, text) for index, text in enumerate(texts))
    )
    expected = "\n".join(subject.alone[: len(prompts)])
    return Check("rows of one request", " | ".join(prompts), expected, seen.shown(), passed)


def _is_right(subject: Subject, index: int, answer: str) -> bool:
    return answer == subject.alone[index] or subject.could_answer(subject.prompts[index], answer)


def _check_at_once(ask: Ask, subject: Subject) -> list[Check]:
    """More requests than there are slots, streamed or not; one check for each prompt."""
    count = min(_MOST_AT_ONCE, max(subject.slots, len(subject.prompts)) + _MORE_THAN_SLOTS)
    turns = [(turn % len(subject.prompts), turn % 2 == 1) for turn in range(count)]

    def answer(turn: tuple[int, bool]) -> Answer:
        index, stream = turn
        return ask(subject.prompts[index].encode(), max_tokens=[MAX_TOKENS], stream=[stream])

    with ThreadPoolExecutor(count) as pool:
        answers = list(pool.map(answer, turns))
    checks = []
    for index, prompt in enumerate(subject.prompts):
        mine = [one for one, (asked, _) in zip(answers, turns, strict=True) if asked == index]
        wrong = [one for one in mine if not _is_served(subject, index, one, waiting=count - subject.slots)]
        shown = " | ".join(one.shown() for one in wrong or mine[:1])
        checks.append(Check(f"{count} at once", prompt, subject.alone[index], shown, not wrong))
    return checks


def _is_served(subject: Subject, index: int, answer: Answer, *, waiting: int) -> bool:
    """Whether the answer is right, or the spec's limits let the model turn the request away."""
    may_turn_away = subject.may_time_out or 0 < subject.max_queue_size < waiting
    if answer.refusal is not None:
        return may_turn_away and answer.status == _BUSY
    return _is_right(subject, index, answer.text)


def _check_sampling(ask: Ask, subject: Subject) -> Check:
    prompt = subject.prompts[1]
    options: dict[str, list[object]] = {
        "max_tokens": [MAX_TOKENS],
        "min_tokens": [2],
        "temperature": [0.8],
        "top_k": [50],
        "top_p": [0.95],
        "repetition_penalty": [1.1],
        "presence_penalty": [0.2],
        "frequency_penalty": [0.1],
        "seed": [7],
        "stop_words": [b"\n\n", b"###"],
        "bad_words": [b" the"],
    }
    first, second = (ask(prompt.encode(), **options) for _ in range(2))
    last = first.last
    passed = (
        first.refusal is None
        and first == second
        and 1 <= last.output_tokens <= MAX_TOKENS
        and last.finish_reasons in (("stop",), ("length",))
        and not any(word in first.text for word in ("\n\n", "###"))
    )
    expected = f"1 to {MAX_TOKENS} tokens without the stop words, the same twice for one seed"
    return Check("sampling", prompt, expected, f"{first.shown()}, then {second.shown()}", passed)


def _check_log_probs(ask: Ask, subject: Subject) -> Check:
    """One for each token, those of the engine; their sum beside them."""
    prompt, expected = subject.prompts[0], subject.log_probs
    seen = ask(prompt.encode(), max_tokens=[MAX_TOKENS], return_log_probs=[True])
    last = seen.last
    given = last.log_probs or ()
    passed = (
        seen.refusal is None
        and len(given) == last.output_tokens == len(last.tokens or ()) == len(expected)
        and all(value <= 0 for value in given)
        and all(abs(one - other) <= _LOG_PROB_TOLERANCE for one, other in zip(given, expected, strict=True))
        and last.cum_log_prob is not None
        and math.isclose(last.cum_log_prob, sum(given), rel_tol=1e-4, abs_tol=1e-4)
    )
    shown = f"{given} of {last.tokens}, in sum {last.cum_log_prob}" if given else seen.shown()
    return Check("log-probabilities", prompt, f"{expected}, in sum {sum(expected):.4f}", shown, passed)


def _messages(question: str) -> bytes:
    return json.dumps([{"role": "user", "content": question}]).encode()


def _check_chat(ask: Ask, subject: Subject) -> Iterator[Check]:
    """The same question as messages and as a prompt for the chat template."""
    if subject.chat is None:
        yield _check_refused(
            "chat without a template", ask, names="chat template", messages=[_messages("Hello")]
        )
        return
    question, expected = subject.chat
    by_messages = ask(messages=[_messages(question)], max_tokens=[MAX_TOKENS])
    by_template = ask(question.encode(), apply_chat_template=[True], max_tokens=[MAX_TOKENS])
    for name, seen in (("messages", by_messages), ("chat template", by_template)):
        passed = seen.refusal is None and seen.text == expected
        yield Check(name, question, expected, seen.shown(), passed)


def _check_reuse(ask: Ask, subject: Subject) -> Iterator[Check]:
    """The second time, the beginning of a long prompt is not computed again, and the answer is as right."""
    prompt = subject.reusable
    if prompt is None:
        return
    for turn, least in (("first", 0), ("second", 1)):
        seen = ask(prompt.encode(), max_tokens=[MAX_TOKENS], return_perf_metrics=[True])
        reused = seen.last.reused_blocks
        passed = (
            seen.refusal is None
            and reused is not None
            and reused >= least
            and subject.could_answer(prompt, seen.text)
        )
        yield Check(
            f"a long prompt for the {turn} time",
            prompt,
            f"an answer of the engine, at least {least} blocks reused",
            f"{seen.shown()} ({reused} blocks reused)",
            passed,
        )


def _check_refused(name: str, ask: Ask, *prompts: bytes, names: str, **inputs: Sequence[object]) -> Check:
    seen = ask(*prompts, **inputs)
    shown = [
        *(f"{len(prompt)} bytes: {prompt[:24]!r}" for prompt in prompts),
        *(str(inputs) if inputs else "",),
    ]
    passed = (
        seen.refusal is not None
        and seen.status == "INVALID_ARG"
        and names in seen.refusal
        and "Traceback" not in seen.refusal
    )
    expected = f"a refusal as an invalid argument that names {names}"
    return Check(name, " ".join(shown).strip(), expected, seen.shown(), passed)


def _check_empty_prompt(ask: Ask) -> Check:
    """A tokenizer that adds a first token can continue nothing; others cannot. Both are sane, a crash is not."""
    seen = ask(b"", max_tokens=[MAX_TOKENS])
    answered = (
        seen.refusal is None and 1 <= seen.last.output_tokens <= MAX_TOKENS and seen.last.input_tokens >= 1
    )
    refused = seen.status == "INVALID_ARG"
    return Check(
        "empty prompt",
        "''",
        "an answer, or a refusal as an invalid argument",
        seen.shown(),
        answered or refused,
    )


def _check_flood(ask: Ask, subject: Subject) -> Check:
    """More long streams than slots and queue hold, all cancelled: the next request finds a slot and is answered."""
    prompt, room = subject.prompts[0], subject.slots + subject.max_queue_size
    full = subject.max_queue_size > 0 and room + _MORE_THAN_SLOTS <= _MOST_STREAMS
    count = room + _MORE_THAN_SLOTS if full else min(subject.slots, _MOST_AT_ONCE) + _MORE_THAN_SLOTS
    refusals = ask.flood(prompt.encode(), count=count, max_tokens=subject.sequence_limit, wants_refusal=full)
    after = _answer_when_free(ask, prompt)
    as_wanted = (len(refusals) > 0) == full and all(_BUSY in one for one in refusals)
    return Check(
        "more than it can take" if full else "cancelled streams",
        f"{prompt} in {count} streams, cancelled; then once",
        f"{f'a refusal: {_BUSY}; ' if full else ''}then {subject.alone[0]}",
        "; ".join([*refusals, after.shown()]),
        as_wanted and after.refusal is None and _is_right(subject, 0, after.text),
    )


def _answer_when_free(ask: Ask, prompt: str) -> Answer:
    """The answer when the cancelled requests have left the queue, which the model notices between two tokens."""
    deadline_s = time.monotonic() + _LEAVING_S
    while True:
        seen = ask(prompt.encode(), max_tokens=[MAX_TOKENS])
        if seen.status != _BUSY or time.monotonic() > deadline_s:
            return seen
        time.sleep(_LEAVING_S / 1000)

"""Requests of a model that generates text: prompts and answers of wanted lengths, in the model's own dialect."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from enginesmith_client._dialects import OUTPUT_TOKENS, PROMPT_TOKENS, dialect_of
from enginesmith_client._errors import InvalidInput
from enginesmith_client._generate import Options, Question, inputs_from_question, outputs_to_request
from enginesmith_client._messages import InferResult, ModelMetadata
from enginesmith_client.perf._errors import ProfileError
from enginesmith_client.perf.load._prepared import Prepared, TokenCounts
from enginesmith_client.perf.workload._lengths import sample
from enginesmith_client.perf.workload._payload import RefusedError, Subject, Workload
from enginesmith_client.perf.workload._prompts import ASSUMED, WORDS, fit_from_counts, made_prompts
from enginesmith_client.perf.workload._prompts_file import read_prompts

_ASKED_WORDS = (1, 128)
"""Of the prompts that measure how many tokens a word is, and how many every prompt has besides."""
KEPT_OF_TRACE = 4096
"""Requests of a trace that are kept when they are made."""
_TOLERANCE = 0.02


@dataclass(frozen=True)
class _Wanted:
    """One request before it is encoded."""

    prompt: str
    prompt_tokens: int | None
    output_tokens: int


def text_workload(subject: Subject) -> Workload:
    """Prompts as the profile asks for.

    Raises:
        ProfileError: the model cannot do what the profile asks for, or refuses the longest of the prompts.
    """
    maker = _Maker(subject, _streaming(subject))
    wanted, described = _from_file(maker) if subject.requests.prompts_file else _made(maker)
    requests = tuple(maker.prepared(one) for one in wanted)

    @functools.lru_cache(maxsize=KEPT_OF_TRACE)
    def for_lengths(number: int, prompt_tokens: int | None, output_tokens: int | None) -> Prepared:
        base = wanted[number % len(wanted)]
        if prompt_tokens is not None and subject.requests.prompts_file is None:
            rng = np.random.default_rng([subject.seed, 2, number])
            base = maker.made([prompt_tokens], [base.output_tokens], rng=rng, first=number)[0]
        return maker.prepared(replace(base, output_tokens=output_tokens or base.output_tokens))

    return Workload(
        kind="text",
        streaming=maker.streaming,
        counts=maker.counts,
        requests=requests,
        described=described | maker.described(),
        for_lengths=lambda number, due: for_lengths(number, due.prompt_tokens, due.output_tokens),
    )


def counts_of(metadata: ModelMetadata, *, streaming: bool) -> TokenCounts:
    """Where the model says how many tokens there were. ``streaming``: whether it is asked for answers in pieces."""
    known = {tensor.name for tensor in metadata.outputs if tensor.datatype == "INT32"}
    return TokenCounts(
        PROMPT_TOKENS if PROMPT_TOKENS in known else None,
        OUTPUT_TOKENS if OUTPUT_TOKENS in known else None,
        dialect_of(metadata).counts_pieces,
        # A whole answer of a decoupled model is a stream of one response, which is no token.
        pieces_are_tokens=streaming or not metadata.decoupled or OUTPUT_TOKENS in known,
    )


def _streaming(subject: Subject) -> bool:
    """Whether answers come in pieces."""
    wanted = subject.requests.streaming
    if wanted and not subject.metadata.decoupled:
        raise ProfileError(
            f"requests.streaming is true, but model {subject.target.model!r} is not decoupled: it answers once",
            hint="leave out requests.streaming, or measure a model that streams",
        )
    has_stream_input = subject.metadata.input(dialect_of(subject.metadata).stream) is not None
    if wanted is False and subject.metadata.decoupled and not has_stream_input:
        raise ProfileError(
            f"requests.streaming is false, but model {subject.target.model!r} has no input to ask for a whole answer with",
            hint="leave out requests.streaming",
        )
    return subject.metadata.decoupled and wanted is not False


class _Maker:
    """Makes requests of prompts; measures how long prompts are for the model."""

    def __init__(self, subject: Subject, streaming: bool) -> None:
        self.subject = subject
        self.streaming = streaming
        self.counts = counts_of(subject.metadata, streaming=streaming)
        self.fit = ASSUMED
        options = dialect_of(subject.metadata).options
        self.has = {name for name, tensor in options.items() if subject.metadata.input(tensor) is not None}
        if subject.requests.temperature and "temperature" not in self.has:
            raise ProfileError(
                f"requests.temperature is {subject.requests.temperature:g}, but model {subject.target.model!r} has no option temperature",
                hint="leave it out",
            )

    def described(self) -> dict[str, Any]:
        """What the model's options make of the profile."""
        if "max_tokens" not in self.has:
            lengths = "the model has no option max_tokens: it ends its answers where it likes"
        elif "min_tokens" not in self.has:
            lengths = "the model has no option min_tokens: answers may end sooner than asked"
        else:
            lengths = "as asked: min_tokens is max_tokens"
        return {
            "streaming": self.streaming,
            "output_lengths": lengths,
            "temperature": self.subject.requests.temperature if "temperature" in self.has else None,
        }

    def arrays(self, wanted: _Wanted, *, whole: bool = True) -> dict[str, Any]:
        """The inputs of a request; without ``whole`` of one that asks for a single token."""
        tokens = wanted.output_tokens if whole else 1
        options = Options(
            max_tokens=tokens if "max_tokens" in self.has else None,
            min_tokens=tokens if "min_tokens" in self.has else None,
            temperature=self.subject.requests.temperature if "temperature" in self.has else None,
        )
        try:
            return inputs_from_question(
                self.subject.metadata, Question(wanted.prompt, options), streaming=self.streaming
            )
        except InvalidInput as error:
            raise ProfileError(
                f"a profile cannot make requests for this model: {error.message}",
                hint="requests.kind: tensors with requests.tensors_file sends whatever a file holds",
            ) from error

    def prepared(self, wanted: _Wanted) -> Prepared:
        """The request, ready to be sent."""
        made = self.subject.prepared(self.arrays(wanted), outputs=self._outputs())
        return replace(
            made,
            prompt_tokens=wanted.prompt_tokens,
            output_tokens=wanted.output_tokens if "max_tokens" in self.has else None,
            counts=self.counts,
        )

    def made(
        self,
        prompt_tokens: Sequence[int],
        output_tokens: Sequence[int],
        *,
        rng: np.random.Generator | None = None,
        first: int = 0,
    ) -> list[_Wanted]:
        """Prompts of these lengths, about; the same whenever they are made."""
        shared = self.subject.requests.shared_prefix_tokens
        prompts = made_prompts(
            [self.fit.words(tokens) for tokens in prompt_tokens],
            shared_words=self.fit.words(shared) if shared else 0,
            rng=np.random.default_rng([self.subject.seed, 1]) if rng is None else rng,
            first=first,
        )
        return [_Wanted(*one) for one in zip(prompts, prompt_tokens, output_tokens, strict=True)]

    def question(self, prompt_tokens: int) -> _Wanted:
        """A prompt that the run does not send, so that the server keeps nothing of it that would help the run."""
        rng = np.random.default_rng([self.subject.seed, 3])
        return self.made([prompt_tokens], [1], rng=rng, first=len(WORDS) - 1)[0]

    def calibrate(self) -> None:
        """Ask the model how many tokens words are, if it reports that.

        Raises:
            RefusedError: it takes not even short prompts.
        """
        if self.counts.prompt_output is None:
            return
        asked = made_prompts(_ASKED_WORDS, shared_words=0, rng=np.random.default_rng(1))
        counted = [self.count(_Wanted(prompt, None, 1)) for prompt in asked]
        if counted[0] is not None and counted[1] is not None:
            short, long = zip(_ASKED_WORDS, counted, strict=True)
            self.fit = fit_from_counts(short, long) or ASSUMED  # type: ignore[arg-type]

    def count(self, wanted: _Wanted) -> int | None:
        """How many tokens the model says that the prompt has; asks it for a single token of answer.

        Raises:
            RefusedError: the model does not take the prompt.
        """
        answer = self.subject.first_answer(self.arrays(wanted, whole=False), outputs=self._outputs())
        return _counted(answer, self.counts.prompt_output)

    def _outputs(self) -> list[str]:
        return outputs_to_request(self.subject.metadata, Options())


def _counted(answer: InferResult | None, output: str | None) -> int | None:
    if answer is None or output is None or output not in answer.outputs:
        return None
    return int(answer.outputs[output].reshape(-1)[0])


def _made(maker: _Maker) -> tuple[list[_Wanted], dict[str, Any]]:
    """Prompts of our own words, and how they were made."""
    requests, seed = maker.subject.requests, maker.subject.seed
    rng = np.random.default_rng([seed, 0])
    prompt_tokens = sample(requests.prompt_tokens, rng, requests.different)
    output_tokens = sample(requests.output_tokens, rng, requests.different)
    longest = int(np.argmax(prompt_tokens))
    try:
        maker.calibrate()
        question = maker.question(prompt_tokens[longest])
        counted = maker.count(question)
        if counted is not None and maker.fit.measured and _is_off(counted, prompt_tokens[longest]):
            words = len(question.prompt.split())
            maker.fit = replace(maker.fit, per_word=(counted - maker.fit.fixed) / words)
    except RefusedError as error:
        raise _too_long(maker.subject, error, prompt_tokens[longest]) from error
    wanted = maker.made(prompt_tokens, output_tokens)
    described = {
        "prompts": f"made of common English words; {len(wanted)} different ones are gone round in this order, "
        "so a server that keeps the KV cache of longer ago may find one that it has seen",
        "different": len(wanted),
        "tokens_per_word": _rounded(maker.fit.per_word),
        "tokens_of_every_prompt": _rounded(maker.fit.fixed),
        "prompt_lengths": _lengths_words(maker),
        "shared_prefix_tokens": requests.shared_prefix_tokens,
        "longest_prompt_tokens": counted,
    }
    return wanted, described


def _lengths_words(maker: _Maker) -> str:
    if maker.fit.measured:
        return "calibrated by asking the model how many tokens it counts"
    seen = (
        "does not report" if maker.counts.prompt_output is None else "reports a number that does not follow"
    )
    return f"the model {seen} the length of prompts: one token a word is assumed"


def _is_off(counted: int, wanted: int) -> bool:
    return abs(counted - wanted) > max(1.0, _TOLERANCE * wanted)


def _rounded(value: float) -> float:
    return round(value, 4)


def _from_file(maker: _Maker) -> tuple[list[_Wanted], dict[str, Any]]:
    """Prompts of a file, and what is to be said of them."""
    requests = maker.subject.requests
    assert requests.prompts_file is not None, "the caller looked"
    written = read_prompts(requests.prompts_file)
    rng = np.random.default_rng([maker.subject.seed, 0])
    drawn = sample(requests.output_tokens, rng, len(written))
    wanted = [
        _Wanted(line.prompt, None, line.max_tokens or tokens)
        for line, tokens in zip(written, drawn, strict=True)
    ]
    longest = max(wanted, key=lambda one: len(one.prompt))
    try:
        maker.count(longest)
    except RefusedError as error:
        raise ProfileError(
            f"model {maker.subject.target.model!r} refuses the longest prompt of {requests.prompts_file}: {error.words}",
            hint="shorten it (requests.prompts_file)",
        ) from error
    described = {
        "prompts": f"the {len(wanted)} of {requests.prompts_file.name}, gone round in their order",
        "different": len(wanted),
    }
    return wanted, described


def _too_long(subject: Subject, error: RefusedError, prompt_tokens: int) -> ProfileError:
    if not error.refused:
        return ProfileError(
            f"model {subject.target.model!r} failed at its first question, a prompt of about {prompt_tokens} tokens: {error.words}",
            hint="see whether it answers enginesmith_client.Client.generate; the log of the server has the rest",
        )
    return ProfileError(
        f"model {subject.target.model!r} refuses a prompt of about {prompt_tokens} tokens: {error.words}",
        hint="lower requests.prompt_tokens",
    )


def prompt_errors(subject: Subject) -> Callable[[int], str | None]:
    """Tells what the model says to a prompt of so many tokens; None: it takes it."""
    maker = _Maker(subject, _streaming(subject))
    calibrated = False

    def ask(prompt_tokens: int) -> str | None:
        nonlocal calibrated
        try:
            if not calibrated:
                maker.calibrate()
                calibrated = True
            maker.count(maker.question(prompt_tokens))
        except RefusedError as error:
            return error.words
        return None

    return ask

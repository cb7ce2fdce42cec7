"""Makes the profile of a scenario fit a model: what is too long is cut, what is open gets a size, and notes say so.

Knows nothing of suites. How long a sequence may be, a model seldom tells before it is asked too much; so it is asked.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from enginesmith_client.perf._errors import ProfileError
from enginesmith_client.perf._profile import Length, Profile, RequestsPart
from enginesmith_client.perf.workload._embed import text_error
from enginesmith_client.perf.workload._lengths import capped, longest
from enginesmith_client.perf.workload._payload import Kind, Subject
from enginesmith_client.perf.workload._text import prompt_errors

_OPEN_SIZE = 16
"""Of dimensions of any size, where nobody says one."""
_UNBOUNDED = 4096
"""Tokens that are tried of a length without an upper end."""
_MARGIN = 0.99
"""Of a limit, because prompts come within about a percent of the wanted length."""
_STATED_LIMIT = re.compile(r"(?:at most|maximum[a-z ]*(?:is|of)?|exceeds?[a-z ]*) (\d+)", re.IGNORECASE)
_LIMIT_PARAMETERS = ("max_sequence_length", "max_seq_len", "max_model_len")

_STEPS: list[int] = sorted(
    {max(1, 2**power * eighths // 8) for power in range(21) for eighths in range(8, 16)}
)
"""Lengths that are tried: an eighth apart at most."""

Ask = Callable[[int], "str | None"]
"""What the model says against so many tokens; None: it takes them."""


@dataclass(frozen=True)
class Fitted:
    """A profile that the model can serve, and what was changed for that."""

    profile: Profile
    notes: tuple[str, ...] = ()


class Fitting:
    """Fits profiles to one model; what it found out about the model it keeps."""

    def __init__(self, subject: Subject, kind: Kind, config: Mapping[str, Any]) -> None:
        self._subject = subject
        self._kind = kind
        self._limit = _limit_from_config(config)
        self._prompt_error = prompt_errors(subject) if kind == "text" else None
        self._accepted = 0
        """The most tokens that the model is known to take."""

    def fitted(self, profile: Profile) -> Fitted:
        """``profile`` as the model can serve it.

        Raises:
            ProfileError: it refuses even the shortest of texts.
        """
        requests, notes = profile.requests, list[str]()
        if self._kind == "text" and requests.prompts_file is None:
            requests = self._shortened(requests, _most(requests.output_tokens), notes)
        elif self._kind == "embed" and requests.prompts_file is None:
            requests = self._fewer_texts(self._shortened(requests, 0, notes), notes)
        elif self._kind == "tensors" and requests.tensors_file is None:
            requests = self._sized(requests, notes)
        return Fitted(profile.model_copy(update={"requests": requests}), tuple(notes))

    def _shortened(self, requests: RequestsPart, output_tokens: int, notes: list[str]) -> RequestsPart:
        prompt_tokens = _most(requests.prompt_tokens)
        limit = self._limit_for(prompt_tokens + output_tokens)
        if limit is None or prompt_tokens + output_tokens <= limit:
            return requests
        answer = min(output_tokens, limit // 4)
        prompt = max(1, limit - answer)
        notes.append(
            f"prompts are cut to {prompt} tokens (the scenario has up to {prompt_tokens})"
            + (f" and answers to {answer} (up to {output_tokens})" if answer < output_tokens else "")
            + f": the model takes about {limit} in all"
        )
        changed: dict[str, Any] = {
            "prompt_tokens": capped(requests.prompt_tokens, prompt),
            "shared_prefix_tokens": min(requests.shared_prefix_tokens, prompt // 2),
        }
        if answer < output_tokens:
            changed["output_tokens"] = capped(requests.output_tokens, max(1, answer))
        return requests.model_copy(update=changed)

    def _limit_for(self, tokens: int) -> int | None:
        """The longest sequence, once it matters; None while all that was asked for is taken."""
        if self._limit is None and tokens > self._accepted:
            self._limit = longest_accepted(self._ask, tokens)
            self._accepted = max(self._accepted, tokens if self._limit is None else 0)
        return self._limit

    def _ask(self, tokens: int) -> str | None:
        if self._prompt_error is None:
            return text_error(self._subject, tokens)
        # The answer has to fit too, so a prompt as long as both is tried.
        return self._prompt_error(tokens)

    def _fewer_texts(self, requests: RequestsPart, notes: list[str]) -> RequestsPart:
        most = max(1, self._subject.metadata.max_batch_size)
        if requests.texts <= most:
            return requests
        notes.append(
            f"{most} texts in a request (the scenario has {requests.texts}): the model takes no more"
        )
        return requests.model_copy(update={"texts": most})

    def _sized(self, requests: RequestsPart, notes: list[str]) -> RequestsPart:
        metadata = self._subject.metadata
        most = max(1, metadata.max_batch_size)
        rows = min(requests.rows, most)
        if rows < requests.rows:
            notes.append(
                f"{rows} rows in a request (the scenario has {requests.rows}): the model takes no more"
            )
        shapes = dict(requests.shapes)
        required = [tensor for tensor in metadata.inputs if not tensor.optional]
        for tensor in required or ([] if shapes else metadata.inputs[:1]):
            open_shape = tensor.shape[1:] if metadata.max_batch_size else tensor.shape
            if tensor.name not in shapes and (-1 in open_shape or not required):
                shapes[tensor.name] = tuple(_OPEN_SIZE if size == -1 else size for size in open_shape)
                notes.append(
                    f"input {tensor.name} is sent as {list(shapes[tensor.name])} (the model takes {list(open_shape)}); "
                    f"requests.shapes.{tensor.name} chooses another size"
                )
        return requests.model_copy(update={"rows": rows, "shapes": shapes})


def longest_accepted(ask: Ask, wanted: int) -> int | None:
    """About the most tokens that a model takes; None: it takes ``wanted``. Never more than it was seen to take.

    Raises:
        ProfileError: it takes not even one.
    """
    words = ask(wanted)
    if words is None:
        return None
    stated = [int(int(number) * _MARGIN) for number in _STATED_LIMIT.findall(words)]
    for limit in stated:
        if 1 <= limit < wanted and ask(limit) is None:
            return limit
    return _searched(ask, wanted, words)


def _searched(ask: Ask, refused: int, words: str) -> int:
    """The largest of the steps below ``refused`` that is accepted. Steps, so that the same is found from any start."""
    steps = [step for step in _STEPS if step < refused]
    while steps:
        middle = len(steps) // 2
        if ask(steps[middle]) is not None:
            steps = steps[:middle]
        elif middle + 1 == len(steps) or ask(steps[middle + 1]) is not None:
            return steps[middle]
        else:
            steps = steps[middle + 1 :]
    raise ProfileError(f"the model takes not even the shortest text: {words}")


def _most(length: Length) -> int:
    most = longest(length)
    return _UNBOUNDED if most is None else most


def _limit_from_config(config: Mapping[str, Any]) -> int | None:
    parameters = config.get("parameters", {})
    for name in _LIMIT_PARAMETERS:
        value = str(parameters.get(name, {}).get("string_value", ""))
        if value.isdecimal() and int(value) > 0:
            return int(int(value) * _MARGIN)
    return None

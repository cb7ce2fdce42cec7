"""What goes wrong on the fake server, as scripted: each fault counts down and is gone. Pure but for its counters."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from enginesmith_client._errors import TritonClientError
from enginesmith_client._messages import InferReply


@dataclass
class Faults:
    """The faults of one model that are still to come."""

    errors: list[TritonClientError] = field(default_factory=list)
    """The next inferences end with these, one each."""
    breaks: list[int] = field(default_factory=list)
    """The next streams break after so many answers, one each."""
    latency_s: float = 0.0
    """Of every inference, and of each answer of a stream."""

    def next_error(self) -> TritonClientError | None:
        """The error of the inference that comes now."""
        return self.errors.pop(0) if self.errors else None

    def broken(self, answers: Iterator[InferReply], error: TritonClientError) -> Iterator[InferReply]:
        """``answers``, cut by ``error`` where that is scripted."""
        after = self.breaks.pop(0) if self.breaks else None
        return answers if after is None else _cut(answers, after, error)


def _cut(answers: Iterator[InferReply], after: int, error: TritonClientError) -> Iterator[InferReply]:
    for number, answer in enumerate(answers):
        if number == after:
            break
        yield answer
    raise error

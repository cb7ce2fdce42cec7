"""How the next token is chosen from logits: penalties, bans, and greedy choice or a draw.

Self-contained: numpy only. Knows nothing of engines, text or Triton. Cost matters, because every running sequence
chooses once per decoding step: a greedy choice is one ``argmax``, and top-k and top-p sort only what can be kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

Logits = npt.NDArray[np.float32]
_Ids = npt.NDArray[np.intp]

_LEAST_TEMPERATURE = 1e-6
"""Below this, a difference in the last bit of a logit decides; the division would only overflow."""
_BLOCK = 64
_NUCLEUS = 256
"""How many of the likeliest tokens are sorted before top-p sorts all of them."""


class NonFiniteLogitsError(RuntimeError):
    """The engine produced NaN or Inf."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. The defaults are greedy.

    ``end_ids`` are the tokens that end the answer, if not the model's own. ``min_tokens`` keeps them away until that
    many tokens are there. ``bad_words`` are token sequences that must not come about. ``logprobs`` asks for the
    log-probability of each chosen token.
    """

    max_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int = 0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    min_tokens: int = 0
    bad_words: tuple[tuple[int, ...], ...] = ()
    end_ids: frozenset[int] | None = None
    logprobs: bool = False

    def __post_init__(self) -> None:
        allowed = {
            "max_tokens": (self.max_tokens >= 1, "at least 1"),
            "temperature": (0 <= self.temperature <= 100, "from 0 (greedy) to 100"),
            "top_k": (self.top_k >= 0, "at least 0 (0: off)"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1"),
            "repetition_penalty": (0 < self.repetition_penalty <= 100, "above 0 and at most 100"),
            "seed": (self.seed >= 0, "at least 0"),
            "presence_penalty": (abs(self.presence_penalty) <= 100, "from -100 to 100"),
            "frequency_penalty": (abs(self.frequency_penalty) <= 100, "from -100 to 100"),
            "min_tokens": (self.min_tokens >= 0, "at least 0"),
        }
        for name, (valid, text) in allowed.items():
            if not valid:
                raise ValueError(f"{name} is {getattr(self, name)}; allowed: {text}")


@dataclass
class Generation:
    """One waiting, running or finished sequence."""

    prompt: Sequence[int]
    sampling: Sampling
    tokens: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    """``stop`` (end token or stop string), ``length``, or ``error`` (see ``error``); None while it runs."""
    on_token: Callable[[Generation], bool] | None = None
    """Called after every token; returning True ends the sequence (a stop string was found)."""
    random: np.random.Generator = field(init=False)
    end_ids: frozenset[int] = field(init=False, default=frozenset())
    """The tokens that end it. Set when it starts, to the engine's, unless ``sampling`` names others."""
    logprobs: list[float] = field(init=False, default_factory=list)
    """One per token, if they were asked for: of the engine's logits, before penalties and temperature."""
    reused_tokens: int = field(init=False, default=0)
    """How many tokens of the prompt were in the prefix cache."""
    error: RuntimeError | None = field(init=False, default=None)
    """Why it ended with ``error``: ``NonFiniteLogitsError``, or what its runtime raises for one sequence."""
    _history: _History | None = field(init=False, default=None, repr=False)

    def __post_init__(self) -> None:
        self.random = np.random.default_rng(self.sampling.seed)
        self.end_ids = self.sampling.end_ids or frozenset()

    @property
    def length(self) -> int:
        """Tokens in the key/value cache."""
        return len(self.prompt) + len(self.tokens) - 1

    def history(self) -> _History:
        """Which tokens the sequence holds, brought up to date."""
        if self._history is None:
            self._history = _History(self.prompt)
        self._history.catch_up(self.tokens)
        return self._history


class _History:
    """The tokens that a sequence holds.

    ``seen``: each token of prompt and answer once. ``counts``: how often each is in the answer.
    """

    def __init__(self, prompt: Sequence[int]) -> None:
        self.seen = dict.fromkeys(prompt)
        self.counts: dict[int, int] = {}
        self._known = 0

    def catch_up(self, tokens: Sequence[int]) -> None:
        """Take in what ``tokens``, the answer so far, has more than last time."""
        for token in tokens[self._known :]:
            self.seen[token] = None
            self.counts[token] = self.counts.get(token, 0) + 1
        self._known = len(tokens)


def choose_token(logits: Logits, sequence: Generation) -> int:
    """The next token of ``sequence`` for ``logits`` float32 [vocabulary], which are left as they are.

    Raises:
        NonFiniteLogitsError: the largest logit is NaN or infinite.
    """
    sampling = sequence.sampling
    steered = _steered(logits, sequence)
    best = int(np.argmax(steered))  # argmax finds the first NaN, if there is one
    if not math.isfinite(steered[best]):
        seen = len(sequence.prompt) + len(sequence.tokens)
        raise NonFiniteLogitsError(f"the engine produced {steered[best]} after {seen} tokens")
    if sampling.temperature == 0 or sampling.top_k == 1:
        return best
    return _drawn(steered - steered[best], sampling, sequence.random)


def log_probability(logits: Logits, token: int) -> float:
    """The natural logarithm of the softmax of ``logits`` float32 [vocabulary] at ``token``."""
    best = logits.max()
    return float(logits[token] - best) - math.log(float(np.exp(logits - best).sum(dtype=np.float64)))


def _drawn(gaps: Logits, sampling: Sampling, random: np.random.Generator) -> int:
    """A token by its probability; ``gaps`` are the logits less the largest one."""
    order: _Ids | None = _largest(gaps, sampling.top_k) if 0 < sampling.top_k < gaps.size else None
    kept = gaps if order is None else gaps[order]
    weights = np.exp(kept / max(sampling.temperature, _LEAST_TEMPERATURE))
    if sampling.top_p < 1:
        inside = _nucleus(weights, sampling.top_p)
        order, weights = (inside if order is None else order[inside]), weights[inside]
    place = _place_of_share(weights, random.random())
    return place if order is None else int(order[place])


def _place_of_share(weights: npt.NDArray[np.float32], share: float) -> int:
    """Where the running sum of ``weights`` passes ``share`` of the whole; sums of blocks first, then one block."""
    whole = weights.size // _BLOCK * _BLOCK
    sums = weights[:whole].reshape(-1, _BLOCK).sum(axis=1)
    ends = np.cumsum(np.append(sums, weights[whole:].sum()), dtype=np.float64)
    wanted = share * ends[-1]
    block = int(np.searchsorted(ends, wanted, side="right"))
    before = ends[block - 1] if block else 0.0
    start = block * _BLOCK
    inside = np.cumsum(weights[start : start + _BLOCK], dtype=np.float64)
    place = int(np.searchsorted(inside, wanted - before, side="right"))
    # The sum of a block and that of its parts differ in the last bits: never behind the last possible token.
    return start + min(place, int(np.searchsorted(inside, inside[-1])))


def _nucleus(weights: npt.NDArray[np.float32], top_p: float) -> _Ids:
    """The fewest of the likeliest tokens that reach ``top_p`` of the sum, the likeliest first (Holtzman et al. 2020)."""
    wanted = top_p * float(weights.sum(dtype=np.float64))
    for size in (_NUCLEUS, weights.size):
        order = _largest(weights, size)
        order = order[np.argsort(-weights[order], kind="stable")]
        cumulative = np.cumsum(weights[order], dtype=np.float64)
        if cumulative[-1] >= wanted:
            break
    keep = int(np.searchsorted(cumulative, wanted)) + 1
    return order[:keep]


def _largest(values: npt.NDArray[np.float32], count: int) -> _Ids:
    """Where the ``count`` largest of ``values`` are, in ascending order of place.

    The count-th largest maximum of blocks is a floor below which none of them can be, so few values have to be
    compared with each other.
    """
    if count >= values.size:
        return np.arange(values.size)
    blocks = values.size // _BLOCK
    places: _Ids = np.arange(values.size)
    if count <= blocks // 2:
        maxima = values[: blocks * _BLOCK].reshape(blocks, _BLOCK).max(axis=1)
        places = np.flatnonzero(values >= np.partition(maxima, -count)[-count])
    if places.size > count:
        places = np.sort(places[np.argpartition(values[places], -count)[-count:]])
    return places


def _steered(logits: Logits, sequence: Generation) -> Logits:
    """``logits`` with penalties and bans applied; the very array where there are none."""
    sampling = sequence.sampling
    repeated = sampling.repetition_penalty != 1.0
    counted = bool(sampling.presence_penalty or sampling.frequency_penalty)
    too_early = len(sequence.tokens) < sampling.min_tokens and bool(sequence.end_ids)
    if not (repeated or counted or too_early or sampling.bad_words):
        return logits
    steered = logits.copy()
    if repeated:
        _penalize_repetition(steered, sequence, sampling.repetition_penalty)
    if counted:
        counts = sequence.history().counts
        ids = np.fromiter(counts, np.intp, len(counts))
        times = np.fromiter(counts.values(), np.float32, len(counts))
        steered[ids] -= sampling.presence_penalty + sampling.frequency_penalty * times
    if too_early:
        steered[list(sequence.end_ids)] = -np.inf
    for word in sampling.bad_words:
        if _precedes(sequence, word[:-1]):
            steered[word[-1]] = -np.inf
    return steered


def _penalize_repetition(logits: Logits, sequence: Generation, penalty: float) -> None:
    """Keskar et al. 2019 (CTRL): logits of seen tokens are divided by the penalty, or multiplied when negative."""
    seen = sequence.history().seen
    ids = np.fromiter(seen, np.intp, len(seen))
    values = logits[ids]
    logits[ids] = np.where(values > 0, values / penalty, values * penalty)


def _precedes(sequence: Generation, beginning: tuple[int, ...]) -> bool:
    """Whether ``sequence`` ends with ``beginning``; a word may begin in the prompt."""
    if not beginning:
        return True
    recent = sequence.tokens[-len(beginning) :]
    if len(recent) < len(beginning):
        missing = len(beginning) - len(recent)
        recent = [*sequence.prompt[-missing:], *recent]
    return tuple(recent) == beginning

"""Compact scores of teacher-forced logits, and how far two sets of scores are apart.

A language model's logits over thousands of positions are gigabytes; what a comparison needs is kilobytes per
position. ``Scores`` keeps, for each position, the most likely token, the log-probability of the text's own
next token and the logits at k token ids, plus whole rows of logits for the first positions. The ids are the
reference's own top k, so that a candidate is compared where the reference has its mass. numpy only: the
reference step (PyTorch) and the measure step (ONNX Runtime) share this module.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import numpy.typing as npt

TOP_K = 100
"""Token ids per position at which logits are kept."""
FULL_POSITIONS = 64
"""Positions, from the first window's start, whose whole row of logits is kept."""
_ROWS_PER_CHUNK = 64  # float64 temporaries of 64 x vocabulary, not of the whole window.

LogitsOfTokens = Callable[[npt.NDArray[np.int64]], npt.NDArray[np.float32]]
"""Logits float32 [seq, vocab] of token ids int64 [seq]."""


@dataclass(frozen=True)
class Scores:
    """What is kept of the logits of consecutive positions (n of them, over all windows)."""

    top1: npt.NDArray[np.int32]
    """[n] id of the most likely token; the smallest id of equals."""
    logprob: npt.NDArray[np.float64]
    """[n] natural log-probability of the text's own next token."""
    logsumexp: npt.NDArray[np.float64]
    """[n] natural log of the sum of the exponentials of all logits."""
    kept_ids: npt.NDArray[np.int32]
    """[n, k] the token ids at which logits were kept: the reference's k most likely."""
    kept_logits: npt.NDArray[np.float32]
    """[n, k] the logits at ``kept_ids``."""
    full_logits: npt.NDArray[np.float32]
    """[m, vocab] whole rows of the first m positions."""

    def arrays(self, prefix: str = "") -> dict[str, npt.NDArray[np.generic]]:
        """The arrays by name, each with ``prefix``, for ``numpy.savez``."""
        return {prefix + field.name: getattr(self, field.name) for field in fields(self)}

    def first(self, positions: int) -> Scores:
        """The scores of the first ``positions``."""
        return Scores(**{field.name: getattr(self, field.name)[:positions] for field in fields(self)})

    def save(self, path: Path) -> None:
        """Write the arrays to ``path`` (.npz)."""
        np.savez(path, allow_pickle=False, **self.arrays())

    @classmethod
    def load(cls, path: Path, *, prefix: str = "") -> Scores:
        """The scores in the .npz file at ``path``; never unpickles."""
        with np.load(path, allow_pickle=False) as archive:
            return cls(**{field.name: archive[prefix + field.name] for field in fields(cls)})


@dataclass(frozen=True)
class Agreement:
    """How far a candidate's scores are from a reference's. NaN wherever the candidate's logits are NaN."""

    positions: int
    top1_agreement: float
    """Share of positions with the same most likely token."""
    mean_logprob_delta: float
    """Mean |difference| of the log-probability of the text's own next token."""
    max_logit_delta: float
    """Largest |difference| of any compared logit."""
    max_logit_delta_positions: int
    """Positions at which whole rows were compared; at the others, the reference's top k."""


def scores_from_logits(
    logits: npt.NDArray[np.float32],
    targets: npt.NDArray[np.int64],
    *,
    kept_ids: npt.NDArray[np.int32] | None = None,
    full_positions: int = 0,
) -> Scores:
    """The scores of one window: ``logits`` float32 [seq, vocab], ``targets`` int64 [seq] the tokens that follow.

    ``kept_ids`` [seq, k] says at which ids to keep logits; without it, at each position's own top k.
    """
    seq, vocab = logits.shape
    assert targets.shape == (seq,), f"targets {targets.shape} for logits {logits.shape}"
    top_k = min(TOP_K, vocab)
    ids = np.empty((seq, top_k), dtype=np.int32) if kept_ids is None else kept_ids
    logsumexp = np.empty(seq, dtype=np.float64)
    for start in range(0, seq, _ROWS_PER_CHUNK):
        rows = slice(start, start + _ROWS_PER_CHUNK)
        chunk = logits[rows].astype(np.float64)
        peak = chunk.max(axis=1, keepdims=True)
        with np.errstate(invalid="ignore"):  # inf - inf: the NaN is the finding.
            logsumexp[rows] = np.log(np.exp(chunk - peak).sum(axis=1)) + peak[:, 0]
        if kept_ids is None:
            ids[rows] = np.argpartition(chunk, vocab - top_k, axis=1)[:, vocab - top_k :]
    return Scores(
        top1=logits.argmax(axis=1).astype(np.int32),
        logprob=np.where(
            np.isfinite(logsumexp), logits[np.arange(seq), targets] - np.nan_to_num(logsumexp), np.nan
        ),
        logsumexp=logsumexp,
        kept_ids=ids,
        kept_logits=np.take_along_axis(logits, ids.astype(np.int64), axis=1),
        full_logits=logits[:full_positions].copy(),
    )


def scores_of_windows(
    windows: npt.NDArray[np.int64],
    logits_of_tokens: LogitsOfTokens,
    *,
    reference: Scores | None = None,
    on_window: Callable[[int], None] = lambda _done: None,
) -> Scores:
    """The scores of a model on ``windows`` int64 [n, length]: each token but a window's last predicts the next.

    One window's logits are in memory at a time. With ``reference``, logits are kept at the reference's ids, so
    that the result can be compared with it. ``on_window`` is called with the number of windows done.
    """
    positions = windows.shape[1] - 1
    parts = []
    for index, window in enumerate(windows):
        own = slice(index * positions, (index + 1) * positions)
        parts.append(
            scores_from_logits(
                logits_of_tokens(window[:-1]),
                window[1:],
                kept_ids=None if reference is None else reference.kept_ids[own],
                full_positions=FULL_POSITIONS if index == 0 else 0,
            )
        )
        on_window(index + 1)
    return join_scores(parts)


def join_scores(parts: Iterable[Scores]) -> Scores:
    """The scores of consecutive windows as one."""
    listed = list(parts)
    return Scores(
        **{
            field.name: np.concatenate([getattr(part, field.name) for part in listed])
            for field in fields(Scores)
        }
    )


def agreement(reference: Scores, candidate: Scores) -> Agreement:
    """How far ``candidate`` is from ``reference``; both are of the same windows, and the candidate was scored with ``reference=``."""
    assert np.array_equal(reference.kept_ids, candidate.kept_ids), (
        "the candidate was not scored at the reference's ids"
    )
    full = min(len(reference.full_logits), len(candidate.full_logits))
    deltas = (
        np.abs(reference.full_logits[:full].astype(np.float64) - candidate.full_logits[:full]),
        np.abs(reference.kept_logits[full:].astype(np.float64) - candidate.kept_logits[full:]),
    )
    return Agreement(
        positions=len(reference.top1),
        top1_agreement=float(np.mean(reference.top1 == candidate.top1))
        if np.isfinite(candidate.logsumexp).all()
        else float("nan"),
        mean_logprob_delta=float(np.mean(np.abs(reference.logprob - candidate.logprob))),
        # max() would drop a NaN that does not come first; numpy's keeps it.
        max_logit_delta=float(np.max([delta.max() for delta in deltas if delta.size])),
        max_logit_delta_positions=full,
    )


def perplexity(scores: Scores) -> float:
    """exp of the mean negative log-probability of the text's own next token."""
    return float(np.exp(-scores.logprob.mean()))

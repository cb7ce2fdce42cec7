"""How far a graph's outputs are from a reference's, as a few figures.

Used by whatever chooses (sensitivity), reports (measurements) or judges (the gate), so that all of them mean the same.
numpy only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Batches = Array | Sequence[Array]
"""The rows of an output: one array [samples, ...], or one per batch where a dynamic axis differs between them."""

PROBABILITIES = "probabilities"


def agreement(
    reference: Mapping[str, Batches], output: Mapping[str, Batches], *, task: str
) -> dict[str, float]:
    """The figures of ``output`` against ``reference``, both by output name, rows in the same order.

    ``mean_cosine``, ``min_cosine``: over samples, each sample's first output (in ``reference``'s order) flattened. Where that is one number, as a
        reranker's score is, its cosine could only be a sign: the samples are taken as one vector instead.
    ``max_abs_delta``: of any value of any output.
    ``relative_error``: the norm of all differences over the norm of the reference.
    ``top1_agreement`` (task classification): share of samples with the same highest class of the first output; of one
        class, with the same decision.
    ``rank_correlation`` (task reranking): Spearman's, of the first output over samples.

    A figure is not finite where ``output`` is not, or where it is not defined (the rank of equal scores).
    """
    assert reference, "nothing to compare"
    assert set(reference) == set(output), f"{sorted(reference)} against {sorted(output)}"
    pairs = {name: _pairs(reference[name], output[name]) for name in reference}
    first_name = next(iter(reference))
    first = pairs[first_name]
    cosines = np.concatenate([_cosines(wanted, seen) for wanted, seen in first])
    if all(wanted[0].size == 1 for wanted, _ in first):
        cosines = _cosines(*(np.concatenate(side).reshape(1, -1) for side in zip(*first, strict=True)))
    figures = {
        "mean_cosine": float(cosines.mean()),
        "min_cosine": float(cosines.min()),
        **_differences([pair for every in pairs.values() for pair in every]),
    }
    if task == "classification":
        same = [_classes(wanted, first_name) == _classes(seen, first_name) for wanted, seen in first]
        finite = all(np.isfinite(seen).all() for _, seen in first)
        figures["top1_agreement"] = float(np.concatenate(same).mean()) if finite else float("nan")
    if task == "reranking":
        scores = (np.concatenate([rows.reshape(-1) for rows in side]) for side in zip(*first, strict=True))
        figures["rank_correlation"] = spearman(*scores)
    return figures


def spearman(first: Array, second: Array) -> float:
    """Spearman's rank correlation, equal values sharing their mean rank; NaN where all values of a side are equal."""
    if not (np.isfinite(first).all() and np.isfinite(second).all()):
        return float("nan")
    ranks = [_ranks(first), _ranks(second)]
    deviations = [rank - rank.mean() for rank in ranks]
    norm = float(np.linalg.norm(deviations[0]) * np.linalg.norm(deviations[1]))
    return float(deviations[0] @ deviations[1]) / norm if norm else float("nan")


def _pairs(reference: Batches, output: Batches) -> list[tuple[Array, Array]]:
    """Batches of both sides in float64, which neither rounds nor overflows what any tensor holds."""
    wanted = [reference] if isinstance(reference, np.ndarray) else list(reference)
    seen = [output] if isinstance(output, np.ndarray) else list(output)
    shapes = [[batch.shape for batch in side] for side in (wanted, seen)]
    assert shapes[0] == shapes[1], f"shapes {shapes[0]} against {shapes[1]}"
    return [(a.astype(np.float64), b.astype(np.float64)) for a, b in zip(wanted, seen, strict=True)]


def _cosines(reference: Array, output: Array) -> Array:
    """[samples] cosine of each sample; of two vectors of zeros 1, of one and another 0."""
    wanted, seen = (rows.reshape(len(rows), -1) for rows in (reference, output))
    norms = np.linalg.norm(wanted, axis=1) * np.linalg.norm(seen, axis=1)
    with np.errstate(invalid="ignore"):  # inf * 0: the NaN is the finding.
        products = np.einsum("ij,ij->i", wanted, seen)
    both_zero = ~wanted.any(axis=1) & ~seen.any(axis=1)
    defined = np.isfinite(products) & np.isfinite(norms) & (norms != 0)
    cosines: Array = np.where(np.isfinite(products), both_zero.astype(np.float64), np.nan)
    np.divide(products, norms, out=cosines, where=defined)
    return cosines.clip(-1, 1)


def _differences(pairs: Sequence[tuple[Array, Array]]) -> dict[str, float]:
    with np.errstate(invalid="ignore"):  # inf - inf: the NaN is the finding.
        deltas = [seen - wanted for wanted, seen in pairs]
    squares = sum(float(np.square(delta).sum()) for delta in deltas)
    reference_squares = sum(float(np.square(wanted).sum()) for wanted, _ in pairs)
    if reference_squares:
        relative = float(np.sqrt(squares / reference_squares))
    else:
        relative = 0.0 if squares == 0 else float("inf")
    # max() would drop a NaN that does not come first; numpy's keeps it.
    return {
        "max_abs_delta": float(np.max([np.abs(delta).max() for delta in deltas])),
        "relative_error": relative,
    }


def _classes(rows: Array, name: str) -> Array:
    """[samples] the highest class; of one class, whether it is more likely than not."""
    if rows.shape[-1] == 1:
        chosen: Array = rows.reshape(len(rows), -1)[:, 0] > (0.5 if name == PROBABILITIES else 0.0)
        return chosen
    highest: Array = rows.reshape(len(rows), -1).argmax(axis=1)
    return highest


def _ranks(values: Array) -> Array:
    """[n] ranks from 0, equal values sharing their mean."""
    _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts) - 1
    means: Array = last - (counts - 1) / 2
    return means[places]

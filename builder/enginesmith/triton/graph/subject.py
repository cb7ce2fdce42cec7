"""What a rehearsed deployment should answer: its own samples, computed in this process without a server.

A row alone and the same row in company may differ in the last bits, both right: kernels add in another order for other
batch sizes, and an INT8 activation may turn such a bit into another integer. How far a right answer may be from another
is measured here, on the engine itself.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from enginesmith.errors import StoreError
from enginesmith.triton.graph.configs import TEXT, TEXT_PAIR, reads_pairs
from enginesmith.triton.graph.deployment import Deployment
from enginesmith.triton.graph.package import TEXT_FILE
from enginesmith.triton.graph.warmup import read_batches
from enginesmith.triton.models.graph_onnxruntime.graph_runtime import GraphRuntime

Array = npt.NDArray[Any]
ASKED_ROWS = 6
_SMALLEST_TOLERANCE = 1e-4
_LARGEST_TOLERANCE = 0.1
_MARGIN = 3.0
_MASK = "attention_mask"


class Subject:
    """The samples of a deployment and the right answers to them."""

    def __init__(self, deployment: Deployment, *, engine: Path, samples: Path, package: Path) -> None:
        """``package`` has the tokenization stage, if the deployment takes text."""
        self.deployment = deployment
        target_threads = getattr(deployment.target, "threads", 0)
        self._runtime = GraphRuntime(engine, target_threads)
        batches = read_batches(samples)
        self.batch = {name: array[: deployment.serving.max_batch_size] for name, array in batches[0].items()}
        """Rows for one request that has several."""
        rows = [_without_padding(batch, index) for batch in batches for index in range(_rows(batch))]
        chosen = _spread_by_size(rows)
        self.requests: tuple[Mapping[str, Array], ...] = tuple(rows[index] for index in chosen)
        """One row each, of different lengths where the samples have them."""
        self.longest_sample = max(next(iter(row.values())).shape[-1] for row in rows)
        """In tokens; samples of that length may have been cut."""
        self.texts: tuple[tuple[str, ...], ...] = ()
        """The text, or the two, of each of ``requests``; none where no text is served."""
        if deployment.text:
            texts = _read_texts(samples, pairs=reads_pairs(deployment.signature))
            self.texts = tuple(texts[index] for index in chosen)
        self.package = package
        self.scales = self._scales()
        self.tolerance = self._tolerance()

    def answer(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """The right outputs."""
        return self._runtime.run(inputs)

    def text_inputs(self, texts: Sequence[tuple[str, ...]]) -> dict[str, Array]:
        """What the tokenization stage should make of ``texts``, as its own code makes it in this process.

        Raises:
            TextRefusedError: a text cannot be served.
        """
        from enginesmith.triton.models.graph_tokenizer.graph_text import GraphText

        text = GraphText(self.package / self.deployment.tokenizer_name / "1")
        pairs = [one[1] for one in texts] if text.pairs else None
        return text.inputs(text.encode([one[0] for one in texts], pairs))

    @property
    def text_limit(self) -> int:
        """The longest text in tokens, as the package says."""
        settings = self.package / self.deployment.tokenizer_name / "1" / TEXT_FILE
        return int(json.loads(settings.read_text(encoding="utf-8"))["max_length"])

    def text_request(self, texts: Sequence[tuple[str | bytes, ...]]) -> dict[str, Array]:
        """``texts`` as the text model takes them, one row each."""
        names = (TEXT, TEXT_PAIR) if reads_pairs(self.deployment.signature) else (TEXT,)
        columns = {name: [[_bytes(one[place])] for one in texts] for place, name in enumerate(names)}
        return {name: np.array(rows, np.object_) for name, rows in columns.items()}

    def distance(self, seen: Mapping[str, Array], right: Mapping[str, Array]) -> float:
        """How far ``seen`` is from ``right``: the worst row's norm of the difference over a typical row's norm.

        Infinite where names, dtypes or shapes differ, or a value is not finite.
        """
        if set(seen) != set(right):
            return float("inf")
        worst = 0.0
        for name, array in right.items():
            other = seen[name]
            if other.shape != array.shape or other.dtype != array.dtype:
                return float("inf")
            difference = other.astype(np.float64) - array.astype(np.float64)
            norms = np.linalg.norm(difference.reshape(len(difference), -1), axis=1)
            largest = float(norms.max(initial=0.0)) / self.scales[name]
            worst = max(worst, largest if np.isfinite(largest) else float("inf"))
        return worst

    def _scales(self) -> dict[str, float]:
        answers = [self.answer(request) for request in self.requests]
        return {
            name: max(
                float(np.mean([np.linalg.norm(one[name].astype(np.float64)) for one in answers])), 1e-12
            )
            for name in answers[0]
        }

    def _tolerance(self) -> float:
        """A few times what company changes, within limits beyond which it is an error."""
        most = self.deployment.serving.max_batch_size
        together = self._runtime.run_requests(self.requests[:most])
        company = max(
            self.distance(seen, self.answer(request))
            for seen, request in zip(together, self.requests, strict=False)
        )
        return min(max(_SMALLEST_TOLERANCE, _MARGIN * company), _LARGEST_TOLERANCE)


def _without_padding(batch: Mapping[str, Array], index: int) -> dict[str, Array]:
    """One row of ``batch`` as a request of its own."""
    row = {name: array[index : index + 1] for name, array in batch.items()}
    if _MASK not in row:
        return row
    length = int(row[_MASK].sum())
    return {name: np.ascontiguousarray(array[:, :length]) for name, array in row.items()}


def _spread_by_size(rows: Sequence[Mapping[str, Array]]) -> list[int]:
    """Indices of a few rows, from the smallest to the largest."""
    ordered = sorted(range(len(rows)), key=lambda index: sum(array.size for array in rows[index].values()))
    places = np.linspace(0, len(ordered) - 1, min(ASKED_ROWS, len(ordered)))
    return [ordered[int(place)] for place in places]


def _read_texts(samples: Path, *, pairs: bool) -> list[tuple[str, ...]]:
    path = samples / "texts.json"
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        return (
            [tuple(pair) for pair in document["pairs"]] if pairs else [(text,) for text in document["texts"]]
        )
    except (OSError, ValueError, KeyError) as error:
        raise StoreError(f"cannot read {path}: {error}", hint="build again") from error


def _bytes(text: str | bytes) -> bytes:
    return text if isinstance(text, bytes) else text.encode()


def _rows(batch: Mapping[str, Array]) -> int:
    return len(next(iter(batch.values())))

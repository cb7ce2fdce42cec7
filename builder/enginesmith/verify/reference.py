"""The ``reference`` step: PyTorch's scores of a checkpoint on fixed token windows.

Engines are measured against two of these: the reference of the quantized checkpoint (ModelOpt's own
fake-quantization code on the stored integers) says whether the lowering is exact, that of the unquantized
checkpoint says what quantization costs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from enginesmith import heap
from enginesmith.corpora import corpus_sha256, load_documents, token_windows
from enginesmith.errors import GateError
from enginesmith.steps import StepContext
from enginesmith.verify.scores import Scores, perplexity, scores_of_windows

REFERENCE_FILE = "reference.npz"


def run(context: StepContext) -> Mapping[str, Any]:
    """Write ``reference.npz``: ``windows`` int64 [n, window] and the scores of them.

    Raises:
        SourceError: the corpus or the checkpoint cannot be used.
        GateError: the model's own logits are not finite.
    """
    params = context.params
    corpus_path = (params.get("location") or {}).get("corpus_path")
    documents = load_documents(params["corpus"], Path(corpus_path) if corpus_path else None)
    windows = token_windows(
        documents,
        context.inputs["tokenizer"],
        # The last token of a window is predicted but predicts nothing.
        count=math.ceil(params["tokens"] / (params["window"] - 1)),
        length=params["window"],
        seed=params["seed"],
    )
    context.progress(0.0, "loading the model")
    scores = scores_of_checkpoint(
        context.inputs["checkpoint"],
        windows,
        on_window=lambda done: context.progress(done / len(windows), f"window {done} of {len(windows)}"),
    )
    np.savez(context.out / REFERENCE_FILE, windows=windows, **scores.arrays())
    return {
        "positions": len(scores.top1),
        "perplexity": perplexity(scores),
        "corpus_sha256": corpus_sha256(documents),
    }


def load_reference(directory: Path) -> tuple[npt.NDArray[np.int64], Scores]:
    """The windows int64 [n, window] and the scores in the artifact of a reference step."""
    path = directory / REFERENCE_FILE
    with np.load(path, allow_pickle=False) as archive:
        windows = archive["windows"]
    return windows, Scores.load(path)


def scores_of_checkpoint(
    checkpoint: Path, windows: npt.NDArray[np.int64], *, on_window: Callable[[int], None] = lambda _done: None
) -> Scores:
    """PyTorch's scores of the (quantized or unquantized) ``checkpoint`` on ``windows``."""
    import torch

    from enginesmith.torch_models import load_model, third_party_warnings

    heap.map_large_blocks()
    model = load_model(checkpoint)
    _fold_weights(model)
    heap.reuse_large_blocks()

    def logits_of_tokens(tokens: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        output = model(input_ids=torch.from_numpy(tokens)[None], use_cache=False)
        logits: npt.NDArray[np.float32] = output.logits[0].numpy()
        heap.trim()
        return logits

    with torch.inference_mode(), third_party_warnings():
        scores = scores_of_windows(windows, logits_of_tokens, on_window=on_window)
    if not np.isfinite(scores.logsumexp).all():
        position = int(np.flatnonzero(~np.isfinite(scores.logsumexp))[0])
        raise GateError(
            f"PyTorch's logits of {checkpoint} are not finite at {int((~np.isfinite(scores.logsumexp)).sum())} of "
            f"{len(scores.logsumexp)} positions, first at position {position}",
            hint="the checkpoint itself holds NaN or overflowing weights; check its source",
        )
    return scores


def _fold_weights(model: Any) -> None:
    """Apply the weight quantizers once, in place, by ModelOpt's own code; otherwise each window would again."""
    if not any(hasattr(module, "weight_quantizer") for module in model.modules()):
        return
    import modelopt.torch.quantization as mtq

    from enginesmith.torch_models import third_party_warnings

    with third_party_warnings():
        mtq.fold_weight(model)

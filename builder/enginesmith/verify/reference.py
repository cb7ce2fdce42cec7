"""The ``reference`` step: PyTorch's scores of a checkpoint on fixed token windows.

Engines are measured against two of these: the reference of the quantized checkpoint (ModelOpt's own
fake-quantization code on the stored integers) says whether the lowering is exact, that of the unquantized
checkpoint says what quantization costs.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from enginesmith import heap
from enginesmith.corpora import corpus_sha256, load_documents, token_windows
from enginesmith.errors import GateError
from enginesmith.steps import StepContext
from enginesmith.verify.scores import Agreement, Scores, agreement, perplexity, scores_of_windows

REFERENCE_FILE = "reference.npz"
NOISE_FILE = "noise.json"
NOISE_WINDOWS = 3
"""Windows on which PyTorch is compared with itself."""
_LAST_BIT = 2.0**-23


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
    model = _load(context.inputs["checkpoint"])
    scores = _finite_scores(
        model,
        windows,
        context.inputs["checkpoint"],
        on_window=lambda done: context.progress(done / len(windows), f"window {done} of {len(windows)}"),
    )
    np.savez(context.out / REFERENCE_FILE, windows=windows, **scores.arrays())
    noise = rounding_noise(model, windows[:NOISE_WINDOWS], scores) if _rounds_activations(model) else None
    (context.out / NOISE_FILE).write_text(json.dumps(noise and asdict(noise)) + "\n", encoding="utf-8")
    return {
        "positions": len(scores.top1),
        "perplexity": perplexity(scores),
        "corpus_sha256": corpus_sha256(documents),
        "noise": noise and asdict(noise),
    }


def load_reference(directory: Path) -> tuple[npt.NDArray[np.int64], Scores]:
    """The windows int64 [n, window] and the scores in the artifact of a reference step."""
    path = directory / REFERENCE_FILE
    with np.load(path, allow_pickle=False) as archive:
        windows = archive["windows"]
    return windows, Scores.load(path)


def load_noise(directory: Path) -> dict[str, Any] | None:
    """How far PyTorch is from itself under rounding noise (an ``Agreement``), where that was measured."""
    noise: dict[str, Any] | None = json.loads((directory / NOISE_FILE).read_text(encoding="utf-8"))
    return noise


def scores_of_checkpoint(checkpoint: Path, windows: npt.NDArray[np.int64]) -> Scores:
    """PyTorch's scores of the (quantized or unquantized) ``checkpoint`` on ``windows``."""
    return _finite_scores(_load(checkpoint), windows, checkpoint, on_window=lambda _done: None)


def rounding_noise(model: Any, windows: npt.NDArray[np.int64], reference: Scores) -> Agreement:
    """How far ``model`` is from itself when the output of every layer changes in its last bit.

    Rounding activations to a static grid is discontinuous: a value near the middle of two steps goes to the other one
    when a sum is added in another order, and the layers behind multiply the difference. Two correct implementations in
    FP32 cannot agree better than this; a wrong one agrees worse.
    """
    import torch

    generator = torch.Generator().manual_seed(0)

    def disturb(_module: Any, _inputs: Any, output: Any) -> Any:
        hidden, *rest = output if isinstance(output, tuple) else (output,)
        hidden = hidden * (1 + _LAST_BIT * torch.randn(hidden.shape, generator=generator))
        return (hidden, *rest) if isinstance(output, tuple) else hidden

    hooks = [layer.register_forward_hook(disturb) for layer in model.model.layers]
    first = reference.first(windows.shape[0] * (windows.shape[1] - 1))
    try:
        return agreement(first, _scores(model, windows, reference=first))
    finally:
        for hook in hooks:
            hook.remove()


def _load(checkpoint: Path) -> Any:
    from enginesmith.torch_models import load_model

    heap.map_large_blocks()
    model = load_model(checkpoint)
    _fold_weights(model)
    heap.reuse_large_blocks()
    return model


def _scores(
    model: Any,
    windows: npt.NDArray[np.int64],
    *,
    reference: Scores | None = None,
    on_window: Callable[[int], None] = lambda _done: None,
) -> Scores:
    import torch

    from enginesmith.torch_models import third_party_warnings

    def logits_of_tokens(tokens: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        output = model(input_ids=torch.from_numpy(tokens)[None], use_cache=False)
        logits: npt.NDArray[np.float32] = output.logits[0].numpy()
        heap.trim()
        return logits

    with torch.inference_mode(), third_party_warnings():
        return scores_of_windows(windows, logits_of_tokens, reference=reference, on_window=on_window)


def _finite_scores(
    model: Any, windows: npt.NDArray[np.int64], checkpoint: Path, *, on_window: Callable[[int], None]
) -> Scores:
    scores = _scores(model, windows, on_window=on_window)
    bad = ~np.isfinite(scores.logsumexp)
    if bad.any():
        raise GateError(
            f"PyTorch's logits of {checkpoint} are not finite at {int(bad.sum())} of {len(bad)} positions, "
            f"first at position {int(np.flatnonzero(bad)[0])}",
            hint="the checkpoint itself holds NaN or overflowing weights; check its source",
        )
    return scores


def _rounds_activations(model: Any) -> bool:
    """Whether any layer quantizes its input."""
    quantizers = (getattr(module, "input_quantizer", None) for module in model.modules())
    return any(quantizer is not None and quantizer.is_enabled for quantizer in quantizers)


def _fold_weights(model: Any) -> None:
    """Apply the weight quantizers once, in place, by ModelOpt's own code; otherwise each window would again."""
    if not any(hasattr(module, "weight_quantizer") for module in model.modules()):
        return
    import modelopt.torch.quantization as mtq

    from enginesmith.torch_models import third_party_warnings

    with third_party_warnings():
        mtq.fold_weight(model)

"""The ``measure`` step: the engine that will be served, against the PyTorch references, and under probes.

Three comparisons, each of which answers its own question:

``exact``      the engine in exact mode (FP32 activations) against PyTorch on the same integers: is the lowering right?
``fast_cost``  the engine as served against exact mode: what does the runtime's own approximation cost?
``quality``    the engine as served against the unquantized model: what does the variant cost altogether?

Probes generate text and look for NaN, Inf and repetition. Nothing is judged here; ``enginesmith.verify.gate`` does.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from enginesmith.steps import StepContext
from enginesmith.triton.models.llm_onnxruntime.llm_runtime import (
    NonFiniteLogitsError,
    Runtime,
    Sampling,
    create_session,
)
from enginesmith.triton.models.llm_onnxruntime.llm_text import Text
from enginesmith.verify.reference import load_noise, load_reference
from enginesmith.verify.scores import LogitsOfTokens, Scores, agreement, perplexity, scores_of_windows
from enginesmith.verify.verdict import MEASUREMENTS_FILE

PROBES = (
    "What is gravity?",
    "Write a short story about a lighthouse keeper.",
    "List three uses of copper.",
)
"""Questions put to every engine: explanation, open-ended prose and enumeration degenerate in different ways."""
_PROBE_CAPACITY = 512


def run(context: StepContext) -> Mapping[str, Any]:
    """Write ``measurements.json``; the facts are the same figures."""
    directory = context.inputs["engine"]
    engine = json.loads((directory / "engine.json").read_text())
    windows, reference = load_reference(context.inputs["reference"])
    _, baseline = load_reference(context.inputs["baseline"])
    approximates = _approximates(engine)
    passes = 2 if approximates else 1
    exact = _scores(directory, "exact.onnx", engine, windows, reference, _share(context, 0, passes))
    served = (
        _scores(directory, "model.onnx", engine, windows, reference, _share(context, 1, passes))
        if approximates
        else exact
    )
    measurements: dict[str, Any] = {
        "quant_algo": engine["quant_algo"],
        "exact": asdict(agreement(reference, exact)),
        "noise": load_noise(context.inputs["reference"]),
        "fast_cost": _closeness(exact, served) if approximates else None,
        "quality": _closeness(baseline, served) | _perplexities(baseline, served),
        "perplexity": perplexity(served),
        "exact_perplexity": perplexity(exact),
        "reference_perplexity": perplexity(reference),
        "baseline_perplexity": perplexity(baseline),
        "probes": _probe(directory, context.inputs["checkpoint"], tokens=int(context.params["probe_tokens"])),
    }
    (context.out / MEASUREMENTS_FILE).write_text(json.dumps(measurements, indent=2) + "\n", encoding="utf-8")
    return measurements | {"top1_agreement": measurements["quality"]["top1_agreement"]}


def _approximates(engine: Mapping[str, Any]) -> bool:
    """Whether the served graph computes differently from the exact one."""
    return bool(engine["accuracy_level"] != 1 or engine["int8_head"])


def _share(context: StepContext, index: int, passes: int) -> Callable[[float], None]:
    def report(fraction: float) -> None:
        context.progress((index + fraction) / (passes + 1), "comparing logits")

    return report


def _scores(
    directory: Path,
    graph: str,
    engine: Mapping[str, Any],
    windows: npt.NDArray[np.int64],
    reference: Scores,
    report: Callable[[float], None],
) -> Scores:
    logits_of_tokens = teacher_forced(directory / graph, engine)
    return scores_of_windows(
        windows, logits_of_tokens, reference=reference, on_window=lambda done: report(done / len(windows))
    )


def teacher_forced(graph: Path, engine: Mapping[str, Any]) -> LogitsOfTokens:
    """A function from token ids int64 [seq] to the engine's logits float32 [seq, vocab]."""
    session = create_session(graph, dict(engine), threads=0)
    empty = np.zeros((1, engine["kv_heads"], 0, engine["head_dim"]), np.float32)
    caches = {
        f"past_key_values.{layer}.{part}": empty
        for layer in range(engine["layers"])
        for part in ("key", "value")
    }

    def logits_of_tokens(tokens: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        feed = {"input_ids": tokens[None], "attention_mask": np.ones((1, len(tokens)), np.int64), **caches}
        logits: npt.NDArray[np.float32] = session.run(["logits"], feed)[0][0]
        return logits

    return logits_of_tokens


def _closeness(reference: Scores, candidate: Scores) -> dict[str, float]:
    finite = bool(np.isfinite(candidate.logsumexp).all())
    return {
        "top1_agreement": float(np.mean(reference.top1 == candidate.top1)) if finite else float("nan"),
        "mean_logprob_delta": float(np.mean(np.abs(reference.logprob - candidate.logprob))),
    }


def _perplexities(baseline: Scores, served: Scores) -> dict[str, float]:
    return {
        "perplexity": perplexity(served),
        "baseline_perplexity": perplexity(baseline),
        "perplexity_increase": perplexity(served) / perplexity(baseline) - 1,
    }


def _probe(directory: Path, checkpoint: Path, *, tokens: int) -> list[dict[str, Any]]:
    text = Text(checkpoint)
    prompts = [
        text.encode(text.as_chat(probe) if text.has_chat_template else probe, chat=text.has_chat_template)
        for probe in PROBES
    ]
    engine = json.loads((directory / "engine.json").read_text())
    capacity = min(engine["max_positions"], max(_PROBE_CAPACITY, max(map(len, prompts)) + tokens + 1))
    runtime = Runtime(directory, slots=1, capacity=capacity)
    results = []
    for probe, prompt in zip(PROBES, prompts, strict=True):
        finite, generated = True, []
        try:
            generated = runtime.generate([prompt], Sampling(max_tokens=tokens))[0].tokens
        except NonFiniteLogitsError:
            finite = False
            runtime.clear()
        results.append(
            {
                "prompt": probe,
                "tokens": len(generated),
                "finite": finite,
                "longest_repeated_run": max(
                    (len(list(run)) for _, run in itertools.groupby(generated)), default=0
                ),
                "text": text.decode(generated),
            }
        )
    return results

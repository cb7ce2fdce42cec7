"""The engine over onnxruntime-genai by itself: tokens per second with so many sequences at once, without a server.

Run by ``gpu.py`` in the environment that it installed. Also writes the package that tritonserver is to serve. The last line
of stdout is what goes to ``--out``.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import queue
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from figures import exit_status, say
from machine import load_average, machine, versions

from enginesmith.triton.genai import GenaiLimits, write_package
from enginesmith.triton.models.llm_genai.llm_genai import GenaiEngine
from enginesmith.triton.models.llm_onnxruntime.llm_batching import Job, Update
from enginesmith.triton.models.llm_onnxruntime.llm_pieces import AnswerText
from enginesmith.triton.models.llm_onnxruntime.llm_sampling import Generation, Sampling
from enginesmith.triton.models.llm_onnxruntime.llm_text import Text

PROMPTS = (
    "The history of bread begins",
    "A ship that leaves the harbour before dawn",
    "Explain to a child why the sky is blue.",
    "Three ways to sort a list of numbers are",
)
_PATIENCE_S = 300.0


def generate(
    engine: GenaiEngine, updates: queue.SimpleQueue[Sequence[Update]], text: Text, *, count: int, tokens: int
) -> tuple[list[list[int]], float, float]:
    """``count`` greedy answers of ``tokens`` tokens at once: their tokens, seconds in all, seconds to the last first token.

    Raises:
        RuntimeError: one of them failed.
    """
    jobs = [_job(text, PROMPTS[place % len(PROMPTS)], tokens) for place in range(count)]
    begun_s = time.perf_counter()
    engine.submit(jobs)
    missing = set(jobs)
    while missing:
        for update in updates.get(timeout=_PATIENCE_S):
            if update.failure is not None:
                raise RuntimeError(update.message)
            if update.last:
                missing.discard(update.job)
    seconds = time.perf_counter() - begun_s
    first_s = max((job.first_token_ns - job.arrived_ns) / 1e9 for job in jobs)
    return [job.generation.tokens for job in jobs], seconds, first_s


def _job(text: Text, prompt: str, tokens: int) -> Job:
    # No end token may shorten an answer: every row generates the same number.
    sampling = Sampling(max_tokens=tokens, min_tokens=tokens)
    return Job(Generation(text.encode(prompt), sampling), AnswerText(text.decode))


def measure(given: argparse.Namespace) -> dict[str, Any]:
    """Figures for every number of sequences, and how many greedy answers company changes."""
    text = Text(given.tokenizer)
    levels, tokens = ((1, 4), 16) if given.quick else ((1, 4, 16, 64), 256)
    updates: queue.SimpleQueue[Sequence[Update]] = queue.SimpleQueue()
    begun_s = time.perf_counter()
    engine = GenaiEngine(given.model, updates.put, slots=max(levels), capacity=given.limits.capacity)
    load_s = time.perf_counter() - begun_s
    try:
        alone = [
            generate(engine, updates, text, count=1, tokens=tokens)[0][0] for _ in range(2)
        ]  # Warms up, too.
        rows = []
        for count in levels:
            answers, seconds, first_s = generate(engine, updates, text, count=count, tokens=tokens)
            same = [answer == alone[0] for answer in answers[:: len(PROMPTS)]]
            rows.append(
                {
                    "sequences": count,
                    "tokens_per_s": round(count * tokens / seconds, 1),
                    "slowest_first_token_ms": round(1e3 * first_s, 2),
                    "answers_like_alone": f"{sum(same)} of {len(same)}",
                }
            )
            say(str(rows[-1]))
    finally:
        engine.close()
    return {"load_s": round(load_s, 2), "tokens_per_answer": tokens, "at_once": rows}


def run(given: argparse.Namespace) -> int:
    """Write the package, measure, and keep what was found."""
    given.limits = GenaiLimits(slots=4) if given.quick else GenaiLimits(slots=64, reuse_tokens=16384)
    write_package(
        given.repository, given.name, model=given.model, checkpoint=given.tokenizer, limits=given.limits
    )
    load = load_average()
    found = measure(given) | {
        "machine": machine(),
        "versions": versions() | _runtimes(),
        "load_average_before": load,
    }
    given.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(found))
    return 0


def _runtimes() -> dict[str, str]:
    """The distributions that generate; which of them are there depends on the machine."""
    found = {}
    for name in ("onnxruntime-gpu", "onnxruntime-genai-cuda", "onnxruntime-genai"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def main() -> int:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("model", "tokenizer", "repository", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--name", required=True)
    parser.add_argument("--quick", action="store_true")
    return exit_status(lambda: run(parser.parse_args()))


if __name__ == "__main__":
    sys.exit(main())

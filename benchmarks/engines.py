"""Decoding speed of every variant's engine, without a server: one sequence, and batches.

Each round measures every engine once, so that slow changes of the machine touch all of them alike. Ratios are taken
within a round. The peers are the FP32 engine of the same model and, where an interpreter with llama-cpp-python is
given, llama.cpp on the GGUF file that the model came from: same prompt, same number of tokens, same threads.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from figures import (
    Bar,
    Outcome,
    Spread,
    bar_of_spread,
    print_table,
    run_benchmark,
    say,
    spread_of,
    spread_of_ratios,
)
from peers import LlamaPeer, gguf_of
from releases import Project, Release, add_project_options, baseline_of, project_from, published_releases

from enginesmith.demo import LOAD_QUESTIONS
from enginesmith.triton.models.llm_onnxruntime.llm_runtime import Generation, Runtime, Sampling
from enginesmith.triton.models.llm_onnxruntime.llm_text import Text

MIN_SPEEDUP: Mapping[str, float] = {"int4_awq": 3.0, "int8_wo": 2.3, "int8_sq": 1.5}
"""Single-stream decoding against the FP32 engine, by scheme."""
MIN_LLAMA_SPEEDUP: Mapping[str, float] = {"int4_awq": 1.2}
"""Single-stream decoding against llama.cpp, by scheme."""
BATCHES = (1, 4, 8, 16)
WARM_STEPS = 8


@dataclass(frozen=True)
class Settings:
    """How long and how often to measure."""

    rounds: int
    steps: int
    batch_rounds: int
    batch_steps: int


RECORD = Settings(rounds=9, steps=96, batch_rounds=2, batch_steps=48)
QUICK = Settings(rounds=2, steps=24, batch_rounds=1, batch_steps=12)


class Engine:
    """One release's engine, loaded with the limits and threads that it is served with."""

    def __init__(self, release: Release) -> None:
        self.release = release
        self.name = release.variant
        serving = release.serving
        self.threads = serving["threads"] or os.cpu_count() or 1
        self._runtime = Runtime(
            release.directory,
            slots=max(BATCHES),
            capacity=serving["max_sequence_length"],
            threads=serving["threads"],
        )
        self.accuracy_level = self._runtime.engine["accuracy_level"]

    def decode_tokens_per_s(self, prompts: Sequence[Sequence[int]], *, steps: int) -> float:
        """Tokens per second of ``steps`` decoding steps of all ``prompts`` at once; their prefill is not timed."""
        sampling = Sampling(max_tokens=WARM_STEPS + steps + 1)
        for prompt in prompts:
            self._runtime.start(Generation(prompt, sampling))
        # Sequences are not retired at an end-of-text token, so every engine decodes the same number of tokens.
        for _ in range(WARM_STEPS):
            self._runtime.step()
        started_s = time.perf_counter()
        for _ in range(steps):
            self._runtime.step()
        elapsed_s = time.perf_counter() - started_s
        self._runtime.clear()
        return len(prompts) * steps / elapsed_s


def measure(project: Project, *, llama_python: Path | None, gguf: Path | None) -> Outcome:
    """Load all engines, measure them in turn, compare."""
    settings = QUICK if project.quick else RECORD
    releases = published_releases(project)
    baseline = baseline_of(releases).variant
    engines = [Engine(release) for release in releases]
    prompts = _prompts(releases[0])
    with ExitStack() as stack:
        peer = _llama(project, stack, python=llama_python, gguf=gguf, engine=engines[0])
        single, llama = _measure_single(engines, prompts[0], settings, peer)
        programs = {"llama-cpp-python": str(peer.description["version"])} if peer else {}
    batched = _measure_batched(engines, prompts, settings)
    speedups = {name: spread_of_ratios(speeds, single[baseline]) for name, speeds in single.items()}
    against_llama = (
        {name: spread_of_ratios(speeds, llama) for name, speeds in single.items()} if llama else {}
    )
    figures = {
        "variants": {
            engine.name: {
                "scheme": engine.release.scheme,
                "accuracy_level": engine.accuracy_level,
                "single_tokens_per_s": spread_of(single[engine.name]),
                "against_fp32": speedups[engine.name],
                "against_llama_cpp": against_llama.get(engine.name),
                "batched_tokens_per_s": batched[engine.name],
            }
            for engine in engines
        },
        "llama_cpp": {"single_tokens_per_s": spread_of(llama), "system": peer.description["system"]}
        if llama and peer
        else None,
    }
    _show(figures)
    described = _settings(settings, prompts, engines[0], baseline)
    return Outcome("engines", described, figures, _bars(releases, speedups, against_llama), programs)


def _measure_single(
    engines: Sequence[Engine], prompt: Sequence[int], settings: Settings, peer: LlamaPeer | None
) -> tuple[dict[str, list[float]], list[float]]:
    """Tokens per second of every round: by variant, and llama.cpp's."""
    single: dict[str, list[float]] = {engine.name: [] for engine in engines}
    llama: list[float] = []
    # Round 0 warms every engine up and is not kept.
    for number in range(settings.rounds + 1):
        say(f"one sequence: round {number}/{settings.rounds}")
        for engine in engines:
            speed = engine.decode_tokens_per_s([prompt], steps=settings.steps)
            if number:
                single[engine.name].append(speed)
        if peer:
            speed = peer.decode_tokens_per_s(prompt, warm_steps=WARM_STEPS, steps=settings.steps)
            if number:
                llama.append(speed)
    return single, llama


def _measure_batched(
    engines: Sequence[Engine], prompts: Sequence[Sequence[int]], settings: Settings
) -> dict[str, dict[str, Spread]]:
    """Tokens per second of all slots together, by variant and number of slots."""
    speeds: dict[tuple[str, int], list[float]] = {}
    for number in range(1, settings.batch_rounds + 1):
        say(f"batches of {', '.join(map(str, BATCHES))}: round {number}/{settings.batch_rounds}")
        for batch in BATCHES:
            rows = [prompts[index % len(prompts)] for index in range(batch)]
            for engine in engines:
                speed = engine.decode_tokens_per_s(rows, steps=settings.batch_steps)
                speeds.setdefault((engine.name, batch), []).append(speed)
    return {
        engine.name: {str(batch): spread_of(speeds[engine.name, batch]) for batch in BATCHES}
        for engine in engines
    }


def _llama(
    project: Project, stack: ExitStack, *, python: Path | None, gguf: Path | None, engine: Engine
) -> LlamaPeer | None:
    """The peer, or None with a line that says why it is left out."""
    if python is None:
        say("llama.cpp is left out: give --llama-python, an interpreter that has llama-cpp-python")
        return None
    directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="enginesmith-bench-")))
    path = gguf or gguf_of(project.spec, directory)
    if path is None:
        say("llama.cpp is left out: the model does not come from a GGUF file; give one with --gguf")
        return None
    context = int(engine.release.serving["max_sequence_length"])
    return stack.enter_context(LlamaPeer(python, path, threads=engine.threads, context=context))


def _prompts(release: Release) -> list[list[int]]:
    text = Text(release.directory)
    return [
        text.encode(
            text.as_chat(question) if text.has_chat_template else question, chat=text.has_chat_template
        )
        for question in LOAD_QUESTIONS
    ]


def _settings(
    settings: Settings, prompts: Sequence[Sequence[int]], engine: Engine, baseline: str
) -> dict[str, Any]:
    return {
        "rounds": settings.rounds,
        "decoded_tokens": settings.steps,
        "batch_rounds": settings.batch_rounds,
        "batch_decoded_tokens": settings.batch_steps,
        "warm_tokens": WARM_STEPS,
        "prompt_tokens": [len(prompt) for prompt in prompts],
        "threads": engine.threads,
        "peer": f"{baseline}: unquantized, FP32",
    }


def _bars(
    releases: Sequence[Release], speedups: Mapping[str, Spread], against_llama: Mapping[str, Spread]
) -> list[Bar]:
    return [
        bar_of_spread(
            f"{release.variant}: tokens/s against {peer}",
            spreads.get(release.variant),
            relation="at least",
            limit=limits[release.scheme],
        )
        for peer, limits, spreads in (
            ("FP32", MIN_SPEEDUP, speedups),
            ("llama.cpp", MIN_LLAMA_SPEEDUP, against_llama),
        )
        for release in releases
        if release.scheme in limits
    ]


def _show(figures: Mapping[str, Any]) -> None:
    headings = [
        "variant",
        "tokens/s x1",
        "x FP32",
        "x llama.cpp",
        *(f"tokens/s x{batch}" for batch in BATCHES),
    ]
    rows = [
        [
            name,
            str(figure["single_tokens_per_s"]),
            str(figure["against_fp32"]),
            str(figure["against_llama_cpp"] or "-"),
            *(f"{figure['batched_tokens_per_s'][str(batch)].median:.1f}" for batch in BATCHES),
        ]
        for name, figure in figures["variants"].items()
    ]
    if figures["llama_cpp"]:
        rows.append(["llama.cpp", str(figures["llama_cpp"]["single_tokens_per_s"])])
    print_table(
        "decoding speed: median (lowest-highest); batches: median, all slots together", headings, rows
    )


def main() -> int:
    """Measure as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_project_options(parser)
    parser.add_argument(
        "--llama-python", type=Path, metavar="PATH", help="a Python interpreter with llama-cpp-python"
    )
    parser.add_argument(
        "--gguf", type=Path, metavar="FILE", help="what llama.cpp runs [the model's own source]"
    )
    given = parser.parse_args()
    return run_benchmark(
        lambda: measure(project_from(given), llama_python=given.llama_python, gguf=given.gguf)
    )


if __name__ == "__main__":
    sys.exit(main())

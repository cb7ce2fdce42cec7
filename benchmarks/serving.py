"""Throughput through a real tritonserver, measured with perf_analyzer, beside the raw runtime.

Each variant is served alone from the published repository. A round measures, one after the other: the server with one
stream in flight, the runtime with the same prompts one at a time, the server with 16 streams in flight, the runtime with
the same prompts, 16 slots. Answers are greedy and equally long, so tokens per second follow from requests per second; both
sides include prefill and every token of the answer. Every token is a response of its own.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
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
from releases import Project, Release, add_project_options, project_from, published_releases

from enginesmith.errors import OperatorError
from enginesmith.triton.models.llm_onnxruntime.llm_runtime import Runtime, Sampling
from enginesmith.triton.models.llm_onnxruntime.llm_text import Text
from enginesmith.triton.server import TritonServer
from enginesmith_client import Client
from enginesmith_client.perf.perf_analyzer._measure import (
    PerfAnalyzer,
    Question,
    find_perf_analyzer,
    input_data_from_rows,
    run_perf_analyzer,
)

MIN_BATCHING_GAIN = 2.8
"""Throughput at the larger concurrency against that at 1."""
MIN_SHARE_OF_RUNTIME = 0.9
"""Throughput of the server against that of the runtime at the same batch size."""
CONCURRENCIES = (1, 16)
MAX_S = 600.0
"""Of one measurement."""
PROMPTS = (
    "The history of the printing press begins in the city of",
    "Once upon a time, in a village between two rivers, there lived",
    "A bicycle stays upright because the rider and the wheels",
    "The most important thing to know about growing tomatoes is",
    "In the middle of the night the lighthouse keeper heard",
    "Water boils at a lower temperature on a mountain because",
    "The first railway between the two cities was opened in",
    "To repair a wooden chair, begin by looking at the joints and",
    "The difference between a comet and an asteroid is that",
    "Every morning the baker got up before sunrise in order to",
    "When the ship finally reached the harbour, the sailors",
    "The human heart has four chambers, and each of them",
    "A good map of the mountains shows the traveller where",
    "The old library was quiet, and on the highest shelf there",
    "Glass is made by heating sand together with soda until",
    "The river flows from the hills in the north down to",
)
"""Beginnings that the models continue at length. They are sent without the chat template, which asks for an end."""


@dataclass(frozen=True)
class Settings:
    """How long and how often to measure."""

    rounds: int
    answer_tokens: int
    single_requests: int
    waves: int
    """Requests of the batched measurement, in multiples of the concurrency."""

    def requests(self, concurrency: int) -> int:
        """Requests of one measurement."""
        return self.single_requests if concurrency == 1 else self.waves * concurrency


RECORD = Settings(rounds=3, answer_tokens=48, single_requests=3, waves=2)
QUICK = Settings(rounds=1, answer_tokens=16, single_requests=2, waves=1)


@dataclass(frozen=True)
class Round:
    """Answer tokens per second of one round, by concurrency."""

    served: Mapping[int, float]
    runtime: Mapping[int, float]
    first_token_ms: Mapping[int, float]
    """Median time from the request to the first token through the server."""


def measure(project: Project) -> Outcome:
    """Every variant in turn, each behind a server of its own."""
    settings = QUICK if project.quick else RECORD
    tool = find_perf_analyzer()
    figures: dict[str, Any] = {}
    bars: list[Bar] = []
    programs = {"perf_analyzer": tool.version()}
    for release in published_releases(project):
        with (
            tempfile.TemporaryDirectory(prefix="enginesmith-bench-") as directory,
            TritonServer(project.repository, model_control="explicit", load_models=[release.model]) as server,
            Client(server.grpc_url, timeout_s=600) as client,
        ):
            server.wait_ready()
            programs["tritonserver"] = server.server_version()
            bench = _Bench(release, client, server.grpc_url, settings, tool, Path(directory))
            rounds = bench.rounds()
        figures[release.variant] = _figures(rounds, bench.prompts)
        bars += _bars(release.variant, figures[release.variant])
    _show(figures)
    described = {
        "rounds": settings.rounds,
        "answer_tokens": settings.answer_tokens,
        "requests": {str(concurrency): settings.requests(concurrency) for concurrency in CONCURRENCIES},
    }
    return Outcome("serving", described, {"variants": figures}, bars, programs)


class _Bench:
    """One release behind a server, and the same engine in this process."""

    def __init__(
        self,
        release: Release,
        client: Client,
        grpc_url: str,
        settings: Settings,
        tool: PerfAnalyzer,
        directory: Path,
    ) -> None:
        self._model, self._client, self._grpc_url = release.model, client, grpc_url
        self._settings, self._tool, self._directory = settings, tool, directory
        self._text = Text(release.directory)
        self._runtime = Runtime(
            release.directory,
            slots=release.serving["max_batch_size"],
            capacity=release.serving["max_sequence_length"],
            threads=release.serving["threads"],
        )
        self.prompts = self._lasting_prompts()

    def rounds(self) -> list[Round]:
        """Measure as often as the settings say."""
        rounds = []
        for number in range(1, self._settings.rounds + 1):
            say(f"{self._model}: round {number}/{self._settings.rounds}")
            served, runtime, first_token_ms = {}, {}, {}
            for concurrency in CONCURRENCIES:
                served[concurrency], first_token_ms[concurrency] = self._serve(concurrency)
                runtime[concurrency] = self._run(concurrency)
            rounds.append(Round(served, runtime, first_token_ms))
        return rounds

    def _lasting_prompts(self) -> list[str]:
        """The prompts whose answers reach the full length, from the server and from the runtime.

        Raises:
            OperatorError: fewer than a handful do, so lengths could not be equal.
        """
        tokens = self._settings.answer_tokens
        generations = self._runtime.generate(
            [self._text.encode(prompt) for prompt in PROMPTS], Sampling(max_tokens=tokens)
        )
        lasting = [
            prompt
            for prompt, generation in zip(PROMPTS, generations, strict=True)
            if len(generation.tokens) == tokens
            and self._client.generate(self._model, prompt, max_tokens=tokens).output_tokens == tokens
        ]
        if len(lasting) < len(PROMPTS) // 2:
            raise OperatorError(
                f"{self._model} ends {len(PROMPTS) - len(lasting)} of {len(PROMPTS)} answers before {tokens} tokens",
                hint="add prompts to PROMPTS that it continues for longer, or measure shorter answers",
            )
        return lasting

    def _serve(self, concurrency: int) -> tuple[float, float]:
        """Answer tokens per second through the server, and the median time to the first in milliseconds."""
        tokens = self._settings.answer_tokens
        rows: list[dict[str, Sequence[str | int | bool]]] = [
            {"text_input": [prompt], "max_tokens": [tokens], "stream": [True]} for prompt in self.prompts
        ]
        result = run_perf_analyzer(
            Question(
                self._model,
                self._grpc_url,
                input_data_from_rows(rows),
                concurrency,
                streaming=True,
                request_count=self._settings.requests(concurrency),
                max_s=MAX_S,
            ),
            directory=self._directory,
            tool=self._tool,
        )
        waits_ms = [(record.ttft_ns or 0) / 1e6 for record in result.records]
        return result.rows_per_s * tokens, statistics.median(waits_ms)

    def _run(self, batch: int) -> float:
        """Answer tokens per second of the runtime, for the requests that perf_analyzer sends."""
        count, tokens = self._settings.requests(batch), self._settings.answer_tokens
        ids = [self._text.encode(self.prompts[index % len(self.prompts)]) for index in range(count)]
        produced = 0
        started_s = time.perf_counter()
        for first in range(0, count, batch):
            generations = self._runtime.generate(ids[first : first + batch], Sampling(max_tokens=tokens))
            produced += sum(len(generation.tokens) for generation in generations)
        return produced / (time.perf_counter() - started_s)


def _figures(rounds: Sequence[Round], prompts: Sequence[str]) -> dict[str, Any]:
    small, large = CONCURRENCIES
    served = {concurrency: [one.served[concurrency] for one in rounds] for concurrency in CONCURRENCIES}
    runtime = {concurrency: [one.runtime[concurrency] for one in rounds] for concurrency in CONCURRENCIES}
    return {
        "prompts": len(prompts),
        "served_tokens_per_s": {str(at): spread_of(speeds) for at, speeds in served.items()},
        "runtime_tokens_per_s": {str(at): spread_of(speeds) for at, speeds in runtime.items()},
        "batching_gain": spread_of_ratios(served[large], served[small]),
        "share_of_runtime": {str(at): spread_of_ratios(served[at], runtime[at]) for at in CONCURRENCIES},
        "first_token_ms": {
            str(at): spread_of([one.first_token_ms[at] for one in rounds]) for at in CONCURRENCIES
        },
    }


def _bars(variant: str, figures: Mapping[str, Any]) -> list[Bar]:
    large = CONCURRENCIES[-1]
    gain: Spread = figures["batching_gain"]
    share: Spread = figures["share_of_runtime"][str(large)]
    return [
        bar_of_spread(
            f"{variant}: throughput at {large} in flight against 1",
            gain,
            relation="at least",
            limit=MIN_BATCHING_GAIN,
        ),
        bar_of_spread(
            f"{variant}: throughput at {large} against the runtime",
            share,
            relation="at least",
            limit=MIN_SHARE_OF_RUNTIME,
        ),
    ]


def _show(figures: Mapping[str, Any]) -> None:
    headings = ["variant"]
    for at in CONCURRENCIES:
        headings += [f"served x{at}", f"runtime x{at}", "share"]
    headings += ["gain", *(f"first token x{at}" for at in CONCURRENCIES)]
    rows = []
    for name, figure in figures.items():
        row = [name]
        for key in map(str, CONCURRENCIES):
            served, runtime = figure["served_tokens_per_s"][key], figure["runtime_tokens_per_s"][key]
            row += [
                f"{served.median:.1f}",
                f"{runtime.median:.1f}",
                f"{figure['share_of_runtime'][key].median:.0%}",
            ]
        waits = [f"{figure['first_token_ms'][str(at)].median:.0f} ms" for at in CONCURRENCIES]
        rows.append([*row, str(figure["batching_gain"]), *waits])
    print_table("answer tokens per second through tritonserver: medians", headings, rows)


def main() -> int:
    """Measure as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_project_options(parser)
    given = parser.parse_args()
    return run_benchmark(lambda: measure(project_from(given)))


if __name__ == "__main__":
    sys.exit(main())

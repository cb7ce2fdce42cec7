"""Streams of a served language model: throughput, time to first token, reuse of a shared prompt.

One variant behind a real tritonserver, asked over gRPC by the asynchronous client. Each round measures one after the
other: one stream, sixteen at once, onnxruntime-genai's ``Generator`` with a batch of sixteen over the same graph and
weights; then a short request on an idle server and while eight long ones generate; then prompts with and without a
shared beginning of 512 tokens. Ratios are taken within a round.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from figures import Bar, Outcome, bar_of_spread, print_table, run_benchmark, say, spread_of, spread_of_ratios
from genai_peer import GenAiPeer
from releases import Project, Release, add_project_options, project_from, published_releases
from serving import PROMPTS

from enginesmith.triton.models.llm_onnxruntime.llm_runtime import Runtime, Sampling
from enginesmith.triton.models.llm_onnxruntime.llm_text import Text
from enginesmith.triton.server import TritonServer
from enginesmith_client import AsyncClient

STREAMS = 16
LONG_STREAMS = 8
SHARED_TOKENS = 512
MIN_STREAMING_GAIN = 3.5
"""Tokens per second of sixteen streams against one."""
MIN_AGAINST_GENAI = 1.4
"""Tokens per second of sixteen streams through Triton against a batch of sixteen in onnxruntime-genai."""
MAX_BUSY_TTFT = 3.0
"""Time to first token of a short request among eight long ones, against that on an idle server."""
MAX_REUSED_TTFT = 0.35
"""Time to first token with a shared beginning that was seen before, against one that was not."""


@dataclass(frozen=True)
class Settings:
    """How long and how often to measure."""

    rounds: int
    answer_tokens: int
    probes: int
    """Requests whose time to first token is taken, per round and kind; the median of them counts."""


RECORD = Settings(rounds=5, answer_tokens=96, probes=5)
QUICK = Settings(rounds=1, answer_tokens=24, probes=2)


@dataclass
class Rounds:
    """What was measured, one entry per round."""

    single: list[float] = field(default_factory=list)
    many: list[float] = field(default_factory=list)
    genai: list[float] = field(default_factory=list)
    idle_ttft_s: list[float] = field(default_factory=list)
    busy_ttft_s: list[float] = field(default_factory=list)
    fresh_ttft_s: list[float] = field(default_factory=list)
    reused_ttft_s: list[float] = field(default_factory=list)
    equal: list[int] = field(default_factory=list)
    """Of the sixteen streamed answers, how many are what the engine generates for that prompt alone."""


def measure(project: Project) -> Outcome:
    """The first chosen variant; the bars were set for the 4-bit one."""
    settings = QUICK if project.quick else RECORD
    release = next(iter(published_releases(project)))
    with (
        tempfile.TemporaryDirectory(prefix="enginesmith-bench-") as directory,
        TritonServer(project.repository, model_control="explicit", load_models=[release.model]) as server,
    ):
        server.wait_ready()
        peer = GenAiPeer(
            release.directory,
            Path(directory),
            threads=release.serving["threads"] or os.cpu_count() or 1,
            capacity=release.serving["max_sequence_length"],
        )
        rounds = asyncio.run(_Bench(release, server.grpc_url, settings, peer).measure())
        programs = {"tritonserver": server.server_version(), "onnxruntime-genai": peer.version}
    _show(rounds)
    described = {
        "variant": release.variant,
        "streams": STREAMS,
        "long_streams": LONG_STREAMS,
        "shared_tokens": SHARED_TOKENS,
        "rounds": settings.rounds,
        "answer_tokens": settings.answer_tokens,
        "probes": settings.probes,
    }
    return Outcome("streaming", described, _figures(rounds), _bars(release.variant, rounds), programs)


class _Bench:
    """One served release, its engine in this process, and the peer."""

    def __init__(self, release: Release, grpc_url: str, settings: Settings, peer: GenAiPeer) -> None:
        self._model, self._grpc_url, self._settings, self._peer = release.model, grpc_url, settings, peer
        self._text = Text(release.directory)
        self._ids = [self._text.encode(prompt) for prompt in PROMPTS]
        self._expected = _greedy_alone(release, self._text, self._ids, settings.answer_tokens)
        self._fresh = 0

    async def measure(self) -> Rounds:
        """As many rounds as the settings say, after one that does not count."""
        rounds = Rounds()
        async with AsyncClient(self._grpc_url, timeout_s=600) as client:
            await self._streams(client, PROMPTS[:1])
            for number in range(1, self._settings.rounds + 1):
                say(f"{self._model}: round {number}/{self._settings.rounds}")
                await self._throughput(client, rounds)
                await self._first_tokens(client, rounds)
                await self._reuse(client, rounds)
        return rounds

    async def _throughput(self, client: AsyncClient, rounds: Rounds) -> None:
        rounds.single.append((await self._streams(client, PROMPTS[:1]))[0])
        speed, answers = await self._streams(client, PROMPTS[:STREAMS])
        rounds.many.append(speed)
        rounds.equal.append(sum(map(str.__eq__, answers, self._expected)))
        rounds.genai.append(
            self._peer.decode_tokens_per_s(self._ids[:STREAMS], tokens=self._settings.answer_tokens)
        )

    async def _first_tokens(self, client: AsyncClient, rounds: Rounds) -> None:
        idle = [await self._ttft_s(client, PROMPTS[0]) for _ in range(self._settings.probes)]
        stopped = asyncio.Event()
        begun = asyncio.Semaphore(0)
        busy = [
            asyncio.create_task(self._long(client, prompt, begun, stopped))
            for prompt in PROMPTS[:LONG_STREAMS]
        ]
        try:
            for _ in busy:
                await begun.acquire()
            among = [await self._ttft_s(client, PROMPTS[0]) for _ in range(self._settings.probes)]
        finally:
            stopped.set()
            await asyncio.gather(*busy)
        rounds.idle_ttft_s.append(statistics.median(idle))
        rounds.busy_ttft_s.append(statistics.median(among))

    async def _reuse(self, client: AsyncClient, rounds: Rounds) -> None:
        """Every fresh beginning is unlike all before; a reused one was sent once before its time is taken."""
        fresh, reused = [], []
        for number in range(self._settings.probes):
            shared = self._beginning()
            fresh.append(await self._ttft_s(client, shared + " What is the first point?"))
            reused.append(await self._ttft_s(client, f"{shared} Tell me about item {number}."))
        rounds.fresh_ttft_s.append(statistics.median(fresh))
        rounds.reused_ttft_s.append(statistics.median(reused))

    async def _streams(self, client: AsyncClient, prompts: Sequence[str]) -> tuple[float, list[str]]:
        """Tokens per second of one stream per prompt, all begun at once, and their texts."""
        tokens = self._settings.answer_tokens
        started_s = time.perf_counter()
        answers = await asyncio.gather(*(self._answer(client, prompt, tokens) for prompt in prompts))
        return tokens * len(prompts) / (time.perf_counter() - started_s), list(answers)

    async def _answer(self, client: AsyncClient, prompt: str, tokens: int) -> str:
        # min_tokens keeps the end of text from shortening an answer.
        stream = client.stream(self._model, prompt, max_tokens=tokens, min_tokens=tokens)
        text = "".join([delta.text async for delta in stream])
        assert stream.generation is not None
        assert stream.generation.output_tokens == tokens, stream.generation
        return text

    async def _ttft_s(self, client: AsyncClient, prompt: str) -> float:
        """Seconds from the call to the first piece of text."""
        started_s = time.perf_counter()
        first_s = 0.0
        async for delta in client.stream(self._model, prompt, max_tokens=4, min_tokens=4):
            if not first_s and delta.output_tokens:
                first_s = time.perf_counter() - started_s
        return first_s

    async def _long(
        self, client: AsyncClient, prompt: str, begun: asyncio.Semaphore, stopped: asyncio.Event
    ) -> None:
        """Long answers, one after the other, until told to stop; ``begun`` is released at the first piece."""
        first = True
        while not stopped.is_set():
            stream = client.stream(self._model, prompt, max_tokens=400, min_tokens=400)
            async for _ in stream:
                if first:
                    begun.release()
                    first = False
                if stopped.is_set():
                    await stream.close()
                    return

    def _beginning(self) -> str:
        """A text of about ``SHARED_TOKENS`` tokens whose first tokens no text before it had."""
        self._fresh += 1
        words = f"Document {self._fresh}. " + " ".join(
            f"Item {number}: the {self._fresh + number} boats carry grain over the river."
            for number in range(64)
        )
        return self._text.decode(self._text.encode(words)[:SHARED_TOKENS])


def _greedy_alone(release: Release, text: Text, prompts: Sequence[Sequence[int]], tokens: int) -> list[str]:
    """What the engine, as it is served, generates for each prompt by itself."""
    runtime = Runtime(
        release.directory,
        slots=2,
        capacity=release.serving["max_sequence_length"],
        threads=release.serving["threads"],
        batch_invariant=release.serving["batch_invariant"],
    )
    sampling = Sampling(max_tokens=tokens, min_tokens=tokens)
    return [text.decode(runtime.generate([ids], sampling)[0].tokens) for ids in prompts]


def _figures(rounds: Rounds) -> dict[str, Any]:
    return {
        "single_tokens_per_s": spread_of(rounds.single),
        "streams_tokens_per_s": spread_of(rounds.many),
        "genai_tokens_per_s": spread_of(rounds.genai),
        "idle_ttft_s": spread_of(rounds.idle_ttft_s),
        "busy_ttft_s": spread_of(rounds.busy_ttft_s),
        "fresh_prefix_ttft_s": spread_of(rounds.fresh_ttft_s),
        "reused_prefix_ttft_s": spread_of(rounds.reused_ttft_s),
        "equal_to_unbatched": spread_of(rounds.equal),
    }


def _bars(variant: str, rounds: Rounds) -> list[Bar]:
    gain = spread_of_ratios(rounds.many, rounds.single)
    against = spread_of_ratios(rounds.many, rounds.genai)
    busy = spread_of_ratios(rounds.busy_ttft_s, rounds.idle_ttft_s)
    reused = spread_of_ratios(rounds.reused_ttft_s, rounds.fresh_ttft_s)
    return [
        bar_of_spread(
            f"{variant}: tokens/s of {STREAMS} streams against 1",
            gain,
            relation="at least",
            limit=MIN_STREAMING_GAIN,
        ),
        bar_of_spread(
            f"{variant}: {STREAMS} streams against onnxruntime-genai's Generator",
            against,
            relation="at least",
            limit=MIN_AGAINST_GENAI,
        ),
        bar_of_spread(
            f"{variant}: streamed answers equal to unbatched greedy decoding",
            spread_of(rounds.equal),
            relation="at least",
            limit=STREAMS,
            unit="",
        ),
        bar_of_spread(
            f"{variant}: first token among {LONG_STREAMS} long streams against idle",
            busy,
            relation="at most",
            limit=MAX_BUSY_TTFT,
        ),
        bar_of_spread(
            f"{variant}: first token with a shared prompt of {SHARED_TOKENS} tokens against without",
            reused,
            relation="at most",
            limit=MAX_REUSED_TTFT,
        ),
    ]


def _show(rounds: Rounds) -> None:
    rows = [
        ("tokens/s, 1 stream", str(spread_of(rounds.single))),
        (f"tokens/s, {STREAMS} streams", str(spread_of(rounds.many))),
        (f"tokens/s, onnxruntime-genai, batch {STREAMS}", str(spread_of(rounds.genai))),
        ("time to first token, idle, s", str(spread_of(rounds.idle_ttft_s))),
        (f"time to first token, {LONG_STREAMS} long streams, s", str(spread_of(rounds.busy_ttft_s))),
        ("time to first token, new prompt, s", str(spread_of(rounds.fresh_ttft_s))),
        ("time to first token, shared prompt, s", str(spread_of(rounds.reused_ttft_s))),
    ]
    print_table("streams", ("", "median (range)"), rows)


def main() -> int:
    """Measure as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_project_options(parser)
    given = parser.parse_args()
    given.variant = given.variant or ["int4-awq"]
    return run_benchmark(lambda: measure(project_from(given)))


if __name__ == "__main__":
    sys.exit(main())

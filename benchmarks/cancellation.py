"""What a cancelled stream still costs: tokens generated after the caller left, and time until its slot is free.

One variant behind a real tritonserver, every slot taken by a long stream. One stream after the other is closed in the
middle of its answer. The model's own metrics say how many tokens it generated for the answer that ended, and when the
slot was free; both are compared with what the caller had read and with the time between two tokens just before.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import statistics
import sys
import time
import urllib.request
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from figures import Bar, Outcome, print_table, run_benchmark, say, spread_of
from releases import Project, Release, add_project_options, project_from, published_releases
from serving import PROMPTS

from enginesmith.triton.server import TritonServer
from enginesmith_client import AsyncClient, AsyncTextStream, Cancelled

MAX_TOKENS_AFTER = 2.0
MAX_TOKEN_TIMES = 2.0
"""From the call of ``close`` to the free slot, in times between two tokens of the same stream."""
WARM_TOKENS = 8
"""Tokens of a stream over which its time per token is taken."""
TIMEOUT_S = 300.0


@dataclass
class Reader:
    """One stream and when its tokens came."""

    stream: AsyncTextStream
    came_s: list[float] = field(default_factory=list)
    tokens: int = 0
    cancelled: bool = False
    grown: asyncio.Event = field(default_factory=asyncio.Event)

    async def read(self) -> None:
        """Read until the stream is closed."""
        try:
            async for piece in self.stream:
                self.tokens = piece.output_tokens or self.tokens
                self.came_s.append(time.perf_counter())
                self.grown.set()
        except Cancelled:
            self.cancelled = True

    async def token_s(self) -> float:
        """The median time between two of the next tokens."""
        first = len(self.came_s)
        while len(self.came_s) < first + WARM_TOKENS:
            self.grown.clear()
            await self.grown.wait()
        came_s = self.came_s[first:]
        return statistics.median(later - earlier for earlier, later in itertools.pairwise(came_s))


@dataclass
class Samples:
    """One entry per cancelled stream."""

    running: list[int] = field(default_factory=list)
    tokens_after: list[float] = field(default_factory=list)
    freed_s: list[float] = field(default_factory=list)
    token_s: list[float] = field(default_factory=list)

    @property
    def token_times(self) -> list[float]:
        """Until the slot was free, in times between two tokens."""
        return [freed / token for freed, token in zip(self.freed_s, self.token_s, strict=True)]


@dataclass(frozen=True)
class Metrics:
    """The served model's own counts, read from Triton's ``/metrics``."""

    url: str
    model: str

    async def read(self, name: str) -> int:
        """A metric of the model: ``running``, ``slots``, ``output_tokens_total``."""
        return await asyncio.to_thread(self._read, name)

    def _read(self, name: str) -> int:
        with urllib.request.urlopen(self.url, timeout=10) as answer:
            text = answer.read().decode()
        for line in text.splitlines():
            if line.startswith(f"enginesmith_llm_{name}{{") and f'model="{self.model}"' in line:
                return int(float(line.rsplit(" ", 1)[1]))
        raise ValueError(f"{self.model} has no metric {name}")


@asynccontextmanager
async def every_slot_taken(
    client: AsyncClient, metrics: Metrics, *, max_tokens: int
) -> AsyncIterator[list[Reader]]:
    """A long stream in every slot, each past its first token."""
    slots = await metrics.read("slots")
    options = {"max_tokens": max_tokens, "min_tokens": max_tokens, "temperature": 0.0}
    streams = [
        client.stream(metrics.model, PROMPTS[number % len(PROMPTS)], **options)  # type: ignore[arg-type]
        for number in range(slots)
    ]
    readers = [Reader(stream) for stream in streams]
    tasks = [asyncio.create_task(reader.read()) for reader in readers]
    for reader in readers:
        await reader.grown.wait()
    try:
        yield readers
    finally:
        for stream in streams:
            await stream.close()
        await asyncio.gather(*tasks)


async def cancel_one(reader: Reader, metrics: Metrics, samples: Samples) -> None:
    """Close one stream and wait until the model has noticed."""
    token_s = await reader.token_s()
    running = await metrics.read("running")
    ended_tokens = await metrics.read("output_tokens_total")
    begun_s = time.perf_counter()
    read_tokens = reader.tokens
    await reader.stream.close()
    while await metrics.read("running") >= running:
        if time.perf_counter() - begun_s > TIMEOUT_S:
            raise TimeoutError(f"a cancelled stream still had its slot after {TIMEOUT_S:g} s")
    samples.freed_s.append(time.perf_counter() - begun_s)
    samples.running.append(running)
    samples.token_s.append(token_s)
    samples.tokens_after.append(await metrics.read("output_tokens_total") - ended_tokens - read_tokens)


async def sample(release: Release, server: TritonServer, *, rounds: int) -> Samples:
    """Cancel every stream of every round, one after the other."""
    samples = Samples()
    metrics = Metrics(server.metrics_url, release.model)
    max_tokens = int(release.serving["max_sequence_length"]) // 2
    async with AsyncClient(server.grpc_url, timeout_s=TIMEOUT_S) as client:
        await client.generate(release.model, PROMPTS[0], max_tokens=8)
        for number in range(rounds):
            say(f"{release.model}: round {number + 1}/{rounds}")
            async with every_slot_taken(client, metrics, max_tokens=max_tokens) as readers:
                for reader in readers:
                    await cancel_one(reader, metrics, samples)
            if not all(reader.cancelled for reader in readers):
                raise AssertionError("a stream ended before it was cancelled")
    return samples


def measure(project: Project) -> Outcome:
    """The first chosen variant."""
    rounds = 1 if project.quick else 5
    release = next(iter(published_releases(project)))
    with TritonServer(project.repository, model_control="explicit", load_models=[release.model]) as server:
        server.wait_ready()
        samples = asyncio.run(sample(release, server, rounds=rounds))
        programs = {"tritonserver": server.server_version()}
    tokens, times = spread_of(samples.tokens_after), spread_of(samples.token_times)
    print_table(
        "cancellation: what a stream costs after it was closed",
        ("", "median (range)"),
        [
            ["tokens generated that the caller had not read", str(tokens)],
            ["time until the slot is free, in token times", str(times)],
            ["the same, ms", str(spread_of([1000 * seconds for seconds in samples.freed_s]))],
            ["time per token before, ms", str(spread_of([1000 * seconds for seconds in samples.token_s]))],
        ],
    )
    bars = [
        Bar("tokens after the cancel call", "at most", MAX_TOKENS_AFTER, tokens.median, "", tokens.low, tokens.high),
        Bar("slot free, token times", "at most", MAX_TOKEN_TIMES, times.median, "", times.low, times.high),
    ]  # fmt: skip
    figures = {
        "running": samples.running,
        "tokens_after": samples.tokens_after,
        "freed_s": samples.freed_s,
        "token_s": samples.token_s,
    }
    settings = {"variant": release.variant, "rounds": rounds, "streams": len(samples.running)}
    return Outcome("cancellation", settings, figures, bars, programs)


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_project_options(parser)
    arguments = parser.parse_args()
    arguments.variant = arguments.variant or ["int4-awq"]
    return run_benchmark(lambda: measure(project_from(arguments)))


if __name__ == "__main__":
    sys.exit(main())

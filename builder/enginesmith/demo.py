"""The demonstration: every variant of a model behind one real tritonserver, asked and measured.

Owns the questions, the load and the comparison table. It goes through the client, as an application would; the
figures come from what the server answered in this run.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

from enginesmith.errors import ServerError

if TYPE_CHECKING:
    from rich.table import Table

    from enginesmith.report_llm import LlmVariantReport
    from enginesmith_client import Client

QUESTION = "What is the difference between a compiler and an interpreter?"
LOAD_QUESTIONS = (
    "Explain how a bridge carries its load.",
    "Describe the life of a star from beginning to end.",
    "Write a short story about a lighthouse keeper.",
    "Explain how bread is made, step by step.",
)
ANSWER_TOKENS = 96
LOAD_TOKENS = 48
CONCURRENCY = 16
_SINGLE_REQUESTS = 4
_BATCHED_REQUESTS = 2 * CONCURRENCY

Progress = Callable[[float | None, str], None]


@dataclass(frozen=True)
class Served:
    """What one variant did behind the server."""

    model: str
    answer: str
    tokens_per_s_single: float
    """Answer tokens per second with one request at a time."""
    tokens_per_s_batched: float
    """Answer tokens per second with ``CONCURRENCY`` requests at a time."""
    first_token_ms: float
    """From the question to the first piece of the answer, with nothing else running."""

    @property
    def batching_gain(self) -> float:
        """How many times more tokens per second concurrent requests get together than one alone."""
        return self.tokens_per_s_batched / self.tokens_per_s_single


def measure_served(client: Client, models: Sequence[str], *, on_progress: Progress) -> Iterator[Served]:
    """Ask and load each of ``models`` in turn, so that they do not compete.

    Raises:
        ServerError: a model answered nothing under load.
    """
    for index, model in enumerate(models):
        on_progress(index / len(models), f"asking {model}")
        answer, first_token_ms = _streamed(client, model)
        on_progress((index + 0.3) / len(models), f"{model}: one request at a time")
        single = _tokens_per_s(client, model, requests=_SINGLE_REQUESTS, concurrency=1)
        on_progress((index + 0.6) / len(models), f"{model}: {CONCURRENCY} requests at a time")
        batched = _tokens_per_s(client, model, requests=_BATCHED_REQUESTS, concurrency=CONCURRENCY)
        yield Served(model, answer, single, batched, first_token_ms)


def _streamed(client: Client, model: str) -> tuple[str, float]:
    """The answer to ``QUESTION``, and the milliseconds to its first piece."""
    pieces: list[str] = []
    first_s = 0.0
    started_s = time.perf_counter()
    with client.stream(model, QUESTION, max_tokens=ANSWER_TOKENS, chat=True) as stream:
        for delta in stream:
            first_s = first_s or time.perf_counter() - started_s
            pieces.append(delta.text)
    return "".join(pieces), first_s * 1000


def _tokens_per_s(client: Client, model: str, *, requests: int, concurrency: int) -> float:
    def ask(index: int) -> int:
        question = LOAD_QUESTIONS[index % len(LOAD_QUESTIONS)]
        return client.generate(model, question, max_tokens=LOAD_TOKENS, chat=True).output_tokens or 0

    with ThreadPoolExecutor(concurrency) as pool:
        started = time.perf_counter()
        tokens = sum(pool.map(ask, range(requests)))
        elapsed_s = time.perf_counter() - started
    if not tokens:
        raise ServerError(
            f"{model} answered {requests} requests with no token at all", hint="see the server's log"
        )
    return tokens / elapsed_s


def comparison_table(reports: Sequence[LlmVariantReport], served: Sequence[Served]) -> Table:
    """One row per variant: what it gained and what it lost, all measured."""
    from rich.table import Table

    from enginesmith.report_parts import NOT_MEASURED, bytes_text

    headings = (
        "variant",
        "size",
        "of BF16",
        "of FP32",
        "tokens/s x1",
        f"tokens/s x{CONCURRENCY}",
        "batching gain",
        "first token ms",
        "perplexity",
        "top-1 agreement",
    )
    table = Table(title="what each variant gained and lost, measured in this run", title_justify="left")
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "variant" else "right")
    for report, one in zip(reports, served, strict=True):
        table.add_row(
            report.variant,
            bytes_text(report.engine_bytes) or NOT_MEASURED,
            _shown(report.share_of_bf16, ".0%"),
            _shown(report.share_of_fp32, ".0%"),
            f"{one.tokens_per_s_single:.1f}",
            f"{one.tokens_per_s_batched:.1f}",
            f"{one.batching_gain:.2f}x",
            f"{one.first_token_ms:.0f}",
            _shown(report.perplexity, ".2f"),
            _shown(report.top1_agreement, ".1%"),
        )
    return table


def _shown(value: float | None, form: str) -> str:
    from enginesmith.report_parts import NOT_MEASURED

    return NOT_MEASURED if value is None else format(value, form)

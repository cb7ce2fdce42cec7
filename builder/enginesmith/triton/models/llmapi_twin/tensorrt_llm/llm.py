"""``LLM``: one generation at a time, in a worker thread, by the ONNX Runtime engine of the same integers or as an echo.

``rehearsal.json`` beside this file says what plays: the engine's directory (null: the prompt's tokens are repeated),
the arguments that the real LLM knows, and a journal in which every generation is written down.
"""

from __future__ import annotations

import itertools
import json
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from .result import RequestOutput, Step
from .sampling_params import SamplingParams

_POLL_S = 0.005


class TwinTokenizer:
    """The calls of ``TransformersTokenizer`` that a served model makes."""

    def __init__(self, directory: Path) -> None:
        from tokenizers import Tokenizer

        self._tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of ``text``."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def decode(self, tokens: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of ``tokens``."""
        return str(self._tokenizer.decode(list(tokens), skip_special_tokens=skip_special_tokens))


@dataclass
class _Job:
    result: RequestOutput
    sampling: SamplingParams
    stops: list[tuple[str, list[int]]]
    arrived: float


class LLM:
    """Refuses what the real one refuses: unknown arguments, a missing checkpoint, sequences that are too long."""

    def __init__(self, model: str, tokenizer: str | None = None, **kwargs: Any) -> None:
        self._rehearsal = json.loads((Path(__file__).parent / "rehearsal.json").read_text())
        self._check_arguments(kwargs)
        directory = Path(model)
        for name in ("config.json", "tokenizer.json"):
            if not (directory / name).is_file():
                raise ValueError(f"{model} is no Hugging Face checkpoint: {name} is missing")
        self.tokenizer = TwinTokenizer(Path(tokenizer) if tokenizer else directory)
        self._max_seq_len = int(kwargs["max_seq_len"])
        self._play: Callable[[_Job, Callable[[list[int]], bool]], str] = self._echo
        if self._rehearsal["engine"] is not None:
            self._play = _Twin(
                Path(self._rehearsal["engine"]), self._max_seq_len, self._rehearsal["threads"]
            ).play
        self._numbers = itertools.count(1)
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._worker = threading.Thread(target=self._work, name="worker", daemon=True)
        self._worker.start()

    def generate_async(
        self,
        inputs: str | list[int],
        sampling_params: SamplingParams | None = None,
        lora_request: None = None,
        prompt_adapter_request: None = None,
        streaming: bool = False,
    ) -> RequestOutput:
        """Start an answer. Call it in a running event loop."""
        if lora_request is not None or prompt_adapter_request is not None:
            raise ValueError("the rehearsal's engine cannot play adapters")
        sampling = sampling_params or SamplingParams()
        sampling.refuse_what_is_not_played()
        tokens = self.tokenizer.encode(inputs) if isinstance(inputs, str) else list(inputs)
        if len(tokens) >= self._max_seq_len:
            raise ValueError(
                f"the prompt has {len(tokens)} tokens; max_seq_len {self._max_seq_len} leaves no room for an answer"
            )
        stops = [sampling.stop] if isinstance(sampling.stop, str) else sampling.stop or []
        words = [(stop, self.tokenizer.encode(stop, add_special_tokens=False)) for stop in stops]
        result = RequestOutput(next(self._numbers), tokens, self.tokenizer, streaming=streaming)
        self._jobs.put(_Job(result, sampling, words, time.monotonic()))
        return result

    def shutdown(self) -> None:
        """End the worker; what is running is aborted."""
        self._jobs.put(None)
        self._worker.join()

    def _check_arguments(self, kwargs: dict[str, Any]) -> None:
        known = {"llm": self._rehearsal["llm_arguments"], "cache": self._rehearsal["kv_cache_arguments"]}
        for key in kwargs:
            if key not in known["llm"]:
                raise ValueError(f"{type(self).__name__} got invalid argument: {key}")
        for key in kwargs.get("kv_cache_config") or {}:
            if key not in known["cache"]:
                raise ValueError(f"KvCacheConfig: extra inputs are not permitted: {key}")
        if kwargs.get("backend") != "pytorch":
            raise ValueError(f"backend {kwargs.get('backend')!r} is not played, only pytorch")

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                self._generate(job)
            except Exception as error:  # noqa: BLE001 - the boundary of a request, as in the real executor.
                job.result.report(Step((), error=f"{type(error).__name__}: {error}"))

    def _generate(self, job: _Job) -> None:
        number, started = job.result.request_id, time.monotonic()
        made: list[int] = []
        ended: list[tuple[str, int]] = []
        first: list[float] = []
        self._note({"event": "started", "request": number})

        def on_tokens(tokens: list[int]) -> bool:
            """Take over the tokens so far; True ends the generation."""
            made[:] = tokens
            first[:1] = first[:1] or [time.monotonic()]
            self._hold(job)
            ended[:] = [(stop, len(ids)) for stop, ids in job.stops if ids and tokens[-len(ids) :] == ids][:1]
            if job.result.streaming and not ended and not job.result.aborted.is_set():
                job.result.report(Step(tuple(tokens)))
            return bool(ended) or job.result.aborted.is_set()

        reason: Any = self._play(job, on_tokens)
        stop_reason, stop_length = ended[0] if ended else (None, 0)
        if job.result.aborted.is_set():
            reason, stop_reason, stop_length = "cancelled", None, 0
        self._note({"event": "finished", "request": number, "tokens": len(made), "finish_reason": reason})
        metrics = None
        if job.sampling.return_perf_metrics:
            metrics = _metrics(job.arrived, started, first[0], time.monotonic())
        job.result.report(Step(tuple(made), reason, stop_reason, stop_length, metrics))

    def _hold(self, job: _Job) -> None:
        """Wait while the rehearsal wants generations to stand still, so that one can be cancelled for certain."""
        while Path(self._rehearsal["hold"]).exists() and not job.result.aborted.wait(_POLL_S):
            pass

    def _echo(self, job: _Job, on_tokens: Callable[[list[int]], bool]) -> str:
        room = min(job.sampling.max_tokens, self._max_seq_len - len(job.result.prompt_token_ids))
        tokens: list[int] = []
        for token in job.result.prompt_token_ids[:room]:
            tokens.append(token)
            if on_tokens(tokens):
                return "stop"
        return "length" if room <= len(job.result.prompt_token_ids) else "stop"

    def _note(self, entry: dict[str, Any]) -> None:
        with Path(self._rehearsal["journal"]).open("a") as journal:
            journal.write(json.dumps(entry) + "\n")


class _Twin:
    """The ONNX Runtime engine of the same integers."""

    def __init__(self, directory: Path, capacity: int, threads: int) -> None:
        import llm_runtime

        self._module = llm_runtime
        self._runtime = llm_runtime.Runtime(directory, slots=1, capacity=capacity, threads=threads)

    def play(self, job: _Job, on_tokens: Callable[[list[int]], bool]) -> str:
        """Generate for ``job``; returns how it ended."""
        wanted = job.sampling
        greedy = wanted.top_k == 1 or (
            wanted.temperature is None and not wanted.top_k and wanted.top_p is None
        )
        sampling = self._module.Sampling(
            max_tokens=wanted.max_tokens,
            temperature=0.0 if greedy else (1.0 if wanted.temperature is None else wanted.temperature),
            top_k=wanted.top_k or 0,
            top_p=wanted.top_p or 1.0,
            repetition_penalty=wanted.repetition_penalty or 1.0,
            seed=wanted.seed or 0,
        )
        generation = self._module.Generation(
            job.result.prompt_token_ids, sampling, on_token=lambda one: on_tokens(list(one.tokens))
        )
        try:
            self._runtime.run([generation])
        finally:
            self._runtime.clear()
        return str(generation.finish_reason)


def _metrics(arrived: float, started: float, first: float, last: float) -> SimpleNamespace:
    """The shape of TensorRT-LLM's ``RequestPerfMetrics``; nothing is reused or drafted here."""
    return SimpleNamespace(
        kv_cache_metrics=SimpleNamespace(
            num_reused_blocks=0,
            num_missed_blocks=0,
            num_new_allocated_blocks=0,
            num_total_allocated_blocks=0,
            kv_cache_hit_rate=0.0,
        ),
        timing_metrics=SimpleNamespace(
            arrival_time=timedelta(seconds=arrived),
            first_scheduled_time=timedelta(seconds=started),
            first_token_time=timedelta(seconds=first),
            last_token_time=timedelta(seconds=last),
        ),
        speculative_decoding=SimpleNamespace(
            acceptance_rate=0.0, total_accepted_draft_tokens=0, total_draft_tokens=0
        ),
    )

"""What the server and the machine did within a window: differences of the samples nearest to its ends."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence

from enginesmith_client.perf._figures import ServerFigures, UsageFigures
from enginesmith_client.perf._records import Record
from enginesmith_client.perf._run_files import Window
from enginesmith_client.perf.observe._samples import ModelCounts, Sample, around

_STEPS = re.compile(r'enginesmith_llm_steps_total\{batch_size="(\d+)"\}')
_BLOCKS = 'nv_trt_llm_kv_cache_block_metrics{{kv_cache_block_type="{}"}}'
_SCHEDULED = 'nv_trt_llm_request_metrics{request_type="scheduled"}'


def seen_around(samples: Sequence[Sample], window: Window) -> tuple[Sample, Sample] | None:
    """The samples with the model's statistics nearest to the window's ends; None where there are not two."""
    return around((one for one in samples if one.statistics), window.start_ns, window.end_ns)


def server_figures(
    samples: Sequence[Sample], window: Window, records: Iterable[Record]
) -> ServerFigures | None:
    """What the server says that it did; None where its statistics were not seen, or began anew meanwhile."""
    pair = seen_around(samples, window)
    if pair is None or pair[0].statistics is None or pair[1].statistics is None:
        return None
    before, after = pair
    did = _difference(pair[1].statistics, pair[0].statistics)
    parts = [
        _difference(counts, before.composing[name])
        for name, counts in after.composing.items()
        if name in before.composing
    ]
    if min([one.requests for one in (did, *parts)]) < 0:
        return None
    within = [one for one in samples if before.at_ns <= one.at_ns <= after.at_ns]
    # An ensemble has no batches of its own: those of the part that computes longest decide how fast it is.
    batching = max(parts, key=lambda one: one.compute_infer_s) if parts else did
    batches = _steps(before.metrics, after.metrics) or batching.batches
    executions = sum(batches.values()) or batching.executions
    rows = sum(size * count for size, count in batches.items()) or batching.inferences
    scheduled = _mean(one.metrics.get(_SCHEDULED) for one in within)
    return ServerFigures(
        requests=did.requests,
        queue_ms=_mean_ms(did.queue_s + sum(one.queue_s for one in parts), did.queue_count),
        compute_input_ms=_mean_ms(did.compute_input_s, did.compute_count),
        compute_infer_ms=_mean_ms(did.compute_infer_s, did.compute_count),
        compute_output_ms=_mean_ms(did.compute_output_s, did.compute_count),
        executions=executions,
        batch_sizes=batches,
        mean_batch=scheduled if scheduled is not None else rows / executions if executions else None,
        kv_hit_percent=_kv_hit_percent(before, after, records),
        kv_used_bytes=_most_bytes(within, "enginesmith_llm_kv_used_bytes"),
        kv_total_bytes=_most_bytes(within, "enginesmith_llm_kv_total_bytes"),
        kv_used_percent=_most(_kv_used_percent(one.metrics) for one in within),
    )


def usage_figures(samples: Sequence[Sample], window: Window) -> UsageFigures | None:
    """What processes, machine and GPUs were busy with; None where there are not two samples."""
    pair = around(samples, window.start_ns, window.end_ns)
    if pair is None:
        return None
    before, after = pair
    within = [one for one in samples if before.at_ns <= one.at_ns <= after.at_ns]
    same_server = before.server is not None and before.server == after.server
    memory_bytes = _most(one.server_rss_bytes for one in within)
    gpu_bytes = _most(one.gpu_memory_bytes or _gpu(one, "memory_used_bytes") for one in within)
    machine_s = after.machine_total_s - before.machine_total_s
    return UsageFigures(
        client_cpu_percent=_percent_of_core(pair, lambda one: one.client_cpu_s),
        server_cpu_percent=_percent_of_core(pair, lambda one: one.server_cpu_s) if same_server else None,
        machine_cpu_percent=100 * (after.machine_busy_s - before.machine_busy_s) / machine_s
        if machine_s > 0
        else None,
        server_rss_bytes=None if memory_bytes is None else int(memory_bytes),
        gpu_percent=_mean(_gpu_percent(one) for one in within),
        gpu_memory_bytes=None if gpu_bytes is None else int(gpu_bytes),
    )


def _difference(now: ModelCounts, then: ModelCounts) -> ModelCounts:
    batches = {size: count - then.batches.get(size, 0) for size, count in now.batches.items()}
    return ModelCounts(
        success=now.success - then.success,
        fail=now.fail - then.fail,
        inferences=now.inferences - then.inferences,
        executions=now.executions - then.executions,
        queue_s=now.queue_s - then.queue_s,
        queue_count=now.queue_count - then.queue_count,
        compute_input_s=now.compute_input_s - then.compute_input_s,
        compute_infer_s=now.compute_infer_s - then.compute_infer_s,
        compute_output_s=now.compute_output_s - then.compute_output_s,
        compute_count=now.compute_count - then.compute_count,
        cache_hits=now.cache_hits - then.cache_hits,
        batches={size: count for size, count in sorted(batches.items()) if count > 0},
    )


def _steps(before: Mapping[str, float], after: Mapping[str, float]) -> dict[int, int]:
    """Decoding steps by the number of sequences that they advanced, of models that batch in flight."""
    steps = {
        int(match[1]): round(value - before.get(name, 0.0))
        for name, value in after.items()
        if (match := _STEPS.fullmatch(name))
    }
    return {size: count for size, count in sorted(steps.items()) if count > 0}


def _kv_hit_percent(before: Sample, after: Sample, records: Iterable[Record]) -> float | None:
    """Prompt tokens that needed not be computed, of all."""

    def grown(name: str) -> float | None:
        return after.metrics[name] - before.metrics.get(name, 0.0) if name in after.metrics else None

    reused, prompts = (
        grown("enginesmith_llm_reused_tokens_total"),
        grown("enginesmith_llm_prompt_tokens_total"),
    )
    if reused is None:
        # TensorRT-LLM tells blocks that were found, and not of how many tokens that were looked for.
        blocks, size = grown(_BLOCKS.format("reused")), after.metrics.get(_BLOCKS.format("tokens_per"))
        reused = blocks * size if blocks is not None and size is not None else None
        ended = [one for one in records if before.at_ns <= one.ended_ns < after.at_ns]
        prompts = float(sum(one.prompt_tokens or 0 for one in ended))
    return min(100.0, 100 * reused / prompts) if reused is not None and prompts else None


def _kv_used_percent(metrics: Mapping[str, float]) -> float | None:
    pairs = (
        ("enginesmith_llm_kv_used_bytes", "enginesmith_llm_kv_total_bytes"),
        (_BLOCKS.format("used"), _BLOCKS.format("max")),
    )
    for used, total in pairs:
        if used in metrics and metrics.get(total):
            return 100 * metrics[used] / metrics[total]
    return None


def _gpu_percent(sample: Sample) -> float | None:
    if sample.gpu_percent is not None:
        return sample.gpu_percent
    share = _gpu(sample, "utilization")
    return None if share is None else 100 * share


def _gpu(sample: Sample, name: str) -> float | None:
    """A metric of Triton's, summed over GPUs."""
    values = [value for key, value in sample.metrics.items() if key.partition("{")[0] == f"nv_gpu_{name}"]
    return sum(values) if values else None


def _percent_of_core(pair: tuple[Sample, Sample], cpu_s: Callable[[Sample], float | None]) -> float | None:
    before, after = (cpu_s(one) for one in pair)
    if before is None or after is None:
        return None
    return 100 * (after - before) / ((pair[1].at_ns - pair[0].at_ns) / 1e9)


def _mean_ms(total_s: float, count: int) -> float | None:
    return 1e3 * total_s / count if count else None


def _most(values: Iterable[float | None]) -> float | None:
    return max((value for value in values if value is not None), default=None)


def _most_bytes(samples: Iterable[Sample], name: str) -> int | None:
    """The most that was seen; None also for 0, which is how a model says that it cannot tell."""
    return int(_most(one.metrics.get(name) for one in samples) or 0) or None


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None

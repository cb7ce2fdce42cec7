"""The step ``convert``: a unified Hugging Face checkpoint becomes a TensorRT-LLM checkpoint. No GPU, no torch.

The whole conversion is planned from headers first (``plan``), then written in one pass (``stream``). ``config.json``
is written last, so a directory without it is not a checkpoint.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator
from collections.abc import Mapping as AbstractMapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from enginesmith.checkpoints.tensors import CONFIG_FILE, CheckpointTensors
from enginesmith.durable import write_json_atomically
from enginesmith.engines.tensorrt_llm.config import attention_windows, checkpoint_config
from enginesmith.engines.tensorrt_llm.mapping import Mapping
from enginesmith.engines.tensorrt_llm.plan import ConversionPlan, plan_conversion
from enginesmith.engines.tensorrt_llm.recoding import Scales
from enginesmith.engines.tensorrt_llm.scales import scalar_scales
from enginesmith.engines.tensorrt_llm.stream import write_ranks
from enginesmith.errors import OperatorError
from enginesmith.steps import StepContext


def run(context: StepContext) -> AbstractMapping[str, Any]:
    """Convert the input ``checkpoint``; facts: ranks, bytes, algorithm and attention windows."""
    params = context.params
    mapping = Mapping(
        tensor=params.get("tensor", 1),
        pipeline=params.get("pipeline", 1),
        expert=params.get("expert", 1),
        gpus_per_node=params.get("gpus_per_node", 8),
    )
    plan = convert_checkpoint(
        context.inputs["checkpoint"],
        context.out,
        mapping=mapping,
        workers=params.get("workers", 1),
        progress=lambda fraction: context.progress(fraction, f"{mapping.world_size} ranks"),
    )
    return {
        "ranks": mapping.world_size,
        "weight_bytes": plan.weight_bytes,
        "rank_bytes": [sum(tensor.nbytes for tensor in rank) for rank in plan.ranks],
        "architecture": plan.decoder.architecture,
        "quant_algo": None if plan.quantization.algorithm == "none" else plan.quantization.algorithm,
        "kv_cache_quant_algo": plan.quantization.kv_algorithm,
        "max_attention_window": attention_windows(plan.decoder),
    }


def convert_checkpoint(
    source: Path,
    out: Path,
    *,
    mapping: Mapping,
    workers: int = 1,
    progress: Callable[[float], None] = lambda _: None,
) -> ConversionPlan:
    """Write ``config.json`` and ``rank{i}.safetensors`` for the checkpoint ``source`` into ``out``; what was written.

    ``workers`` threads read and write at the same time; each holds a few dozen MiB. ``progress`` gets fractions.

    Raises:
        SourceError: the checkpoint is not one that TensorRT-LLM can run, or is damaged.
        SpecError: the mapping does not divide the model.
        OperatorError: ``out`` holds a checkpoint already, another process is writing one there, or it cannot be written.
    """
    tensors = CheckpointTensors(source)
    plan = plan_conversion(tensors, mapping)
    document = checkpoint_config(plan)
    scales = Scales(scalar_scales(tensors, plan), tensors)
    out.mkdir(parents=True, exist_ok=True)
    with _only_writer(out):
        if (out / CONFIG_FILE).exists():
            raise OperatorError(f"{out} holds a checkpoint already", hint="give an empty directory")
        write_ranks(plan, tensors, out=out, scales=scales, workers=workers, progress=progress)
        write_json_atomically(out / CONFIG_FILE, document)
    return plan


@contextmanager
def _only_writer(out: Path) -> Iterator[None]:
    """Hold the lock of the directory; the system gives it back when this process ends, however it ends."""
    directory = os.open(out, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(directory)
        raise OperatorError(
            f"another process is writing a TensorRT-LLM checkpoint in {out}",
            hint="wait for it, or give another directory",
        ) from error
    try:
        yield
    finally:
        os.close(directory)

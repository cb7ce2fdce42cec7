"""What the served model is told: ``model.yaml``, the GPUs of this instance, and a clean MPI environment.

Self-contained like every file in this directory. Nothing here may import ``tensorrt_llm``: importing it starts CUDA on
the GPUs that are visible then.
"""

from __future__ import annotations

import os
import re
from collections.abc import MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

# Variables that say "you are a rank of an MPI job". A process that has them cannot start MPI workers of its own.
_MPI_JOB = re.compile(
    r"OMPI_(COMM_WORLD_|UNIVERSE_SIZE|FIRST_RANKS|APP_CTX|MCA_orte_|MCA_ess_)|PMIX_(?!MCA_)|PMI_|ORTE_"
)


@dataclass(frozen=True)
class Settings:
    """The two halves of ``model.yaml``."""

    llm_arguments: dict[str, Any]
    """Keyword arguments of ``tensorrt_llm.LLM``."""
    decoupled: bool
    cancellation_check_period_s: float
    max_prompt_length: int | None
    default_max_tokens: int
    max_sequence_length: int | None
    max_requests: int | None
    """Requests that may be under way at once; None: no limit."""


def read_settings(version: Path, environment: MutableMapping[str, str] = os.environ) -> Settings:
    """The settings in ``model.yaml`` of the version directory, or in the file that ``LLM_CONFIG_PATH`` names.

    ``model`` may name a directory relative to the version directory; anything else is passed on as it is.
    """
    path = version / environment.get("LLM_CONFIG_PATH", "model.yaml")
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise RuntimeError(f"cannot read the settings of the model from {path}: {error}") from error
    if not isinstance(document, dict) or not document.get("model"):
        raise RuntimeError(f"{path} names no model: it must be a mapping with the key 'model'")
    arguments = dict(document)
    triton = arguments.pop("triton_config", None) or {}
    beside = version / str(arguments["model"])
    if beside.is_dir():
        arguments["model"] = str(beside)
    queue, batch = int(triton.get("max_queue_size", 0)), arguments.get("max_batch_size")
    return Settings(
        llm_arguments=arguments,
        decoupled=bool(triton.get("decoupled", False)),
        cancellation_check_period_s=int(triton.get("cancellation_check_period_ms", 100)) / 1000,
        max_prompt_length=triton.get("max_prompt_length"),
        default_max_tokens=int(triton.get("default_max_tokens", 128)),
        max_sequence_length=arguments.get("max_seq_len"),
        max_requests=queue + int(batch) if queue and batch else None,
    )


def choose_gpus(
    config: dict[str, Any], instance: str, environment: MutableMapping[str, str] = os.environ
) -> None:
    """Let this process and its children see only the GPUs of its instance.

    ``gpu_device_ids`` of the configuration gives them, ``0,1;2,3`` for two instances; ``instance`` is Triton's name of
    this one, which ends in its number.
    """
    ids = config.get("parameters", {}).get("gpu_device_ids", {}).get("string_value", "")
    count = sum(int(group.get("count", 1)) for group in config.get("instance_group", ())) or 1
    if not ids:
        if count > 1:
            raise RuntimeError(
                f"{count} instances need the parameter gpu_device_ids, e.g. 0;1, or they would share GPUs"
            )
        return
    groups = ids.split(";")
    if len(groups) != count:
        raise RuntimeError(
            f"gpu_device_ids {ids!r} names the GPUs of {len(groups)} instances; there are {count}"
        )
    number = int(instance.rsplit("_", 1)[-1]) if instance.rsplit("_", 1)[-1].isdigit() else 0
    environment["CUDA_VISIBLE_DEVICES"] = groups[number]
    # TensorRT-LLM hands this one to the MPI workers that it spawns.
    environment["TRTLLM_VISIBLE_DEVICES"] = groups[number]


def leave_mpi_job(environment: MutableMapping[str, str] = os.environ) -> None:
    """Forget the MPI job that tritonserver was started in, so that TensorRT-LLM can start its own workers.

    Raises:
        RuntimeError: this is one of several ranks; the LLM API is served by one process.
    """
    ranks = int(environment.get("OMPI_COMM_WORLD_SIZE") or environment.get("PMI_SIZE") or 1)
    if ranks > 1:
        raise RuntimeError(
            f"tritonserver was started as {ranks} MPI ranks, but the LLM API starts its workers itself; start it once, "
            "or under trtllm-llmapi-launch (enginesmith serve --print shows the command)"
        )
    for name in [name for name in environment if _MPI_JOB.match(name)]:
        del environment[name]

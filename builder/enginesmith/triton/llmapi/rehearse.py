"""The ``rehearse_llmapi`` step: the package, in a real tritonserver, with only ``tensorrt_llm`` played.

The served bytes are the package's own: its configuration, its ``model.py``, its ``model.yaml``, its checkpoint. What
is different from production is one Python package, found first on ``PYTHONPATH``: a stand-in for ``tensorrt_llm`` in
which the ONNX Runtime engine of the same integers generates, or, for architectures that have none, an echo.
"""

from __future__ import annotations

import importlib.resources
import json
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from enginesmith.spec import Serving
from enginesmith.steps import StepContext
from enginesmith.targets import LlmApiTarget
from enginesmith.triton.llmapi.asking import Asking
from enginesmith.triton.llmapi.options import (
    CHECKPOINT_DIRECTORY,
    KV_CACHE_OPTIONS,
    LLM_OPTIONS,
    model_yaml,
)
from enginesmith.triton.llmapi.scenarios import Journal, check_generate, run_checks
from enginesmith.triton.llmapi.subject import read_subject
from enginesmith.triton.placement import contents_digest, place_tree, tree_contents
from enginesmith.triton.rehearsal_report import Check, require_passed
from enginesmith.triton.server import TritonServer, find_server

NOT_REHEARSED = (
    "TensorRT-LLM itself: loading the checkpoint, its kernels, its memory, its batching",
    "more than one GPU: MPI workers, gpu_device_ids",
    "best_of above 1, frequency and presence penalties, log-probabilities",
)
STOP_BY_ID = ("stopping a request by its id: it reaches any of the instances",)


def run(context: StepContext) -> Mapping[str, Any]:
    """Rehearse the package. Facts: ``ready_s``, ``requests``, ``server_version``, ``played_by``.

    Raises:
        GateError: an answer was wrong; says what was asked, what was expected and what was seen.
        ServerError: tritonserver could not load the package.
    """
    target = LlmApiTarget.model_validate(context.params["target"])
    serving = Serving.model_validate(context.params["serving"])
    model = target.triton_model("tensorrt_llm")
    package, engine = context.inputs["package"] / model, context.inputs.get("engine")
    context.progress(None, "asking the twin without a server")
    subject = read_subject(context.inputs["checkpoint"], engine, serving)
    repository = context.scratch / "repository"
    repository.mkdir()
    place_tree(package, repository / model)
    python, journal = place_stand_in(context.scratch, engine)

    installation = find_server(str(context.params.get("server") or "auto"))
    started = time.monotonic()
    with TritonServer(repository, installation=installation, python_path=[python]) as server:
        server.wait_ready(on_progress=context.progress)
        ready_s = time.monotonic() - started
        context.progress(None, "asking tritonserver")
        asking = Asking(server.grpc_url, model, decoupled=target.streaming)
        checks = run_checks(asking, subject, journal, streaming=target.streaming, instances=target.instances)
        server.require_alive("while it was asked")
        checks.append(check_generate(server.http_url, model, subject))
        facts = {
            "ready_s": round(ready_s, 3),
            "requests": asking.requests + 1,
            "server_version": server.server_version(),
            "played_by": "onnxruntime twin" if engine is not None else "echo",
        }
    checks.append(_check_options(package / "1", target, serving))
    require_passed(model, checks)
    rehearsal = {
        "format": 1,
        "passed": True,
        "model": model,
        "package_digest": contents_digest(tree_contents(package)),
        "not_rehearsed": (*NOT_REHEARSED, *(STOP_BY_ID if target.instances > 1 else ())),
        "checks": [asdict(check) for check in checks],
        **facts,
    }
    (context.out / "rehearsal.json").write_text(json.dumps(rehearsal, indent=1) + "\n", encoding="utf-8")
    return facts


def _check_options(version: Path, target: LlmApiTarget, serving: Serving) -> Check:
    """``model.yaml`` against the target: parallelism and memory are what a stand-in on a CPU takes at any value."""
    seen = yaml.safe_load((version / "model.yaml").read_text(encoding="utf-8"))
    expected = model_yaml(target, serving, version / CHECKPOINT_DIRECTORY)
    different = sorted(key for key in {*seen, *expected} if seen.get(key) != expected.get(key))
    return Check(
        "options of the LLM",
        "model.yaml",
        ", ".join(f"{key}: {expected.get(key)}" for key in different) or "as the target says",
        ", ".join(f"{key}: {seen.get(key)}" for key in different) or "as the target says",
        not different,
    )


def place_stand_in(scratch: Path, engine: Path | None) -> tuple[Path, Journal]:
    """A directory for ``PYTHONPATH`` with the stand-in for ``tensorrt_llm``, and the journal it writes."""
    python = scratch / "python"
    models = importlib.resources.files("enginesmith.triton.models")
    with importlib.resources.as_file(models / "llmapi_twin" / "tensorrt_llm") as package:
        shutil.copytree(package, python / "tensorrt_llm", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("llm_runtime.py", "llm_sampling.py", "llm_prefix.py"):
        with importlib.resources.as_file(models / "llm_onnxruntime" / name) as module:
            shutil.copyfile(module, python / name)
    journal = Journal(scratch / "journal.jsonl", scratch / "hold")
    told = {
        "engine": None if engine is None else str(engine),
        "threads": 0,
        "llm_arguments": sorted(LLM_OPTIONS),
        "kv_cache_arguments": sorted(KV_CACHE_OPTIONS),
        "journal": str(journal.path),
        "hold": str(journal.hold),
    }
    (python / "tensorrt_llm" / "rehearsal.json").write_text(json.dumps(told), encoding="utf-8")
    return python, journal

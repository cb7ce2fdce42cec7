"""The steps ``rehearse_graph`` and ``rehearse_tensorrt``: the package in a real tritonserver, asked real questions.

What our Python model executes on a CPU is rehearsed as it is. Where a GPU or one of Triton's native backends executes the
graph, the copy that is served differs from the package in that one model: its configuration says Python and CPU, and it is
played by the variant's ONNX Runtime engine. ``rehearsal.json`` says which bytes were rehearsed, who played and what was not
run, so that nothing else can be published in their name.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import tritonclient.grpc as grpc
from tritonclient.grpc import model_config_pb2 as pb
from tritonclient.grpc.model_config_pb2 import ModelConfig

from enginesmith.errors import GateError
from enginesmith.graph_targets import GraphOnnxRuntimeTarget
from enginesmith.graphs.signature import MODEL_FILE, SIGNATURE_FILE, WEIGHTS_FILE, read_signature
from enginesmith.steps import StepContext
from enginesmith.triton.config import config_text, parse_config
from enginesmith.triton.graph.asking import Asking
from enginesmith.triton.graph.deployment import Deployment, read_deployment
from enginesmith.triton.graph.package import ENGINE_FILE, write_code
from enginesmith.triton.graph.package_tensorrt import PLAN_FILE, package_digest
from enginesmith.triton.graph.scenarios import run_checks
from enginesmith.triton.graph.subject import Subject
from enginesmith.triton.placement import place_file, place_tree
from enginesmith.triton.rehearsal_report import Check, require_passed
from enginesmith.triton.response_cache import cache_bytes_for
from enginesmith.triton.server import TritonServer, find_server

TWIN = "onnxruntime twin"
ITSELF = "itself"


def run(context: StepContext) -> Mapping[str, Any]:
    """Rehearse the package. Facts: ``ready_s``, ``requests``, ``largest_batch``, ``server_version``, ``played_by``.

    Raises:
        GateError: a model is missing or an answer was wrong; says what was asked, what was expected and what was seen.
        ServerError: tritonserver could not load the package.
    """
    package, engine = context.inputs["package"], context.inputs["engine"]
    deployment = read_deployment(context.params, read_signature(context.inputs["signature"]))
    configs = _read_configs(package, deployment)
    context.progress(None, "asking the engine without a server")
    subject = Subject(deployment, engine=engine, samples=context.inputs["samples"], package=package)
    served = context.scratch / "repository"
    served.mkdir()
    for name in deployment.models:
        place_tree(package / name, served / name)
    if is_played(deployment):
        play_engine(served / deployment.name, configs[deployment.name], engine)
    installation = find_server(str(context.params.get("server") or "auto"))
    started = time.monotonic()
    with TritonServer(served, installation=installation, cache_bytes=cache_bytes_for(served)) as server:
        server.wait_ready(on_progress=context.progress)
        ready_s = time.monotonic() - started
        context.progress(None, "asking tritonserver")
        with grpc.InferenceServerClient(server.grpc_url) as client:
            ask = Asking(client)
            checks = run_checks(ask, subject, warmup_rows=_warmup_rows(configs[deployment.name]))
            server.require_alive("while it was asked")
            largest_batch = ask.statistics(deployment.name).largest_batch
        facts = {
            "ready_s": round(ready_s, 3),
            "requests": ask.requests,
            "largest_batch": largest_batch,
            "server_version": server.server_version(),
            "played_by": TWIN if is_played(deployment) else ITSELF,
        }
    require_passed(deployment.name, checks)
    document = _report(deployment, package, checks, tolerance=subject.tolerance) | facts
    (context.out / "rehearsal.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return facts


def is_played(deployment: Deployment) -> bool:
    """Whether the ONNX Runtime engine stands in for what serves."""
    return deployment.is_native or deployment.needs_gpu


def play_engine(model: Path, config: ModelConfig, engine: Path) -> None:
    """Make the served copy in ``model`` one that the Python backend runs with ``engine``, with the same inputs and outputs."""
    version = model / "1"
    signature = (version / SIGNATURE_FILE).read_bytes()
    # The files are links to the rehearsed ones, which must stay as they are.
    shutil.rmtree(version)
    (model / "config.pbtxt").unlink()
    version.mkdir()
    (version / SIGNATURE_FILE).write_bytes(signature)
    for name in (MODEL_FILE, WEIGHTS_FILE, ENGINE_FILE):
        if (engine / name).is_file():
            place_file(engine / name, version / name)
    write_code("graph_onnxruntime", version)
    (model / "config.pbtxt").write_text(config_text(stand_in_config(config)), encoding="utf-8")


def stand_in_config(config: ModelConfig) -> ModelConfig:
    """``config`` with only that changed which says how the model runs: in Python, on the CPU."""
    played = ModelConfig()
    played.CopyFrom(config)
    played.backend, played.platform = "python", ""
    played.ClearField("optimization")
    for group in played.instance_group:
        group.kind = pb.ModelInstanceGroup.KIND_CPU
    return played


def _read_configs(package: Path, deployment: Deployment) -> dict[str, ModelConfig]:
    configs = {
        path.parent.name: parse_config(path.read_text(encoding="utf-8"), origin=str(path))
        for path in sorted(package.glob("*/config.pbtxt"))
    }
    if set(configs) != set(deployment.models):
        raise GateError(
            f"the package has the models {', '.join(configs) or 'none'}; expected: {', '.join(deployment.models)}",
            hint="build again",
        )
    return configs


def _warmup_rows(config: ModelConfig) -> int:
    """Rows that all instances compute before they are ready."""
    instances = sum(int(group.count) for group in config.instance_group)
    return instances * sum(int(sample.batch_size) for sample in config.model_warmup)


def _not_rehearsed(deployment: Deployment) -> list[str]:
    if not is_played(deployment):
        return []
    files = (
        (MODEL_FILE,) if isinstance(deployment.target, GraphOnnxRuntimeTarget) else (PLAN_FILE, ENGINE_FILE)
    )
    return [f"{deployment.name}/1/{name}" for name in files]


def _report(
    deployment: Deployment, package: Path, checks: Sequence[Check], *, tolerance: float
) -> dict[str, Any]:
    return {
        "format": 1,
        "passed": True,
        "model": deployment.name,
        "models": list(deployment.models),
        "package_digest": package_digest(package),
        "not_rehearsed": _not_rehearsed(deployment),
        "tolerance": tolerance,
        "checks": [asdict(check) for check in checks],
    }

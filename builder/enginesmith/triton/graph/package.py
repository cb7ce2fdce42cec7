"""The ``package_graph`` step: a verified graph becomes the models that Triton serves.

Reads the engine, its verdict, the signature, the samples and the checkpoint's tokenizer; writes one directory for each
model of ``enginesmith.triton.graph.configs``. What has no passed verdict is not packaged. ``assemble`` writes the same
without the engine.
"""

from __future__ import annotations

import hashlib
import importlib.resources
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tritonclient.grpc.model_config_pb2 import ModelConfig

from enginesmith.errors import SourceError, SpecError, StoreError
from enginesmith.graph_targets import GraphOnnxRuntimeTarget
from enginesmith.graphs.signature import MODEL_FILE, SIGNATURE_FILE, WEIGHTS_FILE, Signature, read_signature
from enginesmith.steps import StepContext
from enginesmith.triton.config import config_text, parse_config
from enginesmith.triton.graph.configs import engine_config, reads_pairs, text_config, tokenizer_config
from enginesmith.triton.graph.deployment import Deployment, read_deployment, runtime_of
from enginesmith.triton.graph.warmup import warmup_of
from enginesmith.triton.package_checks import require_passed
from enginesmith.triton.placement import place_file, tree_files

ENGINE_FILE = "engine.json"
TOKENIZER_FILE, TEXT_FILE = "tokenizer.json", "text.json"
# Session options that change no result, so an engine may be served without them.
_SPEED_ONLY = ("session.intra_op.allow_spinning", "session.inter_op.allow_spinning")
# From each of these folders a model takes the files named; None: all.
_RUNTIME_FILE = "graph_runtime.py"
_CODE: Mapping[str, Mapping[str, tuple[str, ...] | None]] = {
    "onnxruntime": {"graph_onnxruntime": None},
    "tensorrt": {"graph_onnxruntime": (_RUNTIME_FILE,), "graph_tensorrt_rtx": None},
    "tensorrt_rtx": {"graph_onnxruntime": (_RUNTIME_FILE,), "graph_tensorrt_rtx": None},
}


def run(context: StepContext) -> Mapping[str, Any]:
    """Write the package. Facts: ``models``, ``package_bytes``.

    Raises:
        GateError: the engine has no passed verdict.
        SpecError: the target's backend cannot execute the engine as it was measured, or does not know an option.
        SourceError: the checkpoint has no tokenizer.
    """
    deployment = write_repository(context)
    engine = context.inputs["engine"]
    version = context.out / deployment.name / "1"
    document = _engine_document(engine, deployment)
    for name in (MODEL_FILE, WEIGHTS_FILE):
        if (engine / name).is_file():
            place_file(engine / name, version / name)
    if not (version / MODEL_FILE).is_file():
        raise StoreError(f"{MODEL_FILE} is missing in {engine}", hint="build again")
    _write_json(version / ENGINE_FILE, document)
    return facts_of(context.out, deployment)


def write_repository(context: StepContext) -> Deployment:
    """Write all of the models but what executes the graph: ``model.onnx`` or ``model.plan``, and ``engine.json``."""
    require_passed(context.inputs["verdict"])
    deployment = read_deployment(context.params, read_signature(context.inputs["signature"]))
    _write_engine(context.out / deployment.name, deployment, samples=context.inputs["samples"])
    if deployment.text:
        _write_text(context.out, deployment, checkpoint=context.inputs["checkpoint"])
    return deployment


def facts_of(repository: Path, deployment: Deployment) -> dict[str, Any]:
    """What a step reports of the repository that it wrote."""
    return {
        "models": list(deployment.models),
        "package_bytes": sum(file.stat().st_size for file in tree_files(repository)),
    }


def _engine_document(engine: Path, deployment: Deployment) -> Mapping[str, Any]:
    """``engine.json`` of the package: as it was lowered for a CPU; for a GPU's provider the options of the target."""
    target = deployment.target
    assert isinstance(target, GraphOnnxRuntimeTarget)
    if target.provider != "cpu":
        return {"provider": target.provider, "provider_options": target.provider_options, "session": {}}
    path = engine / ENGINE_FILE
    try:
        document: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StoreError(f"cannot read {path}: {error}", hint="build again") from error
    special = [key for key in document.get("session", {}) if key not in _SPEED_ONLY]
    special += document.get("disabled_optimizers") or ()
    if deployment.is_native and special:
        raise SpecError(
            f"target {target.name}: the engine of {deployment.variant} was measured with {', '.join(special)}, which Triton's "
            "ONNX Runtime backend cannot set",
            hint="serve it with `backend: python`, or leave the variant out of this target's `variants`",
        )
    return document


def _write_engine(model: Path, deployment: Deployment, *, samples: Path) -> None:
    version = model / "1"
    version.mkdir(parents=True)
    deployment.signature.write(version)
    requests, files = warmup_of(deployment, samples)
    for name, content in files.items():
        (model / "warmup").mkdir(exist_ok=True)
        (model / "warmup" / name).write_bytes(content)
    label_file = _write_labels(model, deployment.signature)
    if not deployment.is_native:
        for folder, names in _CODE[runtime_of(deployment.target)].items():
            write_code(folder, version, only=names)
    _write_config(model, engine_config(deployment, warmup=requests, label_file=label_file))


def _write_labels(model: Path, signature: Signature) -> str | None:
    """The names of the classes as Triton's classification extension reads them; the file is named by its content."""
    if not signature.labels:
        return None
    text = "".join(f"{' '.join(label.split())}\n" for label in signature.labels)
    name = f"labels-{hashlib.sha256(text.encode()).hexdigest()[:16]}.txt"
    (model / name).write_text(text, encoding="utf-8")
    return name


def _write_text(repository: Path, deployment: Deployment, *, checkpoint: Path) -> None:
    """The tokenization stage and the ensemble."""
    version = repository / deployment.tokenizer_name / "1"
    version.mkdir(parents=True)
    if not (checkpoint / TOKENIZER_FILE).is_file():
        raise SourceError(
            f"{TOKENIZER_FILE} is missing in {checkpoint}, so no text can be served",
            hint="save the tokenizer with the checkpoint, or set serving.text: false",
        )
    place_file(checkpoint / TOKENIZER_FILE, version / TOKENIZER_FILE)
    write_code("graph_tokenizer", version)
    _write_json(version / TEXT_FILE, _text_settings(deployment, checkpoint))
    _write_config(version.parent, tokenizer_config(deployment))
    ensemble = repository / deployment.text_name
    (ensemble / "1").mkdir(parents=True)
    # Triton wants a version directory of an ensemble too, and an empty one would not survive a copy.
    (ensemble / "1" / SIGNATURE_FILE).write_bytes(
        (repository / deployment.name / "1" / SIGNATURE_FILE).read_bytes()
    )
    _write_config(ensemble, text_config(deployment))


def _text_settings(deployment: Deployment, checkpoint: Path) -> dict[str, Any]:
    serving, signature = deployment.serving, deployment.signature
    sentences = _sentence_settings(checkpoint)
    limit = deployment.longest
    if serving.truncate:
        limit = min(limit, int(sentences.get("max_seq_length") or limit))
    return {
        "max_length": limit,
        "truncate": serving.truncate,
        "pad_to": list(deployment.pad_to),
        "pad_id": signature.pad_id,
        "lower_case": bool(sentences.get("do_lower_case")),
        "pairs": reads_pairs(signature),
        "inputs": [{"name": tensor.name, "dtype": tensor.dtype} for tensor in signature.inputs],
    }


def _sentence_settings(checkpoint: Path) -> Mapping[str, Any]:
    """What sentence-transformers does with texts before the tokenizer; nothing for other checkpoints."""
    path = checkpoint / "sentence_bert_config.json"
    if not path.is_file():
        return {}
    try:
        settings: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SourceError(f"cannot read {path}: {error}", hint="check the source of the model") from error
    return settings


def write_code(folder_name: str, version: Path, *, only: tuple[str, ...] | None = None) -> None:
    """Put code that Triton's Python backend runs into ``version``; it imports nothing of enginesmith."""
    folder = importlib.resources.files("enginesmith.triton.models") / folder_name
    with importlib.resources.as_file(folder) as sources:
        for file in tree_files(sources):
            if file.name != "__init__.py" and (only is None or file.name in only):
                (version / file.name).write_bytes(file.read_bytes())


def _write_config(model: Path, config: ModelConfig) -> None:
    text = config_text(config)
    assert parse_config(text) == config
    (model / "config.pbtxt").write_text(text, encoding="utf-8")


def _write_json(path: Path, document: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")

"""The parameters of each kind of step of a graph spec: what of it decides the step's result, and nothing else.

As ``enginesmith.step_params`` for text generation. Used by ``enginesmith.plan_graph``.
"""

from __future__ import annotations

import glob
from pathlib import Path

from enginesmith.digests import tree_digest
from enginesmith.errors import SourceError
from enginesmith.graph_spec import GraphSpec, GraphVariant, Samples
from enginesmith.graph_targets import GraphOnnxRuntimeTarget, GraphTarget, TensorRtRtxTarget, TensorRtTarget
from enginesmith.platforms import GPUS
from enginesmith.schemes import GRAPH_SCHEMES
from enginesmith.spec_part import Corpus
from enginesmith.step_params import Params, corpus_params
from enginesmith.store import ArtifactStore

_ENGLISH = Corpus(builtin="english")


def sample_params(spec: GraphSpec, store: ArtifactStore, samples: Samples, *, where: str) -> Params:
    """Which inputs are made: from texts, from a file, or random ones."""
    keyed = samples.model_dump(mode="json", exclude={"corpus", "file", "length"})
    location: dict[str, str | None] = {"corpus_path": None, "file": None}
    if spec.reads_text:
        corpus, location["corpus_path"] = corpus_params(spec, store, samples.corpus or _ENGLISH, where=where)
        length = min(samples.length, spec.serving.max_sequence_length)
        return {**keyed, "task": spec.task, "corpus": corpus, "length": length, "location": location}
    keyed |= {"task": spec.task, "inputs": [tensor.model_dump(mode="json") for tensor in spec.inputs]}
    if spec.source.onnx and not spec.inputs:  # The file says what its inputs are.
        location["onnx"] = _local_file(spec, spec.source.onnx, where="source.onnx")
        keyed["onnx_sha256"] = store.digests.digest(spec.resolve(spec.source.onnx))
    keyed["axes"] = {name: axis.model_dump(mode="json") for name, axis in spec.axes.items()}
    if samples.file is None:
        return {**keyed, "file_sha256": None, "location": location}
    location["file"] = _local_file(spec, samples.file, where=f"{where}.file")
    return {**keyed, "file_sha256": store.digests.digest(spec.resolve(samples.file)), "location": location}


def export_params(spec: GraphSpec, store: ArtifactStore) -> Params:
    """How the FP32 graph is made, and by content what it is made of."""
    source = spec.source
    location: dict[str, str] = {}
    keyed: Params = {"task": spec.task}
    if source.is_checkpoint:
        keyed |= {
            "pooling": spec.pooling,
            "normalize": spec.normalize,
            "probabilities": spec.probabilities,
            "max_sequence_length": spec.serving.max_sequence_length,
        }
    else:
        keyed["inputs"] = [tensor.model_dump(mode="json", exclude={"low", "high"}) for tensor in spec.inputs]
        keyed["outputs"] = list(spec.outputs)
        keyed["axes"] = {name: axis.model_dump(mode="json") for name, axis in spec.axes.items()}
    if source.module:
        path, factory = source.module.rsplit(":", 1)
        location["module"] = _local_file(spec, path, where="source.module")
        location["base_dir"] = str(spec.base_dir)
        keyed |= {"factory": factory, "module_sha256": store.digests.digest(spec.resolve(path))}
        keyed["files"] = {name: _content(spec, store, name) for name in sorted(set(source.files))}
    if source.onnx:
        location["onnx"] = _local_file(spec, source.onnx, where="source.onnx")
        keyed["onnx_sha256"] = store.digests.digest(spec.resolve(source.onnx))
        keyed["onnx_data"] = _weights_beside(spec.resolve(source.onnx), store)
    return {**keyed, "location": location}


def _weights_beside(path: Path, store: ArtifactStore) -> dict[str, str]:
    """The files whose names begin with that of the ONNX file, by content: it may keep its weights in them.

    The export refuses weights in files of other names, because a plan does not open the file to see their names.
    """
    beside = sorted(path.parent.glob(f"{glob.escape(path.name)}?*"))
    return {other.name: store.digests.digest(other) for other in beside if other.is_file()}


def _local_file(spec: GraphSpec, name: str, *, where: str) -> str:
    path = spec.resolve(name)
    if not path.is_file():
        seen = "is not a file" if path.exists() else "does not exist"
        raise SourceError(f"{where} {path} {seen}", hint="the path starts at the spec's directory")
    return str(path)


def _content(spec: GraphSpec, store: ArtifactStore, name: str) -> str:
    path = spec.resolve(name)
    if path.is_dir():
        return tree_digest(path, store.digests)
    return store.digests.digest(spec.resolve(_local_file(spec, name, where="source.files")))


def scheme_params(variant: GraphVariant) -> Params:
    """How the graph is quantized; only what matters for the scheme has a value, so that nothing else changes a key."""
    is_int8 = variant.scheme == "int8"
    calibrated = GRAPH_SCHEMES[variant.scheme].calibrated
    return {
        "scheme": variant.scheme,
        "method": variant.method if is_int8 else "max",
        "percentile": variant.percentile if is_int8 and variant.method == "percentile" else None,
        "smoothing": variant.smoothing if is_int8 else None,
        "weights": variant.weights if calibrated else None,
        "reduce_range": variant.reduce_range and is_int8,
        "attention": variant.attention and calibrated,
        "operators": sorted(set(variant.operators)) if calibrated else None,
        "exclude": variant.exclude if variant.exclude == "auto" else sorted(set(variant.exclude)),
    }


def quality_params(spec: GraphSpec, variant: GraphVariant) -> Params:
    """The limits that a variant has to keep."""
    return (variant.quality or spec.verify.quality).model_dump(mode="json")


def package_params(spec: GraphSpec, name: str, target: GraphTarget) -> Params:
    """How Triton serves a variant on a target: what its models read of target and serving."""
    exclude = {"name", "variants"}
    if not isinstance(target, GraphOnnxRuntimeTarget):
        # The rest decides the engine only.
        exclude |= set(type(target).model_fields) - {"runtime", "backend"}
    return {
        "model_name": spec.triton_name(name),
        "variant": name,
        "scheme": spec.variants[name].scheme,
        "task": spec.task,
        "text": spec.with_text_ensemble,
        "serving": spec.serving.model_dump(mode="json"),
        "target": target.model_dump(mode="json", exclude=exclude),
    }


def tensorrt_params(
    spec: GraphSpec, target: TensorRtTarget | TensorRtRtxTarget, store: ArtifactStore, *, version: str
) -> Params:
    """What TensorRT compiles in. ``version`` is that of the library that will build."""
    if isinstance(target, TensorRtTarget):
        capabilities = [GPUS[target.gpu].compute_capability]
    else:
        capabilities = sorted(int(text.replace(".", "")) for text in target.compute_capabilities)
    name = f"{target.runtime}-{version}-sm{'-'.join(map(str, capabilities))}.cache"
    return {
        "runtime": target.runtime,
        "version": version,
        "compute_capabilities": capabilities,
        "optimization_level": target.optimization_level,
        "workspace_bytes": target.workspace_bytes,
        "opt_batch_size": target.opt_batch_size,
        "opt_sequence_length": target.opt_sequence_length,
        "max_batch_size": spec.serving.max_batch_size,
        "max_sequence_length": spec.serving.max_sequence_length if spec.reads_text else None,
        "location": {"timing_cache": str(store.root / "timing_caches" / name)},
    }

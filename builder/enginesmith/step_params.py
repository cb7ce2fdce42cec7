"""The parameters of each kind of step, read from a spec: what of it decides the step's result, and nothing else.

What is left out of a step's parameters can be edited in the spec without running that step again. Used by
``enginesmith.plan``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from enginesmith.digests import source_digest, tree_digest
from enginesmith.errors import SourceError, SpecError
from enginesmith.graph_spec import GraphSpec
from enginesmith.platforms import GPUS
from enginesmith.spec import Calibration, Limits, ModelSpec, Serving, Variant
from enginesmith.spec_part import Corpus
from enginesmith.store import ArtifactStore
from enginesmith.targets import LlmApiTarget, OnnxRuntimeTarget, TensorRtLlmTarget

Params = dict[str, Any]


def fetch_params(spec: ModelSpec | GraphSpec, store: ArtifactStore, *, as_it_came: bool) -> Params:
    """The source by content where it is local, else by its pin. ``as_it_came`` takes any architecture."""
    source, path = spec.source, None
    keyed: dict[str, Any] = {"dtype": source.dtype}
    if source.wheel:
        keyed |= {"wheel": source.wheel, "sha256": source.sha256, "member": source.member}
    elif source.hub:
        keyed |= {"hub": source.hub, "revision": source.revision, "member": source.member}
    else:
        path = spec.resolve(source.path or "")
        if path.is_dir():
            keyed |= {"directory_sha256": tree_digest(path, store.digests)}
        elif path.is_file() and path.suffix == ".gguf":
            keyed |= {"gguf_sha256": store.digests.digest(path)}
        else:
            seen = "is neither a directory nor a .gguf file" if path.exists() else "does not exist"
            raise SourceError(
                f"source.path {path} {seen}",
                hint="give a Hugging Face directory or a .gguf file; the path starts at the spec's directory",
            )
    any_architecture = {"as_it_came": True} if as_it_came else {}
    return {"source": keyed, **any_architecture, "location": {"path": None if path is None else str(path)}}


def verify_params(spec: ModelSpec, variant: Variant) -> Params:
    """The limits that the gate applies."""
    verify = spec.verify
    return {
        "scheme": variant.scheme,
        "limits": {
            "lowering": _limits(verify.lowering),
            "baseline": _limits(verify.baseline) if variant.scheme == "none" else None,
            "quality": _limits(variant.quality or verify.quality),
        },
        "max_repeated_run": verify.max_repeated_run,
    }


def _limits(limits: Limits) -> dict[str, Any]:
    return limits.model_dump(mode="json")


def reference_params(spec: ModelSpec, store: ArtifactStore) -> Params:
    """The texts whose scores are the reference."""
    verify = spec.verify
    corpus, path = corpus_params(spec, store, verify.corpus, where="verify")
    return {
        "corpus": corpus,
        "tokens": verify.tokens,
        "window": verify.window,
        "seed": verify.seed,
        "location": {"corpus_path": path},
    }


def quantize_params(spec: ModelSpec, store: ArtifactStore, variant: Variant) -> Params:
    """Only what matters for the scheme has a value, so that nothing else changes the key."""
    calibration: Calibration | None = variant.calibration or spec.calibration
    if variant.scheme == "int8_wo" and variant.kv_cache == "none":
        calibration = None  # Weights only, by their largest value: nothing is calibrated.
    corpus, path = (
        corpus_params(spec, store, calibration.corpus, where="calibration") if calibration else (None, None)
    )
    return {
        "scheme": variant.scheme,
        "group_size": variant.effective_group_size,
        "alpha": variant.alpha if variant.scheme == "int8_sq" else None,
        "alpha_step": variant.alpha_step if variant.scheme in ("int4_awq", "w4a8_awq") else None,
        "kv_cache": variant.kv_cache,
        "lm_head": variant.lm_head,
        "exclude": sorted(set(variant.exclude)),
        "calibration": calibration
        and {
            "corpus": corpus,
            "samples": calibration.samples,
            "length": calibration.length,
            "seed": calibration.seed,
        },
        "location": {"corpus_path": path},
    }


def corpus_params(
    spec: ModelSpec | GraphSpec, store: ArtifactStore, corpus: Corpus, *, where: str
) -> tuple[Params, str | None]:
    """What of a corpus enters a key, and the absolute path of a local one."""
    if corpus.builtin:
        return {"builtin": corpus.builtin, "sha256": source_digest("pydoc_data.topics")}, None
    if corpus.file:
        path = spec.resolve(corpus.file)
        if not path.is_file():
            raise SourceError(
                f"{where}.corpus.file {path} does not exist or is not a file",
                hint="the path starts at the spec's directory",
            )
        suffix = path.suffix.lower()
        field = corpus.field if suffix == ".jsonl" else None
        return {"file": suffix, "field": field, "sha256": store.digests.digest(path)}, str(path)
    local = spec.resolve(corpus.dataset or "")
    keyed = {"field": corpus.field, "config": corpus.config, "split": corpus.split}
    if local.exists():
        content = tree_digest(local, store.digests) if local.is_dir() else store.digests.digest(local)
        return {"dataset": "local", **keyed, "sha256": content}, str(local)
    if corpus.revision is None:
        raise SpecError(
            f"{where}.corpus.dataset {corpus.dataset} is not a local path ({local}), and a hub dataset needs its revision",
            hint="add revision: the dataset's commit, 40 hex digits; branches and tags move",
        )
    return {"dataset": corpus.dataset, **keyed, "revision": corpus.revision}, None


# A model that batches in flight forms no batches beforehand and answers in no order.
_NOT_BATCHED = {
    "preferred_batch_sizes": True,
    "max_queue_delay_us": True,
    "preserve_ordering": True,
}
_NOT_PACKAGED_SERVING: dict[str, Any] = {
    "dynamic_batching": {**_NOT_BATCHED, "queue_policy": {"timeout_action", "allow_timeout_override"}},
}


def package_params(spec: ModelSpec, name: str, target: OnnxRuntimeTarget) -> Params:
    """How Triton serves an ONNX Runtime engine."""
    return {
        "model_name": spec.triton_name(name),
        "variant": name,
        "scheme": spec.variants[name].scheme,
        "serving": spec.serving.model_dump(mode="json", exclude=_NOT_PACKAGED_SERVING),
        "threads": target.threads,
        "kv_cache": target.kv_cache.model_dump(mode="json"),
        "prefill_chunk_tokens": target.prefill_chunk_tokens,
        "batch_invariant": target.batch_invariant,
    }


def convert_params(target: TensorRtLlmTarget) -> Params:
    """How a TensorRT-LLM checkpoint is sharded; ``workers`` only says how fast."""
    parallelism = target.parallelism.model_dump(mode="json")
    return {**parallelism, "workers": target.workers}


# What the models of a deployment do not read of a target and of ``serving``. Whatever is added to the spec decides their
# steps until it is listed here.
_NOT_DEPLOYED: dict[str, Any] = {"name": True, "variants": True, "gpu": True, "nccl": True}
_NOT_ASSEMBLED: dict[str, Any] = {
    **_NOT_DEPLOYED,
    "workers": True,
    "opt_num_tokens": True,
    "gather_context_logits": True,
    "gather_generation_logits": True,
    "plugins": True,
    "kv_cache": {"tokens_per_block"},
}
_NOT_ASSEMBLED_SERVING = {"instances", "default_max_tokens"}
_NOT_LLMAPI: dict[str, Any] = {**_NOT_DEPLOYED, "toolchain": True}
_NOT_LLMAPI_SERVING: dict[str, Any] = {
    "instances": True,
    "dynamic_batching": {
        **_NOT_BATCHED,
        "queue_policy": {"default_timeout_us", "timeout_action", "allow_timeout_override"},
    },
}


def deployment_params(spec: ModelSpec, name: str, target: TensorRtLlmTarget | LlmApiTarget) -> Params:
    """How Triton serves a TensorRT-LLM runtime: what its models read of target and serving, named for this variant.

    What decides an engine only is not in it: an edit of that compiles again and leaves the rehearsed repository as it is.
    """
    params = {"variant": name, "scheme": spec.variants[name].scheme}
    prefix = {"model_prefix": target.prefix_for(spec.name, name)}
    if isinstance(target, LlmApiTarget):
        return {
            "target": target.model_dump(mode="json", exclude=_NOT_LLMAPI) | prefix,
            "serving": spec.serving.model_dump(mode="json", exclude=_NOT_LLMAPI_SERVING),
            **params,
        }
    return {
        "target": target.model_dump(mode="json", exclude=_NOT_ASSEMBLED) | prefix,
        "serving": spec.serving.model_dump(mode="json", exclude=_NOT_ASSEMBLED_SERVING),
        "model_name": f"{spec.triton_name(name)}-{target.name}",
        **params,
    }


_COMPILED = {
    "runtime",
    "toolchain",
    "gpu",
    "parallelism",
    "max_num_tokens",
    "opt_num_tokens",
    "max_beam_width",
    "logits_dtype",
    "gather_context_logits",
    "gather_generation_logits",
    "plugins",
}


def compile_params(
    spec: ModelSpec, target: TensorRtLlmTarget, store: ArtifactStore, *, version: str, engine_dir: str | None
) -> Params:
    """What ``trtllm-build`` compiles in, and nothing that can be changed without compiling again.

    ``version`` is the toolchain's TensorRT-LLM. ``engine_dir`` holds engines that were built elsewhere: other engines are
    another artifact. Where the directory holds none yet, nothing of it is in the key.
    """
    adopted: Params = {}
    if engine_dir is not None and (Path(engine_dir) / "config.json").is_file():
        adopted = {"engines_sha256": tree_digest(Path(engine_dir), store.digests)}
    serving = Serving(
        max_batch_size=spec.serving.max_batch_size,
        dynamic_batching=None,
        max_sequence_length=spec.serving.max_sequence_length,
        max_prompt_length=spec.serving.max_prompt_length,
    )
    capability = GPUS[target.gpu].compute_capability
    dump = target.model_dump(mode="json", include=_COMPILED)
    dump["kv_cache"] = {"tokens_per_block": target.kv_cache.tokens_per_block}
    return {
        "target": dump,
        "serving": serving.model_dump(mode="json"),
        "version": version,
        "compute_capability": capability,
        **adopted,
        "location": {
            "engine_dir": engine_dir,
            "timing_cache": str(
                store.root / "timing_caches" / f"tensorrt-llm-{version}-sm{capability}.cache"
            ),
            "workers": target.workers,
        },
    }

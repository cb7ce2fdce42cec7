"""Whether a graph spec can be built and served on its targets, before anyone waits for a build."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from enginesmith.errors import SpecError
from enginesmith.graph_spec import GraphSpec
from enginesmith.graph_targets import GraphOnnxRuntimeTarget, TensorRtRtxTarget, TensorRtTarget
from enginesmith.platforms import GPUS, TRITON_IMAGES, graph_schemes_on
from enginesmith.schemes import GRAPH_SCHEMES, GraphSchemeName

ENCODERS = frozenset(
    (
        "albert",
        "bert",
        "camembert",
        "convbert",
        "deberta",
        "deberta-v2",
        "distilbert",
        "electra",
        "ernie",
        "megatron-bert",
        "modernbert",
        "mpnet",
        "nomic_bert",
        "nystromformer",
        "roberta",
        "roformer",
        "squeezebert",
        "xlm-roberta",
    )
)
"""Model types whose export was held against PyTorch (texts of up to 64 tokens, padded and not)."""
_POSITIONS_AFTER_PADDING = frozenset(("camembert", "mpnet", "roberta", "xlm-roberta"))
_TASK_ARCHITECTURES: Mapping[str, tuple[str, ...]] = {
    "embedding": ("Model", "ForMaskedLM"),
    "classification": ("ForSequenceClassification",),
    "reranking": ("ForSequenceClassification",),
}
_USUAL_CLASSES = 2
"""What transformers assumes where config.json says nothing."""
_OF_EVERY_PROVIDER = ("device_id", "user_compute_stream")


def check_graph_targets(spec: GraphSpec) -> None:
    """Return if every target of ``spec`` can execute its variants, as far as that is known without the model.

    Raises:
        SpecError: the first combination that cannot work, with what can.
    """
    for target in spec.targets:
        if isinstance(target, GraphOnnxRuntimeTarget):
            _check_provider_options(target)
            for name in spec.variants if target.variants is None else target.variants:
                _check_native_scheme(target, name, spec.variants[name].scheme)
            continue
        if isinstance(target, TensorRtTarget):
            _check_toolchain(target)
        else:
            _check_capabilities(target)
        variants = spec.variants if target.variants is None else target.variants
        for name in variants:
            _check_scheme(target, name, spec.variants[name].scheme)
        _check_usual_shapes(spec, target)


def _check_provider_options(target: GraphOnnxRuntimeTarget) -> None:
    """ONNX Runtime's TensorRT provider reads names with ``trt_``, the CUDA provider none; the other's are ignored or refused."""
    theirs = [name for name in target.provider_options if name.startswith("trt_")]
    wrong = theirs if target.provider == "cuda" else sorted(set(target.provider_options) - set(theirs))
    if target.provider == "tensorrt":
        wrong = [name for name in wrong if name not in _OF_EVERY_PROVIDER]
    if wrong:
        other = "tensorrt" if target.provider == "cuda" else "cuda"
        raise SpecError(
            f"target {target.name}: provider_options {wrong[0]} is no option of provider {target.provider}",
            hint=f"options of TensorRT's provider begin with trt_, those of the CUDA provider do not; or provider: {other}",
        )


def _check_native_scheme(target: GraphOnnxRuntimeTarget, variant: str, scheme: GraphSchemeName) -> None:
    """Triton's own backend cannot set the session options with which a CPU's INT8 and FP8 engines were measured."""
    if target.provider == "cpu" and target.backend == "onnxruntime" and scheme in ("int8", "fp8"):
        raise SpecError(
            f"target {target.name}: Triton's ONNX Runtime backend cannot run scheme {scheme} (variant {variant}) on a CPU as it "
            "was measured: it sets no session options",
            hint="backend: python runs it; or leave the variant out with `variants` in the target",
        )
    if target.provider == "tensorrt" and scheme == "fp8":
        raise SpecError(
            f"target {target.name}: ONNX Runtime's TensorRT provider has no precision for scheme fp8 (variant {variant})",
            hint="runtime: tensorrt builds it; or leave the variant out with `variants` in the target",
        )


def _check_toolchain(target: TensorRtTarget) -> None:
    if target.toolchain in TRITON_IMAGES:
        return
    close = difflib.get_close_matches(target.toolchain, TRITON_IMAGES, n=1)
    raise SpecError(
        f"target {target.name}: toolchain {target.toolchain!r} is not a known tag of tritonserver:YY.MM-py3"
        + (f"; did you mean {close[0]!r}?" if close else ""),
        hint=f"known: {', '.join(TRITON_IMAGES)}",
    )


def _check_capabilities(target: TensorRtRtxTarget) -> None:
    seen = target.compute_capabilities
    if twice := [text for index, text in enumerate(seen) if text in seen[:index]]:
        raise SpecError(
            f"target {target.name}: compute capability {twice[0]} is named twice", hint="name each GPU once"
        )


def _check_scheme(target: TensorRtTarget | TensorRtRtxTarget, variant: str, scheme: GraphSchemeName) -> None:
    """One message for all GPUs of a target that cannot execute a scheme."""
    if isinstance(target, TensorRtTarget):
        gpu = GPUS[target.gpu]
        schemes = graph_schemes_on("tensorrt", gpu.compute_capability)
        if scheme not in schemes:
            fitting = [
                row.name
                for row in GPUS.values()
                if scheme in graph_schemes_on("tensorrt", row.compute_capability)
            ]
            raise SpecError(
                f"target {target.name}: TensorRT has no {GRAPH_SCHEMES[scheme].title} (variant {variant}) on {gpu.name}, "
                f"SM{gpu.compute_capability}",
                hint=f"on {gpu.name}: {', '.join(schemes)}; {scheme} runs on {', '.join(fitting)}; or leave the variant out "
                f"with `variants` in the target",
            )
        return
    seen = {text: int(text.replace(".", "")) for text in target.compute_capabilities}
    lacking = {text: sm for text, sm in seen.items() if scheme not in graph_schemes_on("tensorrt_rtx", sm)}
    if lacking:
        rest = [text for text in seen if text not in lacking]
        allowed = set.intersection(*(set(graph_schemes_on("tensorrt_rtx", sm)) for sm in lacking.values()))
        raise SpecError(
            f"target {target.name}: TensorRT for RTX does not build {GRAPH_SCHEMES[scheme].title} (variant {variant}) for "
            f"compute capability {', '.join(lacking)}, and one engine is built for all of {', '.join(seen)}",
            hint=f"for {', '.join(lacking)}: {', '.join(name for name in GRAPH_SCHEMES if name in allowed)}; "
            + (f"{scheme} with compute_capabilities {rest}; " if rest else "")
            + "or name another target for this variant",
        )


def _check_usual_shapes(spec: GraphSpec, target: TensorRtTarget | TensorRtRtxTarget) -> None:
    serving = spec.serving
    if target.opt_batch_size is not None and target.opt_batch_size > serving.max_batch_size:
        raise SpecError(
            f"target {target.name}: opt_batch_size {target.opt_batch_size} is above serving.max_batch_size "
            f"{serving.max_batch_size}, where the engine's profile ends",
            hint=f"1 to {serving.max_batch_size}",
        )
    usual = target.opt_sequence_length
    if usual is None:
        return
    if not spec.reads_text:
        raise SpecError(
            f"target {target.name}: opt_sequence_length is for tasks that read text, not for {spec.task}",
            hint="give the usual length of an axis as axes.<name>.opt",
        )
    if usual > serving.max_sequence_length:
        raise SpecError(
            f"target {target.name}: opt_sequence_length {usual} is above serving.max_sequence_length "
            f"{serving.max_sequence_length}, where the engine's profile ends",
            hint=f"1 to {serving.max_sequence_length}",
        )


def check_graph_legal(spec: GraphSpec, hf_config: Mapping[str, Any]) -> None:
    """Return if ``spec`` fits a checkpoint with this ``config.json``.

    Raises:
        SpecError: the architecture does not do the task, or a length is beyond the model's.
    """
    _check_architecture(spec, hf_config)
    positions = _positions(hf_config)
    if positions is not None and spec.serving.max_sequence_length > positions:
        raise SpecError(
            f"serving.max_sequence_length is {spec.serving.max_sequence_length}, but the model knows only {positions} positions",
            hint=f"set serving.max_sequence_length to {positions} or less",
        )


def _check_architecture(spec: GraphSpec, hf_config: Mapping[str, Any]) -> None:
    endings = _TASK_ARCHITECTURES.get(spec.task, ())
    architecture = next(iter(hf_config.get("architectures") or ()), None)
    kind = hf_config.get("model_type")
    if not isinstance(architecture, str) or not architecture.endswith(endings):
        allowed = " or ".join(f"*{ending}" for ending in endings)
        raise SpecError(
            f"task {spec.task} takes a checkpoint of architecture {allowed}, seen: {architecture}",
            hint="see the checkpoint's config.json; text generation has a spec of its own (task: text-generation)"
            if isinstance(architecture, str) and architecture.endswith("ForCausalLM")
            else "choose the task that the checkpoint was trained for",
        )
    if kind not in ENCODERS or hf_config.get("is_decoder"):
        raise SpecError(
            f"task {spec.task} takes an encoder, seen: {architecture} of model_type {kind}"
            + (" with is_decoder: true" if hf_config.get("is_decoder") else "")
            + f"; known: {', '.join(sorted(ENCODERS))}",
            hint="export another model yourself, and give it as source.module or source.onnx",
        )
    if spec.task == "reranking" and (classes := _classes(hf_config)) != 1:
        raise SpecError(
            f"task reranking takes a model with one label, its score; {architecture} has {classes}",
            hint="task classification serves all labels",
        )


def _classes(hf_config: Mapping[str, Any]) -> int:
    labels = hf_config.get("id2label")
    if isinstance(labels, Mapping):
        return len(labels)
    count = hf_config.get("num_labels")
    return count if isinstance(count, int) else _USUAL_CLASSES


def _positions(hf_config: Mapping[str, Any]) -> int | None:
    """How many tokens a text may have. RoBERTa and its kin count positions from behind the padding token's id."""
    positions = hf_config.get("max_position_embeddings")
    if not isinstance(positions, int):
        return None
    pad = hf_config.get("pad_token_id")
    if hf_config.get("model_type") in _POSITIONS_AFTER_PADDING:
        return positions - (pad if isinstance(pad, int) else 1) - 1
    return positions

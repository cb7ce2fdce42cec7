"""The ``config.pbtxt`` of the models of a graph deployment: the engine, and for text its tokenizer and the ensemble.

Pure functions from a ``Deployment`` to protobuf messages; knows no files. Names, dtypes and dims of the engine's tensors
are the signature's on every runtime, so clients need not know which one serves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tritonclient.grpc.model_config_pb2 import ModelConfig

from enginesmith.graph_targets import GraphOnnxRuntimeTarget
from enginesmith.graphs.signature import GraphTensor, Signature
from enginesmith.triton.config import (
    DataType,
    EnsembleStep,
    InstanceKind,
    Tensor,
    WarmupSample,
    ensemble_config,
    model_config,
    with_response_cache,
    with_warmup,
)
from enginesmith.triton.graph.deployment import Deployment, runtime_of
from enginesmith.triton.graph.native import with_provider

DATA_TYPES: Mapping[str, DataType] = {
    "float32": "TYPE_FP32",
    "float16": "TYPE_FP16",
    "int64": "TYPE_INT64",
    "int32": "TYPE_INT32",
    "uint8": "TYPE_UINT8",
    "bool": "TYPE_BOOL",
}
TEXT, TEXT_PAIR = "TEXT", "TEXT_PAIR"


def reads_pairs(signature: Signature) -> bool:
    """Whether the model judges two texts together."""
    return signature.task == "reranking"


def text_inputs(signature: Signature) -> tuple[Tensor, ...]:
    """What the models that take text take: one text, or two, in each row."""
    names = (TEXT, TEXT_PAIR) if reads_pairs(signature) else (TEXT,)
    return tuple(Tensor(name, "TYPE_STRING") for name in names)


def engine_config(
    deployment: Deployment, *, warmup: Sequence[WarmupSample] = (), label_file: str | None = None
) -> ModelConfig:
    """The model that executes the graph."""
    serving, signature, target = deployment.serving, deployment.signature, deployment.target
    kind: InstanceKind = "KIND_GPU" if deployment.needs_gpu else "KIND_CPU"
    config = model_config(
        deployment.name,
        inputs=[_tensor(one, ragged=deployment.joins_lengths) for one in signature.inputs],
        outputs=[
            _tensor(one, label_file=_label_file(one, signature, label_file)) for one in signature.outputs
        ],
        max_batch_size=serving.max_batch_size,
        dynamic_batching=serving.dynamic_batching,
        instances=serving.instances,
        instance_kind=kind,
        parameters=_parameters(deployment),
        backend=target.backend,
        platform="tensorrt_plan" if target.backend == "tensorrt" else "",
    )
    if target.backend == "onnxruntime":
        config = with_provider(config, deployment)
    if serving.response_cache:
        config = with_response_cache(config)
    return with_warmup(config, warmup)


def tokenizer_config(deployment: Deployment) -> ModelConfig:
    """The model that turns text into the graph's inputs."""
    serving = deployment.serving
    return model_config(
        deployment.tokenizer_name,
        inputs=text_inputs(deployment.signature),
        outputs=[_tensor(one) for one in deployment.signature.inputs],
        max_batch_size=serving.max_batch_size,
        # The engine waits for companions; whoever waited here would wait twice.
        dynamic_batching=serving.dynamic_batching
        and serving.dynamic_batching.model_copy(
            update={"max_queue_delay_us": 0, "preferred_batch_sizes": ()}
        ),
        instances=serving.tokenizer_instances,
    )


def text_config(deployment: Deployment) -> ModelConfig:
    """The ensemble of both."""
    signature = deployment.signature
    given = text_inputs(signature)
    inner = {tensor.name: tensor.name for tensor in signature.inputs}
    return ensemble_config(
        deployment.text_name,
        inputs=given,
        outputs=[_tensor(one) for one in signature.outputs],
        max_batch_size=deployment.serving.max_batch_size,
        steps=[
            EnsembleStep(deployment.tokenizer_name, {one.name: one.name for one in given}, inner),
            EnsembleStep(deployment.name, inner, {one.name: one.name for one in signature.outputs}),
        ],
    )


def _parameters(deployment: Deployment) -> dict[str, str]:
    target = deployment.target
    parameters = {"scheme": deployment.scheme, "variant": deployment.variant}
    if isinstance(target, GraphOnnxRuntimeTarget):
        key = "intra_op_thread_count" if deployment.is_native else "threads"
        return {**parameters, key: str(target.threads)}
    return {**parameters, "runtime": runtime_of(target)}


def _tensor(tensor: GraphTensor, *, ragged: bool = False, label_file: str | None = None) -> Tensor:
    return Tensor(
        tensor.name,
        DATA_TYPES[tensor.dtype],
        tensor.dims,
        ragged=ragged and -1 in tensor.dims,
        label_file=label_file,
    )


def _label_file(tensor: GraphTensor, signature: Signature, label_file: str | None) -> str | None:
    """``label_file`` for the output that has one value for each class."""
    return label_file if signature.labels and tensor.dims == (len(signature.labels),) else None

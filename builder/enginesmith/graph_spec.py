"""The spec of a model that one ONNX graph computes: an encoder, a classifier, a reranker, any module or ONNX file.

Owns its shape and defaults. Such a model answers in one run, where a text-generation model (``enginesmith.spec``) goes
on token by token; sources, corpora, batching and names are the same.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, get_args

from pydantic import Field, model_validator

from enginesmith.graph_targets import GraphOnnxRuntimeTarget, GraphTarget
from enginesmith.schemes import GRAPH_SCHEMES, GraphSchemeName
from enginesmith.spec import Source
from enginesmith.spec_part import Corpus, DynamicBatching, Part, SpecBase, VariantPart

GraphTask = Literal["embedding", "classification", "reranking", "tensors"]
GRAPH_TASKS: tuple[str, ...] = get_args(GraphTask)
TensorDtype = Literal["float32", "float16", "int64", "int32", "uint8", "bool"]
BATCH_AXIS = "batch"
SEQUENCE_AXIS = "sequence"


class GraphSource(Source):
    """Where the model comes from. Exactly one of ``path``, ``hub``, ``wheel``, ``module`` and ``onnx``."""

    KINDS: ClassVar[tuple[str, ...]] = ("path", "hub", "wheel", "module", "onnx")

    dtype: Literal["float32"] | None = Field(
        default=None,
        description="Graphs are exported in float32; the scheme of a variant decides what it is built in.",
    )
    module: str | None = Field(
        default=None,
        pattern=r"^[^:]+\.py:[A-Za-z_][A-Za-z0-9_]*$",
        description="path.py:factory, relative to the spec: a function without arguments that returns a torch.nn.Module.",
    )
    onnx: str | None = Field(default=None, description="A ready ONNX file, relative to the spec.")
    files: tuple[str, ...] = Field(
        default=(),
        description="Files and directories that `module` reads, e.g. weights and other sources, so that a change of them is seen.",
    )

    @model_validator(mode="after")
    def _files_of_a_module(self) -> GraphSource:
        if self.files and self.module is None:
            raise ValueError("files names what a module reads; the other sources bring theirs")
        return self

    @property
    def is_checkpoint(self) -> bool:
        """Whether it is a Hugging Face checkpoint, which tells its task's inputs and outputs itself."""
        return self.module is None and self.onnx is None


class GraphInput(Part):
    """An input of a module or an ONNX file."""

    name: str = Field(min_length=1)
    dtype: TensorDtype = "float32"
    shape: Annotated[tuple[int | str, ...], Field(min_length=1)] = Field(
        description="With the batch: [batch, 3, 224, 224]. A name is a dynamic axis, and the same name the same length."
    )
    low: float = Field(default=0.0, description="Smallest random value, where no samples are given.")
    high: float = Field(
        default=1.0, description="Random values are below it (floats) or at most it (whole numbers)."
    )

    @model_validator(mode="after")
    def _starts_with_batch(self) -> GraphInput:
        if self.shape[0] != BATCH_AXIS:
            raise ValueError(
                f"input {self.name}: the first axis must be {BATCH_AXIS!r}, seen: {self.shape[0]!r}"
            )
        if bad := [size for size in self.shape if isinstance(size, int) and size < 1]:
            raise ValueError(f"input {self.name}: a length must be at least 1, seen: {bad[0]}")
        if self.high < self.low:
            raise ValueError(f"input {self.name}: high {self.high} is below low {self.low}")
        return self


class Axis(Part):
    """The lengths of a dynamic axis."""

    min: int = Field(default=1, ge=1)
    opt: int | None = Field(default=None, ge=1, description="The usual length. Default: max.")
    max: int = Field(ge=1)

    @model_validator(mode="after")
    def _ordered(self) -> Axis:
        if not self.min <= (self.opt or self.max) <= self.max:
            raise ValueError(
                f"min {self.min}, opt {self.opt or self.max} and max {self.max} must not decrease"
            )
        return self


class Samples(Part):
    """Inputs to calibrate or to measure with: texts for the tasks that read text, an .npz file or random numbers else."""

    corpus: Corpus | None = Field(
        default=None, description="Texts. Default for the tasks that read text: builtin english."
    )
    file: str | None = Field(
        default=None,
        description="An .npz file with one array per input, samples along the first axis, relative to the spec.",
    )
    samples: int = Field(default=64, ge=1, le=65536)
    length: int = Field(
        default=64, ge=4, le=131072, description="Longest text in tokens; shorter ones are padded."
    )
    batch_size: int = Field(default=8, ge=1, le=1024, description="Samples that are run together.")
    seed: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _one_source(self) -> Samples:
        if self.corpus is not None and self.file is not None:
            raise ValueError("give corpus or file, not both")
        return self


class GraphLimits(Part):
    """Thresholds that stop a build. A limit left out (null) is measured and reported, not enforced."""

    min_mean_cosine: float | None = Field(
        default=None, ge=-1, le=1, description="Mean cosine between a sample's output and the reference's."
    )
    min_cosine: float | None = Field(default=None, ge=-1, le=1, description="The same for the worst sample.")
    max_abs_delta: float | None = Field(
        default=None, ge=0, description="Largest |difference| of any output value."
    )
    max_relative_error: float | None = Field(
        default=None,
        ge=0,
        description="Norm of the difference over the norm of the reference, over all samples.",
    )
    min_top1_agreement: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="Share of samples with the same highest class; classification only.",
    )
    min_rank_correlation: float | None = Field(
        default=None, ge=-1, le=1, description="Spearman correlation of scores over samples; reranking only."
    )


EXPORT_LIMITS = GraphLimits(max_relative_error=1e-4)
QUALITY_LIMITS = GraphLimits(min_mean_cosine=0.98)
_LIMITS_OF_ONE_TASK = {"min_top1_agreement": "classification", "min_rank_correlation": "reranking"}


class GraphVerification(Part):
    """What is measured on every variant, and what stops the build."""

    samples: Samples = Samples(samples=128, seed=1)
    export: GraphLimits = Field(
        default=EXPORT_LIMITS, description="The FP32 graph in ONNX Runtime against the original model."
    )
    quality: GraphLimits = Field(
        default=QUALITY_LIMITS,
        description="Each variant as served against the original model. Variants may override it.",
    )


class GraphVariant(VariantPart):
    """One precision of the model; served as the Triton model ``<name>-<variant>``."""

    scheme: GraphSchemeName
    method: Literal["entropy", "max", "percentile", "mse"] = Field(
        default="percentile",
        description="How an activation's range is chosen from its calibrated histogram (int8).",
    )
    percentile: float = Field(
        default=99.99,
        gt=50,
        le=100,
        description="The share of |values| inside the range (method percentile).",
    )
    smoothing: float | None = Field(
        default=0.5,
        ge=0,
        le=1,
        description="SmoothQuant's alpha (int8): how much of the activations' range moves into the weights. null: none.",
    )
    weights: Literal["per_channel", "per_tensor"] = "per_channel"
    reduce_range: bool = Field(
        default=False,
        description="7-bit weights (int8): exact and fast on x86 CPUs without VNNI, whose 8-bit kernels saturate.",
    )
    attention: bool = Field(
        default=False, description="Also quantize products of two activations, such as attention's."
    )
    operators: tuple[Literal["MatMul", "Gemm", "Conv"], ...] = ("MatMul", "Gemm", "Conv")
    exclude: tuple[str, ...] | Literal["auto"] = Field(
        default=(),
        description="Glob patterns of node names or operators that stay in float, e.g. 'encoder.layer.0.*'. auto: the smallest set with which verify.quality holds.",
    )
    calibration: Samples | None = Field(
        default=None, description="Overrides the model's calibration for this variant."
    )
    quality: GraphLimits | None = Field(
        default=None, description="Overrides verify.quality for this variant."
    )

    @model_validator(mode="after")
    def _parameters_fit_scheme(self) -> GraphVariant:
        if not GRAPH_SCHEMES[self.scheme].calibrated and self.exclude == "auto":
            raise ValueError(
                f"exclude: auto has no meaning for scheme {self.scheme}; it belongs to int8 and fp8"
            )
        if self.scheme == "none" and self.exclude:
            raise ValueError("exclude has no meaning for scheme none: everything stays in float32")
        return self


class GraphServing(Part):
    """How Triton serves the variants."""

    max_batch_size: int = Field(default=32, ge=1, le=4096)
    dynamic_batching: DynamicBatching | None = DynamicBatching()
    instances: int = Field(default=1, ge=1, le=64, description="Instances of the model on this machine.")
    max_sequence_length: int = Field(
        default=256, ge=4, description="Longest text in tokens, special tokens included."
    )
    text: bool = Field(
        default=True,
        description="Also serve <name>-<variant>-text, an ensemble that takes text. For the tasks that read text.",
    )
    tokenizer_instances: int = Field(default=1, ge=1, le=64)
    pad_to: tuple[int, ...] = Field(
        default=(),
        description="Lengths to which the tokenization stage pads, for backends that batch equal shapes only. Default there: powers of two.",
    )
    truncate: bool = Field(
        default=True, description="Cut longer texts as sentence-transformers does; false refuses them."
    )
    response_cache: bool = Field(
        default=False, description="Answer repeated requests from Triton's response cache."
    )
    warmup: bool = Field(default=True, description="Run real samples before the model is ready.")

    @model_validator(mode="after")
    def _batches_can_be_formed(self) -> GraphServing:
        batching = self.dynamic_batching
        for size in batching.preferred_batch_sizes if batching else ():
            if not 1 <= size <= self.max_batch_size:
                raise ValueError(
                    f"dynamic_batching.preferred_batch_sizes has {size}; allowed: 1 to max_batch_size {self.max_batch_size}"
                )
        return self

    @model_validator(mode="after")
    def _padding_fits(self) -> GraphServing:
        if list(self.pad_to) != sorted(set(self.pad_to)):
            raise ValueError(f"pad_to {list(self.pad_to)} must be increasing lengths")
        if self.pad_to and self.pad_to[-1] != self.max_sequence_length:
            raise ValueError(
                f"pad_to must end with max_sequence_length {self.max_sequence_length}, seen: {self.pad_to[-1]}"
            )
        return self


class GraphSpec(SpecBase):
    """One model that a single ONNX graph computes: its source, its variants and how they are served."""

    task: GraphTask
    source: GraphSource
    inputs: tuple[GraphInput, ...] = Field(
        default=(), description="Of a module or an ONNX file; checkpoints know theirs."
    )
    outputs: tuple[str, ...] = Field(default=(), description="Names of a module's outputs, in its order.")
    axes: dict[str, Axis] = Field(
        default={}, description="Lengths of the dynamic axes other than batch, of a module or an ONNX file."
    )
    pooling: Literal["mean", "cls", "max", "last"] | None = Field(
        default=None,
        description="How token vectors become one (embedding). Default: what the checkpoint says, else mean.",
    )
    normalize: bool | None = Field(
        default=None, description="Embeddings of length 1. Default: what the checkpoint says, else true."
    )
    probabilities: bool = Field(
        default=False,
        description="Softmax (or, for one class, sigmoid) over the logits (classification, reranking).",
    )
    calibration: Samples = Samples()
    variants: Annotated[dict[str, GraphVariant], Field(min_length=1)]
    targets: Annotated[tuple[GraphTarget, ...], Field(min_length=1)] = (
        GraphOnnxRuntimeTarget(runtime="onnxruntime"),
    )
    serving: GraphServing = GraphServing()
    verify: GraphVerification = GraphVerification()

    @model_validator(mode="after")
    def _source_fits_task(self) -> GraphSpec:
        if self.source.is_checkpoint == (self.task == "tensors"):
            raise ValueError(
                "task tensors takes a module or an ONNX file; embedding, classification and reranking take a checkpoint "
                "(path, hub or wheel)"
            )
        if self.source.is_checkpoint and (self.inputs or self.outputs or self.axes):
            raise ValueError(
                "inputs, outputs and axes describe a module or an ONNX file; checkpoints know theirs"
            )
        if self.source.module and not (self.inputs and self.outputs):
            raise ValueError("a module needs inputs and outputs: PyTorch does not name them")
        return self

    @model_validator(mode="after")
    def _axes_are_known(self) -> GraphSpec:
        named = {size for tensor in self.inputs for size in tensor.shape[1:] if isinstance(size, str)}
        if missing := sorted(named - set(self.axes)):
            raise ValueError(f"axes: the lengths of the dynamic axis {missing[0]!r} are missing")
        if unused := sorted(set(self.axes) - named) if self.inputs else []:
            raise ValueError(f"axes: no input has an axis {unused[0]!r}")
        if bad := sorted(name for name in named if self.source.module and not name.isidentifier()):
            raise ValueError(f"axes: {bad[0]!r} is not a name for PyTorch: letters, digits and _ only")
        names = [tensor.name for tensor in self.inputs] + list(self.outputs)
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"the name {twice[0]!r} is used for two inputs or outputs")
        return self

    @model_validator(mode="after")
    def _samples_fit_task(self) -> GraphSpec:
        every = [self.calibration, self.verify.samples]
        every += [variant.calibration for variant in self.variants.values() if variant.calibration]
        for samples in every:
            if self.reads_text and samples.file is not None:
                raise ValueError(f"task {self.task} reads text: give its samples as corpus, not as file")
            if not self.reads_text and samples.corpus is not None:
                raise ValueError(
                    f"task {self.task} reads no text: give samples as an .npz file, or leave them random"
                )
        return self

    @model_validator(mode="after")
    def _keys_fit_task(self) -> GraphSpec:
        if self.task != "embedding" and (self.pooling is not None or self.normalize is not None):
            raise ValueError(f"pooling and normalize are for task embedding, not for {self.task}")
        if self.probabilities and self.task not in ("classification", "reranking"):
            raise ValueError(
                f"probabilities is for the tasks classification and reranking, not for {self.task}"
            )
        every = [self.verify.export, self.verify.quality]
        every += [variant.quality for variant in self.variants.values() if variant.quality]
        for limits in every:
            for limit, task in _LIMITS_OF_ONE_TASK.items():
                if getattr(limits, limit) is not None and task != self.task:
                    raise ValueError(f"{limit} is measured for task {task}, not for {self.task}")
        return self

    @property
    def reads_text(self) -> bool:
        """Whether the model's inputs are made of text by its tokenizer."""
        return self.task != "tensors"

    @property
    def with_text_ensemble(self) -> bool:
        """Whether a model that takes text is served as well."""
        return self.reads_text and self.serving.text

    def targets_of(self, variant: str) -> tuple[GraphTarget, ...]:
        """The targets that build ``variant``."""
        return tuple(
            target for target in self.targets if target.variants is None or variant in target.variants
        )

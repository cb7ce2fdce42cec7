"""ModelOpt's own exporters as an oracle for TensorRT-LLM checkpoints.

ModelOpt quantizes a tiny model once. One copy is exported as a unified Hugging Face checkpoint, which our writer
reads; other copies are exported with ``export_tensorrt_llm_checkpoint``. Each export changes the model it is given,
so each gets a copy of its own.
"""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any, Literal

from checkpoint_factory import VOCAB_SIZE

Scheme = Literal["none", "int8_wo", "int8_sq", "int4_awq", "w4a8_awq", "fp8", "fp8_kv"]

_PRESETS: dict[str, str] = {
    "int8_wo": "INT8_WEIGHT_ONLY_CFG",
    "int8_sq": "INT8_SMOOTHQUANT_CFG",
    "int4_awq": "INT4_AWQ_CFG",
    "w4a8_awq": "W4A8_AWQ_BETA_CFG",
    "fp8": "FP8_DEFAULT_CFG",
    "fp8_kv": "FP8_DEFAULT_CFG",
}
_DECODER_TYPES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen", "qwen3": "qwen"}
GROUP_SIZE = 32
_FP8_BOUND = 448.0


class Oracle:
    """A tiny model in a scheme, and what ModelOpt's exporters make of it."""

    def __init__(self, checkpoint: Path, scheme: Scheme) -> None:
        self.checkpoint = checkpoint
        self._scheme = scheme
        self._model = _quantized(checkpoint, scheme)

    def unified(self, directory: Path) -> Path:
        """``directory``, filled with the unified Hugging Face checkpoint."""
        import torch
        from modelopt.torch.export import export_hf_checkpoint

        model = copy.deepcopy(self._model)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            export_hf_checkpoint(model, dtype=torch.bfloat16, export_dir=directory)
        return directory

    def tensorrt_llm(self, directory: Path, *, tensor: int = 1, pipeline: int = 1) -> Path:
        """``directory``, filled with ModelOpt's TensorRT-LLM checkpoint."""
        import torch
        from modelopt.torch.export import export_tensorrt_llm_checkpoint

        model = copy.deepcopy(self._model)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            export_tensorrt_llm_checkpoint(
                model,
                _DECODER_TYPES[self._model.config.model_type],
                torch.bfloat16,
                directory,
                inference_tensor_parallel=tensor,
                inference_pipeline_parallel=pipeline,
            )
        return directory


def ranks(directory: Path) -> list[dict[str, Any]]:
    """The tensors of every rank of a TensorRT-LLM checkpoint, as PyTorch tensors."""
    from safetensors.torch import load_file

    count = json.loads((directory / "config.json").read_text())["mapping"]["world_size"]
    return [load_file(directory / f"rank{rank}.safetensors") for rank in range(count)]


def _quantized(checkpoint: Path, scheme: Scheme) -> Any:
    import torch
    import transformers

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import modelopt.torch.quantization as mtq

        model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16)
        if scheme == "none":
            return model
        if scheme.startswith("fp8"):
            _put_on_fp8_grid(model)
        config = copy.deepcopy(getattr(mtq, _PRESETS[scheme]))
        if scheme == "fp8_kv":
            config["quant_cfg"] = _with_kv_cache(config["quant_cfg"], mtq.FP8_KV_CFG["quant_cfg"])
        if scheme in ("int4_awq", "w4a8_awq"):
            _set_group_size(config)
            config["algorithm"] = {"method": "awq_lite", "alpha_step": 0.5}
        windows = torch.randint(0, VOCAB_SIZE, (2, 24), generator=torch.Generator().manual_seed(3))
        return mtq.quantize(model, config, lambda quantized: [quantized(row[None]) for row in windows])


def _put_on_fp8_grid(model: Any) -> None:
    """Make every weight of ``model`` an FP8 code times a power of two, another power for each layer of a group.

    ModelOpt's two exports round in different arithmetic (BF16 and float32) and disagree on about 4% of arbitrary
    weights. On the grid both are exact, and what is compared is the re-rounding to a shared scale.
    """
    import torch

    projections = [module for name, module in model.named_modules() if name.endswith("_proj")]
    with torch.no_grad():
        for number, module in enumerate(projections):
            scale = 2.0 ** (number % 3 - 10)
            codes = (
                (module.weight.float() / scale).clamp(-_FP8_BOUND, _FP8_BOUND).to(torch.float8_e4m3fn).float()
            )
            codes[0, 0] = _FP8_BOUND
            module.weight.copy_(codes * scale)


def _with_kv_cache(recipe: Any, kv_cache: Any) -> Any:
    if isinstance(recipe, dict):
        return {**recipe, **kv_cache}
    return [*recipe, *kv_cache]


def _set_group_size(config: Any) -> None:
    """Group size 32 in every quantizer that has groups; tiny models have no 128 columns for each rank."""
    match config:
        case dict():
            for key, value in config.items():
                if key == "block_sizes" and value and -1 in value:
                    value[-1] = GROUP_SIZE
                else:
                    _set_group_size(value)
        case list():
            for value in config:
                _set_group_size(value)

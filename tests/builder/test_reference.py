"""Scores and the reference step: what is kept of logits, how scores compare, and which checkpoints can be scored."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from checkpoint_factory import tiny_checkpoint
from safetensors.torch import load_file, save_file

from enginesmith.errors import GateError, SourceError
from enginesmith.torch_models import dequantized_weight, load_model, third_party_warnings
from enginesmith.verify.reference import load_reference, run
from enginesmith.verify.scores import Scores, agreement, perplexity, scores_from_logits, scores_of_windows

VOCAB = 512
PARAMS: dict[str, Any] = {
    "corpus": {"builtin": "english"},
    "tokens": 100,
    "window": 32,
    "seed": 1,
    "location": {"corpus_path": None},
}


@dataclass
class Context:
    params: Mapping[str, Any]
    inputs: Mapping[str, Path]
    out: Path
    scratch: Path = field(default_factory=Path)

    def progress(self, fraction: float | None, note: str = "") -> None: ...


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("llama"))


def random_windows(count: int = 3, length: int = 100) -> npt.NDArray[np.int64]:
    return np.random.default_rng(0).integers(0, VOCAB, (count, length))


def fake_logits(tokens: npt.NDArray[np.int64], *, shift: float = 0.0) -> npt.NDArray[np.float32]:
    """Logits that depend on the tokens, so that windows cannot be mixed up."""
    rng = np.random.default_rng(tokens)
    return (rng.standard_normal((len(tokens), VOCAB)) * 4 + shift).astype(np.float32)


def test_scores_hold_the_figures_of_the_softmax() -> None:
    logits, targets = fake_logits(np.arange(70)), np.arange(70)
    scores = scores_from_logits(logits, targets, full_positions=64)
    exact = torch.log_softmax(torch.from_numpy(logits).double(), dim=-1).numpy()
    np.testing.assert_allclose(scores.logprob, exact[np.arange(70), targets], atol=1e-12)
    np.testing.assert_allclose(
        scores.logsumexp, torch.logsumexp(torch.from_numpy(logits).double(), -1).numpy()
    )
    assert np.array_equal(scores.top1, logits.argmax(1))
    assert np.array_equal(np.sort(scores.kept_logits, axis=1), np.sort(logits, axis=1)[:, -100:])
    assert np.array_equal(scores.full_logits, logits[:64])


def test_perplexity_of_a_uniform_model_is_the_size_of_its_vocabulary() -> None:
    scores = scores_from_logits(np.zeros((5, VOCAB), np.float32), np.arange(5))
    assert perplexity(scores) == pytest.approx(VOCAB)


def test_scores_survive_a_file(tmp_path: Path) -> None:
    scores = scores_of_windows(random_windows(), fake_logits)
    scores.save(tmp_path / "scores.npz")
    assert agreement(scores, Scores.load(tmp_path / "scores.npz")).max_logit_delta == 0


def test_equal_models_agree_in_everything() -> None:
    windows = random_windows()
    reference = scores_of_windows(windows, fake_logits)
    result = agreement(reference, scores_of_windows(windows, fake_logits, reference=reference))
    assert (result.positions, result.max_logit_delta_positions) == (3 * 99, 64)
    assert (result.top1_agreement, result.mean_logprob_delta, result.max_logit_delta) == (1.0, 0.0, 0.0)


def test_a_shift_of_all_logits_changes_no_probability() -> None:
    windows = random_windows()
    reference = scores_of_windows(windows, fake_logits)
    shifted = scores_of_windows(windows, lambda tokens: fake_logits(tokens, shift=0.5), reference=reference)
    result = agreement(reference, shifted)
    assert result.max_logit_delta == pytest.approx(0.5, abs=1e-5)
    assert result.mean_logprob_delta < 1e-6
    assert result.top1_agreement == 1.0


@pytest.mark.parametrize(
    ("position", "token_rank", "seen"), [(10, 0, True), (10, 511, True), (90, 511, True), (90, 0, False)]
)
def test_whole_rows_are_compared_first_and_the_top_k_elsewhere(
    position: int, token_rank: int, seen: bool
) -> None:
    window = random_windows(count=1)

    def disturbed(tokens: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        logits = fake_logits(tokens)
        logits[position, np.argsort(logits[position])[token_rank]] -= 1
        return logits

    reference = scores_of_windows(window, fake_logits)
    result = agreement(reference, scores_of_windows(window, disturbed, reference=reference))
    assert result.max_logit_delta == pytest.approx(1.0 if seen else 0.0, abs=1e-5)


def test_nan_logits_leave_no_figure_that_could_pass() -> None:
    window = random_windows(count=1)

    def broken(tokens: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        logits = fake_logits(tokens)
        logits[80:] = np.nan
        return logits

    reference = scores_of_windows(window, fake_logits)
    result = agreement(reference, scores_of_windows(window, broken, reference=reference))
    assert np.isnan([result.top1_agreement, result.mean_logprob_delta, result.max_logit_delta]).all()


def test_the_step_scores_an_unquantized_checkpoint_as_transformers_does(llama: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    facts = run(Context(PARAMS, {"checkpoint": llama, "tokenizer": llama}, tmp_path))
    windows, scores = load_reference(tmp_path)
    assert windows.shape == (4, 32)  # 4 windows predict 4 x 31 tokens, at least the 100 that were asked for.
    assert facts["positions"] == len(scores.top1) == 124
    with third_party_warnings(), torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
        output = model(input_ids=torch.from_numpy(windows), labels=torch.from_numpy(windows))
    assert np.log(facts["perplexity"]) == pytest.approx(output.loss.item(), abs=1e-5)
    np.testing.assert_allclose(scores.full_logits[:31], output.logits[0, :-1].numpy(), atol=1e-4)
    json.dumps(facts)


@pytest.mark.parametrize(
    ("preset", "group_size"),
    [("INT8_SMOOTHQUANT_CFG", None), ("INT4_AWQ_CFG", 64), ("FP8_DEFAULT_CFG", None)],
)
def test_a_checkpoint_that_modelopt_wrote_by_itself_can_be_scored(
    llama: Path, tmp_path: Path, preset: str, group_size: int | None
) -> None:
    """Straight from mtq.quantize and export_hf_checkpoint in bfloat16, as ModelOpt's examples do it."""
    import copy

    from transformers import AutoModelForCausalLM

    from enginesmith.torch_models import require_modelopt

    require_modelopt()
    import modelopt.torch.quantization as mtq
    from modelopt.torch.export import export_hf_checkpoint
    from modelopt.torch.export.unified_export_hf import requantize_resmooth_fused_llm_layers

    config = copy.deepcopy(getattr(mtq, preset))
    if group_size:
        config["quant_cfg"][1]["cfg"]["block_sizes"][-1] = group_size
    tokens = torch.from_numpy(random_windows(count=4, length=32))
    with third_party_warnings(), torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.bfloat16)
        mtq.quantize(model, config, lambda m: m(tokens))
        requantize_resmooth_fused_llm_layers(model)
        fake_quantized = model(tokens).logits.float()
        export_hf_checkpoint(model, export_dir=tmp_path)
        rebuilt = load_model(tmp_path)(tokens).logits
    # bfloat16 arithmetic is in between, of weights whose fourth bit it rounds to either side.
    assert (fake_quantized - rebuilt).abs().mean() < 0.2 * fake_quantized.std()


def test_unpacked_integers_are_what_modelopt_packed() -> None:
    from enginesmith.torch_models import require_modelopt

    require_modelopt()
    import modelopt.torch.quantization as mtq
    from modelopt.torch.export.quant_utils import pack_int4_in_uint8

    layer = torch.nn.Sequential(torch.nn.Linear(64, 6, bias=False))
    entry = {
        "quantizer_name": "*weight_quantizer",
        "cfg": {"num_bits": 4, "block_sizes": {-1: 32, "type": "static"}},
    }
    integers = torch.arange(-192, 192).remainder(16).sub(8).reshape(6, 64).float()
    scale = torch.tensor([[0.5, 2.0]] * 6)
    with third_party_warnings(), torch.no_grad():
        mtq.quantize(
            layer, {"quant_cfg": [{"quantizer_name": "*", "enable": False}, entry], "algorithm": None}
        )
        weight = integers * scale.repeat_interleave(32, dim=1)
        assert torch.equal(dequantized_weight(pack_int4_in_uint8(weight, scale, 32), scale, layer[0]), weight)


@pytest.mark.parametrize(
    ("quantization", "said"),
    [
        (
            {"quant_algo": "NVFP4"},
            r"quant_algo 'NVFP4'; supported: W8A8_SQ_PER_CHANNEL, W8A16, W4A16_AWQ, W4A8_AWQ, FP8",
        ),
        (
            {"quant_algo": "FP8", "kv_cache_quant_algo": "NVFP4"},
            r"kv_cache_quant_algo 'NVFP4'; supported: FP8, INT8, none",
        ),
    ],
)
def test_an_unknown_quantization_is_refused(tmp_path: Path, quantization: dict[str, Any], said: str) -> None:
    checkpoint = tiny_checkpoint(tmp_path)
    (checkpoint / "hf_quant_config.json").write_text(json.dumps({"quantization": quantization}))
    with pytest.raises(SourceError, match=said):
        load_model(checkpoint)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda tensors: tensors.pop("model.norm.weight"), r"lacks 1 tensors of its architecture, first model\.norm\.weight"),
        (lambda tensors: tensors.update({"model.extra": torch.zeros(2)}), r"tensor model\.extra .* no such tensor"),
        (lambda tensors: tensors.update({"model.norm.weight": torch.zeros(3)}), r"has shape \[3\]; the architecture has shape \[64\]"),
    ],
)  # fmt: skip
def test_a_checkpoint_that_is_not_of_its_architecture_is_refused(
    tmp_path: Path, change: Any, said: str
) -> None:
    path = tiny_checkpoint(tmp_path) / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    with pytest.raises(SourceError, match=said):
        load_model(tmp_path)


def test_logits_that_are_not_finite_stop_the_reference(tmp_path: Path) -> None:
    path = tiny_checkpoint(tmp_path / "in") / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"][0] = float("inf")
    save_file(tensors, path)
    (tmp_path / "out").mkdir()
    with pytest.raises(GateError, match="not finite at 124 of 124 positions, first at position 0"):
        run(Context(PARAMS, {"checkpoint": tmp_path / "in", "tokenizer": tmp_path / "in"}, tmp_path / "out"))


def test_quantized_experts_are_one_clear_error(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(tmp_path, architecture="MixtralForCausalLM")
    document = {"quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": None}}
    (checkpoint / "hf_quant_config.json").write_text(json.dumps(document))
    with pytest.raises(SourceError, match=r"has quantized experts.*\n.*scheme none"):
        load_model(checkpoint)

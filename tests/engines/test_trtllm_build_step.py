"""The compile step: builds with the tool it finds, adopts what was built elsewhere, and believes neither unchecked."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trtllm_build_standin
from checkpoint_factory import tiny_checkpoint
from trtllm_build_cases import (
    A100,
    H100,
    H200,
    SERVING,
    Context,
    make_context,
    make_target,
    write_checkpoint,
)

from enginesmith.digests import file_digest
from enginesmith.engines.tensorrt_llm.compile import (
    BuildProgress,
    plain_arguments,
    run,
    script_for_another_machine,
)
from enginesmith.engines.tensorrt_llm.convert import convert_checkpoint
from enginesmith.engines.tensorrt_llm.mapping import Mapping
from enginesmith.engines.tensorrt_llm.toolchain import GPU_FILE, SUMS_FILE
from enginesmith.errors import EnginesmithError, OperatorError, SourceError, ToolchainError

Edit = Callable[[Path], None]


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with TensorRT-LLM 1.2.1 and an H100; the directory of its programs."""
    programs = tmp_path / "bin"
    trtllm_build_standin.install(programs, gpu=H100)
    monkeypatch.setenv("PATH", f"{programs}:/usr/bin:/bin")
    monkeypatch.delenv("ENGINESMITH_TRTLLM_BUILD", raising=False)
    return programs


def test_engines_are_built_and_completed_with_the_tokenizer(tmp_path: Path, machine: Path) -> None:
    target = make_target(parallelism={"tensor": 2, "pipeline": 2}, workers=2)
    converted = write_checkpoint(
        tmp_path / "converted", tensor=2, pipeline=2, quant_algo="FP8", kv_cache_quant_algo="FP8"
    )
    context = make_context(tmp_path, target, converted)
    facts = run(context)
    assert sorted(path.name for path in context.out.iterdir()) == [
        "chat_template.jinja",
        "config.json",
        "gpu.csv",
        *(f"rank{rank}.engine" for rank in range(4)),
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert (context.out / GPU_FILE).read_text() == H100 + "\n"
    assert "pretrained_config" in json.loads((context.out / "config.json").read_text())
    assert (facts["origin"], facts["world_size"], facts["version"]) == ("built", 4, "1.2.1")
    assert facts["engine_bytes"] == 4 * 4100
    assert facts["gpu"]["name"] == "NVIDIA H100 80GB HBM3"
    json.dumps(facts)


def test_a_converted_model_goes_through(tmp_path: Path, machine: Path) -> None:
    source = tiny_checkpoint(tmp_path / "hf")
    converted = tmp_path / "converted"
    convert_checkpoint(source, converted, mapping=Mapping(tensor=2))
    context = make_context(tmp_path, make_target(parallelism={"tensor": 2}), converted)
    assert run(context)["world_size"] == 2
    served = json.loads((context.out / "config.json").read_text())
    assert served["pretrained_config"] == json.loads((converted / "config.json").read_text()) | {
        "logits_dtype": "float32"
    }


def test_progress_only_grows_and_names_the_engine(tmp_path: Path, machine: Path) -> None:
    converted = write_checkpoint(tmp_path / "converted", tensor=2)
    context = make_context(tmp_path, make_target(parallelism={"tensor": 2}), converted)
    run(context)
    fractions = [fraction for fraction, _ in context.notes if fraction is not None]
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1.0
    notes = [note for _, note in context.notes]
    assert notes[0] == "TensorRT-LLM 1.2.1 on NVIDIA H100 80GB HBM3 (SM90, 80 GiB)"
    assert "engine 2 of 2: building" in notes
    assert notes[-1] == "2 of 2 engines built"


def test_progress_reads_lines_of_the_tool() -> None:
    progress = BuildProgress(2)
    assert not progress.read("[TRT-LLM] [I] Set PluginConfig.gemm_plugin to auto.")
    assert progress.read("[TRT-LLM] [I] Build TensorRT engine Unnamed Network 0")
    assert progress.note == "engine 1 of 2: building"
    assert progress.read("[TRT-LLM] [I] Engine serialized. Total time: 00:00:19")
    assert progress.fraction == 0.5


def test_timings_are_kept_for_the_next_build(tmp_path: Path, machine: Path) -> None:
    kept = tmp_path / "timing_caches" / "1.2.1-sm90.cache"
    converted = write_checkpoint(tmp_path / "converted")
    context = make_context(tmp_path, make_target(), converted, timing_cache=str(kept))
    run(context)
    assert kept.read_bytes() == b"timings of 1.2.1"
    assert [path.name for path in kept.parent.iterdir()] == [kept.name]
    assert not list(context.out.glob("*.cache"))


def test_named_compiler_wins_over_the_path(
    tmp_path: Path, machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = trtllm_build_standin.install(tmp_path / "else where")
    (machine / "trtllm-build").write_text("#!/bin/sh\nexit 9\n")
    monkeypatch.setenv("ENGINESMITH_TRTLLM_BUILD", str(elsewhere))
    assert run(make_context(tmp_path, make_target(), write_checkpoint(tmp_path / "c")))["version"] == "1.2.1"


@pytest.mark.parametrize(
    ("fault", "error", "words"),
    [
        ("memory", OperatorError, "the GPU's memory was too small"),
        ("killed", ToolchainError, "exit status -9"),
        ("short", SourceError, r"rank0\.engine looks cut off: \d+ bytes"),
    ],
)
def test_failed_build_says_why(
    fault: str,
    error: type[EnginesmithError],
    words: str,
    tmp_path: Path,
    machine: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("STANDIN_FAULT", fault)
    context = make_context(tmp_path, make_target(), write_checkpoint(tmp_path / "converted"))
    with pytest.raises(error) as raised:
        run(context)
    assert re.search(words, str(raised.value))


def test_full_disk_is_told_apart(tmp_path: Path, machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STANDIN_FAULT", "disk")
    with pytest.raises(OSError, match="No space left on device"):
        run(make_context(tmp_path, make_target(), write_checkpoint(tmp_path / "converted")))


def test_missing_tokenizer_stops_before_the_build(tmp_path: Path, machine: Path) -> None:
    context = make_context(tmp_path, make_target(), write_checkpoint(tmp_path / "converted"))
    (context.inputs["checkpoint"] / "tokenizer.json").unlink()
    with pytest.raises(SourceError, match=r"has no tokenizer\.json"):
        run(context)
    assert not list(context.out.iterdir())


def test_command_for_another_machine_is_the_one_that_is_run_here(tmp_path: Path, machine: Path) -> None:
    converted = write_checkpoint(tmp_path / "converted", quant_algo="W4A16_AWQ")
    context = make_context(tmp_path, make_target(), converted)
    arguments = plain_arguments(context.params, converted, Path("/engines"))
    assert arguments[:4] == ("--checkpoint_dir", str(converted), "--output_dir", "/engines")
    assert arguments[arguments.index("--output_timing_cache") + 1] == "/engines/model.cache"
    assert arguments[arguments.index("--use_fp8_context_fmha") + 1] == "disable"
    script = script_for_another_machine(context.params, converted, Path("/engines"))
    assert shlex.split(script.splitlines()[2])[-len(arguments) :] == list(arguments)
    assert "tritonserver:26.07-trtllm-python-py3 trtllm-build" in script


@pytest.fixture(scope="module")
def built_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The converted checkpoint of a TP=2 FP8 target, and its engines as the container script leaves them."""
    place = tmp_path_factory.mktemp("built")
    converted = write_checkpoint(place / "converted", tensor=2, quant_algo="FP8")
    programs = place / "bin"
    trtllm_build_standin.install(programs, gpu=H100)
    context = make_context(place, make_target(parallelism={"tensor": 2}), converted)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{programs}:/usr/bin:/bin")
        run(context)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (context.out / name).unlink()
    return place


@pytest.fixture
def built(tmp_path: Path, built_once: Path) -> Path:
    """A copy of the engines that a test may harm; their checkpoint is beside them."""
    shutil.copytree(built_once / "converted", tmp_path / "converted")
    return Path(shutil.copytree(built_once / "out", tmp_path / "there"))


def adopting(tmp_path: Path, engines: Path, **keys: Any) -> Context:
    target = make_target(**{"parallelism": {"tensor": 2}, **keys})
    return make_context(tmp_path, target, tmp_path / "converted", engine_dir=str(engines))


def write_sums(
    engines: Path, names: tuple[str, ...] = ("config.json", "rank0.engine", "rank1.engine")
) -> None:
    lines = [f"{file_digest(engines / name)}  {name}\n" for name in names]
    (engines / SUMS_FILE).write_text("".join(lines))


def test_adopted_engines_are_copied_and_completed(
    tmp_path: Path, built: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/usr/bin:/bin")  # Neither compiler nor GPU are needed.
    write_sums(built)
    (built / "notes.txt").write_text("not the runtime's")
    context = adopting(tmp_path, built)
    facts = run(context)
    assert (facts["origin"], facts["digests_checked"]) == ("adopted", True)
    assert (context.out / "tokenizer.json").is_file()
    assert not (context.out / "notes.txt").exists()
    assert (context.out / "rank1.engine").stat().st_ino != (built / "rank1.engine").stat().st_ino


def test_engines_without_records_are_adopted_and_it_is_said(tmp_path: Path, built: Path) -> None:
    (built / GPU_FILE).unlink()
    facts = run(adopting(tmp_path, built))
    assert facts["gpu"] is None
    assert facts["digests_checked"] is False


def edit(section: str, key: str, value: Any) -> Edit:
    def change(engines: Path) -> None:
        config = json.loads((engines / "config.json").read_text())
        place = config
        for name in filter(None, section.split(".")):
            place = place[name]
        place[key] = value
        (engines / "config.json").write_text(json.dumps(config))

    return change


def cut(name: str, size: int) -> Edit:
    return lambda engines: (engines / name).write_bytes((engines / name).read_bytes()[:size]) and None


def changed_after_sums(engines: Path) -> None:
    write_sums(engines)
    data = bytearray((engines / "rank1.engine").read_bytes())
    data[100] ^= 1
    (engines / "rank1.engine").write_bytes(data)


DAMAGE: dict[str, tuple[Edit, type[EnginesmithError], str]] = {
    "another version": (edit("", "version", "1.1.0"), ToolchainError, "built by TensorRT-LLM 1.1.0, the target's toolchain has 1.2.1"),
    "its toolchain is named": (edit("", "version", "1.1.0"), ToolchainError, "set toolchain: '26.02'"),
    "another architecture": (lambda d: (d / GPU_FILE).write_text(A100 + "\n") and None, ToolchainError, "built on NVIDIA A100-SXM4-80GB (SM80, 80 GiB), the target's GPU is h100"),
    "another GPU of the architecture": (lambda d: (d / GPU_FILE).write_text(H200 + "\n") and None, ToolchainError, "built on NVIDIA H200 (SM90, 140 GiB)"),
    "damaged GPU record": (lambda d: (d / GPU_FILE).write_text("no devices were found\n") and None, SourceError, "does not describe a GPU"),
    "another world size": (edit("pretrained_config.mapping", "world_size", 4), OperatorError, "have world_size 4, the target's parallelism asks for 2"),
    "another parallelism": (edit("pretrained_config.mapping", "tp_size", 1), OperatorError, "have tp_size 1"),
    "another model": (edit("pretrained_config", "num_hidden_layers", 7), OperatorError, "have num_hidden_layers 7, the variant's checkpoint has 4"),
    "another vocabulary": (edit("pretrained_config", "vocab_size", 7), OperatorError, "these are the engines of another model"),
    "another scheme": (edit("pretrained_config.quantization", "quant_algo", "W4A16_AWQ"), OperatorError, "have quant_algo W4A16_AWQ, the variant's checkpoint has FP8"),
    "another KV cache": (edit("pretrained_config.quantization", "kv_cache_quant_algo", "FP8"), OperatorError, "have kv_cache_quant_algo FP8, the variant's checkpoint has none"),
    "small batch": (edit("build_config", "max_batch_size", 4), OperatorError, "max_batch_size 4, the spec needs 8"),
    "short prompts": (edit("build_config", "max_input_len", 255), OperatorError, "max_input_len 255, the spec needs 256"),
    "short sequences": (edit("build_config", "max_seq_len", 128), OperatorError, "max_seq_len 128, the spec needs 512"),
    "few tokens": (edit("build_config", "max_num_tokens", 64), OperatorError, "max_num_tokens 64, the spec needs 4096"),
    "contiguous cache": (edit("build_config", "kv_cache_type", "CONTINUOUS"), OperatorError, "in-flight batching needs PAGED"),
    "block size": (edit("build_config.plugin_config", "tokens_per_block", 64), OperatorError, "tokens_per_block 64, the target asks for 32"),
    "no paged attention": (edit("build_config.plugin_config", "use_paged_context_fmha", False), OperatorError, "use_paged_context_fmha False, the target asks for True"),
    "a rank is missing": (lambda d: (d / "rank1.engine").unlink(), SourceError, "has no rank1.engine; a world of 2 has 2 engines, seen: rank0.engine"),
    "a rank too many": (lambda d: shutil.copy(d / "rank0.engine", d / "rank2.engine") and None, OperatorError, "has rank2.engine too"),
    "an empty rank": (cut("rank1.engine", 0), SourceError, "rank1.engine looks cut off: 0 bytes"),
    "a rank cut off": (cut("rank0.engine", 3000), SourceError, "rank0.engine looks cut off: 3000 bytes"),
    "changed bytes": (changed_after_sums, SourceError, "rank1.engine is not what SHA256SUMS says"),
    "incomplete sums": (lambda d: write_sums(d, names=("config.json",)), SourceError, "has no line for rank0.engine"),
    "no config": (lambda d: (d / "config.json").unlink(), SourceError, "config.json is missing"),
    "damaged config": (cut("config.json", 40), SourceError, "is not valid JSON"),
    "a checkpoint's config": (edit("", "version", None), SourceError, "does not say which TensorRT-LLM wrote it"),
    "the checkpoint's config": (lambda d: (d / "config.json").write_text('{"version": "1.2.1"}') and None, SourceError, "has no section pretrained_config.mapping"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
def test_wrong_engines_are_refused_with_seen_and_expected(name: str, tmp_path: Path, built: Path) -> None:
    change, error, words = DAMAGE[name]
    change(built)
    context = adopting(tmp_path, built)
    with pytest.raises(error) as raised:
        run(context)
    assert words in str(raised.value)
    assert raised.value.hint
    if name not in ("changed bytes", "incomplete sums"):  # Bytes are compared as copied.
        assert not list(context.out.iterdir()), "refused before anything was copied"


def test_directory_that_is_not_there(tmp_path: Path, built: Path) -> None:
    with pytest.raises(SourceError, match="does not exist"):
        run(adopting(tmp_path, tmp_path / "nowhere"))


def test_serving_defaults_of_the_cases_are_within_the_engine(built: Path) -> None:
    build = json.loads((built / "config.json").read_text())["build_config"]
    assert build["max_num_tokens"] == SERVING.max_batch_size * SERVING.max_sequence_length

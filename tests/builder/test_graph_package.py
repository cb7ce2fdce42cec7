"""Triton repositories of graph models: golden configurations, what is written, what is refused."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from graph_deployment import (
    LABELS,
    LONGEST,
    VOCABULARY,
    Context,
    params,
    signature_of,
    tokenizer,
    write_inputs,
)

from enginesmith.errors import EnginesmithError, GateError, OperatorError, SourceError, SpecError
from enginesmith.publish.local import publish
from enginesmith.triton.config import ModelConfig, config_text, parse_config
from enginesmith.triton.graph.assemble import run as assemble
from enginesmith.triton.graph.configs import engine_config, text_config, tokenizer_config
from enginesmith.triton.graph.deployment import Deployment, read_deployment
from enginesmith.triton.graph.package import run as package
from enginesmith.triton.graph.package_tensorrt import package_digest
from enginesmith.triton.graph.package_tensorrt import run as package_tensorrt
from enginesmith.triton.graph.rehearse import stand_in_config
from enginesmith.triton.graph.warmup import warmup_of
from enginesmith.triton.installation import find_server
from enginesmith.triton.models.graph_tokenizer.graph_text import GraphText, TextRefusedError, utf8
from enginesmith.triton.response_cache import cache_arguments, cache_bytes_for

GOLDEN = Path(__file__).parents[1] / "golden" / "graph"
NATIVE = {"runtime": "onnxruntime", "backend": "onnxruntime"}
TENSORRT_PROVIDER = {
    **NATIVE,
    "provider": "tensorrt",
    "provider_options": {"trt_max_workspace_size": "1073741824", "trt_engine_cache_enable": "1"},
}
CUDA_PROVIDER = {
    **NATIVE,
    "provider": "cuda",
    "provider_options": {"arena_extend_strategy": "kSameAsRequested"},
}


def deployment(task: str = "embedding", **changes: Any) -> Deployment:
    return read_deployment(params(task, **changes), signature_of(task))


CONFIGS = {
    "python": engine_config(deployment(response_cache=True, instances=2)),
    "python_tensors": engine_config(deployment("tensors", dynamic_batching=None)),
    "python_labels": engine_config(deployment("classification"), label_file="labels-0123.txt"),
    "onnxruntime_cpu": engine_config(deployment(target={**NATIVE, "threads": 2})),
    "onnxruntime_cuda": engine_config(deployment(target=CUDA_PROVIDER)),
    "onnxruntime_tensorrt": engine_config(deployment(target=TENSORRT_PROVIDER, scheme="int8")),
    "tensorrt": engine_config(
        deployment(
            target={"runtime": "tensorrt"},
            dynamic_batching={
                "preferred_batch_sizes": [2, 4],
                "queue_policy": {"max_queue_size": 64, "default_timeout_us": 100_000},
            },
        )
    ),
    "tensorrt_rtx": engine_config(deployment(target={"runtime": "tensorrt_rtx"})),
    "tokenizer": tokenizer_config(deployment(tokenizer_instances=2)),
    "text_pairs": text_config(deployment("reranking")),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_the_configuration_is_the_golden_file(name: str) -> None:
    text = (GOLDEN / f"{name}.pbtxt").read_text()
    assert config_text(CONFIGS[name]) == text
    assert parse_config(text) == CONFIGS[name]


def written(root: Path, step: Mapping[str, Any], inputs: Mapping[str, Path]) -> Path:
    context = Context(root, step, inputs)
    package(context)
    return context.out


def files(directory: Path) -> set[str]:
    return {path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()}


@pytest.fixture
def inputs(tmp_path: Path) -> dict[str, Path]:
    return write_inputs(tmp_path / "inputs")


def test_a_package_has_an_engine_a_tokenizer_and_an_ensemble(tmp_path: Path, inputs: dict[str, Path]) -> None:
    context = Context(tmp_path / "package", params(), inputs)
    facts = package(context)
    made = context.out
    assert facts["models"] == ["tiny-v", "tiny-v-tokenizer", "tiny-v-text"]
    assert facts["package_bytes"] == sum(path.stat().st_size for path in made.rglob("*") if path.is_file())
    engine = {"model.onnx", "engine.json", "signature.json", "model.py", "graph_runtime.py"}
    assert files(made / "tiny-v/1") == engine
    assert files(made / "tiny-v-tokenizer/1") == {"tokenizer.json", "text.json", "model.py", "graph_text.py"}
    assert files(made / "tiny-v-text/1") == {"signature.json"}
    assert (made / "tiny-v/1/model.onnx").samefile(inputs["engine"] / "model.onnx")


def test_without_text_there_is_only_the_engine(tmp_path: Path, inputs: dict[str, Path]) -> None:
    made = written(tmp_path / "package", params(text=False), inputs)
    assert [path.name for path in made.iterdir()] == ["tiny-v"]


def test_a_native_backend_gets_no_code_of_ours(tmp_path: Path, inputs: dict[str, Path]) -> None:
    made = written(tmp_path / "package", params(target=NATIVE), inputs)
    assert files(made / "tiny-v/1") == {"model.onnx", "engine.json", "signature.json"}


def test_a_gpu_provider_in_python_gets_its_options(tmp_path: Path, inputs: dict[str, Path]) -> None:
    target = {**CUDA_PROVIDER, "backend": "python"}
    made = written(tmp_path / "package", params(target=target), inputs)
    assert json.loads((made / "tiny-v/1/engine.json").read_text()) == {
        "provider": "cuda",
        "provider_options": {"arena_extend_strategy": "kSameAsRequested"},
        "session": {},
    }


def test_labels_are_a_file_named_by_its_content(tmp_path: Path) -> None:
    made = written(
        tmp_path / "package", params("classification"), write_inputs(tmp_path / "inputs", "classification")
    )
    config = parse_config((made / "tiny-v/config.pbtxt").read_text())
    path = made / "tiny-v" / config.output[0].label_filename
    assert path.name.startswith("labels-")
    assert path.read_text().splitlines() == list(LABELS)


def refuses(context: Context, kind: type[EnginesmithError], says: str) -> None:
    with pytest.raises(kind, match=says):
        package(context)


def test_what_has_no_passed_verdict_is_refused(tmp_path: Path, inputs: dict[str, Path]) -> None:
    check = {"name": "quality.min_mean_cosine", "passed": False}
    (inputs["verdict"] / "verdict.json").write_text(json.dumps({"passed": False, "checks": [check]}))
    refuses(Context(tmp_path / "p", params(), inputs), GateError, r"broken: quality\.min_mean_cosine")


def test_a_checkpoint_without_a_tokenizer_is_refused(tmp_path: Path, inputs: dict[str, Path]) -> None:
    (inputs["checkpoint"] / "tokenizer.json").unlink()
    refuses(Context(tmp_path / "p", params(), inputs), SourceError, r"tokenizer\.json is missing")


def test_cuda_options_are_where_tritons_backend_does_not_overwrite_them() -> None:
    options = {"arena_extend_strategy": "kSameAsRequested", "gpu_mem_limit": "1073741824", "use_tf32": "0"}
    config = engine_config(deployment(target={**CUDA_PROVIDER, "provider_options": options}))
    (accelerator,) = config.optimization.execution_accelerators.gpu_execution_accelerator
    assert (accelerator.name, dict(accelerator.parameters)) == ("cuda", {"use_tf32": "0"})
    assert config.parameters["arena_extend_strategy"].string_value == "1"
    assert config.parameters["gpu_mem_limit"].string_value == "1073741824"


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a value that an option of CUDA has not": (
        {"target": {**CUDA_PROVIDER, "provider_options": {"arena_extend_strategy": "1"}}},
        "arena_extend_strategy is 1; allowed: kNextPowerOfTwo, kSameAsRequested",
    ),
    "an unknown option": (
        {"target": {**TENSORRT_PROVIDER, "provider_options": {"trt_engine_cache": "1"}}},
        "knows no option trt_engine_cache .*\n.*trt_engine_cache_enable",
    ),
    "an option that the scheme decides": (
        {"target": {**TENSORRT_PROVIDER, "provider_options": {"trt_fp16_enable": "1"}}},
        "trt_fp16_enable is decided by the variant's scheme",
    ),
    "a scheme without a precision": (
        {"target": TENSORRT_PROVIDER, "scheme": "fp8"},
        "no precision for scheme fp8; it has: none, fp16, bf16, int8",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_triton_would_refuse_is_refused_before(
    name: str, tmp_path: Path, inputs: dict[str, Path]
) -> None:
    changes, says = REFUSED[name]
    refuses(Context(tmp_path / "p", params(**changes), inputs), SpecError, says)


def test_an_engine_with_options_that_a_backend_cannot_set_is_refused(
    tmp_path: Path, inputs: dict[str, Path]
) -> None:
    session = {"session.x64quantprecision": "1", "session.intra_op.allow_spinning": "0"}
    (inputs["engine"] / "engine.json").write_text(json.dumps({"session": session}))
    says = "was measured with session.x64quantprecision, which Triton's"
    refuses(Context(tmp_path / "p", params(target=NATIVE), inputs), SpecError, says)


@pytest.mark.parametrize(
    ("target", "serving", "expected"),
    [
        ({"runtime": "onnxruntime"}, {}, ()),
        ({"runtime": "onnxruntime"}, {"pad_to": (8, 24)}, (8, 24)),
        (NATIVE, {}, (16, 24)),
        (NATIVE, {"pad_to": (12, 24)}, (12, 24)),
        ({"runtime": "tensorrt"}, {"max_sequence_length": 16}, (16,)),
        ({"runtime": "tensorrt_rtx"}, {}, ()),
    ],
)
def test_texts_are_padded_to_buckets_where_the_backend_joins_equal_shapes_only(
    target: dict[str, Any], serving: dict[str, Any], expected: tuple[int, ...]
) -> None:
    assert deployment(target=target, **serving).pad_to == expected


@pytest.mark.parametrize("target", [{"runtime": "onnxruntime"}, NATIVE], ids=["python", "native"])
def test_warm_up_data_fits_what_the_configuration_says(
    target: dict[str, Any], inputs: dict[str, Path]
) -> None:
    made = deployment(target=target)
    samples, contents = warmup_of(made, inputs["samples"])
    lengths = {one.inputs["input_ids"].dims for one in samples}
    assert lengths == ({(17,)} if not made.pad_to else {(16,), (24,)})
    assert {one.batch_size for one in samples} == {1, 4}
    for one in samples:
        for given in one.inputs.values():
            assert len(contents[given.file]) == 8 * math.prod(given.dims)
    longest = max(samples, key=lambda one: one.inputs["input_ids"].dims).inputs
    mask = np.frombuffer(contents[longest["attention_mask"].file], np.int64)
    ids = np.frombuffer(contents[longest["input_ids"].file], np.int64)
    assert mask.sum() == 17
    assert (ids[17:] == 0).all()


def test_no_warm_up_where_none_is_wanted(inputs: dict[str, Path]) -> None:
    assert warmup_of(deployment(warmup=False), inputs["samples"]) == ([], {})


def text_stage(root: Path, **serving: Any) -> GraphText:
    task = serving.pop("task", "embedding")
    inputs = write_inputs(root / "inputs", task)
    for name, content in serving.pop("checkpoint_files", {}).items():
        (inputs["checkpoint"] / name).write_text(json.dumps(content))
    return GraphText(written(root / "package", params(task, **serving), inputs) / "tiny-v-tokenizer/1")


def test_texts_are_padded_to_the_longest_and_the_tokenizers_own_settings_do_not_count(tmp_path: Path) -> None:
    stage = text_stage(tmp_path)
    made = stage.inputs(stage.encode(["the river", "a cold stone falls over the bright river"]))
    assert made["input_ids"].shape == (2, 10)
    assert made["input_ids"][0].tolist() == [2, 4, 11, 3, 0, 0, 0, 0, 0, 0]
    assert made["attention_mask"].sum(axis=1).tolist() == [4, 10]
    assert made["input_ids"].dtype == np.int64


def test_texts_are_padded_to_the_next_bucket(tmp_path: Path) -> None:
    stage = text_stage(tmp_path, pad_to=(4, 8, 24))
    widths = [
        stage.inputs(stage.encode([" ".join(["the"] * words)]))["input_ids"].shape[1] for words in (2, 3, 7)
    ]
    assert widths == [4, 8, 24]


def test_letters_are_made_small_as_sentence_transformers_makes_them(tmp_path: Path) -> None:
    document = json.loads(tokenizer().to_str())
    document["normalizer"] = None
    document["model"]["vocab"]["\u03bf\u03b4\u03bf\u03c3"] = len(VOCABULARY)
    settings = {"do_lower_case": True}
    files = {"tokenizer.json": document, "sentence_bert_config.json": settings}
    stage = text_stage(tmp_path, checkpoint_files=files)
    made = stage.inputs(stage.encode(["THE River", "\u039f\u0394\u039f\u03a3"]))
    assert made["input_ids"].tolist() == [[2, 4, 11, 3], [2, len(VOCABULARY), 3, 0]]


def test_pairs_have_two_types(tmp_path: Path) -> None:
    stage = text_stage(tmp_path, task="reranking")
    made = stage.inputs(stage.encode(["the river"], ["cold"]))
    assert made["token_type_ids"].tolist() == [[0, 0, 0, 0, 1, 1]]


@pytest.mark.parametrize(
    ("settings", "expected"), [({}, 24), ({"max_seq_length": 9}, 9), ({"max_seq_length": 512}, 24)]
)
def test_long_texts_are_cut_where_sentence_transformers_cuts(
    settings: dict[str, Any], expected: int, tmp_path: Path
) -> None:
    stage = text_stage(tmp_path, checkpoint_files={"sentence_bert_config.json": settings})
    made = stage.inputs(stage.encode(["the " * 100]))
    assert made["input_ids"].shape == (1, expected)
    assert made["input_ids"][0, -1] == 3


def test_long_texts_are_refused_where_nothing_is_cut(tmp_path: Path) -> None:
    stage = text_stage(tmp_path, truncate=False)
    with pytest.raises(TextRefusedError, match="has 102 tokens; this model accepts at most 24"):
        stage.inputs(stage.encode(["the " * 100]))


def test_text_that_is_no_utf8_is_refused_with_its_place() -> None:
    with pytest.raises(TextRefusedError, match=r"TEXT is not valid UTF-8: .* at byte 3"):
        utf8(b"caf\xe9", "TEXT")
    assert utf8("café".encode(), "TEXT") == "café"


def test_the_stand_in_differs_in_who_runs_it_only() -> None:
    played = stand_in_config(CONFIGS["onnxruntime_tensorrt"])
    assert (played.backend, played.platform) == ("python", "")
    back = ModelConfig()
    back.CopyFrom(played)
    back.backend = "onnxruntime"
    back.instance_group[0].kind = CONFIGS["onnxruntime_tensorrt"].instance_group[0].kind
    back.optimization.CopyFrom(CONFIGS["onnxruntime_tensorrt"].optimization)
    assert back == CONFIGS["onnxruntime_tensorrt"]


RTX = {"runtime": "tensorrt_rtx"}


def tensorrt_parts(root: Path, **changes: Any) -> Context:
    """The context of ``package_tensorrt``, with an ``engine.json`` that fits but for ``changes``; None: no such key."""
    step, inputs = params(target=RTX), write_inputs(root / "inputs")
    assembled = Context(root / "assemble", step, inputs)
    assemble(assembled)
    names = ("input_ids", "attention_mask")
    document = {
        "runtime": "tensorrt_rtx",
        "bindings": [
            *({"name": name, "mode": "input", "dtype": "int64"} for name in names),
            {"name": "embedding", "mode": "output", "dtype": "float32"},
        ],
        "profiles": [{name: {"min": [1, 1], "opt": [4, 8], "max": [4, LONGEST]} for name in names}],
    }
    for name in ("engine", "rehearsal"):
        (root / name).mkdir()
    (root / "engine/engine.json").write_text(json.dumps(document | changes))
    (root / "engine/model.plan").write_bytes(b"a plan")
    rehearsal = {"passed": True, "package_digest": package_digest(assembled.out)}
    (root / "rehearsal/rehearsal.json").write_text(json.dumps(rehearsal))
    parts = {"repository": assembled.out, "engine": root / "engine", "rehearsal": root / "rehearsal"}
    return Context(root / "package", step, {**parts, "verdict": inputs["verdict"]})


def test_a_tensorrt_package_is_the_repository_and_the_engine(tmp_path: Path) -> None:
    context = tensorrt_parts(tmp_path)
    package_tensorrt(context)
    added = {"tiny-v/1/model.plan", "tiny-v/1/engine.json"}
    assert files(context.out) == files(context.inputs["repository"]) | added
    assert {"model.py", "graph_tensorrt.py", "cuda_memory.py", "graph_runtime.py"} <= files(
        context.out / "tiny-v/1"
    )


UNFIT: dict[str, tuple[dict[str, Any], str]] = {
    "another runtime": ({"runtime": "tensorrt"}, "it is for tensorrt, the target is tensorrt_rtx"),
    "another output": (
        {"bindings": [{"name": "logits", "mode": "output", "dtype": "float32"}]},
        "output embedding is missing, expected float32; .*output logits is float32, expected none",
    ),
    "too short a profile": (
        {"profiles": [{"input_ids": {"min": [1, 1], "max": [4, 16]}}]},
        r"the max shape of input input_ids is \[4, 16\], \[4, 24\] is served",
    ),
    "too large a smallest batch": (
        {"profiles": [{"input_ids": {"min": [2, 1], "max": [4, 24]}}]},
        r"the min shape of input input_ids is \[2, 1\], \[1, 1\] is served",
    ),
    "no profile": ({"profiles": []}, r"the max shape of input attention_mask is \[\]"),
}


@pytest.mark.parametrize("name", UNFIT)
def test_an_engine_that_does_not_cover_what_is_served_is_refused(name: str, tmp_path: Path) -> None:
    changes, says = UNFIT[name]
    context = tensorrt_parts(tmp_path, **changes)
    with pytest.raises(GateError, match=says):
        package_tensorrt(context)
    assert not any(context.out.iterdir())


def test_a_repository_that_was_not_rehearsed_is_refused(tmp_path: Path) -> None:
    context = tensorrt_parts(tmp_path)
    (context.inputs["repository"] / "tiny-v/1/model.py").write_text("other")
    with pytest.raises(GateError, match="is not what was rehearsed"):
        package_tensorrt(context)


def test_a_missing_plan_is_refused(tmp_path: Path) -> None:
    context = tensorrt_parts(tmp_path)
    (context.inputs["engine"] / "model.plan").unlink()
    with pytest.raises(SourceError, match=r"model\.plan is missing"):
        package_tensorrt(context)


def evidence(made: Path, **rehearsal: Any) -> dict[str, Any]:
    return {"rehearsal": {"passed": True, "package_digest": package_digest(made), **rehearsal}}


def test_a_plan_is_published_although_no_rehearsal_ran_it_and_nothing_else_is(tmp_path: Path) -> None:
    context = tensorrt_parts(tmp_path)
    package_tensorrt(context)
    late = ["tiny-v/1/model.plan", "tiny-v/1/engine.json"]
    rehearsed = evidence(context.inputs["repository"], not_rehearsed=late)
    assert publish(context.out, tmp_path / "repository", evidence=rehearsed).version == 1
    (context.out / "tiny-v/1/more.bin").write_bytes(b"what is this")
    rehearsed["rehearsal"]["not_rehearsed"].append("tiny-v/1/more.bin")
    with pytest.raises(GateError, match="is not what was rehearsed"):
        publish(context.out, tmp_path / "other", evidence=rehearsed)


def test_versions_share_warm_up_data_and_none_is_changed(tmp_path: Path, inputs: dict[str, Path]) -> None:
    repository = tmp_path / "repository"
    first = written(tmp_path / "first", params(), inputs)
    publish(first, repository, evidence=evidence(first))
    shared = {path.name for path in (repository / "tiny-v/warmup").iterdir()}
    assert shared == {path.name for path in (first / "tiny-v/warmup").iterdir()}
    second = written(tmp_path / "second", params(target=NATIVE), inputs)
    assert publish(second, repository, evidence=evidence(second)).parts[0].version == 2
    assert {path.name for path in (repository / "tiny-v/warmup").iterdir()} > shared
    damaged = repository / "tiny-v/warmup" / min(shared)
    damaged.unlink()
    damaged.write_bytes(b"damaged")
    with pytest.raises(OperatorError, match="was changed after it was published"):
        publish(first, repository, evidence=evidence(first))


def test_a_server_gets_a_cache_where_a_model_asks_for_one(tmp_path: Path, inputs: dict[str, Path]) -> None:
    made = written(tmp_path / "with", params(response_cache=True), inputs)
    plain = written(tmp_path / "without", params(), inputs)
    assert cache_bytes_for(made) == 64 << 20
    assert cache_bytes_for(made, 0) == cache_bytes_for(plain) == 0
    assert cache_bytes_for(plain, 1 << 20) == 1 << 20
    assert cache_arguments(0) == ()
    assert cache_arguments(1 << 20) == ("--cache-config=local,size=1048576",)
    installation = find_server()
    arguments = cache_arguments(1, installation)
    if installation.cache_directory:
        assert arguments[1:] == (f"--cache-directory={installation.cache_directory}",)
        assert (installation.cache_directory / "local").is_dir()

"""``enginesmith inspect``: what it says of each kind of thing, and of what is damaged, ambiguous or not there."""

from __future__ import annotations

import json
import tracemalloc
from contextlib import suppress
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from graph_engines import write_engine
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import save_file

from enginesmith import cli
from enginesmith.errors import SourceError
from enginesmith.inspect_onnx import inspect_onnx, layer_of
from enginesmith.inspect_onnx_file import read_onnx_headers
from enginesmith.store import ArtifactStore

MIB = 1 << 20


@pytest.fixture(autouse=True)
def own_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENGINESMITH_STORE", str(tmp_path / "store"))


def inspected(capsys: pytest.CaptureFixture[str], what: object, *options: object) -> dict[str, Any]:
    """The answer as JSON, after making sure that the tables can be shown."""
    assert cli.run(["inspect", str(what), *map(str, options)]) == 0
    assert capsys.readouterr().out
    assert cli.run(["inspect", str(what), "--json", *map(str, options)]) == 0
    document: dict[str, Any] = json.loads(capsys.readouterr().out)
    return document


def refused(capsys: pytest.CaptureFixture[str], what: object) -> str:
    assert cli.run(["inspect", str(what)]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert "Traceback" not in err
    return err


def quantized_model(path: Path) -> Path:
    """``layer.0/MatMul`` in INT8 Q/DQ, ``layer.1/MatMul`` in float, ``layer.2/MatMul`` in FP8."""
    nodes, weights = [], []
    names = {"int8": ("x", "a"), "float": ("a", "b"), "fp8": ("b", "y")}
    for index, (kind, (source, target)) in enumerate(names.items()):
        weight = f"w{index}"
        values: Any = np.ones((8, 8), np.float32)
        if kind != "float":
            values = values.astype(np.int8 if kind == "int8" else ml_dtypes.float8_e4m3fn)
            zero = np.zeros((), values.dtype)
            weights += [
                numpy_helper.from_array(np.float32(1), f"scale{index}"),
                numpy_helper.from_array(zero, f"zero{index}"),
            ]
            scale = [f"scale{index}", f"zero{index}"]
            nodes += [
                helper.make_node("QuantizeLinear", [source, *scale], [f"q{index}"], name=f"layer.{index}/QuantizeLinear"),
                helper.make_node("DequantizeLinear", [f"q{index}", *scale], [f"d{index}"], name=f"layer.{index}/DequantizeLinear"),
                helper.make_node("DequantizeLinear", [weight, *scale], [f"dw{index}"], name=f"layer.{index}/DequantizeLinear_2"),
            ]  # fmt: skip
            source, used = f"d{index}", f"dw{index}"
        else:
            used = weight
        weights.append(numpy_helper.from_array(values, weight))
        nodes.append(helper.make_node("MatMul", [source, used], [target], name=f"layer.{index}/MatMul"))
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "quantized",
        [value("x", TensorProto.FLOAT, ["batch", 8])],
        [value("y", TensorProto.FLOAT, ["batch", 8])],
        weights,
        value_info=[value("a", TensorProto.FLOAT, ["batch", 8])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], producer_name="tests")
    onnx.checker.check_model(model)
    onnx.save(model, path)
    return path


def test_a_graph_says_its_operators_its_precisions_and_where_its_bytes_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = inspected(capsys, quantized_model(tmp_path / "model.onnx"))
    assert (found["kind"], found["opsets"], found["producer"]) == ("ONNX graph", {"ai.onnx": 21}, "tests")
    assert {row["operator"]: row["count"] for row in found["operators"]} == {
        "MatMul": 3, "DequantizeLinear": 4, "QuantizeLinear": 2,
    }  # fmt: skip
    products = {
        row["node"]: (row["activations"], row["weights"], row["quantized"]) for row in found["products"]
    }
    assert products == {
        "layer.0/MatMul": ("int8", "int8", True),
        "layer.1/MatMul": ("float32", "float32", False),
        "layer.2/MatMul": ("float8e4m3fn", "float8e4m3fn", True),
    }
    assert (found["product_count"], found["quantized_product_count"]) == (3, 2)
    assert {row["layer"]: row["bytes"] for row in found["layers"]} == {
        "layer.0": 64 + 5, "layer.1": 256, "layer.2": 64 + 5,
    }  # fmt: skip
    assert found["inputs_and_outputs"][0]["shape"] == ["batch", 8]
    assert found["largest_tensors"][0] == {
        "name": "w1", "dtype": "float32", "shape": [8, 8], "used_by": "layer.1/MatMul", "bytes": 256,
    }  # fmt: skip


def test_shapes_with_names_are_shown_and_not_taken_for_markup(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["inspect", str(quantized_model(tmp_path / "model.onnx"))]) == 0
    assert "[batch, 8]" in capsys.readouterr().out


def test_headers_are_those_of_the_model_without_the_values(tmp_path: Path) -> None:
    path = quantized_model(tmp_path / "model.onnx")
    whole, headers = onnx.load(path), read_onnx_headers(path).model
    for tensor in whole.graph.initializer:
        for field in ("raw_data", "float_data", "int32_data"):
            tensor.ClearField(field)
    assert headers == whole


def test_weights_are_not_read(tmp_path: Path) -> None:
    weights = numpy_helper.from_array(np.ones((32 * MIB // 4,), np.float32), "w")
    node = helper.make_node("Add", ["x", "w"], ["y"])
    value = helper.make_tensor_value_info
    sides = [[value(name, TensorProto.FLOAT, [None])] for name in "xy"]
    model = helper.make_model(helper.make_graph([node], "big", *sides, [weights]))
    onnx.save(model, tmp_path / "model.onnx")
    read_onnx_headers(tmp_path / "model.onnx")
    tracemalloc.start()
    read_onnx_headers(tmp_path / "model.onnx")
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < MIB


@given(st.data())
def test_a_damaged_graph_is_one_error_wherever_it_is_cut_or_changed(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = quantized_model(tmp_path_factory.mktemp("damaged") / "model.onnx")
    content = bytearray(path.read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    if data.draw(st.booleans()):
        path.write_bytes(content[:place])
    else:
        content[place] ^= data.draw(st.integers(1, 255))
        path.write_bytes(content)
    with suppress(SourceError):
        list(inspect_onnx(path).as_tables())


@pytest.mark.parametrize(
    ("content", "said"), [(b"", "is empty"), (b"not a model", "no ONNX model"), (b"\x08\x0a", "no operators")]
)
def test_what_is_no_graph_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes, said: str
) -> None:
    (tmp_path / "model.onnx").write_bytes(content)
    assert said in refused(capsys, tmp_path / "model.onnx")


def test_weights_beside_a_graph_must_be_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = onnx.load(quantized_model(tmp_path / "small.onnx"))
    onnx.save(
        model,
        tmp_path / "model.onnx",
        save_as_external_data=True,
        location="model.onnx.data",
        size_threshold=0,
    )
    found = inspected(capsys, tmp_path / "model.onnx")
    assert found["external_bytes"] == (tmp_path / "model.onnx.data").stat().st_size > 300
    (tmp_path / "model.onnx.data").write_bytes(b"short")
    assert "has 5 bytes of" in refused(capsys, tmp_path / "model.onnx")
    (tmp_path / "model.onnx.data").unlink()
    assert "model.onnx.data, which is missing" in refused(capsys, tmp_path / "model.onnx")


@pytest.mark.parametrize(
    ("node", "layer"),
    [
        ("encoder.layer.0.attention.self.query/MatMul", "encoder.layer.0"),
        ("/model/layers.11/mlp/Mul", "model.layers.11"),
        ("embeddings.word_embeddings/Gather", "embeddings.word_embeddings"),
        ("pooling/Div", "pooling"),
        ("Cast_4", ""),
    ],
)
def test_a_node_belongs_to_the_layer_of_its_module(node: str, layer: str) -> None:
    assert layer_of(node) == layer


def test_an_engine_directory_is_its_settings_and_its_graph(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = inspected(capsys, write_engine(tmp_path / "engine", emulated=True))
    assert found["kind"] == "ONNX Runtime engine"
    assert (found["provider"], found["emulated"]) == ("cpu", True)
    assert [row["node"] for row in found["parts"][0]["products"]] == ["head/MatMul"]


def checkpoint(directory: Path, **config: Any) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {
        "embeddings.weight": np.ones((10, 4), np.float32),
        **{f"encoder.layer.{index}.dense.weight": np.ones((4, 4), np.float16) for index in (0, 1, 10)},
    }
    save_file(tensors, directory / "model.safetensors")
    document = {"architectures": ["BertModel"], "model_type": "bert", "hidden_size": 4} | config
    (directory / "config.json").write_text(json.dumps(document))
    return directory


def test_a_checkpoint_says_what_it_is_and_how_big_each_layer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quantization = {"quant_method": "modelopt", "quant_algo": "FP8", "exclude_modules": ["lm_head"]}
    found = inspected(capsys, checkpoint(tmp_path / "checkpoint", quantization_config=quantization))
    assert (found["kind"], found["architecture"]) == ("Hugging Face checkpoint", "BertModel")
    assert (found["parameters"], found["dtypes"]) == (88, {"F16": 48, "F32": 40})
    assert found["quantization"] == {"algorithm": "FP8", "exclude_modules": ["lm_head"]}
    assert [row["layer"] for row in found["layers"]] == [
        "embeddings", "encoder.layer.0", "encoder.layer.1", "encoder.layer.10",
    ]  # fmt: skip
    one_file = inspected(capsys, tmp_path / "checkpoint" / "model.safetensors")
    assert (one_file["kind"], one_file["parameters"]) == ("safetensors file", 88)


def test_a_checkpoint_that_is_cut_off_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = checkpoint(tmp_path / "checkpoint") / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    assert "truncated" in refused(capsys, tmp_path / "checkpoint")


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"architecture": "x", "mapping": {"world_size": "two"}}, "world_size 'two'; allowed: 1 and more"),
        ({"architecture": "x", "mapping": {"world_size": -1}}, "world_size -1"),
        ({"architecture": "x", "mapping": 2}, "rank0.safetensors"),
        ({"build_config": {}, "pretrained_config": {"mapping": {"world_size": "x"}}}, "world_size 'x'"),
    ],
)
def test_a_mapping_that_is_none_is_one_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], config: dict[str, Any], said: str
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert said in refused(capsys, tmp_path)


def test_a_configuration_with_other_types_than_known_is_shown_without_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = checkpoint(tmp_path / "checkpoint") / "config.json"
    config.write_text(json.dumps({"architectures": 5, "id2label": "x"}))
    assert inspected(capsys, tmp_path / "checkpoint")["architecture"] == ""


def test_a_tensorrt_llm_checkpoint_and_its_engines_say_mapping_quantization_and_limits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = {
        "architecture": "LlamaForCausalLM",
        "dtype": "bfloat16",
        "hidden_size": 4,
        "mapping": {"world_size": 2, "tp_size": 2, "pp_size": 1},
        "quantization": {"quant_algo": "W4A16_AWQ", "group_size": 64, "kv_cache_quant_algo": None},
    }
    weights, engines = tmp_path / "checkpoint", tmp_path / "engines"
    for directory in (weights, engines):
        directory.mkdir()
    (weights / "config.json").write_text(json.dumps(model))
    for rank in range(2):
        save_file(
            {"transformer.layers.0.mlp.weight": np.ones((4, 4), np.int8)}, weights / f"rank{rank}.safetensors"
        )
        (engines / f"rank{rank}.engine").write_bytes(b"plan" * 10)
    found = inspected(capsys, weights)
    assert found["kind"] == "TensorRT-LLM checkpoint"
    assert found["mapping"] == {"world_size": 2, "tp_size": 2, "pp_size": 1}
    assert found["quantization"] == {"quant_algo": "W4A16_AWQ", "group_size": 64}
    assert [row["tensors"] for row in found["ranks"]] == [1, 1]
    build = {
        "max_batch_size": 16,
        "max_seq_len": 2048,
        "plugin_config": {"gemm_plugin": "auto", "lora_plugin": None},
    }
    document = {"version": "1.2.0", "pretrained_config": model, "build_config": build}
    (engines / "config.json").write_text(json.dumps(document))
    found = inspected(capsys, engines)
    assert (found["version"], found["max_batch_size"], found["max_seq_len"]) == ("1.2.0", 16, 2048)
    assert found["plugins"] == {"gemm_plugin": "auto"}
    assert found["engine_bytes"] == 80
    (engines / "rank1.engine").unlink()
    assert "rank1.engine is missing or empty; the engines are for 2 ranks" in refused(capsys, engines)
    assert "can only be read by the TensorRT" in refused(capsys, engines / "rank0.engine")


def tensorrt_engine(directory: Path) -> Path:
    directory.mkdir(parents=True)
    shapes = {"min": [1, 1], "opt": [32, 64], "max": [32, 256]}
    document = {
        "runtime": "tensorrt_rtx",
        "version": "1.7.1",
        "compute_capabilities": [86, 89],
        "read_on": None,
        "bindings": [{"name": "input_ids", "is_input": True, "dtype": "int64", "shape": [-1, -1]}],
        "profiles": [{"input_ids": shapes}],
        "layers_of": "network",
        "layers": [
            {"name": "head/MatMul", "type": "MATRIX_MULTIPLY", "precision": ["float16"]},
            {"name": "head/Add", "type": "ELEMENTWISE", "precision": ["float16"]},
        ],
        "plan_bytes": 9,
    }
    (directory / "engine.json").write_text(json.dumps(document))
    (directory / "model.plan").write_bytes(b"plan plan")
    return directory


def test_a_tensorrt_engine_says_bindings_profiles_and_layers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = tensorrt_engine(tmp_path / "engine")
    found = inspected(capsys, engine)
    assert (found["runtime"], found["compute_capabilities"], found["layer_count"]) == (
        "tensorrt_rtx",
        [86, 89],
        2,
    )
    assert found["profiles"][0]["max"] == [32, 256]
    assert found["bindings"][0]["name"] == "input_ids"
    assert found["precisions"][0] == {"type": "MATRIX_MULTIPLY", "precision": "float16", "layers": 1}
    assert inspected(capsys, engine / "model.plan") == found
    (engine / "model.plan").write_bytes(b"plan")
    assert "has 4 bytes, recorded were 9" in refused(capsys, engine)
    (engine / "model.plan").unlink()
    assert "model.plan is missing" in refused(capsys, engine)


def triton_model(repository: Path, name: str = "tiny-int8") -> Path:
    model = repository / name
    for version in ("1", "2"):
        (model / version).mkdir(parents=True)
        (model / version / "model.py").write_text("pass\n")
    (model / "config.pbtxt").write_text(
        f'name: "{name}"\nbackend: "python"\nmax_batch_size: 8\n'
        'input [ { name: "TEXT" data_type: TYPE_STRING dims: [ 1 ] } ]\n'
        'output [ { name: "embedding" data_type: TYPE_FP32 dims: [ 4 ] } ]\n'
        "version_policy { specific { versions: [ 2 ] } }\ndynamic_batching { max_queue_delay_microseconds: 500 }\n"
    )
    quality = {"mean_cosine": 0.99}
    evidence = {
        "enginesmith": "0.1.0", "spec": "tiny", "variant": "int8", "target": "onnxruntime", "scheme": "int8",
        "steps": {"measure_graph": {"key": "a" * 64, "facts": {"quality": quality}, "duration_s": 3.25}},
    }  # fmt: skip
    release = {
        "version": 2,
        "published": "2026-01-01T00:00:00+00:00",
        "not_rehearsed": [],
        "evidence": evidence,
    }
    (model / "2" / "release.json").write_text(json.dumps(release))
    return model


def test_a_published_model_says_what_is_served_and_why_it_was_let_through(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    triton_model(tmp_path / "repository")
    found = inspected(capsys, "tiny-int8", "--repository", tmp_path / "repository")
    assert (found["kind"], found["scheme"], found["max_queue_delay_us"]) == ("Triton model", "int8", 500)
    assert [(row["version"], row["served"]) for row in found["versions"]] == [(1, False), (2, True)]
    assert found["quality"] == [{"figure": "mean_cosine", "measured": 0.99}]
    assert found["steps_behind_it"][0]["key"] == "a" * 12
    assert found["inputs_and_outputs"][0]["dtype"] == "STRING"
    listed = inspected(capsys, tmp_path / "repository")["models_in_it"]
    assert [(row["model"], row["served"]) for row in listed] == [("tiny-int8", "2")]


def test_a_damaged_configuration_is_refused_with_its_place(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = triton_model(tmp_path / "repository")
    (model / "config.pbtxt").write_text('name: "x"\nmax_batch: 3\n')
    assert "max_batch" in refused(capsys, model)


def artifact(store: ArtifactStore, key: str) -> Path:
    with store.staging(key) as staging:
        quantized_model(staging.files / "model.onnx")
        done = staging.commit(
            kind="quantize_graph",
            parts={"params": {"scheme": "int8"}, "inputs": {"graph": "b" * 64}, "tools": {"onnx": "1.0"}},
            facts={"quantized": 2, "quality": {"mean_cosine": 0.5}},
            duration_s=1.5,
            peak_rss_bytes=MIB,
        )
    return done.path


def test_an_artifact_is_found_by_the_first_digits_of_its_key(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = ArtifactStore(tmp_path / "store")
    path = artifact(store, "ab12cd34" + "0" * 56)
    found = inspected(capsys, "ab12cd34")
    assert found["kind"] == "artifact of the step quantize_graph"
    assert (found["inputs"], found["facts"]["quantized"]) == ({"graph": "b" * 12}, 2)
    assert [row["file"] for row in found["files"]] == ["model.onnx"]
    assert found["parts"][0]["quantized_product_count"] == 2
    assert inspected(capsys, path) == found == inspected(capsys, path.parent)
    artifact(store, "ab12cd34" + "1" * 56)
    ambiguous = refused(capsys, "ab12cd34")
    assert "2 artifacts" in ambiguous
    assert "ab12cd3411111111  quantize_graph" in ambiguous
    assert inspected(capsys, "ab12cd340")["key"].startswith("ab12cd340")


def test_a_damaged_artifact_is_named_with_what_is_wrong(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = artifact(ArtifactStore(tmp_path / "store"), "ab12cd34" + "0" * 56)
    (path / "model.onnx").chmod(0o644)
    (path / "model.onnx").write_bytes(b"other")
    assert "model.onnx has 5 bytes" in refused(capsys, "ab12cd34")
    assert path.exists()


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("ab12cd3", "has 7 digits; the first 8"),
        ("ab12cd34", "no artifact whose key begins with ab12cd34"),
        ("missing.onnx", "is no file or directory, no key of the store and no model"),
        ("a" * 300, "cannot be looked into: File name too long"),
    ],
)
def test_what_is_not_there_is_said(capsys: pytest.CaptureFixture[str], what: str, said: str) -> None:
    assert said in refused(capsys, what)


def test_what_is_nothing_known_is_refused_with_what_is_allowed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "todo.txt").write_text("bread")
    for what in (tmp_path / "notes", tmp_path / "notes" / "todo.txt"):
        said = refused(capsys, what)
        assert "nothing that can be looked into" in said
        assert "allowed: an ONNX file" in said


def test_help_has_examples(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["inspect", "--help"]) == 0
    assert "enginesmith inspect model.onnx" in capsys.readouterr().out

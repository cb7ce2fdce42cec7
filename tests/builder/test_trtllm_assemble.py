"""The assembled repository: what is in it, what it relies on, and what is refused."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import pytest
from checkpoint_factory import tiny_checkpoint
from trtllm_deployment import Context, assembled, step_params, write_converted

from enginesmith.errors import EnginesmithError, SourceError, SpecError
from enginesmith.triton.config import parse_config
from enginesmith.triton.placement import contents_digest, tree_contents
from enginesmith.triton.trtllm import assemble
from enginesmith.triton.trtllm.placeholders import placeholders

PARTS = {"preprocessing", "tensorrt_llm", "postprocessing", "ensemble", "tensorrt_llm_bls"}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("checkpoint") / "hf")


def limits(repository: Path) -> dict[str, Any]:
    return dict(json.loads((repository / "preprocessing" / "1" / "limits.json").read_text()))


def test_the_repository_has_the_five_models_and_no_engine(tmp_path: Path, checkpoint: Path) -> None:
    repository = assembled(tmp_path, checkpoint, step_params())
    assert {path.name for path in repository.iterdir()} == PARTS
    for model in PARTS:
        config = parse_config((repository / model / "config.pbtxt").read_text())
        assert config.name == model
        assert any((repository / model / "1").iterdir())
    assert parse_config((repository / "tensorrt_llm" / "config.pbtxt").read_text()).backend == "tensorrtllm"
    assert not placeholders(repository)
    assert (repository / "preprocessing/1/tokenizer.json").samefile(checkpoint / "tokenizer.json")


def test_the_same_inputs_give_the_same_bytes(tmp_path: Path, checkpoint: Path) -> None:
    digests = {
        contents_digest(tree_contents(assembled(tmp_path / name, checkpoint, step_params()))) for name in "ab"
    }
    assert len(digests) == 1


def test_served_code_imports_nothing_of_enginesmith_and_little_else(tmp_path: Path, checkpoint: Path) -> None:
    repository = assembled(tmp_path, checkpoint, step_params())
    allowed = {"numpy", "tokenizers", "triton_python_backend_utils", "text_pieces", "bls_tensors"}
    import sys

    for file in repository.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
            assert {name.split(".")[0] for name in names} <= allowed | sys.stdlib_module_names, file


@pytest.mark.parametrize(
    ("named", "expected"),
    [
        ([0, 2, 7], (2, [0, 7])),  # The tokenizer's is one of them.
        ([7, 9], (7, [9])),  # It is not: a tokenizer converted from another format may name a wrong one.
        (9, (9, [])),
        (None, (2, [])),
    ],
)
def test_the_end_token_is_one_that_the_model_names_and_others_become_stop_words(
    tmp_path: Path, checkpoint: Path, named: Any, expected: tuple[int, list[int]]
) -> None:
    copy = tmp_path / "hf"
    copy.mkdir()
    for file in checkpoint.iterdir():
        (copy / file.name).symlink_to(file)
    (copy / "generation_config.json").unlink()
    (copy / "generation_config.json").write_text(json.dumps({"eos_token_id": named}))
    read = limits(assembled(tmp_path, copy, step_params()))
    assert (read["end_id"], read["further_end_ids"]) == expected
    assert read["pad_id"] == 0


def test_every_model_is_named_with_the_prefix(tmp_path: Path, checkpoint: Path) -> None:
    repository = assembled(tmp_path, checkpoint, step_params({"model_prefix": "llama-"}))
    assert {path.name for path in repository.iterdir()} == {f"llama-{part}" for part in PARTS}
    bls = parse_config((repository / "llama-tensorrt_llm_bls" / "config.pbtxt").read_text())
    assert bls.parameters["postprocessing_model_name"].string_value == "llama-postprocessing"


def refused(root: Path, checkpoint: Path, params: dict[str, Any], **converted: Any) -> EnginesmithError:
    inputs = {
        "checkpoint": checkpoint,
        "converted": write_converted(root / "converted", checkpoint, **converted),
    }
    with pytest.raises(EnginesmithError) as caught:
        assemble.run(Context(root / "assemble", params, inputs))
    return caught.value


def test_a_placeholder_in_a_users_string_is_refused(tmp_path: Path, checkpoint: Path) -> None:
    error = refused(tmp_path, checkpoint, step_params() | {"repository_path": "/models/${NAME}"})
    assert isinstance(error, SpecError)
    assert "preprocessing/config.pbtxt" in error.message
    assert "/models/${NAME}" in error.message


def test_a_relative_repository_path_is_refused(tmp_path: Path, checkpoint: Path) -> None:
    error = refused(tmp_path, checkpoint, step_params() | {"repository_path": "models"})
    assert "is not absolute" in error.message


def test_a_checkpoint_without_a_tokenizer_is_refused(tmp_path: Path, checkpoint: Path) -> None:
    bare = tmp_path / "hf"
    bare.mkdir()
    (bare / "config.json").symlink_to(checkpoint / "config.json")
    error = refused(tmp_path, bare, step_params())
    assert isinstance(error, SourceError)
    assert "tokenizer.json is missing" in error.message


def test_a_checkpoint_that_was_converted_for_other_gpus_is_refused(tmp_path: Path, checkpoint: Path) -> None:
    error = refused(tmp_path, checkpoint, step_params(), mapping={"tp_size": 2, "pp_size": 1})
    assert "{'tp_size': 2, 'pp_size': 1}" in error.message


def test_answers_longer_than_the_model_knows_positions_are_refused(tmp_path: Path, checkpoint: Path) -> None:
    error = refused(tmp_path, checkpoint, step_params(serving={"max_sequence_length": 4096}))
    assert "max_sequence_length is 4096" in error.message

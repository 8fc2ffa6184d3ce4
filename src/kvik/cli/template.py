"""What the chat template of `kvik run` gets besides messages: tools from a file, and variables."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from kvik.cli.options import PROMPT, check_text, check_utf8, value
from kvik.errors import InvalidInput
from kvik.text.chat_messages import check_template_vars, check_tools

MAX_TOOLS_BYTES = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class TemplateInput:
    """Arguments of `LLM.render_chat`."""

    tools: list[dict[str, Any]] | None = None
    template_vars: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class TemplateOptions:
    """The same as options."""

    tools: Annotated[Path | None, value(PROMPT, "FILE", "Tools that the model may call: OpenAI's JSON list.")] = None
    template_var: Annotated[
        list[str] | None,
        value(PROMPT, "NAME=JSON", "Set the template's variable, like enable_thinking=false; may be repeated."),
    ] = None

    def read(self, *, raw: bool) -> TemplateInput:
        """The checked tools and variables. Raises `InvalidInput`."""
        if raw and (self.tools is not None or self.template_var):
            option = "--tools" if self.tools is not None else "--template-var"
            raise InvalidInput(f"{option} is for the chat template, --raw uses none", hint="leave out one")
        tools = None if self.tools is None else _read_tools(self.tools)
        return TemplateInput(tools=tools, template_vars=_template_vars(self.template_var or []))


def _read_tools(path: Path) -> list[dict[str, Any]]:
    hint = 'give a file with a JSON list such as [{"type": "function", "function": {"name": "..."}}]'
    try:
        with path.open("rb") as file:
            data = file.read(MAX_TOOLS_BYTES + 1)
    except OSError as error:
        raise InvalidInput(f"--tools is {path}: {error.strerror}", hint=hint) from None
    if len(data) > MAX_TOOLS_BYTES:
        raise InvalidInput(f"--tools is {path}, which has more than {MAX_TOOLS_BYTES:,} bytes", hint=hint)
    try:
        tools = json.loads(check_utf8("--tools", data))
    except (ValueError, RecursionError) as error:
        if isinstance(error, InvalidInput):
            raise
        raise InvalidInput(f"--tools is {path}, which is not JSON: {error}", hint=hint) from None
    if not isinstance(tools, list):
        raise InvalidInput(f"--tools is {path}, whose JSON is not a list", hint=hint)
    return check_tools(tools) or []


def _template_vars(options: list[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for option in options:
        name, sign, text = check_text("--template-var", option).partition("=")
        if not sign:
            raise InvalidInput(f"--template-var is {option!r:.80}", hint="give NAME=JSON, like enable_thinking=false")
        if name in found:
            raise InvalidInput(f"--template-var sets {name!r:.80} twice", hint="give each name once")
        found[name] = _json_or_word(name, text)
    return check_template_vars(found)


def _json_or_word(name: str, text: str) -> Any:
    """The JSON value, or the text itself where it is a bare word."""
    try:
        return json.loads(text, parse_constant=str)
    except (ValueError, RecursionError) as error:
        if text.lstrip().startswith(("{", "[", '"')):
            raise InvalidInput(
                f"--template-var {name!r:.80} is not JSON: {error}", hint="quote it for the shell, or give a bare word"
            ) from None
        return text

"""What a caller sends to a chat template, checked before any template sees it: messages, tools and variables.

The form is that of the OpenAI API: https://platform.openai.com/docs/api-reference/chat/create.
"""

from __future__ import annotations

import json
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias, TypeGuard

from kvik.errors import InvalidInput

Content: TypeAlias = str | Sequence[Mapping[str, Any]]
"""Text, or parts such as {"type": "text", "text": "..."}."""

RESERVED = frozenset(
    {"messages", "tools", "add_generation_prompt", "chat_template", "raise_exception", "strftime_now", "namespace"}
    | {f"{kind}_token" for kind in ("bos", "eos", "unk", "pad", "sep", "cls", "mask")}
)
"""Names of a template's variables that no caller sets: they have arguments of their own, or are the model's."""

_MESSAGES = 'send a list such as [{"role": "user", "content": "Hello"}]'
_PART = 'send text parts such as {"type": "text", "text": "Hello"}'
_TOOL = 'send {"type": "function", "function": {"name": "...", "description": "...", "parameters": {...}}}'
_CALL = 'send {"id": "...", "type": "function", "function": {"name": "...", "arguments": "{...}"}}'


def check_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The messages without keys of None, arguments of calls as objects. Raises `InvalidInput` by their index."""
    if isinstance(messages, str) or not isinstance(messages, Sequence) or not messages:
        raise InvalidInput("messages must be a list with at least one message", hint=_MESSAGES)
    return [check_message(f"messages[{index}]", message) for index, message in enumerate(messages)]


def check_message(name: str, message: Mapping[str, Any]) -> dict[str, Any]:
    """One message, as `check_messages` gives it. Raises `InvalidInput`, which calls it `name`."""
    if not isinstance(message, Mapping):
        raise InvalidInput(f"{name} is {type(message).__name__}, not an object", hint=_MESSAGES)
    # Many templates would write `None`, and take a key that is missing for nothing.
    checked = {key: value for key, value in message.items() if value is not None}
    for key in ("role", "tool_call_id", "name"):
        if not isinstance(checked.get(key, None if key == "role" else ""), str):
            raise InvalidInput(f"{name} has no {key!r} of text", hint=_MESSAGES)
    if calls := checked.get("tool_calls"):
        checked["tool_calls"] = _check_calls(f"{name}.tool_calls", calls)
    content = checked.get("content")
    if isinstance(content, str) or (content is None and calls):
        return checked
    if not _is_list(content):
        raise InvalidInput(f"{name} has no 'content' of text or parts", hint=_MESSAGES)
    checked["content"] = _check_parts(f"{name}.content", content)
    return checked


def joined(parts: Sequence[Mapping[str, Any]]) -> str:
    """The text of all parts, a line or more each, as vLLM and llama.cpp join them."""
    return "\n".join(part["text"] for part in parts)


def check_tools(tools: Sequence[Mapping[str, Any]] | None) -> list[dict[str, Any]] | None:
    """The tools as plain objects. Raises `InvalidInput` by their index."""
    if tools is None:
        return None
    if not _is_list(tools):
        raise InvalidInput(f"tools is {reprlib.repr(tools)}", hint=f"send a list; for each tool {_TOOL}")
    for index, tool in enumerate(tools):
        name = f"tools[{index}]"
        if not isinstance(tool, Mapping):
            raise InvalidInput(f"{name} is {type(tool).__name__}, not an object", hint=_TOOL)
        if tool.get("type") != "function":
            raise InvalidInput(f"{name}.type is {reprlib.repr(tool.get('type'))}, not 'function'", hint=_TOOL)
        function = tool.get("function")
        if not isinstance(function, Mapping):
            raise InvalidInput(f"{name}.function is {type(function).__name__}, not an object", hint=_TOOL)
        _check_name(f"{name}.function", function, _TOOL)
        if not isinstance(function.get("parameters", {}), Mapping | None):
            raise InvalidInput(f"{name}.function.parameters is not a JSON schema: that is an object", hint=_TOOL)
    return [dict(tool) for tool in tools]


def check_template_vars(template_vars: Mapping[str, Any] | None) -> dict[str, Any]:
    """The variables as a plain mapping. Raises `InvalidInput` by their name."""
    hint = 'send names with JSON values, such as {"enable_thinking": false}'
    if template_vars is None:
        return {}
    if not isinstance(template_vars, Mapping):
        raise InvalidInput(f"template_vars is {reprlib.repr(template_vars)}", hint=hint)
    for name in template_vars:
        if not isinstance(name, str) or not name.isidentifier():
            raise InvalidInput(f"template_vars has {reprlib.repr(name)}, which is not a variable's name", hint=hint)
        if name in RESERVED:
            raise InvalidInput(
                f"template_vars has {name!r}, which is not the caller's to set",
                hint="leave it out; tools have an argument of their own",
            )
    return dict(template_vars)


def _check_parts(name: str, parts: Sequence[Any]) -> list[dict[str, Any]]:
    if not parts:
        raise InvalidInput(f"{name} has no parts", hint=_PART)
    for index, part in enumerate(parts):
        if not isinstance(part, Mapping) or not isinstance(part.get("type"), str):
            raise InvalidInput(f"{name}[{index}] is not a part with a 'type'", hint=_PART)
        if part["type"] != "text":
            raise InvalidInput(f"{name}[{index}] has unsupported content, {part['type']!r:.80}", hint=_PART)
        if not isinstance(part.get("text"), str):
            raise InvalidInput(f"{name}[{index}] has no 'text'", hint=_PART)
    return [{"type": "text", "text": part["text"]} for part in parts]


def _check_calls(name: str, calls: Any) -> list[dict[str, Any]]:
    if not _is_list(calls):
        raise InvalidInput(f"{name} is {type(calls).__name__}, not a list", hint=_CALL)
    checked = []
    for index, call in enumerate(calls):
        where = f"{name}[{index}]"
        function = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping):
            raise InvalidInput(f"{where} has no 'function' object", hint=_CALL)
        if call.get("type", "function") != "function" or not isinstance(call.get("id", ""), str | None):
            raise InvalidInput(f"{where} has a 'type' that is not 'function', or an 'id' that is not text", hint=_CALL)
        _check_name(f"{where}.function", function, _CALL)
        arguments = _arguments(f"{where}.function.arguments", function.get("arguments", {}))
        checked.append({**call, "function": {**function, "arguments": arguments}})
    return checked


def _arguments(name: str, arguments: Any) -> dict[str, Any]:
    """The object that the arguments are: clients send its JSON, templates write the object themselves."""
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments) if arguments.strip() else {}
        except (ValueError, RecursionError):
            raise InvalidInput(f"{name} is not JSON: {reprlib.repr(arguments)}", hint=_CALL) from None
    if not isinstance(arguments, Mapping):
        raise InvalidInput(f"{name} is {type(arguments).__name__}, not an object", hint=_CALL)
    return dict(arguments)


def _check_name(name: str, function: Mapping[str, Any], hint: str) -> None:
    if not isinstance(function.get("name"), str) or not function["name"]:
        raise InvalidInput(f"{name}.name is {reprlib.repr(function.get('name'))}, not a text", hint=hint)


def _is_list(value: object) -> TypeGuard[Sequence[Any]]:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes | bytearray)

"""Messages to the text a chat model was trained on, by the Jinja template inside its file.

The template is a program by whoever made the file. It is rendered as transformers renders it (Jinja2's immutable
sandbox, `trim_blocks`, `lstrip_blocks`, loop controls, `generation` blocks, `tojson`, `raise_exception`,
`strftime_now`), so the text is the same byte for byte. Since no limit inside one process stops a loop that doubles a
string, rendering happens in a process of its own, which may use so much time and memory and may open no files.

The template is compiled at the first rendering; what is wrong with its syntax is a TemplateError there.
"""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvik.errors import InvalidInput, TemplateError, ToolsNotSupported
from kvik.text.chat_messages import check_messages, check_template_vars, check_tools, joined

if TYPE_CHECKING:
    from jinja2 import Template
    from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_SOURCE_BYTES = 1 << 20
MAX_TEXT_BYTES = 1 << 24
MAX_MEMORY_BYTES = 1 << 29
MAX_SECONDS = 2.0  # of processor time for one rendering; a long conversation takes some milliseconds

PROBE = "kvik-probe"
PROBE_ID = "kvikprobe"  # Mistral's templates want nine letters and digits
MAX_ROLES = 16

_DAMAGED = "take another file of this model, or send a prompt instead of messages, which needs no template"

# What the worker answers other than text: what it means, and what to do about it.
_FAILURES = {
    "refused": ("the chat template refuses the messages: {}", "send the roles in the order that the template asks for"),
    "syntax": ("the chat template is not valid Jinja: {}", _DAMAGED),
    "failed": ("the chat template failed: {}", _DAMAGED),
    "memory": (f"the chat template needs more than {MAX_MEMORY_BYTES >> 20:,} MiB", _DAMAGED),
    "length": (f"the chat template makes more than {MAX_TEXT_BYTES >> 20} MiB of text", "send shorter messages"),
}


class ChatTemplate:
    """One model's chat template. Safe to share between threads; the worker process ends with it.

    `more_tokens` are further names of special tokens that the template may use, such as `pad_token`; `for_tools` is
    another template, which renders instead of this one where tools are given.
    """

    def __init__(
        self,
        source: str,
        *,
        bos_token: str,
        eos_token: str,
        name: str,
        more_tokens: Mapping[str, str] | None = None,
        for_tools: ChatTemplate | None = None,
    ) -> None:
        num_bytes = len(source.encode(errors="surrogatepass"))
        if num_bytes > MAX_SOURCE_BYTES:
            raise TemplateError(
                f"{name}: the chat template has {num_bytes:,} bytes, more than {MAX_SOURCE_BYTES:,}", hint=_DAMAGED
            )
        self._source = source
        self._special = {"bos_token": bos_token, "eos_token": eos_token, **(more_tokens or {})}
        self._for_tools = for_tools
        self._name = name
        self._forms_by_role: dict[str, tuple[bool, bool]] = {}
        self._form_of_calls: tuple[dict[str, Any], bool] | None = None
        self._lock = threading.Lock()
        self._worker: subprocess.Popen[bytes] | None = None
        self._owner = 0
        self._stop: weakref.finalize[[subprocess.Popen[bytes], int], ChatTemplate] | None = None

    @property
    def source(self) -> str:
        """The template itself."""
        return self._source

    @property
    def eos_token(self) -> str:
        """The name of the token that ends a text."""
        return self._special["eos_token"]

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> str:
        """The prompt for `messages`, each with a `role` and a `content`; one with `tool_calls` may have no content.

        Content is text, or a list of text parts, which a template that goes through parts gets as it is and any other
        as text. `variables` are the template's own switches, such as `enable_thinking`. Raises InvalidInput for
        messages and tools that are none, TemplateError where the template refuses them, fails or passes a limit.
        """
        if tools is not None and self._for_tools is not None:
            return self._for_tools.render(
                messages, add_generation_prompt=add_generation_prompt, tools=tools, **variables
            )
        checked = [
            self._in_form(self._with_calls_in_form(message, given))
            for message, given in zip(check_messages(messages), messages, strict=True)
        ]
        kind, text = self._render_checked(checked, check_tools(tools), add_generation_prompt, variables)
        if kind == "text":
            return text
        message, hint = _FAILURES[kind]
        # One line, and nothing that steers a terminal: the template may have written the text.
        said = "".join(character if character.isprintable() else " " for character in text)
        raise TemplateError(f"{self._name}: {message.format(said)}", hint=hint)

    def render_request(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_vars: Mapping[str, Any] | None = None,
        add_generation_prompt: bool = True,
    ) -> str:
        """The prompt for a caller's request, of which nothing is ignored.

        Raises as `render` does, and InvalidInput for tools and variables that the template does not know.
        """
        variables = check_template_vars(template_vars)
        if check_tools(tools) and not self._mentions("tools"):
            raise ToolsNotSupported(
                f"{self._name}: the chat template takes no tools", hint="take a model that was trained to call tools"
            )
        for name in variables:
            if name in self._special:
                raise InvalidInput(f"template_vars has {name!r}, which is the model's own", hint="leave it out")
            if not self._mentions(name):
                raise InvalidInput(
                    f"{self._name}: the chat template has no variable {name!r}",
                    hint="check its spelling, or leave it out",
                )
        return self.render(messages, add_generation_prompt=add_generation_prompt, tools=tools, **variables)

    def _mentions(self, name: str) -> bool:
        in_tools = self._for_tools is not None and (name == "tools" or self._for_tools._mentions(name))
        return in_tools or re.search(rf"\b{re.escape(name)}\b", self._source) is not None

    def _in_form(self, message: dict[str, Any]) -> dict[str, Any]:
        """The message with its content in the form that the template takes: text, parts, or as it is."""
        content = message.get("content")
        # A template that goes through parts names their key.
        if content is None or (isinstance(content, str) and not self._mentions("text")):
            return message
        takes_text, takes_parts = self._forms(message["role"])
        if isinstance(content, str):
            if takes_text or not takes_parts:
                return message
            return message | {"content": [{"type": "text", "text": content}]}
        return message if takes_parts else message | {"content": joined(content)}

    def _with_calls_in_form(self, message: dict[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
        """The message with its calls in the form that the template takes; `given` is the message before its check."""
        calls = message.get("tool_calls")
        if not calls:
            return message
        without_content, takes_text = self._calls_form()
        if not message.get("content"):
            message = message | without_content
        if takes_text:
            as_text = [
                {**call, "function": {**call["function"], "arguments": _arguments_text(call, before)}}
                for call, before in zip(calls, given["tool_calls"], strict=True)
            ]
            message = message | {"tool_calls": as_text}
        return message

    def _calls_form(self) -> tuple[dict[str, Any], bool]:
        """What a message of calls alone has for content, and whether arguments are JSON text rather than an object.

        Templates ask for the content to be absent, empty or none, and some put arguments between texts with `+`.
        """
        if self._form_of_calls is None:
            forms = [
                (content, takes_text)
                for content in ({}, {"content": ""}, {"content": None})
                for takes_text in (False, True)
            ]
            self._form_of_calls = next((form for form in forms if self._writes_calls(*form)), ({}, False))
        return self._form_of_calls

    def _writes_calls(self, without_content: dict[str, Any], takes_text: bool) -> bool:
        arguments: Any = {PROBE: PROBE}
        function = {"name": PROBE_ID, "arguments": json.dumps(arguments) if takes_text else arguments}
        call = {"id": PROBE_ID, "type": "function", "function": function}
        asked = self._in_form({"role": "user", "content": "-"})
        try:
            kind, text = self._render_checked(
                [asked, {"role": "assistant", "tool_calls": [call], **without_content}], None, False, {}
            )
        except TemplateError:  # as in `_writes`
            return False
        # Text that is put into JSON is escaped, and an object that is put into text is written as Python does.
        is_whole = f'"{PROBE}"' in text if takes_text else repr(arguments) not in text
        return kind == "text" and PROBE_ID in text and PROBE in text and is_whole

    def _forms(self, role: str) -> tuple[bool, bool]:
        """Whether the template writes the content of such a message where it is text, and where it is parts.

        Found by rendering both, as llama.cpp does: what a template does with its variables shows in no other way.
        """
        if role not in self._forms_by_role:
            probes = ([{"type": "text", "text": PROBE}], PROBE)
            takes_parts, takes_text = (self._writes(role, content) for content in probes)
            if len(self._forms_by_role) < MAX_ROLES:
                self._forms_by_role[role] = takes_text, takes_parts
            return takes_text, takes_parts
        return self._forms_by_role[role]

    def _writes(self, role: str, content: object) -> bool:
        message = {"role": role, "content": content}
        before = [] if role in ("user", "system") else [{"role": "user", "content": content}]
        after = [{"role": "user", "content": content}] if role == "system" else []
        try:
            kind, text = self._render_checked([*before, message, *after], None, True, {})
        except TemplateError:  # it passed a limit, as it will in earnest
            return False
        # In quotes it is a list that was written as it is.
        return kind == "text" and PROBE in text and f"'{PROBE}'" not in text and f'"{PROBE}"' not in text

    def _render_checked(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None,
        add_generation_prompt: bool,
        variables: Mapping[str, Any],
    ) -> tuple[str, str]:
        """The kind and the text of the worker's reply."""
        context = {
            "messages": messages,
            "tools": tools,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
            **self._special,
            **variables,
        }
        try:
            request = json.dumps(context, default=_plain, allow_nan=False).encode()
        except (TypeError, ValueError, RecursionError) as error:
            raise InvalidInput(
                f"messages, tools or template variables hold what JSON cannot: {error}",
                hint="use text, numbers, true, false, null, lists and objects",
            ) from error
        with self._lock:
            try:
                return self._ask(request)
            except BaseException:
                # A reply left unread would be taken for the next one's.
                self._stop_worker()
                raise

    def _running_worker(self) -> subprocess.Popen[bytes]:
        # After a fork the worker is the parent's: a child can neither ask nor end it, and makes its own.
        if self._worker is not None and self._owner == os.getpid() and self._worker.poll() is None:
            return self._worker
        self._stop_worker()
        path = [str(Path(__file__).parents[2]), *filter(None, sys.path)]
        program = "import sys; sys.path[:] = sys.argv[1:]; from kvik.text.chat_template import serve; serve()"
        try:
            worker = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", program, *path],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                # Secrets in the environment are no business of a template.
                env={key: os.environ[key] for key in ("TZ", "LD_LIBRARY_PATH") if key in os.environ},
                start_new_session=True,  # Ctrl-C is for kvik
            )
        except OSError as error:
            raise TemplateError(
                f"{self._name}: no process to render the chat template in: {error}",
                hint="free memory or processes, or send a prompt instead of messages",
            ) from error
        self._worker = worker
        self._owner = os.getpid()
        self._stop = weakref.finalize(self, _end, worker, self._owner)
        _send(worker, json.dumps({"source": self._source, "seconds": MAX_SECONDS}).encode())
        return worker

    def _stop_worker(self) -> None:
        if self._stop is not None:
            self._stop()
        self._worker = self._stop = None

    def _ask(self, request: bytes) -> tuple[str, str]:
        """Send one request to the worker and return the kind and the text of its reply."""
        worker = self._running_worker()
        assert worker.stdout is not None
        try:
            _send(worker, request)
        except BrokenPipeError:
            raise self._died(worker) from None
        header = worker.stdout.readline().split()
        size = int(header[1]) if header else 0
        data = worker.stdout.read(size)
        if not header or len(data) < size:
            raise self._died(worker)
        return header[0].decode(), data.decode(errors="surrogatepass")

    def _died(self, worker: subprocess.Popen[bytes]) -> TemplateError:
        code = worker.wait()
        if code == -signal.SIGPROF:
            return TemplateError(f"{self._name}: the chat template ran longer than {MAX_SECONDS:g} s", hint=_DAMAGED)
        return TemplateError(
            f"{self._name}: the process that renders the chat template ended with code {code}", hint=_DAMAGED
        )


def _arguments_text(call: Mapping[str, Any], given: Mapping[str, Any]) -> str:
    """The arguments of a call as JSON: what the caller gave where that was text, so that it stays the same tokens."""
    arguments = given["function"].get("arguments")
    if isinstance(arguments, str) and arguments.strip():
        return arguments
    try:
        return json.dumps(call["function"]["arguments"], ensure_ascii=False, default=_plain, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidInput(
            f"the arguments of a call hold what JSON cannot: {error}",
            hint="use text, numbers, true, false, null, lists and objects",
        ) from error


def _plain(value: object) -> object:
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, Sequence) and not isinstance(value, bytes | bytearray):
        return list(value)
    raise TypeError(f"a {type(value).__name__}")


def _send(worker: subprocess.Popen[bytes], line: bytes) -> None:
    assert worker.stdin is not None
    worker.stdin.write(line + b"\n")
    worker.stdin.flush()


def _end(worker: subprocess.Popen[bytes], owner: int) -> None:
    if os.getpid() != owner:
        return
    worker.kill()
    worker.communicate()  # closes the pipes and waits


# From here on: the worker's side. It imports Jinja2, which kvik's own process never does.


def serve() -> None:
    """Be the worker: read a template and then requests, a line of JSON each, and answer until the input ends.

    An answer is a line with its kind and its number of bytes, then these bytes.
    """
    environment = _environment()
    environment.from_string("{{ 'text' }}").render()  # has Python load what it loads late, while it still may
    first = json.loads(sys.stdin.buffer.readline())
    _limit_this_process()
    template: Template | None = None
    for line in sys.stdin.buffer:
        signal.setitimer(signal.ITIMER_PROF, first["seconds"])
        try:
            template = template or environment.from_string(first["source"])
            kind, text = _render(template, json.loads(line))
        except Exception as error:  # noqa: BLE001 whatever the template did is an answer, not an end
            kind, text = _failure(error)
        data = text.encode(errors="surrogatepass")
        if len(data) > MAX_TEXT_BYTES:
            kind, data = "length", b""
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.buffer.write(f"{kind} {len(data)}\n".encode() + data)
        sys.stdout.buffer.flush()


def _limit_this_process() -> None:
    limits = {resource.RLIMIT_NOFILE: 0, resource.RLIMIT_NPROC: 0}
    if sys.platform != "darwin":  # macOS refuses a limit on addresses; the time limit is all there is
        limits[resource.RLIMIT_AS] = MAX_MEMORY_BYTES
    for limit, max_value in limits.items():
        _, hard = resource.getrlimit(limit)
        max_value = max_value if hard == resource.RLIM_INFINITY else min(max_value, hard)
        resource.setrlimit(limit, (max_value, max_value))
    # The parent may have left the signal ignored or blocked.
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGPROF})


def _render(template: Template, context: Mapping[str, Any]) -> tuple[str, str]:
    parts = []
    size = 0
    for part in template.generate(context):
        parts.append(part)
        size += len(part)
        if size > MAX_TEXT_BYTES:
            return "length", ""
    return "text", "".join(parts)


class _RefusedError(Exception):
    """The template called `raise_exception`."""


def _failure(error: Exception) -> tuple[str, str]:
    from jinja2 import TemplateSyntaxError

    match error:
        case _RefusedError():
            kind, text = "refused", str(error)
        case TemplateSyntaxError():
            kind, text = "syntax", f"line {error.lineno}: {error.message}"
        case MemoryError():
            kind, text = "memory", ""
        case _:
            kind, text = "failed", f"{type(error).__name__}: {error}"
    return kind, text[:1000]


def _environment() -> ImmutableSandboxedEnvironment:
    """Jinja2 as transformers' chat template support sets it up."""
    # Jinja2 imports the unused ones when a filter needs them, and by then no file can be opened.
    import pprint  # noqa: F401
    import textwrap  # noqa: F401
    import time
    from datetime import datetime

    import jinja2.constants
    import jinja2.debug  # noqa: F401
    from jinja2 import nodes
    from jinja2.exceptions import SecurityError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.utils import Namespace

    time.tzset()

    class Generation(Extension):
        """`{% generation %}`, which marks what the assistant said for training, and changes no text."""

        tags = {"generation"}  # noqa: RUF012 as Extension has it

        def parse(self, parser: Parser) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body).set_lineno(line)

    class PublicNamespace(Namespace):
        """`namespace()` without names that could lead into Python's internals."""

        def __init__(*args: Any, **kwargs: Any) -> None:
            self, *others = args
            Namespace.__init__(self)
            for key, value in dict(*others, **kwargs).items():
                self[key] = value

        def __setitem__(self, name: str, value: Any) -> None:
            if name.startswith("_"):
                raise SecurityError(f"a namespace takes no name such as {name!r}")
            super().__setitem__(name, value)

    def raise_exception(message: object) -> None:
        raise _RefusedError(message)

    def strftime_now(form: str) -> str:
        return datetime.now().strftime(form)

    def tojson(
        value: object,
        ensure_ascii: bool = False,
        indent: int | str | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def new_dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals |= {
        "dict": new_dict,
        "namespace": PublicNamespace,
        "raise_exception": raise_exception,
        "strftime_now": strftime_now,
    }
    return environment

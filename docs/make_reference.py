"""Writes docs/reference from the program: the command line, HTTP, Python, metrics and errors.

python docs/make_reference.py [--check]
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import typer

import kvik
from kvik import errors
from kvik.cli.app import app
from kvik.server.app import ROUTES
from kvik.server.endpoint import Endpoint, plain_path
from kvik.server.errors import api_error
from kvik.server.fields import Body
from kvik.server.watch.metrics import _Collector

FOLDER = Path(__file__).with_name("reference")
SOURCES = Path(kvik.__file__).parent
GENERATED = "<!-- `make reference` writes this page from the program. -->\n"

# Declared so that they are refused with a reason, or only with some values.
REFUSED = {
    "suffix": "refused: the models write on, not between",
    "best_of": "honoured where it equals `n`, refused else",
    "background": "refused where true",
    "previous_response_id": "refused: nothing is stored",
}

ALIASES = {"Count": "int (ge=1)", "Text": "str (1 to 1,024 characters)", "JsonObject": "object"}


def cell(text: object) -> str:
    """Text of a table's cell."""
    return " ".join(str(text).split()).replace("|", "\\|")


def table(head: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """In Markdown."""
    names = list(head)
    lines = [names, ["---"] * len(names), *([cell(each) for each in row] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines) + "\n"


def first_sentence(text: str | None) -> str:
    """Of a docstring, on one line."""
    return " ".join(inspect.cleandoc(text or "").partition("\n\n")[0].split())


def marked(text: str) -> str:
    """A docstring's Markdown, in which examples are code."""
    blocks = re.split(r"\n{2,}", inspect.cleandoc(text))
    return "\n\n".join(f"```pycon\n{one}\n```" if one.lstrip().startswith(">>>") else one for one in blocks)


# The command line.


def commands(command: Any, path: str) -> Iterator[tuple[str, Any]]:
    """All commands that do something, by what is typed."""
    if hasattr(command, "commands"):
        for name, inner in command.commands.items():
            yield from commands(inner, f"{path} {name}")
    else:
        yield path, command


def cli() -> str:
    """All commands with their options."""
    text = (
        "# Command line\n\n"
        "stdout is the result, stderr the rest. Exit codes: 0 done, 1 not as promised (a race that was not equal),"
        " 2 bad input, with a `hint:`, 130 interrupted. `kvik COMMAND --help` says what stands here.\n\n"
    )
    for path, command in commands(typer.main.get_command(app), "kvik"):
        # A form feed ends what `--help` shows.
        text += f"## `{path}`\n\n{inspect.cleandoc(command.help or '').partition(chr(12))[0].strip()}\n\n"
        text += table(("option", "default", "what it does"), map(option, command.params))
    return text


def option(parameter: Any) -> tuple[str, str, str]:
    """A row: how it is written, its default, what it does."""
    value = parameter.default
    is_flag = bool(getattr(parameter, "is_flag", False))
    kind = "" if is_flag else f" {parameter.metavar or parameter.type.name.upper()}"
    is_option = parameter.opts[0].startswith("-")
    written = f"`{', '.join(parameter.opts)}{kind}`" if is_option else f"`{kind.strip()}`"
    shown = "" if is_flag or value is None or callable(value) else f"`{value}`"
    told = parameter.help or ""
    names = [parameter.envvar] if isinstance(parameter.envvar, str) else parameter.envvar or []
    return written, shown, told + "".join(f" `${name}`" for name in names)


# HTTP.


def comments_of(kind: type) -> dict[str, str]:
    """What stands behind each field in the class's own text, or behind its default in parentheses."""
    text = inspect.getsource(kind)
    found = re.findall(r"^    (\w+): [^\n#]*?(?:\(\n\s+[^\n#]*)?  # (.+)$", text, re.MULTILINE)
    return dict(found)


def annotation(text: str) -> str:
    """A field's type as it is written, without what only says that it may be left out."""
    for alias, meant in ALIASES.items():
        text = re.sub(rf"\b{alias}\b", meant, text)
    text = re.sub(r"Annotated\[(\w+), Meta\((.*?)\)\]", r"\1 (\2)", text)
    for sign, keyword in (("≥", "ge"), ("≤", "le"), (">", "gt"), ("<", "lt")):
        text = re.sub(rf"\b{keyword}=", f"{sign} ", text)
    return re.sub(r"\s*\| None$", "", text)


def own_fields(kind: type) -> list[tuple[str, str, str]]:
    """Rows for the fields that a struct itself declares."""
    told = comments_of(kind)
    own = inspect.get_annotations(kind)
    accepted: frozenset[str] = getattr(kind, "accepted", frozenset())
    rows = []
    for name, type_ in own.items():
        if name not in kind.__struct_fields__:  # type: ignore[attr-defined]
            continue
        note = REFUSED.get(name, told.get(name, "accepted, changes nothing" if name in accepted else ""))
        rows.append((f"`{name}`", f"`{annotation(str(type_))}`", note))
    return rows


def structs(kinds: Iterable[type]) -> list[type]:
    """The structs and those that they have fields from, these first."""
    found: dict[type, None] = {}
    for kind in kinds:
        for each in reversed(kind.__mro__):
            if issubclass(each, Body) and each is not Body:
                found[each] = None
    return list(found)


def http() -> str:
    """All routes, and the fields of their bodies."""
    text = (
        "# HTTP\n\n"
        "`/docs` on a running server has the same with what each answer, chunk and error holds, and"
        " `/openapi.json` for programs. A field that a route does not know is a 400 `unknown_field`. What clients send"
        " unasked and what changes nothing here is accepted, and named in the header `x-kvik-ignored`."
        " [Serving](../serving.md) explains the concepts.\n\n## Routes\n\n"
    )
    routes = [route for route in ROUTES if isinstance(route, Endpoint)]
    text += table(
        ("route", "what it does", "body"),
        (
            (
                f"`{' '.join(sorted((route.methods or set()) - {'HEAD'}))} {plain_path(route.path)}`",
                route.summary,
                "" if route.body is None else f"[{route.body.__name__}](#{route.body.__name__.lower()})",
            )
            for route in routes
        ),
    )
    text += "## Fields\n\n"
    for kind in structs(route.body for route in routes if route.body is not None):
        parents = [f"[{one.__name__}](#{one.__name__.lower()})" for one in kind.__bases__ if one in structs([kind])]
        text += f"### {kind.__name__}\n\n{first_sentence(kind.__doc__)}\n\n"
        if parents:
            text += f"Also the fields of {', '.join(parents)}.\n\n"
        rows = own_fields(kind)
        if rows:
            text += table(("field", "type", "meaning"), rows)
        inherited = sorted(getattr(kind, "accepted", frozenset()) - {row[0].strip("`") for row in rows})
        if inherited:
            text += f"Accepted, and without effect: {', '.join(f'`{name}`' for name in inherited)}.\n\n"
    return text


# Python.


class _Text:
    """Shown in a signature as it is."""

    def __init__(self, text: str) -> None:
        self._text = text

    def __repr__(self) -> str:
        return self._text


def signature(name: str, of: Callable[..., Any]) -> str:
    """As it is called, by the annotations as they are written."""
    told = inspect.signature(of)
    shown = []
    for one in told.parameters.values():
        if one.name not in ("self", "cls"):
            default = one.default
            if default == kvik.SamplingParams():
                default = _Text("SamplingParams()")
            elif inspect.isfunction(default):  # whose address differs from run to run
                default = _Text("...")
            shown.append(one.replace(annotation=_Text(str(one.annotation)), default=default))
    returned = told.return_annotation
    return f"{name}{told.replace(parameters=shown, return_annotation=_Text(str(returned)))}".replace(" -> None", "")


def members(kind: type) -> str:
    """Fields, properties and methods of a class."""
    text, rows = "", []
    if dataclasses.is_dataclass(kind):
        told = comments_of(kind)
        for field in dataclasses.fields(kind):
            is_given = field.default is not dataclasses.MISSING
            rows.append(
                (
                    f"`{field.name}`",
                    f"`{field.type}`",
                    f"`{field.default!r}`" if is_given else "",
                    told.get(field.name, ""),
                )
            )
    if rows:
        text += table(("field", "type", "default", "meaning"), rows)
    properties = [(f"`{name}`", first_sentence(one.__doc__)) for name, one in public(kind) if isinstance(one, property)]
    if properties:
        text += table(("property", "meaning"), properties)
    for name, one in public(kind):
        of = getattr(kind, name)
        if not isinstance(one, property) and inspect.isroutine(of):
            called = ("async " if inspect.iscoroutinefunction(of) else "") + signature(name, of)
            text += f"#### `{kind.__name__}.{name}`\n\n```python\n{called}\n```\n\n{marked(of.__doc__ or '')}\n\n"
    return text


def public(kind: type) -> list[tuple[str, Any]]:
    """What a class of kvik's and those it comes from have to offer, in the order of their text."""
    found: dict[str, Any] = {}
    for each in reversed(kind.__mro__):
        if each.__module__.startswith("kvik"):
            found.update({name: one for name, one in vars(each).items() if not name.startswith("_")})
    return [
        (name, one) for name, one in found.items() if isinstance(one, property) or callable(getattr(kind, name, None))
    ]


def python() -> str:
    """All that `kvik` exports but for errors."""
    text = "# Python\n\nWhat `import kvik` has; it imports each name when it is used. [Errors](errors.md).\n\n"
    for name in kvik.__all__:
        one = getattr(kvik, name)
        if name == "__version__" or (isinstance(one, type) and issubclass(one, Exception)):
            continue
        text += f"## `{name}`\n\n"
        if not dataclasses.is_dataclass(one) and (not isinstance(one, type) or "__init__" in vars(one)):
            text += f"```python\n{signature(name, one)}\n```\n\n"
        text += f"{marked(one.__doc__ or '')}\n\n"
        if isinstance(one, type):
            text += members(one)
    return text


# Metrics and errors.


def metrics() -> str:
    """All families of `/metrics`."""
    nothing = SimpleNamespace(responses={}, num_disconnects=0, num_retries=0)
    state: Any = SimpleNamespace(models=(), http=nothing, is_draining=False, events=None)
    rows = []
    for family in _Collector(state).collect():
        suffix = {"counter": "_total", "info": "_info"}.get(family.type, "")
        labels = ", ".join(f"`{label}`" for label in getattr(family, "_labelnames", None) or ())
        rows.append((f"`{family.name}{suffix}`", family.type, labels, family.documentation))
    return (
        "# Metrics\n\n`GET /metrics`, as Prometheus reads it. Names stay; times are in seconds, sizes in bytes."
        " `process_*` of the Prometheus client come with them.\n\n" + table(("name", "type", "labels", "meaning"), rows)
    )


def constructed(kind: type[errors.KvikError]) -> errors.KvikError:
    """One of the kind, to see what becomes of it over HTTP."""
    needed = [one for one in inspect.signature(kind.__init__).parameters.values() if one.kind is one.KEYWORD_ONLY]
    values: dict[str, Any] = {
        one.name: {0: errors.KvikError("", hint="")} if one.name == "errors" else "" for one in needed
    }
    return kind("", **values)


def raised() -> dict[str, list[tuple[str, str]]]:
    """What is raised with a hint anywhere in kvik: by the error's name its messages and hints, with … for values."""
    found: dict[str, list[tuple[str, str]]] = {}
    for path in sorted(SOURCES.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name) or not node.args:
                continue
            hints = [word.value for word in node.keywords if word.arg == "hint"]
            if hints and hasattr(errors, node.func.id):
                row = (template(node.args[0]), template(hints[0]))
                if row != ("…", "…") and row not in found.setdefault(node.func.id, []):
                    found[node.func.id].append(row)
    return found


def template(node: ast.expr) -> str:
    """A text with … where values stand."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(template(one) if isinstance(one, ast.Constant) else "…" for one in node.values)
    if isinstance(node, ast.IfExp):
        return f"{template(node.body)} / {template(node.orelse)}"
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return template(node.left) + template(node.right)
    return "…"


def error_kinds() -> list[type[errors.KvikError]]:
    """In the order of their text."""
    return [one for one in vars(errors).values() if isinstance(one, type) and issubclass(one, errors.KvikError)]


def errors_page() -> str:
    """All kinds of errors."""
    tree = textwrap.dedent(inspect.cleandoc(errors.__doc__ or "").split("\n\n")[1])
    rows = []
    for kind in error_kinds()[1:]:
        answer = api_error(constructed(kind))
        code = "of the grammar" if kind is errors.InvalidGrammar else f"`{answer.code}`"
        rows.append((f"`{kind.__name__}`", first_sentence(kind.__doc__), answer.status, code))
    return (
        "# Errors\n\nEvery error that kvik raises on purpose is a `KvikError`: `message` is one line that names the"
        " thing with its numbers, `hint` what to do about it. The command line prints both and ends with 2; over HTTP"
        " the hint stands behind the message, in parentheses. `make docs` lists all messages with their hints.\n\n"
        f"```text\n{tree}\n```\n\n" + table(("error", "meaning", "HTTP", "code"), rows)
    )


def messages() -> str:
    """All messages with their hints, by the kind of error."""
    found = raised()
    text = "# Messages and hints\n\nWhat kvik says when it refuses or fails, with … for values.\n\n"
    for kind in error_kinds():
        if kind.__name__ in found:
            text += f"## {kind.__name__}\n\n" + table(("message", "hint"), sorted(found[kind.__name__]))
    return text


BUILT_ONLY = {"messages": messages}
"""Not kept in the repository: it changes with every message."""

PAGES = {"cli": cli, "http": http, "python": python, "metrics": metrics, "errors": errors_page}


def current(name: str) -> str:
    """A page as it should be."""
    return GENERATED + (PAGES | BUILT_ONLY)[name]().rstrip() + "\n"


def stale() -> list[str]:
    """Pages that are kept in the repository and do not say what the program says."""
    kept = {name: FOLDER / f"{name}.md" for name in PAGES}
    return [name for name, path in kept.items() if not path.exists() or path.read_text("utf-8") != current(name)]


def main() -> None:
    """Write the pages, or with --check say which are not current."""
    if "--check" in sys.argv[1:]:
        sys.exit(f"not current: {', '.join(stale())}; run `make reference`" if stale() else 0)
    FOLDER.mkdir(exist_ok=True)
    for name in PAGES | BUILT_ONLY:
        (FOLDER / f"{name}.md").write_text(current(name), encoding="utf-8")


if __name__ == "__main__":
    main()

"""What the documents show is run: programs print what stands below them, commands are taken, consoles are true.

`docs/idea.md` and the programs of `docs/model-files.md` have tests of their own.
"""

from __future__ import annotations

import io
import json
import re
import shlex
import tomllib
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from fenced import PAGES, ROOT, Command, blocks, commands
from gguf_files import tiny_llama
from kvik.cli.app import app
from kvik.engine.llm import LLM
from server_process import Server

ADDRESS = "http://127.0.0.1:8000"
OWN_TESTS = {"idea.md", "model-files.md"}
PROGRAMS = [
    page for page in PAGES if page.name not in OWN_TESTS and any(block.language == "python" for block in blocks(page))
]
COMMANDS = [command for page in PAGES for command in commands(page)]
CONSOLES = [command for command in COMMANDS if command.block.language == "console"]

# Consoles whose numbers are those of one machine.
MEASURED = ("pool-heads",)

# What is run with a tiny model, in an empty folder; all else is taken apart only: it needs a server, a Hub or minutes.
RUN = ("run", "race", "explain", "models ls", "doctor", "cache ls", "cache packed")
NEEDS_MORE = ("--url", "-m", "--template-var", "--store", "--tools")


def arguments_of(text: str) -> list[str]:
    """A command line's words behind `kvik`; empty where it is another program's."""
    words = shlex.split(text, comments=True)
    return words[1:] if words and words[0].rpartition("/")[2] == "kvik" else []


def is_run(command: Command) -> bool:
    line = " ".join(arguments_of(command.text))
    return bool(line) and line.startswith(RUN) and not any(option in line.split() for option in NEEDS_MORE)


def by_time(command: Command) -> Any:
    """README's commands, and those that load no model, in every tier; others before a merge."""
    is_quick = command.block.page.parent == ROOT or arguments_of(command.text)[0] == "plan"
    return pytest.param(command, marks=() if is_quick else pytest.mark.full, id=str(command))


@pytest.fixture(scope="module")
def server(default_model_path: Path) -> Iterator[Server]:
    with Server({"smollm2": LLM(default_model_path, kv_memory="96MiB", threads=2)}) as running:
        yield running


@pytest.mark.parametrize(
    "page",
    [pytest.param(page, marks=() if page.parent == ROOT else pytest.mark.full, id=page.name) for page in PROGRAMS],
)
def test_programs_print_what_stands_below(page: Path, request: pytest.FixtureRequest) -> None:
    """The blocks of a page are one program."""
    names: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks(page):
        if block.language != "python":
            continue
        code = block.text
        if ADDRESS in code:
            code = code.replace(ADDRESS, request.getfixturevalue("server").url.removesuffix("/v1"))
        with redirect_stdout(io.StringIO()) as printed:
            exec(compile(code, str(block), "exec"), names)
        assert block.output in ("", printed.getvalue()), block


@pytest.mark.parametrize(
    "command", [by_time(one) for one in CONSOLES if not arguments_of(one.text)[0].startswith(MEASURED)]
)
def test_consoles_show_what_is_printed(
    command: Command, default_model_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVIK_MODEL", str(default_model_path))
    monkeypatch.delenv("COLUMNS")
    result = CliRunner().invoke(app, arguments_of(command.text), prog_name="kvik")
    assert result.output == command.output


@pytest.mark.parametrize("command", [by_time(one) for one in COMMANDS if is_run(one)])
def test_commands_run(
    command: Command, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path_factory.mktemp("command")
    monkeypatch.setenv("KVIK_MODEL", str(tiny_llama(folder / "tiny.gguf", context_length=4096, tied=False)))
    monkeypatch.setenv("KVIK_HOME", str(folder))
    monkeypatch.chdir(folder)
    result = CliRunner().invoke(app, arguments_of(command.text), input="Some text.", prog_name="kvik")
    assert result.exit_code == 0 or command.block.language == "console", result.output


@pytest.mark.parametrize("command", COMMANDS, ids=str)
def test_commands_are_taken(command: Command, request: pytest.FixtureRequest) -> None:
    """Programs, options, targets and extras are there."""
    words = shlex.split(command.text, comments=True)
    program = words[0].rpartition("/")[2]
    if program == "kvik":
        parse(words[1:])
    elif program == "make":
        targets = re.findall(r"^([\w-]+)(?: [\w-]+)*:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        assert {word for word in words[1:] if "=" not in word} <= set(targets)
    elif program == "pip":
        project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        extras = re.findall(r"\[(.*)\]", words[-1])
        assert words[1] == "install"
        assert set(extras) <= set(project["optional-dependencies"])
    elif program == "python":
        assert (ROOT / words[1]).is_file()
    else:
        assert program == "curl", f"nothing here knows how to try {program}"
        ask(words, command.block.output, request.getfixturevalue("server"))


def parse(arguments: list[str]) -> None:
    """Have the command take its arguments, without running it."""
    command: Any = typer.main.get_command(app)
    words = list(arguments)
    while hasattr(command, "commands") and words:
        command = command.commands[words.pop(0)]
    command.make_context("kvik", words)


def ask(words: list[str], output: str, server: Server) -> None:
    """Send what curl would, twice; the second answer has all that is shown of it."""
    (url,) = (word for word in words if word.startswith(ADDRESS))
    body = json.loads(words[words.index("-d") + 1])
    server.client.ok(url.removeprefix(ADDRESS), body)
    answer = server.client.ok(url.removeprefix(ADDRESS), body)
    shown = json.loads(f"{{{output}}}") if output else {}
    assert contains(answer, shown), answer


def contains(whole: Any, part: Any) -> bool:
    """Whether every field of `part` is in `whole`, at any depth."""
    if isinstance(part, dict):
        return isinstance(whole, dict) and all(name in whole and contains(whole[name], part[name]) for name in part)
    return bool(whole == part)

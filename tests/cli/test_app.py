"""The root command: help, version, usage errors, and how the unexpected ends."""

from __future__ import annotations

import shlex
import signal
from pathlib import Path

import pytest
from typer.testing import CliRunner

import kvik as package
from command_line import Kvik
from kvik.cli import terminal
from kvik.cli.app import app
from kvik.cli.terminal import INTERRUPTED, Interrupt
from kvik.engine.llm import LLM
from kvik.engine.output import Stats
from kvik.errors import ModelError
from kvik.hub.store import SMOLLM2
from kvik.units import amount
from subprocesses import python


@pytest.mark.parametrize("option", ["--help", "-h"])
def test_help_names_every_command(kvik: Kvik, option: str) -> None:
    result = kvik(option)
    assert result.exit_code == 0
    assert all(command in result.stdout for command in ("run", "race", "models"))
    assert result.stderr == ""


def test_help_imports_nothing_heavy() -> None:
    """Counted in modules, in place of a stopwatch."""
    result = python("-c", "import sys, kvik.cli.app\nprint(*sys.modules, sep='\\n')")
    assert result.returncode == 0, result.stderr
    heavy = {"numpy", "tokenizers", "gguf", "huggingface_hub", "jinja2", "rich.live", "kvik.engine", "kvik._native"}
    assert not heavy.intersection(result.stdout.split())


@pytest.mark.parametrize("command", ["run", "race"])
def test_help_shows_every_option_that_is_shared(kvik: Kvik, command: str) -> None:
    text = kvik(command, "--help").stdout
    for option in ("--model", "--temperature", "--stop-token-id", "--system", "--kv-dtype", "--threads", "--json"):
        assert option in text


def test_version(kvik: Kvik) -> None:
    result = kvik("--version")
    assert (result.exit_code, result.stdout, result.stderr) == (0, f"kvik {package.__version__}\n", "")


@pytest.mark.parametrize("is_here", [True, False])
def test_no_command_says_what_to_type_next(
    kvik: Kvik, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_here: bool
) -> None:
    monkeypatch.setenv("KVIK_HOME", str(tmp_path))
    if is_here:
        model = tmp_path / "models" / SMOLLM2.file_name
        model.parent.mkdir()
        model.touch()
    result = kvik()
    assert (result.exit_code, result.stderr) == (0, "")
    assert ("98.4 MB" in result.stdout) is not is_here
    typed = [line.strip().partition("  ")[0] for line in result.stdout.splitlines()[2:]]
    assert len(typed) >= 5
    assert all(kvik(*shlex.split(line)[1:], "--help").exit_code == 0 for line in typed)
    assert max(map(len, result.stdout.splitlines())) <= 100


def test_a_group_without_a_command_shows_its_help(kvik: Kvik) -> None:
    result = kvik("models")
    assert result.exit_code == 2
    assert "Usage: kvik models" in result.output


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_names_commands_and_options(shell: str) -> None:
    environment = {"_KVIK_COMPLETE": f"complete_{shell}", "COMP_WORDS": "kvik ra", "COMP_CWORD": "1"}
    environment |= {"_TYPER_COMPLETE_ARGS": "kvik ra", "_TYPER_COMPLETE_FISH_ACTION": "get-args"}
    result = python("-c", "import sys; sys.argv = ['kvik']; from kvik.__main__ import main; main()", **environment)
    assert "race" in result.stdout
    assert "serve" not in result.stdout


def test_python_m_kvik_is_the_same_command() -> None:
    result = python("-m", "kvik", "run", "--top-k", "-1", "hi")
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr == "InvalidInput: top_k is -1\nhint: give a whole number from 0 to 2,147,483,647\n"


def test_types_of_keys_and_values_are_checked(kvik: Kvik) -> None:
    for text in ("q1", "k=f16", "k=f16,v=q1", "v=f16,k=f16"):
        result = kvik("run", "hi", "--kv-dtype", text)
        assert result.exit_code == 2
        problem, hint = result.stderr.splitlines()
        assert problem == f"InvalidInput: kv_dtype is {text!r}"
        assert hint.startswith("hint: give one of f32, f16, int8, k4v4, or a pair like k=int8,v=f16")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["rn"], "No such command 'rn'"),
        (["run", "--foo"], "No such option: --foo"),
        (["run", "hi", "--top-k", "many"], "'--top-k'"),
        (["run", "hi", "--activations", "q1"], "'q1'"),
        (["run", "one", "two"], "two"),
        (["run", "--seed"], "--seed"),
    ],
)
def test_a_usage_error_is_two_lines(kvik: Kvik, arguments: list[str], said: str) -> None:
    result = kvik(*arguments)
    first, second = result.stderr.splitlines()
    assert result.exit_code == 2
    assert result.stdout == ""
    assert first.startswith("UsageError: ")
    assert said in first
    assert second.startswith("hint: `kvik ")


def test_an_error_that_nobody_expected_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(LLM, "__init__", fail)
    result = CliRunner().invoke(app, ["run", "hi"])
    assert isinstance(result.exception, ZeroDivisionError)


def test_ctrl_c_while_the_model_loads_is_told(kvik: Kvik, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(LLM, "__init__", interrupt)
    result = kvik("run", "hi")
    assert (result.exit_code, result.stdout, result.stderr) == (INTERRUPTED, "", "interrupted\n")


def test_an_error_cannot_steer_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    terminal.show_error(ModelError("a name with \x1b[2J\nin it", hint="another\x07"))
    assert capsys.readouterr().err == "ModelError: a name with \ufffd[2J in it\nhint: another\ufffd\n"


def test_an_interrupt_is_noted_and_the_handler_put_back() -> None:
    before = signal.getsignal(signal.SIGINT)
    with Interrupt() as interrupted:
        assert not interrupted()
        signal.raise_signal(signal.SIGINT)
        assert interrupted()
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize(
    ("value_s", "text"),
    [(0.0, "0 ms"), (0.0612, "61 ms"), (0.9996, "1.00 s"), (2.414, "2.41 s"), (12.34, "12.3 s"), (4321.0, "4,321.0 s")],
)
def test_seconds(value_s: float, text: str) -> None:
    assert terminal.seconds(value_s) == text


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (19_188_941, "19.2 MB"),
        (999_499, "999 kB"),
        (999_500, "1.00 MB"),
        (3 << 29, "1.61 GB"),
        (107 * 10**9, "107 GB"),
    ],
)
def test_bytes(num_bytes: int, text: str) -> None:
    assert amount(num_bytes) == text


def stats(**changes: float) -> Stats:
    values = {
        "num_prompt_tokens": 812,
        "num_cached_tokens": 768,
        "num_computed_tokens": 74,
        "num_completion_tokens": 32,
        "time_to_first_token_s": 0.0612,
        "decode_s": 1.0,
        "kv_bytes": 19_188_941,
        "weight_bytes": 1,
    }
    return Stats(**values | changes)  # type: ignore[arg-type]


def test_the_line_of_figures() -> None:
    line = terminal.stats_line(stats(), "stop", use_cache=True)
    assert line == "prompt 812 · cached 768 (95 %) · TTFT 61 ms · 31 tok/s · KV 19.2 MB"


@pytest.mark.parametrize(
    ("changes", "finish_reason", "use_cache", "part"),
    [
        ({"num_prompt_tokens": 4000, "num_cached_tokens": 3999}, "stop", True, "prompt 4,000 · cached 3,999 (99 %)"),
        ({"num_completion_tokens": 1, "decode_s": 0.0}, "stop", True, " · - tok/s · "),
        ({"decode_s": 10.0}, "stop", True, " · 3.1 tok/s · "),
        ({"num_completion_tokens": 0}, "abort", True, " · TTFT - · "),
        ({}, "length", True, " · cut at 32 tokens"),
        ({}, "abort", True, " · interrupted after 32 tokens"),
        ({"num_computed_tokens": 1234}, "stop", False, " · no cache: 1,234 tokens computed"),
    ],
)
def test_the_line_of_figures_tells_what_is_special(
    changes: dict[str, float], finish_reason: str, use_cache: bool, part: str
) -> None:
    assert part in terminal.stats_line(stats(**changes), finish_reason, use_cache=use_cache)

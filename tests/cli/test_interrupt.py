"""Ctrl-C at any moment of a command: it ends without a traceback, as SIGINT ends it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

# As the installed command, with something done as soon as a module is looked for.
AT_IMPORT = """\
import signal, sys
class Watch:
    def find_spec(self, name, path=None, target=None):
        if name == {module!r} and name not in seen:
            seen.append(name)
            {action}
seen = []
sys.meta_path.insert(0, Watch())
sys.argv = ["kvik", *{arguments!r}]
from kvik.__main__ import main
sys.exit(main())
"""


INTERRUPT, SAY = "signal.raise_signal(signal.SIGINT)", "print(flush=True)"


def at_import(module: str, *arguments: str, action: str = INTERRUPT) -> str:
    return AT_IMPORT.format(module=module, arguments=arguments, action=action)


def command(code: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize(
    "module",
    [
        "kvik.cli.app", "typer", "shutil", "kvik.errors", "kvik.config", "kvik.cli.options", "kvik.cli.run",
        "kvik.cli.race", "kvik.hub.store", "kvik.engine.llm", "numpy", "numpy.linalg", "kvik._native",
        "tokenizers", "kvik.engine.stream",
    ],
)  # fmt: skip
def test_ctrl_c_during_an_import(tiny: Path, module: str) -> None:
    process = command(at_import(module, "run", "-m", str(tiny), "hello"))
    output, errors = process.communicate(timeout=60)
    # A module that is not looked for any more leaves an answer; all those above are.
    assert (process.returncode, output) == (-signal.SIGINT, ""), errors
    assert errors in ("", "interrupted\n")


def test_ctrl_c_at_any_time(tiny: Path) -> None:
    """From the moment on that is the command's own: Python's start before it ends as Python has it."""
    code = at_import("kvik.cli.app", "run", "-m", str(tiny), "--ignore-eos", "--max-tokens", "9999", "a", action=SAY)
    for step in range(26):
        with command(code) as process:
            assert process.stdout is not None
            process.stdout.readline()
            time.sleep(step * 0.02)
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=60)
            assert process.returncode == -signal.SIGINT, (step, errors)
            assert "Traceback" not in errors, (step, errors)
            assert "Exception" not in errors, (step, errors)


def test_a_second_ctrl_c_ends_a_command_that_is_slow_to_end(tiny: Path) -> None:
    code = at_import("kvik.engine.llm", "run", "-m", str(tiny), "hello")
    slow = (
        "import time\nfrom kvik.cli import app\napp.note = lambda text: (print('ending', flush=True), time.sleep(60))\n"
    )
    with command(code.replace("from kvik.__main__", f"{slow}from kvik.__main__")) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ending\n"
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == -signal.SIGINT


def test_a_caller_who_ignores_ctrl_c_is_heeded(tiny: Path) -> None:
    code = at_import("kvik.engine.llm", "run", "-m", str(tiny), "--max-tokens", "1", "hello")
    process = command("import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)\n" + code)
    output, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (0, "")
    assert output.endswith("\n")


def test_a_ctrl_c_in_a_callback_that_cannot_pass_it_on_ends_the_command() -> None:
    code = """\
import sys, weakref
sys.argv = ["kvik", "models", "ls"]
from kvik.cli import app
class Thing: pass
def raising(_): raise KeyboardInterrupt
def list_models(*_):
    thing = Thing()
    kept = weakref.ref(thing, raising)
    del thing
    print("went on")
app.models.store.stored = list_models
from kvik.__main__ import main
main()
"""
    process = command(code)
    assert (*process.communicate(timeout=60), process.returncode) == ("", "", -signal.SIGINT)

"""What happens where the system does not take the output: a line, a hint and an exit code, in every command."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import IO, NoReturn

import pytest

from command_line import Kvik
from kvik.cli.app import app
from kvik.cli.report import save_text
from kvik.errors import InvalidInput
from kvik.files.output import whole_file

COMMANDS = {
    "answer": ("run", "-m", "MODEL", "--max-tokens", "3", "hello"),
    "answer in JSON": ("run", "-m", "MODEL", "--max-tokens", "3", "--json", "hello"),
    "race": ("race", "-m", "MODEL", "--max-tokens", "2", "--lengths", "none", "hello"),
    "plan": ("plan", "llama-3-8b"),
    "plan in JSON": ("plan", "llama-3-8b", "--json"),
    "models": ("models", "ls"),
    "models in JSON": ("models", "ls", "--json"),
    "path": ("models", "path", "MODEL"),
    "version": ("--version",),
    "help": ("--help",),
    "help of a command": ("run", "--help"),
    "help of a group": ("models", "--help"),
}
FILES = {
    "page": ("explain", "-m", "MODEL", "--max-tokens", "1", "hello", "--html", "page.html"),
    "trace": ("explain", "-m", "MODEL", "--max-tokens", "1", "hello", "--trace", "trace.json"),
    "curves of a race": ("race", "-m", "MODEL", "--max-tokens", "2", "--lengths", "none", "hello", "--plot", "a.svg"),
    "curves of a plan": ("plan", "llama-3-8b", "--plot", "plan.png"),
    "model": ("pool-heads", "MODEL", "--kv-heads", "1", "-o", "new.gguf"),
}


def no_file_grows() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))


def started(
    tiny: Path,
    arguments: tuple[str, ...],
    *,
    stdout: IO[str] | int = subprocess.PIPE,
    stderr: IO[str] | int = subprocess.PIPE,
    folder: Path | None = None,
    before: Callable[[], None] | None = None,
) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(filter(None, sys.path))
    return subprocess.run(
        [sys.executable, "-m", "kvik", *(str(tiny) if part == "MODEL" else part for part in arguments)],
        env=os.environ | {"PYTHONPATH": path},
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=stderr,
        text=True,
        cwd=folder,
        preexec_fn=before,
        timeout=300,
        check=False,
    )


@pytest.mark.parametrize("arguments", COMMANDS.values(), ids=COMMANDS.keys())
def test_a_stdout_that_may_not_grow_is_told(tiny: Path, tmp_path: Path, arguments: tuple[str, ...]) -> None:
    with (tmp_path / "out").open("w") as file:
        result = started(tiny, arguments, stdout=file, before=no_file_grows)
    assert result.returncode == 2, result.stderr
    first, second = result.stderr.splitlines()[-2:]
    assert first == "OSError: the output cannot be written: File too large"
    assert second.startswith("hint: ")
    assert "Traceback" not in result.stderr
    assert "Exception" not in result.stderr


@pytest.mark.parametrize("arguments", [COMMANDS["answer"], COMMANDS["models"], COMMANDS["help"]])
def test_a_full_disk_is_told(tiny: Path, arguments: tuple[str, ...]) -> None:
    with Path("/dev/full").open("w") as file:
        result = started(tiny, arguments, stdout=file)
    assert result.returncode == 2
    assert result.stderr.splitlines()[-2] == "OSError: the output cannot be written: No space left on device"


@pytest.mark.parametrize("arguments", COMMANDS.values(), ids=COMMANDS.keys())
def test_a_reader_that_has_left_is_no_error(tiny: Path, arguments: tuple[str, ...]) -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    result = started(tiny, arguments, stdout=write_end)
    os.close(write_end)
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    assert "Exception" not in result.stderr
    assert "Error" not in result.stderr


@pytest.mark.parametrize("code", [errno.EDQUOT, errno.EIO, errno.EFBIG, errno.ENOSPC, errno.EPERM, errno.ENXIO])
@pytest.mark.parametrize("command", ["answer", "plan in JSON", "models", "version", "help of a command"])
def test_every_error_of_stdout_is_told(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], code: int, command: str
) -> None:
    class Failing:
        encoding, errors = "utf-8", "strict"

        def isatty(self) -> bool:
            return False

        def write(self, text: str) -> NoReturn:
            raise OSError(code, os.strerror(code))

        def flush(self) -> None:
            """Nothing is kept."""

    monkeypatch.setattr(sys, "stdout", Failing())
    with pytest.raises(SystemExit) as end:
        app([str(tiny) if part == "MODEL" else part for part in COMMANDS[command]], prog_name="kvik")
    assert end.value.code == 2
    first, second = capsys.readouterr().err.splitlines()[-2:]
    assert first == f"OSError: the output cannot be written: {os.strerror(code)}"
    assert second.startswith("hint: ")


@pytest.mark.parametrize("arguments", FILES.values(), ids=FILES.keys())
def test_a_file_that_may_not_grow_is_told(tiny: Path, tmp_path: Path, arguments: tuple[str, ...]) -> None:
    result = started(tiny, arguments, folder=tmp_path, before=no_file_grows)
    assert result.returncode == 2, result.stderr
    first, second = result.stderr.splitlines()[-2:]
    assert first == f"InvalidInput: {arguments[-1]} cannot be written: File too large"
    assert second.startswith("hint: ")
    assert "Traceback" not in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_stderr_that_is_full_spoils_no_answer(tiny: Path) -> None:
    plain = started(tiny, COMMANDS["answer"])
    with Path("/dev/full").open("w") as file:
        result = started(tiny, (*COMMANDS["answer"], "--stats"), stderr=file)
        refused = started(tiny, ("run", "--top-k", "-1", "hello"), stderr=file)
    assert (result.returncode, result.stdout) == (0, plain.stdout)
    assert refused.returncode == 2


def test_a_file_of_the_caller_s_that_cannot_be_used_is_a_line(kvik: Kvik, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> NoReturn:
        raise PermissionError(errno.EACCES, "Permission denied", "/models/secret.gguf")

    monkeypatch.setattr("kvik.hub.store.stored", fail)
    result = kvik("models", "ls")
    assert result.exit_code == 2
    assert result.stderr.startswith("OSError: /models/secret.gguf: Permission denied\nhint: ")


@pytest.mark.parametrize("code", [errno.EDQUOT, errno.EIO, errno.EFBIG, errno.ENOSPC])
def test_a_file_is_whole_or_not_there(tmp_path: Path, code: int) -> None:
    path = tmp_path / "report.json"
    path.write_text("before")

    def write_half() -> None:
        with whole_file(path) as partial:
            partial.write_text("half")
            raise OSError(code, os.strerror(code))

    with pytest.raises(InvalidInput, match=f"cannot be written: {os.strerror(code)}"):
        write_half()
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_a_name_as_long_as_the_system_allows_can_be_written(tmp_path: Path) -> None:
    path = tmp_path / ("n" * 255)
    save_text(path, "text")
    assert path.read_text() == "text"


def test_a_link_keeps_leading_to_its_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("before")
    (tmp_path / "link").symlink_to("file")
    save_text(tmp_path / "link", "after")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "file").read_text() == "after"


def test_a_device_is_written_and_not_replaced() -> None:
    with whole_file(Path("/dev/null")) as path:
        assert path == Path("/dev/null")


def test_a_name_that_no_system_has_is_refused_before_any_work(kvik: Kvik) -> None:
    result = kvik("bench", "--save", "n" * 300)
    assert result.exit_code == 2
    assert result.stderr.startswith("InvalidInput: --save is nnn")
    assert "File name too long" in result.stderr

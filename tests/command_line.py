"""`kvik` as its users meet it: as a command with its result, and on a terminal with somebody who types."""

from __future__ import annotations

import codecs
import os
import pty
import select
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from typer.testing import Result

Kvik = Callable[..., Result]

CTRL_C, CTRL_D = "\x03", "\x04"
# The child takes the terminal as its own, so that Ctrl-C typed there becomes SIGINT.
CHILD = """\
import os, sys
os.login_tty({terminal})
if {stdout!r}:
    os.dup2(os.open({stdout!r}, os.O_WRONLY | os.O_CREAT), 1)
os.execv(sys.executable, [sys.executable, "-m", "kvik", *sys.argv[1:]])
"""


class Terminal:
    """Runs `kvik` with stdin, stdout and stderr on a pseudo-terminal; `stdout` is a file for stdout instead."""

    def __init__(self, *arguments: str, stdout: Path | None = None, **environment: str) -> None:
        self._fd, child = pty.openpty()
        code = CHILD.format(terminal=child, stdout=str(stdout or ""))
        path = os.pathsep.join(filter(None, sys.path))
        self._process = subprocess.Popen(
            [sys.executable, "-c", code, *arguments],
            pass_fds=[child],
            env=os.environ | {"PYTHONPATH": path, "TERM": "xterm", "INPUTRC": os.devnull} | environment,
        )
        os.close(child)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._unread = ""

    def __enter__(self) -> Terminal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._fd)

    def type(self, text: str) -> None:
        """Press keys."""
        self.type_bytes(text.encode())

    def type_bytes(self, data: bytes) -> None:
        """Send what a keyboard would."""
        os.write(self._fd, data)

    def read_until(self, text: str, *, timeout_s: float = 60.0) -> str:
        """What appears up to `text`, and it; the rest stays for the next call."""
        deadline_s = time.monotonic() + timeout_s
        while text not in self._unread:
            assert self._read(deadline_s), f"{text!r} did not appear in {self._unread[-2000:]!r}"
        before, found, self._unread = self._unread.partition(text)
        return before + found

    def finish(self, *, timeout_s: float = 60.0) -> tuple[str, int]:
        """What appears until the command ends, and its exit code."""
        deadline_s = time.monotonic() + timeout_s
        while self._read(deadline_s):
            pass
        return self._unread, self._process.wait(max(0.1, deadline_s - time.monotonic()))

    def _read(self, deadline_s: float) -> bool:
        if not select.select([self._fd], [], [], max(0.0, deadline_s - time.monotonic()))[0]:
            return False
        try:
            data = os.read(self._fd, 1 << 16)
        except OSError:  # the other side is closed
            return False
        self._unread += self._decoder.decode(data).replace("\r\n", "\n")
        return bool(data)

"""A peer's worker as the driver sees it: a process that is asked, and killed when it takes too long."""

from __future__ import annotations

import json
import os
import select
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

LOAD_S = 300.0


class NoFigure(Exception):
    """Why a cell of the table has no figure."""


class PeerProcess:
    """One worker (see peers/protocol.py), started when it is first asked and again after it died."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str] | None = None) -> None:
        self.command = list(command)
        self.environment = os.environ | dict(environment or {})
        self.description = "did not start"
        self._process: subprocess.Popen[bytes] | None = None
        self._log: IO[bytes] | None = None  # the worker's stderr
        self._unread = b""

    def ask(self, request: Mapping[str, Any], timeout_s: float) -> dict[str, Any]:
        """Its answer. Raises `NoFigure` with its own reason, or that it died or took too long."""
        if self._process is None:
            self._start()
        assert self._process is not None
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._dead() from None
        answer = self._read(timeout_s)
        if "cannot" in answer:
            raise NoFigure(f"cannot: {answer['cannot']}")
        return answer

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            with suppress(BrokenPipeError):  # of what it did not read
                self._process.communicate()
            self._process = None
            self._unread = b""
        if self._log is not None:
            self._log.close()
            self._log = None

    def _start(self) -> None:
        if not Path(self.command[0]).exists():
            raise NoFigure("is not built: bench/peers/build.sh does that")
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  # closed with the process
        self._process = subprocess.Popen(
            self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, env=self.environment
        )
        self.description = str(self._read(LOAD_S)["is"])

    def _read(self, timeout_s: float) -> dict[str, Any]:
        assert self._process is not None
        assert self._process.stdout is not None
        end_s = time.monotonic() + timeout_s
        while b"\n" not in self._unread:
            left_s = end_s - time.monotonic()
            if left_s <= 0 or not select.select([self._process.stdout], [], [], left_s)[0]:
                self.close()
                raise NoFigure(f"took more than {timeout_s:g} s")
            part = os.read(self._process.stdout.fileno(), 1 << 16)
            if not part:
                raise self._dead()
            self._unread += part
        line, _, self._unread = self._unread.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _dead(self) -> NoFigure:
        assert self._process is not None
        assert self._log is not None
        code = self._process.wait()
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").strip().splitlines()
        self.close()
        return NoFigure(f"died with {code}: {lines[-1][:200] if lines else 'it said nothing'}")

"""`kvik serve` as a process of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager

PATIENCE_S = 120.0


@contextmanager
def serving(*arguments: str) -> Iterator[str]:
    """The URL of a server on a free port, which ends with the block."""
    path = os.pathsep.join(filter(None, sys.path))
    command = [sys.executable, "-m", "kvik", "serve", *arguments, "--port", "0", "--drain", "1"]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": path}, stdout=log, stderr=log)
        try:
            yield _url(process, log.fileno())
        finally:
            process.terminate()
            process.wait(PATIENCE_S)


def _url(process: subprocess.Popen[bytes], log: int) -> str:
    deadline_s = time.monotonic() + PATIENCE_S
    while True:
        said = os.pread(log, 1 << 16, 0).decode()
        if found := re.search(r"serves at (http://\S+)/v1", said):
            return found[1]
        assert process.poll() is None, said
        assert time.monotonic() < deadline_s, said
        time.sleep(0.05)

"""A fresh Python that finds kvik and the test helpers as this one does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def environment(**changes: str) -> dict[str, str]:
    """What it needs to find them."""
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    return os.environ | {"PYTHONPATH": path} | changes


def python(*arguments: str, **changes: str) -> subprocess.CompletedProcess[str]:
    """Run it to its end; the exit status is the caller's to judge."""
    return subprocess.run(
        [sys.executable, *arguments],
        env=environment(**changes),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )

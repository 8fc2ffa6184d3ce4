"""What long work on files tells while it runs."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import rich.progress

Progress = Callable[[str, int, int], None]
"""Told what is being done ("smollm2: unpacking"), the bytes done, and the bytes in all (0: not known)."""


def silent(what: str, done_bytes: int, total_bytes: int) -> None:
    """Show no progress."""


def megabytes(num_bytes: int) -> str:
    """Bytes as people read them: `92.9 MB` (10**6 bytes each)."""
    return f"{num_bytes / 1e6:,.1f} MB"


@contextmanager
def terminal_progress() -> Iterator[Progress]:
    """Show progress on stderr: a bar on a terminal, else one line as each stage begins and one at the end."""
    if sys.stderr.isatty():
        with _bars() as report:
            yield report
        return
    begun: dict[str, float] = {}

    def write_line(what: str, done_bytes: int, total_bytes: int) -> None:
        if what not in begun:
            begun[what] = time.monotonic()
            sys.stderr.write(f"{what} ({megabytes(total_bytes)})\n" if total_bytes else f"{what}\n")

    yield write_line
    for what, start_s in list(begun.items())[:1]:
        sys.stderr.write(f"{what.partition(': ')[0]}: done in {time.monotonic() - start_s:.1f} s\n")


@contextmanager
def bytes_progress(*, wait_s: float = 0.0) -> Iterator[Progress]:
    """A bar on stderr for work that takes longer than `wait_s`; nothing where that is no terminal."""
    if not sys.stderr.isatty():
        yield silent
        return
    begin_s = time.monotonic() + wait_s
    with _bars() as report:

        def report_late(what: str, done_bytes: int, total_bytes: int) -> None:
            if time.monotonic() >= begin_s:
                report(what, done_bytes, total_bytes)

        yield report_late


@contextmanager
def counted_progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar on stderr that counts to `total` as it is told of so many more; nothing where that is no terminal."""
    if total < 2 or not sys.stderr.isatty():
        yield lambda count: None
        return
    from rich import progress as parts
    from rich.console import Console

    columns = (parts.TextColumn("{task.description}"), parts.BarColumn(), parts.MofNCompleteColumn())
    with parts.Progress(*columns, parts.TimeElapsedColumn(), console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda count: bar.advance(task, count)


@contextmanager
def _bars() -> Iterator[Progress]:
    """Bars by rich, which is imported only once there is something to show."""
    bars: rich.progress.Progress | None = None
    tasks: dict[str, rich.progress.TaskID] = {}

    def finish() -> None:
        for task in bars.tasks if bars is not None else ():
            task.completed, task.visible = task.total or 0, task.total is not None

    def report(what: str, done_bytes: int, total_bytes: int) -> None:
        nonlocal bars
        if bars is None:
            from rich import progress as parts
            from rich.console import Console
            from rich.table import Column

            text = parts.TextColumn("{task.description}", markup=False, table_column=Column(max_width=40, no_wrap=True))
            columns = (text, parts.BarColumn(12), parts.DownloadColumn(), parts.TransferSpeedColumn())
            bars = parts.Progress(*columns, console=Console(stderr=True))
            bars.start()
        if what not in tasks:
            finish()
            tasks[what] = bars.add_task(what, total=total_bytes or None)
        bars.update(tasks[what], completed=done_bytes, total=total_bytes or None)

    try:
        yield report
        finish()
    finally:
        if bars is not None:
            bars.stop()

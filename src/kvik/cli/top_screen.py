"""`kvik top` on a terminal: a screen of its own that is drawn over until somebody presses q, or once as JSON."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import signal
import sys
import termios
import time
import tty
from collections.abc import Callable
from typing import Any

import msgspec
import typer
from rich.console import Console
from rich.control import Control
from rich.screen import Screen
from rich.text import Text

from kvik.cli.report import write_report
from kvik.cli.terminal import INTERRUPTED, Interrupt, is_terminal
from kvik.cli.top_view import Place, frame
from kvik.client.completions import until_stopped
from kvik.client.live import LiveModel
from kvik.client.watching import Watching
from kvik.errors import InvalidInput

KIND, VERSION = "kvik top", 1
"""Of the JSON."""

FRAME_S = 0.1
"""Between two frames, at least."""

CLOCK_S = 1.0
"""Between two frames at most: the clock goes on."""

ENDINGS = (signal.SIGTERM, signal.SIGHUP)


def print_once(watching: Watching, name: str | None) -> None:
    """Print the state as one JSON object. Raises `RemoteError`."""
    told: dict[str, Any] = {}

    async def tell() -> None:
        told.update(await told_once(watching, name))

    with Interrupt() as interrupted:
        if not asyncio.run(until_stopped(tell(), interrupted)):
            raise typer.Exit(INTERRUPTED)
    write_report(told)


def watch(watching: Watching, name: str | None, *, has_key: bool) -> None:
    """Draw until q or Ctrl-C is pressed. Raises `RemoteError`."""
    with Interrupt() as interrupted:
        asyncio.run(until_stopped(show(watching, name, has_key=has_key), interrupted))


def chosen_model(watching: Watching, name: str | None) -> LiveModel:
    """The one of that name, or the first. Raises `InvalidInput`."""
    models = watching.state.models
    if name is None and models:
        return next(iter(models.values()))
    if name not in models:
        hint = f"choose one of {', '.join(map(repr, models))}"[:500] if models else "load one in the server"
        what = "no model" if name is None else f"no model {name!r:.80}"
        raise InvalidInput(f"{watching.address} has {what}", hint=hint)
    return models[name]


async def told_once(watching: Watching, name: str | None) -> dict[str, Any]:
    """The state as `--json` prints it."""
    # A server that nobody watched so far tells blocks first, and the requests that run with the next event.
    await watching.read(2)
    return report(watching, chosen_model(watching, name))


def report(watching: Watching, model: LiveModel) -> dict[str, Any]:
    """All that is told of a model."""
    described = msgspec.to_builtins(model.description)
    for at, group in enumerate(described["groups"]):
        group["blocks"] = dataclasses.asdict(model.block_counts(at))
    return {
        "kind": KIND,
        "version": VERSION,
        "server": {"url": str(watching.address), "models": list(watching.state.models)},
        "now_s": watching.state.now_s,
        "sees_text": watching.state.sees_text,
        "model": described,
        "counters": model.counters,
        "hit_rate": model.hit_rate,
        "misses": model.misses,
        "requests": [
            msgspec.to_builtins(row)
            | {
                "num_blocks": row.num_blocks,
                "time_to_first_token_s": row.time_to_first_token_s,
                "time_per_token_s": row.time_per_token_s,
            }
            for row in model.ordered_requests
        ],
    }


async def show(watching: Watching, name: str | None, *, has_key: bool) -> None:
    """Draw until q is pressed or a signal ends it. Raises what the server refuses."""
    news, is_over = asyncio.Event(), False

    def end() -> None:
        nonlocal is_over
        is_over = True
        news.set()

    async def follow() -> None:
        async for _ in watching.follow():
            news.set()

    following = asyncio.ensure_future(follow())
    following.add_done_callback(lambda _: news.set())
    display = Display(end, resized=news.set)
    try:
        await news.wait()
        while not is_over:
            if following.done():
                following.result()
            display.draw(_lines(watching, chosen_model(watching, name), display.console, has_key=has_key))
            news.clear()
            await asyncio.sleep(FRAME_S)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(news.wait(), CLOCK_S)
    finally:
        display.close()
        following.cancel()
        await asyncio.wait({following})


def _lines(watching: Watching, model: LiveModel, console: Console, *, has_key: bool) -> list[Text]:
    width, height = console.size
    place = Place(
        width,
        height,
        has_colours=console.color_system is not None and not console.no_color and console.encoding == "utf-8",
        url=str(watching.address),
        clock=time.strftime("%H:%M:%S"),
        lost=None if watching.lost is None else watching.lost.message,
        has_key=has_key,
    )
    return frame(watching.state, model, place)


class Display:
    """The terminal's other screen, from the first frame on, and its keys; whatever ends it, it is put back."""

    def __init__(self, end: Callable[[], None], *, resized: Callable[[], None]) -> None:
        self.console = Console()
        self._end = end
        self._resized = resized
        self._is_open = False
        self._keys_fd = sys.stdin.fileno() if is_terminal(sys.stdin) else None
        self._attributes: list[Any] = []  # of the terminal, as they were

    def draw(self, lines: list[Text]) -> None:
        """Show a frame in place of the last."""
        if not self._is_open:
            self._open()
        with self.console:
            self.console.control(Control.home())
            self.console.print(Screen(Text("\n").join(lines)), end="")

    def close(self) -> None:
        """Put the terminal back as it was."""
        if not self._is_open:
            return
        self._is_open = False
        loop = asyncio.get_running_loop()
        if self._keys_fd is not None:
            loop.remove_reader(self._keys_fd)
            termios.tcsetattr(self._keys_fd, termios.TCSAFLUSH, self._attributes)
        for each in (*ENDINGS, signal.SIGTSTP, signal.SIGWINCH):
            loop.remove_signal_handler(each)
        self.console.show_cursor(True)
        self.console.set_alt_screen(False)

    def _open(self) -> None:
        self._is_open = True
        loop = asyncio.get_running_loop()
        if self._keys_fd is not None:
            self._attributes = termios.tcgetattr(self._keys_fd)
            tty.setcbreak(self._keys_fd)
            loop.add_reader(self._keys_fd, self._read_keys, self._keys_fd)
        for each in ENDINGS:
            loop.add_signal_handler(each, self._end)
        loop.add_signal_handler(signal.SIGTSTP, self._suspend)
        loop.add_signal_handler(signal.SIGWINCH, self._resized)
        self.console.set_alt_screen(True)
        self.console.show_cursor(False)

    def _read_keys(self, fd: int) -> None:
        try:
            keys = os.read(fd, 1024)
        except OSError:  # the terminal is gone
            keys = b""
        if not keys or b"q" in keys.lower():
            self._end()

    def _suspend(self) -> None:
        """Ctrl-Z: the next frame opens the screen again."""
        self.close()
        os.kill(os.getpid(), signal.SIGSTOP)

"""How a race looks while it runs: two panels side by side on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from typing import Protocol

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from kvik.cli.terminal import STEERING, is_terminal, note, rate
from kvik.measure.lanes import RaceLane

FRAME_S = 1 / 8
LINE_S = 5.0
MAX_TEXT_LINES = 14
OTHER_LINES = 7  # of a panel, and one below it


class RaceView(Protocol):
    """Looks at the lanes after each step, on nobody's clock."""

    def show(self) -> None:
        """Draw again if it is time."""

    def close(self) -> None:
        """Put the terminal back as it was."""


def open_view(lanes: tuple[RaceLane, RaceLane], max_tokens: int) -> RaceView:
    """The view that stderr can show."""
    return PanelView(lanes, max_tokens) if is_terminal(sys.stderr) else LineView(lanes, max_tokens)


class LineView:
    """Plain lines, for a log."""

    def __init__(self, lanes: tuple[RaceLane, RaceLane], max_tokens: int) -> None:
        self._lanes = lanes
        self._max_tokens = max_tokens
        self._shown_s = time.monotonic()

    def show(self) -> None:
        """Write a line every few seconds."""
        if time.monotonic() - self._shown_s >= LINE_S:
            self._shown_s = time.monotonic()
            note(
                " · ".join(
                    f"{lane.name}: {lane.num_tokens:,}/{self._max_tokens:,} tokens, {lane.elapsed_s:,.1f} s"
                    for lane in self._lanes
                )
            )

    def close(self) -> None:
        """Nothing to put back."""


class PanelView:
    """Two panels that are drawn over until the race ends, and then give way to the result."""

    def __init__(self, lanes: tuple[RaceLane, RaceLane], max_tokens: int) -> None:
        self._lanes = lanes
        self._max_tokens = max_tokens
        self._console = Console(stderr=True)
        # Drawn between steps, never by a thread of its own: that would run on a lane's clock.
        self._live = Live(
            console=self._console, auto_refresh=False, transient=True, redirect_stdout=False, redirect_stderr=False
        )
        self._live.start()
        self._shown_s = 0.0

    def show(self) -> None:
        """Draw a frame if the last one is old enough."""
        if time.monotonic() - self._shown_s >= FRAME_S:
            width = self._panel_width()
            panels = Table.grid()
            panels.add_row(*(self._panel(lane, width) for lane in self._lanes))
            self._live.update(panels, refresh=True)
            self._shown_s = time.monotonic()

    def close(self) -> None:
        """Take the panels away."""
        self._live.stop()

    def _panel_width(self) -> int:
        # The terminal writes ^C behind the last panel: without room there, on a line that nobody would take away.
        return max(8, (self._console.width - len("^C") - 1) // len(self._lanes))

    def _panel(self, lane: RaceLane, width: int) -> Panel:
        num_lines = max(1, min(MAX_TEXT_LINES, self._console.height - OTHER_LINES))
        text = Text(lane.sequence.text.text.translate(STEERING))
        lines = text.wrap(self._console, width - 4)[-num_lines:]
        figures = (
            f"{lane.num_tokens:,}/{self._max_tokens:,} tokens · {lane.elapsed_s:,.1f} s"
            f" · {rate(lane.tokens_per_s)} tok/s\n{lane.sequence.costs.num_computed_tokens:,} tokens computed"
        )
        return Panel(
            Group(
                Text("\n").join([*lines, *[Text()] * (num_lines - len(lines))]),
                Text(figures, no_wrap=True, overflow="ellipsis"),
                ProgressBar(total=self._max_tokens, completed=lane.num_tokens),
            ),
            title=lane.name,
            width=width,
            border_style="green" if lane.sequence.request.use_cache else "yellow",
        )

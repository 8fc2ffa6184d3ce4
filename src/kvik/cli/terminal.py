"""How things are shown: text and grey lines, errors, figures with units, and Ctrl-C without torn steps."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import FrameType
from typing import TYPE_CHECKING, Any, TextIO

from kvik.errors import KvikError
from kvik.units import amount

if TYPE_CHECKING:
    from kvik.engine.output import Completion, Piece, Stats

INTERRUPTED = 130
"""The exit code after Ctrl-C, as shells have it for whom SIGINT ended."""

# A model may write any character; those that steer a terminal are shown as U+FFFD there.
STEERING = {code: "\ufffd" for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\t\n"}


class OutputError(Exception):
    """stdout did not take what was written; `error` says why."""

    def __init__(self, error: OSError) -> None:
        super().__init__(str(error))
        self.error = error


class Stdout:
    """A stdout that raises `OutputError` and never an OSError, so that nobody takes it for one of other files."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write it."""
        try:
            return self._stream.write(text)
        except OSError as error:
            raise OutputError(error) from None

    def flush(self) -> None:
        """Write what waits."""
        try:
            self._stream.flush()
        except OSError as error:
            raise OutputError(error) from None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def is_terminal(stream: TextIO | None) -> bool:
    """Whether somebody sits there; a closed stream is None."""
    return stream is not None and stream.isatty()


def write(text: str) -> None:
    """Show a part of the result at once."""
    sys.stdout.write(text.translate(STEERING) if is_terminal(sys.stdout) else text)
    sys.stdout.flush()


def write_answer(pieces: Iterable[Piece], completion: Callable[[], Completion | None]) -> Completion:
    """Show an answer as it comes, end its line, and return the completion that is there afterwards."""
    shown = ""
    for piece in pieces:
        shown += piece.text
        write(piece.text)
    whole = completion()
    assert whole is not None
    write(whole.text.removeprefix(shown))  # an interrupted answer may have text that waited for a stop string
    if not whole.text.endswith("\n"):
        write("\n")
    return whole


def note(text: str) -> None:
    """Show one line beside the result, grey where colours are welcome; nobody need be able to hear."""
    colours = text and is_terminal(sys.stderr) and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    say(f"\x1b[90m{text}\x1b[0m\n" if colours else f"{text}\n")


def tell_warnings() -> None:
    """From now on show what kvik warns of in its log, such as a store that cannot be written, as notes."""
    import logging

    class Notes(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            note(f"warning: {record.getMessage()}")

    notes = Notes()
    notes.addFilter(lambda record: record.levelno == logging.WARNING)  # errors end the command, and are shown there
    logging.getLogger("kvik").handlers = [notes]


def show_error(error: KvikError, *, hint: str | None = None) -> None:
    """Show what went wrong, and what to do about it, in a line each."""
    show_problem(type(error).__name__, error.message, error.hint if hint is None else hint)


def show_problem(kind: str, message: str, hint: str) -> None:
    """Show a problem in a line and its hint in another."""
    lines = (f"{kind}: {message}", f"hint: {hint}")
    say("".join(line.replace("\n", " ").translate(STEERING) + "\n" for line in lines))


def say(text: str) -> None:
    """Write to stderr, where that is possible."""
    with contextlib.suppress(OSError):  # a stderr that is full or gone is no reason to lose the result
        sys.stderr.write(text)
        sys.stderr.flush()


def seconds(value_s: float) -> str:
    """A time as people read it: `61 ms`, `2.41 s`, `12.3 s`."""
    if value_s < 0.9995:
        return f"{value_s * 1000:.0f} ms"
    return f"{value_s:.2f} s" if value_s < 9.995 else f"{value_s:,.1f} s"


def columns(rows: Sequence[Sequence[str]], *, left: int = 1) -> list[str]:
    """Rows as lines of one table, the first `left` columns aligned left and the others right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = zip(row, widths, strict=True)
        aligned = [cell.ljust(width) if at < left else cell.rjust(width) for at, (cell, width) in enumerate(cells)]
        lines.append("  ".join(aligned).rstrip())
    return lines


def rate(tokens_per_s: float) -> str:
    """Tokens per second: `31`, `2.4`, or a dash where there is nothing to measure."""
    if not tokens_per_s:
        return "-"
    return f"{tokens_per_s:,.0f}" if tokens_per_s >= 9.95 else f"{tokens_per_s:.1f}"


def stats_line(stats: Stats, finish_reason: str, *, use_cache: bool) -> str:
    """What an answer cost, in one line; at its end what was out of the ordinary."""
    parts = [
        f"prompt {stats.num_prompt_tokens:,}",
        cached_part(stats.num_cached_tokens, stats.num_prompt_tokens),
        *([stored_part(stats)] if stats.num_stored_tokens else []),
        f"TTFT {seconds(stats.time_to_first_token_s) if stats.num_completion_tokens else '-'}",
        f"{rate(stats.tokens_per_s)} tok/s",
        f"KV {amount(stats.kv_bytes)}",
    ]
    if stats.num_drafted_tokens:
        parts.append(f"guessed right {stats.num_accepted_tokens:,} of {stats.num_drafted_tokens:,}")
    if not use_cache:
        parts.append(f"no cache: {stats.num_computed_tokens:,} tokens computed")
    if finish_reason == "length":
        parts.append(f"cut at {stats.num_completion_tokens:,} tokens")
    elif finish_reason == "abort":
        parts.append(f"interrupted after {stats.num_completion_tokens:,} tokens")
    return " · ".join(parts)


def cached_part(num_cached_tokens: int, num_prompt_tokens: int) -> str:
    """How much of a prompt was cached; 100 % is all of it."""
    percent = round(100 * num_cached_tokens / num_prompt_tokens)
    if num_cached_tokens < num_prompt_tokens:
        percent = min(percent, 99)
    return f"cached {num_cached_tokens:,} ({percent} %)"


def stored_part(stats: Stats) -> str:
    """What was read from the store, how long that took, and what computing it would have taken, where it is known."""
    instead = "" if stats.saved_s is None else f" instead of {seconds(stats.saved_s)}"
    return f"stored {stats.num_stored_tokens:,} tokens in {seconds(stats.load_s)}{instead}"


class Interrupt:
    """While it is open, Ctrl-C is noted instead of raised: whoever works looks between steps by calling it."""

    def __init__(self) -> None:
        self._noted = False
        self._previous: Any = None

    def __enter__(self) -> Interrupt:
        self._previous = signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(self, *exception: object) -> None:
        signal.signal(signal.SIGINT, self._previous)

    def __call__(self) -> bool:
        """Whether Ctrl-C was pressed."""
        return self._noted

    def _note(self, signal_number: int, frame: FrameType | None) -> None:
        self._noted = True


@contextlib.contextmanager
def prompt_interrupt() -> Iterator[None]:
    """While it is open, Ctrl-C raises KeyboardInterrupt in the main thread even when that waits in input().

    input() looks for signals only when one ends its wait, so that one which comes just before, or which the system
    gives to another thread, would lie there until the next key. A watcher sends it again until it was seen.
    """
    done = threading.Event()

    def interrupt(signal_number: int, frame: FrameType | None) -> None:
        if not done.is_set():  # else it is the same key, sent again
            done.set()
            raise KeyboardInterrupt

    def watch() -> None:
        while signals := os.read(read_end, 64):
            if signal.SIGINT in signals:
                while not done.wait(0.05):
                    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    watcher = threading.Thread(target=watch, name="kvik-prompt", daemon=True)
    watcher.start()
    previous_fd = signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
    previous_handler = signal.getsignal(signal.SIGINT)
    try:
        signal.signal(signal.SIGINT, interrupt)
        yield
    finally:
        done.set()
        signal.set_wakeup_fd(previous_fd)
        os.close(write_end)  # ends the watcher's wait
        watcher.join()
        os.close(read_end)
        signal.signal(signal.SIGINT, previous_handler)

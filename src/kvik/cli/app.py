"""The root of the command line: its commands, and how errors end it."""

from __future__ import annotations

import contextlib
import errno
import gc
import io
import os
import signal
import sys
from types import FrameType
from typing import Annotated, Any, TextIO, cast

import typer
from typer.core import TyperGroup

from kvik import __version__
from kvik.cli import cache, models
from kvik.cli.bench import bench
from kvik.cli.doctor import doctor
from kvik.cli.explain import explain
from kvik.cli.options import FolderCommand
from kvik.cli.packed import packed
from kvik.cli.plan import plan
from kvik.cli.pool_heads import pool_heads
from kvik.cli.race import race
from kvik.cli.run import run
from kvik.cli.serve import serve
from kvik.cli.start import start_lines
from kvik.cli.terminal import INTERRUPTED, OutputError, Stdout, note, show_error, show_problem, write
from kvik.cli.top import top
from kvik.errors import KvikError


class Root(TyperGroup):
    """Ends every expected failure with a line, a hint and an exit code; an unexpected one keeps its traceback."""

    def main(self, *args: Any, **extra: Any) -> Any:
        """Run the command line and exit: 0 done, 1 not as promised, 2 bad input, 130 interrupted."""
        stdout, sys.stdout = sys.stdout, cast(TextIO, Stdout(sys.stdout))
        try:
            code = super().main(*args, **extra | {"standalone_mode": False})
            sys.stdout.flush()
        except typer.TyperException as error:
            if type(error).__name__ != "NoArgsIsHelpError":  # whose help is already on the screen
                context = getattr(error, "ctx", None)
                command = context.command_path if context is not None else "kvik"
                message = " ".join(error.format_message().split())
                show_problem("UsageError", message, f"`{command} --help` shows what it takes")
            code = 2
        except OutputError as error:
            silence(stdout)
            code = 1
            if error.error.errno != errno.EPIPE:  # else the reader has left
                show_problem(
                    "OSError",
                    f"the output cannot be written: {error.error.strerror}",
                    "free some space on its disk, or let it go to another file, a pipe or a terminal",
                )
                code = 2
        finally:
            sys.stdout = stdout
        sys.exit(code)

    def invoke(self, ctx: Any) -> Any:
        """Run the command, turning what it raises into an exit code."""
        try:
            return super().invoke(ctx)
        except KvikError as error:
            show_error(error)
            raise typer.Exit(2) from None
        except KeyboardInterrupt:
            note("interrupted")
            raise typer.Exit(INTERRUPTED) from None
        except MemoryError:
            show_problem("NotEnoughMemory", "the system gave no more memory", "set a smaller context: `--context 1024`")
            raise typer.Exit(2) from None
        except OSError as error:
            if error.filename is None:
                raise
            show_problem("OSError", f"{error.filename}: {error.strerror}", "see that this file can be used")
            raise typer.Exit(2) from None


app = typer.Typer(
    cls=Root,
    invoke_without_command=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def silence(stdout: TextIO) -> None:
    """Give up on stdout, so that Python's own last flush does not fail again."""
    with contextlib.suppress(OSError, ValueError, AttributeError):  # it may be none of the system's
        os.dup2(os.open(os.devnull, os.O_WRONLY), stdout.fileno())


def show_version(wanted: bool) -> None:
    """Print the version and leave."""
    if wanted:
        write(f"kvik {__version__}\n")
        raise typer.Exit


@app.callback()
def root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """An LLM inference engine whose heart is the KV cache: exact, fast, and it shows its work."""
    if context.invoked_subcommand is None:
        write("\n".join(start_lines()))


app.command(cls=FolderCommand)(run)
app.command(cls=FolderCommand)(race)
app.command(cls=FolderCommand)(bench)
app.command(cls=FolderCommand)(serve)
app.command()(top)
app.command()(plan)
app.command()(doctor)
app.command(cls=FolderCommand)(explain)
app.command("pool-heads")(pool_heads)
cache.app.command("packed", cls=FolderCommand)(packed)
app.add_typer(cache.app, name="cache")
app.add_typer(models.app, name="models")


def main() -> None:
    """Run `kvik`, of which Ctrl-C made an end so far (`kvik.__main__`)."""
    # For a quick start: modules and a vocabulary are 10^5 objects that stay, among which there is no garbage to look
    # for; and NumPy's own threads would have nothing to do.
    gc.set_threshold(100_000)
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    if sys.stderr is None:
        sys.stderr = io.StringIO()  # closed by the caller: nobody wants to hear
    if sys.stdout is None:
        show_problem("OSError", "stdout is closed", "let it go to a file, a pipe or a terminal")
        sys.exit(2)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that lacks a character is no reason to fail
    sys.unraisablehook = end_where_none_can_be_raised
    code: object = INTERRUPTED
    try:
        if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
            signal.signal(signal.SIGINT, raise_once)
        app()
    except SystemExit as end:
        code = end.code
    except KeyboardInterrupt:
        pass
    if code == INTERRUPTED:
        end_by_interrupt()
    if signal.getsignal(signal.SIGINT) is raise_once:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # what is left is Python's own end
    sys.exit(code)  # type: ignore[arg-type]


def raise_once(signal_number: int, frame: FrameType | None) -> None:
    """Let the command end in order; who presses Ctrl-C again does not wait for that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    raise KeyboardInterrupt


def end_where_none_can_be_raised(unraisable: sys.UnraisableHookArgs) -> None:
    """End where Ctrl-C came in a callback of Python's own, as those of imports, which cannot pass it on."""
    if unraisable.exc_type is KeyboardInterrupt:
        end_by_interrupt()
    sys.__unraisablehook__(unraisable)


def end_by_interrupt() -> None:
    """End by SIGINT itself: 130 in a shell, whose loop over many commands then ends as well."""
    sys.stdout.flush()
    sys.stderr.flush()
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.raise_signal(signal.SIGINT)

"""The root of the command line: its commands, and how errors end it."""

from __future__ import annotations

import errno
import gc
import io
import os
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from kvik import __version__
from kvik.cli import models
from kvik.cli.bench import bench
from kvik.cli.convert import convert
from kvik.cli.explain import explain
from kvik.cli.plan import plan
from kvik.cli.race import race
from kvik.cli.run import run
from kvik.cli.terminal import note, show_error, show_problem
from kvik.errors import KvikError


class Root(TyperGroup):
    """Ends every expected failure with a line, a hint and an exit code; an unexpected one keeps its traceback."""

    def main(self, *args: Any, **extra: Any) -> Any:
        """Run the command line and exit: 0 done, 1 interrupted or not as promised, 2 bad input."""
        try:
            code = super().main(*args, **extra | {"standalone_mode": False})
        except typer.TyperException as error:
            if type(error).__name__ != "NoArgsIsHelpError":  # whose help is already on the screen
                context = getattr(error, "ctx", None)
                command = context.command_path if context is not None else "kvik"
                message = " ".join(error.format_message().split())
                show_problem("UsageError", message, f"`{command} --help` shows what it takes")
            code = 2
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
            raise typer.Exit(1) from None
        except MemoryError:
            show_problem("NotEnoughMemory", "the system gave no more memory", "set a smaller context: `--context 1024`")
            raise typer.Exit(2) from None
        except BrokenPipeError:  # the reader has left
            silence_stdout()
            raise typer.Exit(1) from None
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            silence_stdout()
            show_problem("OSError", f"the output cannot be written: {error.strerror}", "free some space on its disk")
            raise typer.Exit(2) from None


app = typer.Typer(
    cls=Root,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def silence_stdout() -> None:
    """Give up on stdout, so that Python's own last flush does not fail again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def show_version(wanted: bool) -> None:
    """Print the version and leave."""
    if wanted:
        typer.echo(f"kvik {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """An LLM inference engine whose heart is the KV cache: exact, fast, and it shows its work."""


app.command()(run)
app.command()(race)
app.command()(bench)
app.command()(plan)
app.command()(explain)
app.command()(convert)
app.add_typer(models.app, name="models")


def main() -> None:
    """Run `kvik`."""
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
    app()
